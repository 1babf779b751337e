"""Which document goes into which row, and batches of such rows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import WINDOWS, make_model, random_ids

from hf_reformer import ReformerForCausalLM, ReformerForSequenceClassification, ReformerForTokenClassification
from hf_reformer.modeling.packed_rows import alignment_of
from hf_reformer.training import DataCollatorForPacking
from hf_reformer.training.packing import TextPacker, best_fit


def taken(length, alignment):
    return (length + alignment - 1) // alignment * alignment


@given(st.lists(st.integers(1, 64), min_size=1, max_size=40), st.sampled_from([1, 8]))
def test_every_document_is_in_one_row_that_has_room(lengths, alignment):
    rows = best_fit(lengths, 64, alignment)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    for row in rows:
        *others, last = row
        assert sum(taken(lengths[number], alignment) for number in others) + lengths[last] <= 64
    # No two rows are so empty that one would do.
    used = sorted(sum(taken(lengths[number], alignment) for number in row) for row in rows)
    assert len(used) < 2 or used[0] + used[1] > 64


def test_best_fit_leaves_the_least_room():
    assert best_fit([30, 50, 14, 34, 20], 64) == [[1, 2], [3, 0], [4]]
    with pytest.raises(ValueError, match="Document 1 has 65 tokens, a row takes 64"):
        best_fit([3, 65], 64)


def test_batches():
    examples = [{"input_ids": [3, 4, 5]}, {"input_ids": torch.tensor([6, 7]), "labels": [-100, 9]}, {"input_ids": [8]}]
    batch = DataCollatorForPacking(context_length=5, pad_token_id=1)(examples)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[3, 4, 5, 6, 7], [8, 1, 1, 1, 1]],
        "labels": [[-100, 4, 5, -100, 9], [-100] * 5],
        "position_ids": [[0, 1, 2, 0, 1], [0] * 5],
        "attention_mask": [[1, 1, 1, 2, 2], [1, 0, 0, 0, 0]],
    }
    assert DataCollatorForPacking(8, pad_to_context=True)(examples)["input_ids"].shape == (1, 8)
    masked = DataCollatorForPacking(8)([{"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0]}])
    assert masked["input_ids"].tolist() == [[5, 6]]
    for wrong, message in (
        ([], "There are no examples"),
        ([{"input_ids": [3, 4], "labels": [3]}], "Example 0 has 2 tokens, but 1 labels"),
    ):
        with pytest.raises(ValueError, match=message):
            DataCollatorForPacking(8)(wrong)
    with pytest.raises(ValueError, match="alignment is 0"):
        best_fit([3], 8, 0)
    with pytest.raises(ValueError, match="Example 1 has no tokens"):
        DataCollatorForPacking(8)([{"input_ids": [1]}, {"input_ids": []}])


def test_a_packed_batch_has_the_loss_of_its_documents():
    model = make_model(ReformerForCausalLM, attn_layers=["local", "lsh", "full"], **WINDOWS).double()
    rows = [random_ids(1, length) for length in (40, 3, 70, 1, 12, 25)]
    collate = DataCollatorForPacking(128, alignment_of(model.config))
    batch = collate([{"input_ids": row[0].tolist()} for row in rows])
    assert batch["input_ids"].shape[0] == 2
    with torch.no_grad():
        loss = model(**batch, num_items_in_batch=1).loss
        alone = sum(model(row, labels=row, num_items_in_batch=1).loss for row in rows if row.shape[1] > 1)
    # Transformers computes it in float32.
    assert loss.item() == pytest.approx(alone.item(), rel=1e-6)


@pytest.mark.parametrize("pooling", ["token", "mean"])
def test_labels_of_texts_stand_in_the_order_of_the_vectors(pooling):
    model = make_model(ReformerForSequenceClassification, **WINDOWS, classifier_pooling=pooling, num_labels=3)
    texts = [random_ids(1, length)[0] for length in (5, 30, 12, 9, 31)]
    examples = [{"input_ids": text.tolist(), "labels": place % 3} for place, text in enumerate(texts)]
    batch = TextPacker(40, alignment_of(model.config))(examples)
    assert len(batch["input_ids"]) < len(texts) and sorted(batch["labels"].tolist()) == [0, 0, 1, 1, 2]
    with torch.no_grad():
        together = model(**batch)
        alone = [model(text[None], labels=torch.tensor([place % 3])) for place, text in enumerate(texts)]
    torch.testing.assert_close(together.loss, torch.stack([each.loss for each in alone]).mean())


def test_labels_of_tokens_stand_where_their_tokens_do():
    model = make_model(ReformerForTokenClassification, **WINDOWS, num_labels=3)
    texts = [random_ids(1, length)[0] for length in (5, 30, 12, 9, 31)]
    examples = [{"input_ids": text.tolist(), "labels": (text % 3).tolist()} for text in texts]
    batch = TextPacker(40, alignment_of(model.config))(examples)
    assert len(batch["input_ids"]) < len(texts)
    real = batch["attention_mask"] > 0
    assert torch.equal(batch["labels"][real], batch["input_ids"][real] % 3) and (batch["labels"][~real] == -100).all()
    with torch.no_grad():
        together = model(**batch)
        alone = [float(model(text[None], labels=text[None] % 3).loss) * len(text) for text in texts]
    assert float(together.loss) == pytest.approx(sum(alone) / sum(map(len, texts)), rel=1e-5)
