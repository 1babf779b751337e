"""Models on packed rows: each document computes what it computes alone, and none changes another."""

import pytest
import torch
from allocations import Allocations
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import (
    AVERAGED,
    DROPOUT,
    POSITIONS,
    STACKS,
    VOCAB,
    WINDOWS,
    assert_equal_tensors,
    gradients,
    make_model,
    random_ids,
)
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from hf_reformer import (
    ReformerForCausalLM,
    ReformerForMaskedLM,
    ReformerForQuestionAnswering,
    ReformerForSequenceClassification,
    ReformerForTokenClassification,
)


LENGTHS = (37, 5, 1, 60, 16)
LONG = {"axial_pos_shape": [32, 64], "max_position_embeddings": 2048}
CHUNKS = {"circular_look_around": False, "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8}
OPTIONS = {
    "windows": WINDOWS,
    "windows, successors": WINDOWS | {"lsh_value_shift": 1},
    "windows, dense beginnings": WINDOWS | {"full_attention_threshold": 24},
    "windows, 4 rounds": WINDOWS | {"num_hashes": 4},
    "chunks": CHUNKS,
    "chunks of the bucket": CHUNKS | {"attend_across_buckets": False, "num_hashes": 4},
    "chunks, dense documents": CHUNKS | {"full_attention_threshold": 40},
}
MODELS = {"causal": ReformerForCausalLM, "masked": ReformerForMaskedLM}


def documents(lengths=LENGTHS):
    return [random_ids(1, length) for length in lengths]


def positions_of(rows):
    return torch.cat([torch.arange(row.shape[1]) for row in rows])[None]


def pack(rows):
    """The arguments of a model for one row of all documents."""
    return {"input_ids": torch.cat(rows, dim=1), "position_ids": positions_of(rows)}


def make(kind, **changes):
    if kind == "masked" and changes.get("lsh_value_shift"):
        pytest.skip("values of successors are for causal models")
    around = {} if kind == "causal" else {"local_num_chunks_after": 1, "lsh_num_chunks_after": 1}
    return make_model(MODELS[kind], **around | changes).double()


def assert_close(actual, expected, tolerance=1e-12):
    assert (actual - expected).norm() <= tolerance * max(expected.norm(), 1)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("kind", MODELS)
def test_packed_documents_are_those_alone(kind, stack, options):
    model, rows = make(kind, attn_layers=STACKS[stack], **OPTIONS[options]), documents()
    with torch.no_grad():
        expected = torch.cat([model(row).logits for row in rows], dim=1)
        assert_close(model(**pack(rows)).logits, expected)


@pytest.mark.parametrize("reversible", [True, False])
@pytest.mark.parametrize("options", ["windows, successors", "windows, dense beginnings", "chunks"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_gradients_of_packed_documents_are_those_alone(implementation, options, reversible):
    model = make(
        "causal",
        attn_layers=STACKS["mixed"],
        reversible=reversible,
        attn_implementation=implementation,
        **OPTIONS[options],
    )
    rows = documents()
    weights = [torch.randn(1, row.shape[1], VOCAB, dtype=torch.float64) for row in rows]
    for row, weight in zip(rows, weights, strict=True):
        (model(row).logits * weight).sum().backward()
    expected = gradients(model)
    model.zero_grad()
    (model(**pack(rows)).logits * torch.cat(weights, dim=1)).sum().backward()
    actual = gradients(model)
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_close(actual[name], expected[name], 1e-10)


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 70), min_size=1, max_size=6), data=st.data())
def test_any_lengths_in_any_rows(lengths, data):
    """Some in one row, some in another, padding before, between and behind."""
    torch.manual_seed(0)
    options = OPTIONS["windows, successors"] | POSITIONS["rotary"]
    model, rows = make("causal", attn_layers=STACKS["mixed"], **options), documents(lengths)
    gaps = data.draw(st.lists(st.integers(0, 9), min_size=len(rows), max_size=len(rows)))
    chosen = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    ids, mask = torch.zeros(2, 500, dtype=torch.long), torch.zeros(2, 500, dtype=torch.long)
    ends, places = [0, 0], []
    for number, (row, gap, second) in enumerate(zip(rows, gaps, chosen, strict=True)):
        start = ends[second] + gap
        where = slice(start, start + row.shape[1])
        ids[int(second), where], mask[int(second), where], ends[second] = row[0], number + 1, where.stop
        places.append((int(second), where))
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
        for row, (index, where) in zip(rows, places, strict=True):
            assert_close(logits[index, where], model(row).logits[0])


@pytest.mark.parametrize("rounds", [1, 4])
@pytest.mark.parametrize("circular", [True, False])
@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("kind", MODELS)
def test_a_document_changes_no_other(kind, stack, circular, rounds):
    """Bit by bit, on the circle too, where a packed document need not be what it is alone."""
    options = {"circular_look_around": circular, "num_hashes": rounds, "full_attention_threshold": 16}
    model = make(kind, attn_layers=STACKS[stack], **options, **LONG).float()
    rows = documents((1, 7, 64, 100, 300))
    changed = [torch.where(row == 5, 6, 5) if i == 2 else row for i, row in enumerate(rows)]
    start, stop = 8, 72
    found = []
    for some in (rows, changed):
        logits = model(**pack(some)).logits
        kept = torch.cat([logits[:, :start], logits[:, stop:]], dim=1)
        model.zero_grad()
        kept.square().sum().backward()
        found.append((kept.detach(), gradients(model)))
        embeddings = found[-1][1].pop("reformer.embeddings.word_embeddings.weight")
        # Of words that only others have.
        assert embeddings.isfinite().all()
    assert torch.equal(found[0][0], found[1][0])
    assert_equal_tensors(found[0][1], found[1][1])


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("positions", POSITIONS)
def test_positions_begin_anew(positions, stack):
    """Given or not; a table need only reach as far as the longest document."""
    model = make("causal", attn_layers=STACKS[stack], **WINDOWS | POSITIONS[positions])
    rows = documents((100, 3, 100, 20))
    numbers = torch.cat([torch.full((1, row.shape[1]), i) for i, row in enumerate(rows)], dim=1)
    ids = torch.cat(rows, dim=1)
    with torch.no_grad():
        expected = torch.cat([model(row).logits for row in rows], dim=1)
        assert_close(model(ids, seq_idx=numbers).logits, expected)
        assert_close(model(ids, seq_idx=numbers, position_ids=positions_of(rows)).logits, expected)
        embedded = model.reformer.embeddings.word_embeddings(ids)
        assert_close(model(inputs_embeds=embedded, attention_mask=numbers + 1).logits, expected)


@pytest.mark.parametrize("stack", STACKS)
def test_maps_and_hidden_states_are_the_callers(stack):
    model, rows = make("causal", attn_layers=STACKS[stack], **OPTIONS["windows, dense beginnings"]), documents()
    asked = {"output_attentions": True, "output_hidden_states": True}
    outputs = model(**pack(rows), **asked)
    start = 0
    for row in rows:
        where = slice(start, start + row.shape[1])
        alone = model(row, **asked)
        for actual, expected in zip(outputs.attentions, alone.attentions, strict=True):
            assert_close(actual[..., where, where], expected)
            assert not actual[..., where, :start].any() and not actual[..., where, where.stop :].any()
        for actual, expected in zip(outputs.hidden_states, alone.hidden_states, strict=True):
            assert_close(actual[:, where], expected)
        start = where.stop
    # Padding attends to nothing and is not attended to.
    rows = documents((20, 9))
    numbers = torch.tensor([[1] * 20 + [2] * 9 + [0] * 5])
    ids = torch.nn.functional.pad(torch.cat(rows, dim=1), (0, 5))
    for weights in model(ids, attention_mask=numbers, output_attentions=True).attentions:
        assert not weights[..., 29:, :].any() and not weights[..., 29:].any()
        assert_close(weights[..., :29, :].sum(-1), torch.ones(1, 2, 29, dtype=torch.float64))
    # A map has the gradient of the output that it made.
    of_map, of_output = torch.autograd.grad(
        outputs.logits.sum(), [outputs.attentions[0], outputs.hidden_states[1]], retain_graph=True
    )
    assert of_map.any() and of_output.any()


@pytest.mark.parametrize("stack", STACKS)
def test_nothing_has_the_size_of_the_documents_times_the_row(stack):
    """Nor of the row squared: 512 documents of 4 tokens, in a row of 2,048."""
    chunks = {"local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "num_buckets": 64}
    model = make_model(ReformerForCausalLM, attn_layers=STACKS[stack], **WINDOWS | LONG | chunks).train()
    ids = random_ids(1, 2048)
    with Allocations() as allocations:
        model(ids, position_ids=(torch.arange(2048) % 4)[None], labels=ids).loss.backward()
    assert allocations.largest < 512 * 2048 / 2


def test_dropout_in_a_reversible_stack():
    model = make("causal", attn_layers=STACKS["mixed"], **WINDOWS | DROPOUT).train()
    batch = pack(documents())
    found = []
    for reversible in (True, False):
        model.config.reversible = reversible
        model.zero_grad()
        torch.manual_seed(3)
        model(**batch, labels=batch["input_ids"]).loss.backward()
        found.append(gradients(model))
    for name, gradient in found[0].items():
        assert_close(gradient, found[1][name], 1e-6)


@pytest.mark.compile
def test_a_compiled_model_computes_the_same():
    model, rows = make("causal", attn_layers=STACKS["mixed"], hash_seed=0, **WINDOWS).train(), documents()
    batch = {"input_ids": torch.cat(rows, dim=1)}
    batch |= {"seq_idx": positions_of(rows).eq(0).cumsum(1), "labels": batch["input_ids"]}
    torch.compiler.reset()
    found = []
    for call in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        outputs = call(**batch)
        outputs.loss.backward()
        found.append((outputs.logits.detach(), gradients(model)))
    assert_close(found[1][0], found[0][0])
    for name, gradient in found[0][1].items():
        # The loss is computed in float32.
        assert_close(found[1][1][name], gradient, 1e-6)


@pytest.mark.parametrize("chunk_size", [0, 13])
@pytest.mark.parametrize("options", [{}, {"return_seq_idx": True, "return_position_ids": False}], ids=str)
def test_no_document_predicts_the_next_one(options, chunk_size):
    """The collator hides the first label of each document; without that the loss is the same."""
    model, rows = make("causal", chunk_size_lm_head=chunk_size, **WINDOWS), documents()
    batch = DataCollatorWithFlattening(**options)([{"input_ids": row[0].tolist()} for row in rows])
    with torch.no_grad():
        expected = sum(model(row, labels=row, num_items_in_batch=1).loss for row in rows if row.shape[1] > 1)
        expected = expected / sum(row.shape[1] - 1 for row in rows)
        # Transformers computes it in float32.
        assert_close(model(**batch).loss, expected, 1e-6)
        assert_close(model(**batch | {"labels": batch["input_ids"]}).loss, expected, 1e-6)


@pytest.mark.parametrize("is_decoder", [True, False])
def test_a_classifier_answers_for_each_document(is_decoder):
    model = make_model(ReformerForSequenceClassification, is_decoder=is_decoder, num_labels=3, **WINDOWS).double()
    rows = documents()
    batch = pack(rows)
    expected = torch.cat([model(row).logits for row in rows])
    outputs = model(**batch, labels=torch.tensor([0, 1, 2, 1, 0]))
    assert_close(outputs.logits.detach(), expected.detach())
    outputs.loss.backward()
    with pytest.raises(ValueError, match=r"`labels` must have shape \[5\]"):
        model(**batch, labels=torch.tensor([0]))


@pytest.mark.parametrize("model_class", [ReformerForTokenClassification, ReformerForQuestionAnswering])
def test_heads_of_tokens(model_class):
    model, rows = make_model(model_class, is_decoder=False, **WINDOWS | AVERAGED).double(), documents()
    with torch.no_grad():
        for name, logits in model(**pack(rows)).items():
            assert_close(logits, torch.cat([model(row)[name] for row in rows], dim=1))


def test_the_trainer_packs(tmp_path):
    """One step on a packed row moves the weights as one on the documents, padded."""
    rows = [{"input_ids": row[0].tolist()} for row in documents((20, 9, 33, 14))]
    for row in rows:
        row["labels"] = row["input_ids"]

    def pad(batch):
        longest = max(len(row["input_ids"]) for row in batch)
        ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in batch])
        return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids.masked_fill(ids == 0, -100)}

    weights = []
    for collate in (DataCollatorWithFlattening(), pad):
        model = make("causal", attn_layers=STACKS["mixed"], hash_seed=0, **WINDOWS)
        arguments = TrainingArguments(
            tmp_path, max_steps=1, per_device_train_batch_size=4, use_cpu=True, report_to=[], optim="sgd"
        )
        Trainer(model, arguments, train_dataset=rows, data_collator=collate).train()
        weights.append(dict(model.named_parameters()))
    for name, weight in weights[0].items():
        assert_close(weight.detach(), weights[1][name].detach(), 1e-6)
    assert VOCAB == weights[0]["lm_head.decoder.weight"].shape[0]
