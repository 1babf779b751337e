"""
Padding anywhere, the batch a row is in, and masked tokens: none of them changes a row's result.

In float64, where the order of a sum moves the 16th digit and no hash.
"""

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from tiny_models import POSITIONS, STACKS, WINDOWS, make_model, random_ids

from hf_reformer import ReformerForCausalLM, ReformerForMaskedLM, ReformerModel


CLOSE = {"rtol": 1e-10, "atol": 1e-10}
# Below, at and above a chunk of 16 and the threshold of 40.
LENGTHS = (61, 40, 41, 17, 16, 9, 1)
PADDED_LENGTH = 70
SIDES = ("left", "right", "both", "between")
OPTIONS = {
    "default": {},
    "exact for short rows": {"full_attention_threshold": 40},
    "own bucket": {"attend_across_buckets": False},
    "own bucket, exact for short rows": {"attend_across_buckets": False, "full_attention_threshold": 40},
    "no duplicates": {"allow_duplicate_attention": False, "num_hashes": 3},
    "chunks ahead": {"lsh_num_chunks_after": 1, "local_num_chunks_after": 1, "lsh_num_chunks_before": 0},
    "chunks of two lengths": {"lsh_attn_chunk_length": 12, "local_attn_chunk_length": 20},
    "successors, exact for short rows": {"lsh_value_shift": 1, "full_attention_threshold": 40},
    "rotary positions": POSITIONS["LSH rotary"],
    "rotary positions, after hashing": POSITIONS["LSH rotary, after hashing"],
    "no positions": POSITIONS["none"],
}
CAUSAL_ONLY = ("successors, exact for short rows",)


# The others say nothing about stacks without LSH layers.
OPTIONS_OF = {
    "local": ("default", "chunks ahead", "chunks of two lengths", "rotary positions"),
    "full": ("default", "rotary positions"),
}


def make_float64(model_class, stack, **changes):
    changes = {"circular_look_around": False} | changes
    return make_model(model_class, attn_layers=STACKS[stack], **changes).double()


def make_rows():
    return [random_ids(1, length) for length in LENGTHS]


def pad(rows, side):
    """Rows of different lengths as one batch of `PADDED_LENGTH`, and its mask. Padding holds tokens, not zeros."""
    ids = random_ids(len(rows), PADDED_LENGTH)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        space = PADDED_LENGTH - row.shape[1]
        start = {"left": space, "right": 0, "both": space // 3, "between": 0}[side]
        places = torch.arange(start, start + row.shape[1])
        if side == "between":
            places = torch.randperm(PADDED_LENGTH)[: row.shape[1]].sort().values
        ids[i, places] = row
        mask[i, places] = True
    return ids, mask


@pytest.mark.parametrize(
    ("stack", "option", "is_decoder"),
    [
        (stack, option, is_decoder)
        for stack in STACKS
        for option in OPTIONS_OF.get(stack, OPTIONS)
        for is_decoder in ([True] if option in CAUSAL_ONLY else [True, False])
    ],
)
def test_a_padded_row_equals_the_row_alone(stack, option, is_decoder):
    """In its output, in the hidden states of each layer, and in the attention maps."""
    model = make_float64(ReformerModel, stack, is_decoder=is_decoder, **OPTIONS[option])
    everything = {"output_hidden_states": True, "output_attentions": True}
    rows = make_rows()
    with torch.no_grad():
        alone = [model(row, **everything) for row in rows]
        for side in SIDES:
            ids, mask = pad(rows, side)
            together = model(ids, attention_mask=mask, **everything)
            for i, expected in enumerate(alone):
                for actual_state, state in zip(
                    (together.last_hidden_state, *together.hidden_states),
                    (expected.last_hidden_state, *expected.hidden_states),
                    strict=True,
                ):
                    torch.testing.assert_close(actual_state[i, mask[i]], state[0], **CLOSE)
                for actual_map, weights in zip(together.attentions, expected.attentions, strict=True):
                    torch.testing.assert_close(actual_map[i][:, mask[i]][:, :, mask[i]], weights[0], **CLOSE)


@pytest.mark.parametrize("reversible", [True, False])
@pytest.mark.parametrize("model_class", [ReformerForCausalLM, ReformerForMaskedLM])
@pytest.mark.parametrize("side", SIDES)
def test_padding_changes_no_gradient(side, model_class, reversible):
    model = make_float64(model_class, "mixed", hash_seed=3, full_attention_threshold=40, reversible=reversible).train()
    rows = make_rows()
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(1, row.shape[1], 50, generator=generator, dtype=torch.float64) for row in rows]
    for row, weight in zip(rows, weights, strict=True):
        (model(row).logits * weight).sum().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    ids, mask = pad(rows, side)
    logits = model(ids, attention_mask=mask).logits
    sum((logits[i, mask[i]] * weight[0]).sum() for i, weight in enumerate(weights)).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-8, atol=1e-8, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("model_class", [ReformerForCausalLM, ReformerForMaskedLM])
@pytest.mark.parametrize("stack", STACKS)
def test_left_padding_is_right_padding_on_the_circle_too(stack, model_class):
    model = make_float64(model_class, stack, circular_look_around=True)
    rows = make_rows()
    with torch.no_grad():
        (_, right_mask), (_, left_mask) = right, left = pad(rows, "right"), pad(rows, "left")
        expected, actual = (model(ids, attention_mask=mask).logits for ids, mask in (right, left))
    torch.testing.assert_close(actual[left_mask], expected[right_mask], **CLOSE)


@pytest.mark.parametrize("circular", [True, False], ids=["circle", "no circle"])
@pytest.mark.parametrize("stack", STACKS)
def test_the_rows_of_a_batch_do_not_touch(stack, circular):
    for model_class in (ReformerForCausalLM, ReformerForMaskedLM):
        model = make_float64(model_class, stack, circular_look_around=circular)
        for length in (9, 50):
            ids = random_ids(3, length)
            with torch.no_grad():
                alone = torch.cat([model(row[None]).logits for row in ids])
                torch.testing.assert_close(model(ids).logits, alone, **CLOSE)


@pytest.mark.parametrize("circular", [True, False], ids=["circle", "no circle"])
@pytest.mark.parametrize("model_class", [ReformerForCausalLM, ReformerForMaskedLM])
@pytest.mark.parametrize("stack", STACKS)
def test_masked_tokens_have_exactly_no_influence(stack, model_class, circular):
    model = make_model(
        model_class, attn_layers=STACKS[stack], circular_look_around=circular, lsh_num_chunks_after=1, hash_seed=2
    ).train()
    for length in (10, 50):
        mask = torch.rand(3, length) > 0.3
        mask[0, :4], mask[1, -4:], mask[2] = False, False, True
        ids, others = random_ids(3, length), random_ids(3, length)
        embed = model.get_input_embeddings()
        logits = []
        for vectors in (embed(ids), 100 * embed(others)):
            vectors = torch.where(mask[..., None], embed(ids), vectors).detach().requires_grad_()
            logits.append(model(inputs_embeds=vectors, attention_mask=mask).logits)
            logits[-1][mask].square().sum().backward()
            assert not vectors.grad[~mask].any()
            assert vectors.grad[mask].any(-1).all()
        assert torch.equal(logits[0][mask], logits[1][mask])
        # The mask does hide something: without it the same tokens count.
        with torch.no_grad():
            assert not torch.allclose(model(inputs_embeds=vectors).logits[mask], logits[1][mask])


@pytest.mark.parametrize("stack", STACKS)
def test_positions_move_with_their_tokens(stack):
    """`generate` passes position_ids that count real tokens; padding has 0 there."""
    model = make_float64(ReformerForCausalLM, stack)
    ids, mask = pad(make_rows(), "left")
    counted = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        given = model(ids, attention_mask=mask, position_ids=counted).logits
        default = model(ids, attention_mask=mask).logits
        shifted = model(ids, attention_mask=mask, position_ids=counted + 7 * mask).logits
    torch.testing.assert_close(given[mask], default[mask], **CLOSE)
    assert ((shifted - default)[mask].abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("stack", STACKS)
def test_a_row_of_nothing_but_padding_harms_nobody(stack):
    model = make_float64(ReformerForMaskedLM, stack, full_attention_threshold=40)
    ids, mask = pad(make_rows(), "right")
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        mask[0] = False
        actual = model(ids, attention_mask=mask).logits
    assert actual.isfinite().all()
    torch.testing.assert_close(actual[mask], expected[mask], **CLOSE)


@pytest.mark.filterwarnings("ignore:A decoder-only architecture is being used")
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("side", SIDES)
def test_prompts_are_continued_as_alone(side, use_cache):
    model = make_float64(ReformerForCausalLM, "mixed", **WINDOWS)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "use_cache": use_cache}
    rows = make_rows()
    ids, mask = pad(rows, side)
    written = model.generate(ids, attention_mask=mask.long(), **options)[:, PADDED_LENGTH:]
    for row, continuation in zip(rows, written, strict=True):
        assert torch.equal(model.generate(row, **options)[0, row.shape[1] :], continuation)


@pytest.mark.parametrize("model_class", [ReformerForCausalLM, ReformerForMaskedLM])
def test_virtual_tokens_before_padding(model_class):
    """Prompt tuning puts them before what is padded on the left."""
    task = "CAUSAL_LM" if model_class is ReformerForCausalLM else "FEATURE_EXTRACTION"
    settings = PromptTuningConfig(task_type=task, num_virtual_tokens=5)
    model = get_peft_model(make_float64(model_class, "mixed", full_attention_threshold=40), settings).double().eval()
    rows = make_rows()
    ids, mask = pad(rows, "left")
    with torch.no_grad():
        together = model(input_ids=ids, attention_mask=mask).logits
        for row, is_real, actual in zip(rows, mask, together, strict=True):
            expected = model(input_ids=row).logits[0]
            torch.testing.assert_close(actual[5:][is_real], expected[5:], **CLOSE)
            torch.testing.assert_close(actual[:5], expected[:5], **CLOSE)


def test_a_mask_says_the_same_of_cached_tokens_in_each_call():
    model = make_model(ReformerForCausalLM)
    ids, padded, whole = random_ids(2, 12), torch.ones(2, 12).long(), torch.ones(2, 12).long()
    padded[1, :4] = 0
    for first, second, message in (
        (padded, whole, "shows token 0 of row 1, and the cache was filled without it"),
        (whole, padded, "hides token 0 of row 1, and the cache was filled with it"),
        (None, padded, "hides token 0 of row 1, and the cache was filled with it"),
    ):
        with torch.no_grad():
            mask = None if first is None else first[:, :10]
            cache = model(ids[:, :10], attention_mask=mask, use_cache=True).cache
            with pytest.raises(ValueError, match=message):
                model(ids[:, 10:], attention_mask=second, cache=cache)
            assert cache.get_seq_length() == 10
            again = model(ids[:, 10:], attention_mask=whole if first is None else first, cache=cache)
            assert again.logits.isfinite().all()
