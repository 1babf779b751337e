"""In which forms rows of several documents come: what they say, what contradicts itself, and where they cannot be."""

import pytest
import torch
from tiny_models import STACKS, WINDOWS, left_padded, make_model, random_ids
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DataCollatorWithFlattening

from hf_reformer import ReformerForCausalLM, ReformerForMaskedLM, ReformerForMultipleChoice
from hf_reformer.modeling.argument_checks import check_one_document_per_row
from hf_reformer.modeling.packed_rows import (
    alignment_of,
    documents_of_call,
    labels_of_next_tokens,
    number_documents,
)


WHAT_TO_DO = "would read each other here, with a cache or in a compiled program. Give each one a row of its own"
LENGTHS = (9, 1, 20)
TOTAL = sum(LENGTHS)
NUMBERS = torch.cat([torch.full((length,), i + 1) for i, length in enumerate(LENGTHS)])[None]
COLLATORS = {
    "positions": {},
    "positions and their numbers": {"return_seq_idx": True},
    "numbers": {"return_position_ids": False, "return_seq_idx": True},
    "borders": {"return_position_ids": False, "return_flash_attn_kwargs": True},
    "everything": {"return_seq_idx": True, "return_flash_attn_kwargs": True},
}


def flattened(**options):
    """What transformers' collator makes of three documents."""
    examples = [{"input_ids": torch.randint(3, 50, (length,)).tolist()} for length in LENGTHS]
    return DataCollatorWithFlattening(**options)(examples)


def numbered(ids, attention_mask=None, position_ids=None, **others):
    return number_documents(ids, attention_mask, position_ids, others)


@pytest.mark.parametrize("collator", COLLATORS)
def test_rows_of_the_flattening_collator(collator):
    batch = flattened(**COLLATORS[collator])
    del batch["labels"]
    torch.testing.assert_close(numbered(batch.pop("input_ids"), **batch), NUMBERS)


COUNTED = torch.arange(12)
PADDED = torch.arange(12) < torch.tensor([12, 7])[:, None]
IDS = torch.zeros(2, 12)
# What is given, and the numbers that come of it.
FORMS = {
    "positions, one of both rows": (
        {"position_ids": torch.stack([COUNTED, COUNTED % 11])},
        torch.stack([COUNTED * 0 + 1, COUNTED // 11 + 1]),
    ),
    "positions of all rows": ({"position_ids": (COUNTED % 5)[None]}, (COUNTED // 5 + 1).expand(2, 12)),
    "documents of one token": ({"position_ids": (COUNTED * 0)[None]}, (COUNTED + 1).expand(2, 12)),
    "positions with gaps": ({"position_ids": (COUNTED % 6 * 3)[None]}, (COUNTED // 6 + 1).expand(2, 12)),
    "positions beside a mask": (
        {"attention_mask": PADDED.long(), "position_ids": torch.where(PADDED, COUNTED % 5, 0)},
        (COUNTED // 5 + 1) * PADDED,
    ),
    "padding in front": (
        {"attention_mask": PADDED.flip(1).long(), "position_ids": ((COUNTED - 5).clamp(min=0) % 4)[None]},
        torch.stack([numbers := torch.tensor([1, 2, 3, 4, 5, 6, 6, 6, 6, 7, 7, 7]), (numbers - 5) * (COUNTED > 4)]),
    ),
    "a mask that numbers": (
        {"attention_mask": torch.stack([COUNTED // 4 + 1, PADDED[1] * (1 + (COUNTED > 2))])},
        torch.stack([COUNTED // 4 + 1, PADDED[1] * (1 + (COUNTED > 2))]),
    ),
    "a mask whose numbers have gaps": (
        {"attention_mask": torch.tensor([7, 7, 0, 7, 3, 3, 0, 0, 3, 9, 9, 9]).expand(2, 12)},
        torch.tensor([1, 1, 0, 1, 2, 2, 0, 0, 2, 3, 3, 3]).expand(2, 12),
    ),
    "borders of all rows": (
        {"cu_seq_lens_q": torch.tensor([0, 5, 12, 12, 24]), "cu_seq_lens_k": torch.tensor([0, 5, 12, 24])},
        torch.stack([1 + (COUNTED >= 5), COUNTED * 0 + 1]),
    ),
    "borders on padding": (
        {"attention_mask": PADDED.flip(1), "cu_seq_lens_q": torch.tensor([0, 5, 12, 16, 24])},
        torch.stack([1 + (COUNTED >= 5), PADDED[1].flip(0) * 1]),
    ),
    "borders around padding": (
        {
            "attention_mask": torch.tensor([1] * 5 + [0] * 3 + [1] * 4).expand(2, 12),
            "cu_seq_lens_q": torch.tensor([0, 3, 5, 8, 12, 15, 17, 20, 24]),
        },
        torch.tensor([1, 1, 1, 2, 2, 0, 0, 0, 3, 3, 3, 3]).expand(2, 12),
    ),
    "one row packed, one continued": (
        {"position_ids": torch.stack([COUNTED % 6, COUNTED + 5])},
        torch.stack([COUNTED // 6 + 1, COUNTED * 0 + 1]),
    ),
    "lists": ({"seq_idx": [[0] * 5 + [1] * 7]}, torch.tensor([1] * 5 + [2] * 7).expand(2, 12)),
    "numbers beside a mask": (
        {"attention_mask": PADDED, "seq_idx": (COUNTED // 6)[None]},
        (COUNTED // 6 + 1) * PADDED,
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_numbers_of_documents(form):
    given, expected = FORMS[form]
    assert torch.equal(numbered(IDS, **given), expected)


@pytest.mark.parametrize("dtype", [torch.long, torch.int32, torch.uint8])
def test_rows_of_one_document(dtype):
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
    ):
        others = {"seq_idx": None, "token_type_ids": positions}
        assert numbered(IDS, mask, positions.to(dtype), **others) is None
        check_one_document_per_row(mask, positions.to(dtype), others)
    for mask in (PADDED, PADDED.to(dtype), PADDED.float(), PADDED * 0, 5 * PADDED.to(dtype)):
        assert numbered(IDS, mask) is None
    for others in ({"seq_idx": COUNTED[None] * 0}, {"cu_seq_lens_q": torch.tensor([0, 12, 24])}):
        assert numbered(IDS, **others) is None
    check_one_document_per_row(None, torch.zeros(2, 1), {})


CONTRADICTIONS = {
    "positions and numbers": (
        {"position_ids": (COUNTED % 6)[None], "seq_idx": (COUNTED // 5)[None]},
        "`seq_idx` and `position_ids` say that documents begin at other tokens",
    ),
    "positions that do not start again": (
        {"position_ids": COUNTED[None], "seq_idx": (COUNTED // 5)[None]},
        "`seq_idx` and `position_ids` say",
    ),
    "numbers that do not change": (
        {"position_ids": (COUNTED % 6)[None], "seq_idx": (COUNTED * 0)[None]},
        "`position_ids` and `seq_idx` say",
    ),
    "queries and keys": (
        {"cu_seq_lens_q": torch.tensor([0, 5, 12, 24]), "cu_seq_lens_k": torch.tensor([0, 6, 12, 24])},
        "`cu_seq_lens_q` and `cu_seq_lens_k` say",
    ),
    "mask and positions": (
        {"attention_mask": (COUNTED // 4 + 1).expand(2, 12), "position_ids": (COUNTED % 6)[None]},
        "`attention_mask` and `position_ids` say",
    ),
    "a number that comes again": (
        {"attention_mask": torch.tensor([[1, 1, 2, 2, 1, 1, 3, 3, 3, 0, 0, 0]]).expand(2, 12)},
        "`attention_mask` numbers a document that comes again behind another",
    ),
    "not from 0": ({"position_ids": (COUNTED % 7 + 40)[None]}, "but not from 0"),
    "back by one": ({"position_ids": torch.tensor([[*range(10), 11, 10]])}, "but not from 0"),
    "borders that go back": ({"cu_seq_lens_q": torch.tensor([0, 9, 5, 24])}, "without going back"),
    "borders of one row": ({"cu_seq_lens_q": torch.tensor([0, 5, 12])}, "must lead from 0 to 24"),
    "numbers of another shape": ({"seq_idx": COUNTED[None, :5]}, r"`seq_idx` must have shape \[2, 12\]"),
    "lengths and a mask": (
        {"attention_mask": PADDED.long(), "seq_lengths": [[12], [7]]},
        "`seq_lengths`: which tokens",
    ),
    "lengths alone": ({"max_length_q": 5, "max_length_k": 5}, "which tokens are whose is not said"),
    "negative": ({"attention_mask": -PADDED.long()}, "from -1 to 0, but must be 0 for padding"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions(case):
    given, message = CONTRADICTIONS[case]
    with pytest.raises(ValueError, match=message):
        documents_of_call(IDS, given.pop("attention_mask", None), given.pop("position_ids", None), given)


MASKS = {
    "added, infinite": (torch.zeros(2, 12).masked_fill(~PADDED, -torch.inf), "from -inf to 0.0"),
    "added, finite": (
        torch.zeros(2, 12).masked_fill(~PADDED, torch.finfo(torch.float32).min),
        r"from -3.4\d*e\+38 to",
    ),
    "in half precision": (torch.zeros(2, 12, dtype=torch.float16).masked_fill(~PADDED, -1e4), "from -10000.0 to 0.0"),
    "not a number": (torch.ones(2, 12).masked_fill(~PADDED, torch.nan), "from nan to nan"),
    "numbers of documents": (PADDED * (1.0 + (torch.arange(12) > 4)), "from 0.0 to 2.0"),
    "who attends to whom": (torch.ones(2, 12, 12), r"a Tensor of shape \[2, 12, 12\]"),
    "several masks": ({"full_attention": torch.ones(2, 1, 12, 12)}, "but is a dict"),
}


@pytest.mark.parametrize("case", MASKS)
def test_masks_of_another_kind(case):
    mask, message = MASKS[case]
    with pytest.raises(ValueError, match=f"`attention_mask` .*{message}"):
        make_model(ReformerForMaskedLM)(random_ids(2, 12), attention_mask=mask)


def test_labels_within_documents():
    labels = torch.arange(10, 21)[None]
    numbers = torch.tensor([[0, 1, 1, 1, 2, 0, 2, 3, 3, 0, 0]])
    expected = torch.tensor([[-100, 12, 13, -100, 16, -100, -100, 18, -100, -100, -100]])
    assert torch.equal(labels_of_next_tokens(labels, numbers > 0, numbers), expected)


def test_labels_beside_padding():
    """As transformers shifts them, but past what is padding between real tokens."""
    labels = torch.arange(10, 16).expand(3, -1)
    is_real = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1]], dtype=torch.bool)
    expected = [
        [11, 12, 13, 14, 15, -100],
        [11, 12, 13, 14, 15, -100],
        [11, 14, -100, -100, 15, -100],
    ]
    assert labels_of_next_tokens(labels, is_real).tolist() == expected


def test_a_padded_row_has_the_loss_of_the_row_alone():
    model = make_model(ReformerForCausalLM, attn_layers=STACKS["mixed"], **WINDOWS).double()
    row = random_ids(1, 40)
    expected = model(row, labels=row).loss
    for places in (torch.arange(40), torch.arange(30, 70), torch.randperm(70)[:40].sort().values):
        ids, mask = random_ids(1, 70), torch.zeros(1, 70, dtype=torch.long)
        ids[:, places], mask[:, places] = row, 1
        labels = ids.masked_fill(mask == 0, -100)
        # What is predicted from padding in front has a label with transformers.
        labels[:, places[0]] = -100
        loss = model(ids, attention_mask=mask, labels=labels).loss
        # transformers computes it in float32.
        torch.testing.assert_close(loss, expected, rtol=40 * 2**-24, atol=0)


def test_documents_begin_at_chunk_borders():
    def alignment(*kinds, **changes):
        model = make_model(ReformerForCausalLM, attn_layers=kinds, local_attn_chunk_length=8, **changes)
        return alignment_of(model.config)

    assert alignment("full") == alignment("full", "lsh", **WINDOWS) == 1
    assert alignment("local", "full") == alignment("local", "lsh", **WINDOWS) == 8
    assert alignment("lsh") == 16 and alignment("local", "lsh", lsh_attn_chunk_length=12) == 24


# Where rows hold one document each.


@pytest.mark.parametrize("collator", COLLATORS)
def test_a_cache_holds_one_text_for_each_row(collator):
    batch = flattened(**COLLATORS[collator])
    with pytest.raises(ValueError, match=WHAT_TO_DO):
        make_model(ReformerForCausalLM)(**batch, use_cache=True)


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


@pytest.mark.parametrize("use_cache", [True, False])
def test_packed_prompts_are_not_continued(use_cache):
    model, ids = make_model(ReformerForCausalLM), random_ids(1, TOTAL)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    for more in ({"attention_mask": NUMBERS}, {"seq_idx": NUMBERS}, {"position_ids": positions}):
        with pytest.raises(ValueError, match=f"{WHAT_TO_DO}|not used by"):
            model.generate(ids, max_new_tokens=2, do_sample=False, use_cache=use_cache, **more)


def test_a_choice_is_one_document():
    model = make_model(ReformerForMultipleChoice)
    with torch.no_grad():
        ids, positions = random_ids(4, 12).view(2, 2, 12), COUNTED.expand(1, 2, 12)
        given = model(ids, position_ids=positions).logits
        torch.testing.assert_close(given, model(ids).logits)
    with pytest.raises(ValueError, match="A choice is one row"):
        model(random_ids(2, TOTAL)[None], attention_mask=NUMBERS.expand(1, 2, TOTAL))


def call(model, ids, mask, positions):
    return model(input_ids=ids, attention_mask=mask, position_ids=positions).logits


@pytest.mark.compile
@pytest.mark.parametrize("way", ["compiled", "exported"])
def test_what_is_traced_refuses_them(way):
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
    documents_of_call(IDS, PADDED.long().to("meta"), positions.to("meta"), {})
    torch.func.vmap(lambda mask, row: documents_of_call(IDS, mask[None], row[None], {}) or row)(
        PADDED.long(), positions
    )
    with FakeTensorMode():
        documents_of_call(IDS, torch.ones(2, 12), torch.ones(2, 12, dtype=torch.long), {})
