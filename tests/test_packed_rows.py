"""Rows of several documents: refused in every form in which they come, because documents would read each other."""

import pytest
import torch
from tiny_models import MODEL_CLASSES, STACKS, left_padded, make_model, random_ids
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DataCollatorWithFlattening

from hf_reformer import (
    ReformerForCausalLM,
    ReformerForMaskedLM,
    ReformerForMultipleChoice,
)
from hf_reformer.modeling.argument_checks import check_one_document_per_row


WHAT_TO_DO = "would read each other here. Give each one a row of its own and pad"
LENGTHS = (9, 1, 20)
TOTAL = sum(LENGTHS)


def flattened(**options):
    """What transformers' collator makes of three documents."""
    examples = [{"input_ids": torch.randint(3, 50, (length,)).tolist()} for length in LENGTHS]
    return DataCollatorWithFlattening(**options)(examples)


POSITIONS = r"`position_ids` holds values from 0 to 19, but must grow along each row"
COLLATORS = {
    "positions": ({}, POSITIONS),
    "positions and their numbers": ({"return_seq_idx": True}, "`seq_idx`: this model takes one document per row"),
    "numbers": ({"return_position_ids": False, "return_seq_idx": True}, "`seq_idx`: this model"),
    "borders": (
        {"return_position_ids": False, "return_flash_attn_kwargs": True},
        "`cu_seq_lens_k`, `cu_seq_lens_q`, `max_length_k`, `max_length_q`: this model",
    ),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("collator", COLLATORS)
@pytest.mark.parametrize("stack", STACKS)
def test_rows_of_the_flattening_collator(stack, collator, training):
    options, message = COLLATORS[collator]
    model = make_model(ReformerForCausalLM, attn_layers=STACKS[stack]).train(training)
    with pytest.raises(ValueError, match=f"{message}.*{WHAT_TO_DO}"):
        model(**flattened(**options))


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_every_head_refuses_them(model_class):
    batch = flattened(return_seq_idx=True)
    ids, positions, numbers = batch["input_ids"], batch["position_ids"], batch["seq_idx"]
    mask = numbers + 1
    if model_class is ReformerForMultipleChoice:
        ids, positions, mask = (tensor[:, None] for tensor in (ids, positions, mask))
    model = make_model(model_class)
    for more, message in (
        ({"position_ids": positions}, POSITIONS),
        ({"seq_idx": numbers}, "`seq_idx`: this model"),
        ({"attention_mask": mask}, "`attention_mask` holds values from 1 to 3, but must be 1 for real tokens and 0"),
        ({"attention_mask": torch.ones(1, 1, TOTAL, TOTAL)}, r"is a Tensor of shape \[1, 1, 30, 30\]. Who attends"),
    ):
        with pytest.raises(ValueError, match=f"{message}.*{WHAT_TO_DO}"):
            model(ids, **more)


PADDED = torch.arange(12) < torch.tensor([12, 7])[:, None]
MASKS = {
    "added, infinite": (torch.zeros(2, 12).masked_fill(~PADDED, -torch.inf), "from -inf to 0.0"),
    "added, finite": (
        torch.zeros(2, 12).masked_fill(~PADDED, torch.finfo(torch.float32).min),
        r"from -3.4\d*e\+38 to",
    ),
    "in half precision": (torch.zeros(2, 12, dtype=torch.float16).masked_fill(~PADDED, -1e4), "from -10000.0 to 0.0"),
    "not a number": (torch.ones(2, 12).masked_fill(~PADDED, torch.nan), "from nan to nan"),
    "numbers of documents": (PADDED * (1 + (torch.arange(12) > 4)), "from 0 to 2"),
    "who attends to whom": (torch.ones(2, 12, 12), r"a Tensor of shape \[2, 12, 12\]"),
    "several masks": ({"full_attention": torch.ones(2, 1, 12, 12)}, "but is a dict"),
}


@pytest.mark.parametrize("case", MASKS)
def test_masks_of_another_kind(case):
    mask, message = MASKS[case]
    with pytest.raises(ValueError, match=f"`attention_mask` .*{message}.*{WHAT_TO_DO}"):
        make_model(ReformerForMaskedLM)(random_ids(2, 12), attention_mask=mask)


COUNTED = torch.arange(12)
POSITIONS_OF_PACKED_ROWS = {
    "from the start": (COUNTED % 7).expand(2, 12),
    "in one row": torch.stack([COUNTED, COUNTED % 11]),
    "the same for all rows": (COUNTED % 7)[None],
    "from the middle": (COUNTED % 7 + 40).expand(2, 12),
    "back by one": torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 10]).expand(2, 12),
    "a document of one token": torch.tensor([0, *range(11)]).expand(2, 12),
    "after padding inside": torch.tensor([0, 1, 2, 3, 4, 0, 0, 0, 0, 1, 2, 3]).expand(2, 12),
}


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("case", POSITIONS_OF_PACKED_ROWS)
def test_positions_that_start_again(case, padded):
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[:, 5:8] = not padded
    with pytest.raises(ValueError, match=WHAT_TO_DO):
        check_one_document_per_row(mask, POSITIONS_OF_PACKED_ROWS[case], {})


@pytest.mark.parametrize("dtype", [torch.long, torch.int32, torch.uint8])
def test_positions_of_one_document(dtype):
    """As `generate` gives them for padding on either side, with gaps, from anywhere; unknown names are not ours."""
    gaps = (3 * COUNTED).expand(2, 12)
    for positions, mask in (
        (COUNTED[None], None),
        (COUNTED[None] + 5, PADDED),
        (gaps, None),
        (torch.where(PADDED, gaps, 0), PADDED),
        (torch.where(PADDED, gaps, 1), PADDED),
        ((PADDED.flip(1).cumsum(1) - 1).clamp(min=0), PADDED.flip(1)),
        ((PADDED.flip(1).cumsum(1) - 1).masked_fill(~PADDED.flip(1), 1), PADDED.flip(1)),
        (torch.zeros(2, 1), None),
    ):
        check_one_document_per_row(mask, positions.to(dtype), {"seq_idx": None, "token_type_ids": positions})


@pytest.mark.parametrize("stack", STACKS)
def test_positions_that_start_again_behind_a_cache(stack):
    """The next document of a row cannot continue the cache of the ones before it; padding is no token of those."""
    model = make_model(ReformerForCausalLM, attn_layers=STACKS[stack])
    ids, mask = left_padded([random_ids(1, length)[0] for length in (25, 9)], length=30)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        cache = model(ids, attention_mask=mask, position_ids=positions, use_cache=True).past_key_values
        longer = torch.cat([mask, torch.ones_like(mask[:, :3])], dim=1)
        for wrong in (COUNTED[None, :3], COUNTED[None, :3] + 24, COUNTED[None, :1] + 8):
            with pytest.raises(ValueError, match=WHAT_TO_DO):
                model(
                    ids[:, : wrong.shape[1]],
                    attention_mask=longer[:, : 30 + wrong.shape[1]],
                    position_ids=wrong,
                    past_key_values=cache,
                )
        assert cache.get_seq_length() == 30
        model(ids[:, :3], attention_mask=longer, position_ids=longer.cumsum(1)[:, -3:] - 1, past_key_values=cache)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}, {"use_cache": False}], ids=str
)
def test_generating_is_not_packing(options):
    """Of padded rows, token by token, in beams, by guesses that are taken back."""
    model = make_model(ReformerForCausalLM, attn_layers=STACKS["mixed"])
    rows = [torch.randint(3, 8, (length,)) for length in (25, 9)]
    # guesses are for one row
    rows = rows[1:] if "prompt_lookup_num_tokens" in options else rows
    ids, mask = left_padded(rows, length=30)
    model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, **options)


def call(model, ids, mask, positions):
    return model(input_ids=ids, attention_mask=mask, position_ids=positions).logits


@pytest.mark.compile
@pytest.mark.parametrize("way", ["compiled", "exported"])
def test_what_is_traced_refuses_them_too(way):
    """By an assertion in the program, since a compiler cannot look at values."""
    model = make_model(ReformerForCausalLM, attn_layers=["local"], attn_implementation="eager")
    ids, mask, positions = random_ids(2, 12), PADDED.long(), COUNTED.expand(2, 12)
    with torch.no_grad():
        if way == "compiled":
            torch.compiler.reset()
            program = torch.compile(model, backend="aot_eager")
        else:
            inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
            program = torch.export.export(model, (), inputs).module()
        torch.testing.assert_close(call(program, ids, mask, positions), call(model, ids, mask, positions))
        for wrong in ((mask + 1, positions), (mask, positions % 5)):
            with pytest.raises(RuntimeError, match=WHAT_TO_DO):
                call(program, ids, *wrong)


def test_values_that_are_not_there_are_not_looked_at():
    positions = COUNTED.expand(2, 12)
    check_one_document_per_row(PADDED.long().to("meta"), positions.to("meta"), {})
    torch.func.vmap(lambda mask, row: check_one_document_per_row(mask[None], row[None], {}) or row)(
        PADDED.long(), positions
    )
    with FakeTensorMode():
        check_one_document_per_row(torch.ones(2, 12), torch.ones(2, 12, dtype=torch.long), {})
