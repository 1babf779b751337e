"""LSH attention: every implementation against the dense float64 oracle, in outputs and all gradients."""

import doctest
import importlib

import pytest
import torch

from hf_reformer.modeling.ops import lsh_sdpa, softmax_kernels
from hf_reformer.modeling.ops.lsh_hashing import draw_rotations, hash_vectors
from hf_reformer.modeling.ops.lsh_operator import attend_by_hash, lsh_attention
from hf_reformer.modeling.ops.lsh_options import LSHOptions
from hf_reformer.modeling.ops.lsh_reference import lsh_attention_reference
from hf_reformer.modeling.ops.value_shift import of_shifted, shift_values


# The third is tested in test_triton.py.
IMPLEMENTATIONS = ["eager", "sdpa"]
NUM_BUCKETS = 6

# One line per thing that can differ. Lengths below, at, above and far from a multiple of the chunk length.
CASES = {
    "causal": {"length": 40, "rounds": 1, "causal": True},
    "bidirectional": {"length": 40, "rounds": 2},
    "one token": {"length": 1, "rounds": 2, "causal": True},
    "shorter than a chunk": {"length": 5, "rounds": 1, "causal": True},
    "one chunk": {"length": 8, "rounds": 2},
    "odd length": {"length": 37, "rounds": 2, "causal": True},
    "many rounds": {"length": 24, "rounds": 16, "causal": True},
    "no neighbours": {"length": 40, "rounds": 2, "num_chunks_before": 0},
    "far neighbours": {"length": 40, "rounds": 2, "num_chunks_before": 3, "num_chunks_after": 2},
    "look ahead only": {"length": 37, "rounds": 2, "num_chunks_before": 0, "num_chunks_after": 1, "causal": True},
    "more neighbours than chunks": {"length": 16, "rounds": 1, "num_chunks_before": 5, "num_chunks_after": 4},
    "no circle": {"length": 37, "rounds": 3, "circular_look_around": False},
    "no circle, causal": {"length": 40, "rounds": 2, "circular_look_around": False, "causal": True},
    "own bucket": {"length": 37, "rounds": 2, "attend_across_buckets": False},
    "own bucket, no circle": {
        "length": 40,
        "rounds": 2,
        "attend_across_buckets": False,
        "circular_look_around": False,
        "causal": True,
    },
    "no duplicates": {"length": 40, "rounds": 4, "allow_duplicate_attention": False, "causal": True},
    "no duplicates, no circle": {
        "length": 37,
        "rounds": 3,
        "allow_duplicate_attention": False,
        "circular_look_around": False,
    },
    "no duplicates, circle of few chunks": {
        "length": 16,
        "rounds": 2,
        "allow_duplicate_attention": False,
        "num_chunks_before": 3,
        "num_chunks_after": 2,
    },
    "as in the paper": {
        "length": 40,
        "rounds": 4,
        "allow_duplicate_attention": False,
        "attend_across_buckets": False,
        "causal": True,
    },
    "windows": {"length": 40, "rounds": 2, "circular_look_around": False, "sliding_window": True},
    "windows, causal, own bucket": {
        "length": 37,
        "rounds": 4,
        "circular_look_around": False,
        "attend_across_buckets": False,
        "sliding_window": True,
        "causal": True,
    },
    "windows on both sides, no duplicates": {
        "length": 61,
        "rounds": 3,
        "circular_look_around": False,
        "sliding_window": True,
        "num_chunks_before": 2,
        "num_chunks_after": 1,
        "allow_duplicate_attention": False,
    },
    "windows, no duplicates, own bucket": {
        "length": 45,
        "rounds": 4,
        "circular_look_around": False,
        "attend_across_buckets": False,
        "sliding_window": True,
        "allow_duplicate_attention": False,
        "causal": True,
    },
    "longer circle": {"length": 37, "rounds": 2, "padded_length": 64},
    "successors": {"length": 40, "rounds": 1, "causal": True, "value_shift": 1},
    "successors, one token": {"length": 1, "rounds": 2, "causal": True, "value_shift": 1},
    "successors, no duplicates, no circle": {
        "length": 37,
        "rounds": 3,
        "causal": True,
        "value_shift": 1,
        "allow_duplicate_attention": False,
        "circular_look_around": False,
    },
    "successors, windows, own bucket": {
        "length": 45,
        "rounds": 4,
        "causal": True,
        "value_shift": 1,
        "circular_look_around": False,
        "attend_across_buckets": False,
        "sliding_window": True,
    },
}
MASKS = ("none", "right", "left", "scattered")
# A sum of some dozens of float32 products.
FLOAT32_ERROR = 16 * torch.finfo(torch.float32).eps


def make_inputs(length, rounds, mask="none", dtype=torch.float64, batch=2, heads=2, size=6):
    generator = torch.Generator().manual_seed(length * 31 + rounds)
    query_key, value, gradient = torch.randn(3, batch, length, heads, size, generator=generator, dtype=torch.float64)
    rotations = draw_rotations(heads, size, rounds, NUM_BUCKETS, device=query_key.device, seed=rounds)
    buckets = hash_vectors(query_key, rotations, NUM_BUCKETS)
    attention_mask = torch.ones(batch, length, dtype=torch.bool)
    if mask == "right":
        attention_mask[1, -(length // 3) :] = length == 1
    elif mask == "left":
        attention_mask[1, : length // 3] = False
    elif mask == "scattered":
        attention_mask[:, ::3] = False
        attention_mask[:, 0] = True
    return (
        query_key.to(dtype),
        value.to(dtype),
        gradient.to(dtype),
        buckets,
        None if mask == "none" else attention_mask,
    )


def run(function, query_key, value, gradient, **kwargs):
    query_key, value = query_key.clone().requires_grad_(), value.clone().requires_grad_()
    output = function(query_key, value, **kwargs)
    output = output[0] if isinstance(output, tuple) else output
    output.backward(gradient)
    return output.detach(), query_key.grad, value.grad


@pytest.fixture(params=[None, 1, 3])
def chunks_at_once(request, monkeypatch):
    """How many chunks the fused kernels are given at once: all there are, or fewer."""
    if request.param is not None:
        monkeypatch.setattr(lsh_sdpa, "_chunks_at_once", lambda *_: request.param)
    return request.param


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_pieces_make_no_difference(case, chunks_at_once, monkeypatch):
    monkeypatch.setattr(lsh_sdpa, "_heads_at_once", lambda *_: 1 if chunks_at_once == 1 else 2)
    monkeypatch.setattr(lsh_sdpa, "ROWS_AT_ONCE", 7)
    check_against_the_oracle(case, "right", "sdpa")


@pytest.mark.slow
@pytest.mark.parametrize(("case", "mask"), [(case, ("none", "scattered")[i % 2]) for i, case in enumerate(CASES)])
def test_matrix_products_do_what_the_fused_kernel_does(case, mask, monkeypatch):
    monkeypatch.setattr(softmax_kernels, "_HAS_CPU_KERNEL", False)
    check_against_the_oracle(case, mask, "sdpa")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_oracle(case, mask, implementation):
    check_against_the_oracle(case, mask, implementation)


def check_against_the_oracle(case, mask, implementation):
    options = dict(CASES[case])
    query_key, value, gradient, buckets, attention_mask = make_inputs(
        options.pop("length"), options.pop("rounds"), mask
    )
    if attention_mask is not None:
        # What a masked token itself attends to means nothing.
        gradient = gradient * attention_mask[..., None, None]
    options.update(buckets=buckets, attention_mask=attention_mask, chunk_length=8)
    expected = run(lsh_attention_reference, query_key, value, gradient, **options)
    actual = run(lsh_attention, query_key, value, gradient, implementation=implementation, **options)
    if attention_mask is not None:
        expected = (expected[0] * attention_mask[..., None, None], *expected[1:])
        actual = (actual[0] * attention_mask[..., None, None], *actual[1:])
    for name, theirs, ours in zip(("output", "query_key", "value"), expected, actual, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def attend_to_everything(query_key, value, options, attention_mask=None, **how):
    """Dense attention, as LSH layers ask for it."""
    if options.value_shift:
        value = shift_values(value, attention_mask)
    output, weights = attend_by_hash(query_key, value, None, options, attention_mask=attention_mask, **how)
    return of_shifted(output, weights, attention_mask) if options.value_shift else (output, weights)


DENSE = {"both directions": {}, "causal": {"causal": True}, "successors": {"causal": True, "value_shift": 1}}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mask", ["none", "scattered"])
@pytest.mark.parametrize("length", [1, 2, 37, 70])
@pytest.mark.parametrize("case", DENSE)
def test_dense_attention_is_that_of_one_bucket(case, length, mask, implementation):
    query_key, value, gradient, _, attention_mask = make_inputs(length, 1, mask)
    real = torch.ones(2, length, 1, 1) if attention_mask is None else attention_mask[..., None, None]
    one_bucket = {
        "buckets": torch.zeros(2, 2, 1, length, dtype=torch.int64),
        "chunk_length": length,
        "num_chunks_before": 0,
    }
    masked = {"attention_mask": attention_mask}
    expected = run(lsh_attention_reference, query_key, value, gradient * real, **one_bucket, **DENSE[case], **masked)
    # Chunks and buckets do not count.
    options = LSHOptions(chunk_length=8, attend_across_buckets=False, **DENSE[case])
    how = {"options": options, "implementation": implementation}
    actual = run(attend_to_everything, query_key, value, gradient * real, **how, **masked)
    for theirs, ours in zip(expected, actual, strict=True):
        torch.testing.assert_close(ours * real, theirs * real, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dense_causal_attention_is_as_good_as_any_in_low_precision(dtype):
    query_key, value, gradient, _, _ = make_inputs(130, 1)
    options = LSHOptions(chunk_length=8, causal=True)
    exact = run(attend_to_everything, query_key, value, gradient, options=options, implementation="eager")
    low = [tensor.to(dtype) for tensor in (query_key, value, gradient)]
    eager, fused = (
        run(attend_to_everything, *low, options=options, implementation=name) for name in ("eager", "sdpa")
    )
    for truth, theirs, ours in zip(exact, eager, fused, strict=True):
        assert ours.dtype == dtype
        assert (ours - truth).abs().max() <= 2 * (theirs - truth).abs().max()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_as_good_as_the_oracle_in_it(dtype, implementation):
    query_key, value, gradient, buckets, _ = make_inputs(37, 2)
    options = {"buckets": buckets, "chunk_length": 8, "causal": True}
    exact = run(lsh_attention_reference, query_key, value, gradient, **options)
    low = [tensor.to(dtype) for tensor in (query_key, value, gradient)]
    reference = run(lsh_attention_reference, *low, **options)
    actual = run(lsh_attention, *low, implementation=implementation, **options)
    for ours, theirs, truth in zip(actual, reference, exact, strict=True):
        assert ours.dtype == dtype
        assert (ours - truth).norm() <= 2 * (theirs - truth).norm()


# Between them, rounding alone decides which of several keys is the nearest.
NORMS = (1e-30, 1e-6, 1e5, 1e15)


@pytest.mark.parametrize("rounds", [1, 4])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("options", [{"causal": True}, {"allow_duplicate_attention": False}], ids=str)
def test_vectors_of_any_length(options, norm, rounds):
    query_key, value, gradient, buckets, mask = make_inputs(37, rounds, "left", torch.float32)
    query_key *= norm / 6**0.5
    # One row has a single token. What a masked token itself attends to means nothing.
    mask[0, 1:] = False
    gradient *= mask[..., None, None]
    options = {"buckets": buckets, "attention_mask": mask, "chunk_length": 8, "circular_look_around": False, **options}
    exact = [rows.double() for rows in (query_key, value, gradient)]
    expected = run(lsh_attention_reference, *exact, **options)
    # The gradient of long vectors vanishes: they see one key only.
    least = gradient.norm() if norm >= 1 else 0
    for implementation in IMPLEMENTATIONS:
        actual = run(lsh_attention, query_key, value, gradient, implementation=implementation, **options)
        for ours, truth in zip(actual, expected, strict=True):
            error = ((ours - truth) * mask[..., None, None]).norm()
            assert error <= FLOAT32_ERROR * max(truth.norm(), least), implementation


def test_equal_scores_of_any_size_share_exactly():
    """Where each score is a number of float32, and many are the same, sums of all rounds lose no digit."""
    query_key, value, gradient, buckets, _ = make_inputs(40, 4, dtype=torch.float32, size=16)
    options = {"buckets": buckets, "chunk_length": 8}
    for size in (2.0**-100, 1.0, 2.0**45):
        equal = size * query_key[:, :4].sign().repeat(1, 10, 1, 1)
        expected = run(lsh_attention_reference, equal.double(), value.double(), gradient.double(), **options)
        actual = run(lsh_attention, equal, value, gradient, implementation="eager", **options)
        least = gradient.norm() if size >= 1 else 0
        for ours, truth in zip(actual, expected, strict=True):
            assert (ours - truth).norm() <= FLOAT32_ERROR * max(truth.norm(), least)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_token_that_sees_only_itself_gets_exactly_its_value(implementation):
    query_key, value, _, buckets, _ = make_inputs(40, 4, dtype=torch.float32)
    output, _ = lsh_attention(query_key, value, buckets, chunk_length=8, causal=True, implementation=implementation)
    torch.testing.assert_close(output[:, 0], value[:, 0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mask", ["none", "scattered"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_with_successors_it_reads_nothing(implementation, mask):
    query_key, value, gradient, buckets, attention_mask = make_inputs(40, 4, mask, dtype=torch.float32)
    first = torch.zeros_like(gradient)
    first[:, 0] = gradient[:, 0]
    options = {"causal": True, "value_shift": 1, "chunk_length": 8, "attention_mask": attention_mask}
    output, *gradients = run(
        lsh_attention, query_key, value, first, buckets=buckets, implementation=implementation, **options
    )
    assert not output[:, 0].any() and output[:, 1].any()
    assert not any(each.any() for each in gradients)


@pytest.mark.parametrize("value_shift", [0, 1])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_future_has_no_influence(implementation, value_shift):
    query_key, value, _, buckets, _ = make_inputs(40, 2, dtype=torch.float32)
    options = {"buckets": buckets, "chunk_length": 8, "causal": True, "implementation": implementation}
    options["value_shift"] = value_shift
    before, _ = lsh_attention(query_key, value, **options)
    query_key[:, 25:], value[:, 25:] = torch.randn(2, *query_key[:, 25:].shape)
    after, _ = lsh_attention(query_key, value, **options)
    assert torch.equal(before[:, :25], after[:, :25])
    assert not torch.equal(before[:, 25:], after[:, 25:])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_masked_tokens_see_nothing_of_the_future_either(implementation):
    query_key, value, _, buckets, mask = make_inputs(40, 2, "scattered", dtype=torch.float32)
    options = {"buckets": buckets, "attention_mask": mask, "chunk_length": 8, "causal": True, "value_shift": 1}
    before, _ = lsh_attention(query_key, value, implementation=implementation, **options)
    assert not before[~mask].any() and before[mask].any()
    value[:, 25:] = torch.randn(value[:, 25:].shape)
    after, _ = lsh_attention(query_key, value, implementation=implementation, **options)
    assert torch.equal(before[:, :25], after[:, :25])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("circular", [True, False])
def test_masked_tokens_have_exactly_no_influence(circular, implementation):
    query_key, value, gradient, buckets, attention_mask = make_inputs(40, 3, "scattered", dtype=torch.float32)
    gradient = gradient * attention_mask[..., None, None]
    options = {"attention_mask": attention_mask, "chunk_length": 8, "circular_look_around": circular}
    options["implementation"] = implementation
    before = run(lsh_attention, query_key, value, gradient, buckets=buckets, **options)
    masked = ~attention_mask
    query_key[masked], value[masked] = 1e3 * torch.randn(2, *query_key[masked].shape)
    changed = buckets.masked_fill(masked[:, None, None], 5)
    after = run(lsh_attention, query_key, value, gradient, buckets=changed, **options)
    assert torch.equal(before[0][attention_mask], after[0][attention_mask])
    for old, new in zip(before[1:], after[1:], strict=True):
        assert torch.equal(old[attention_mask], new[attention_mask])
        assert not new[masked].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding_changes_nothing_without_the_circle(implementation):
    options = {"chunk_length": 8, "circular_look_around": False, "causal": True, "implementation": implementation}
    query_key, value, _, buckets, _ = make_inputs(37, 3)
    alone, _ = lsh_attention(query_key, value, buckets, **options)
    attention_mask = (torch.arange(80) < 37).expand(2, -1)
    longer = [torch.nn.functional.pad(rows, (0, 0, 0, 0, 0, 43), value=3.0) for rows in (query_key, value)]
    padded, _ = lsh_attention(
        *longer, torch.nn.functional.pad(buckets, (0, 43)), attention_mask=attention_mask, **options
    )
    torch.testing.assert_close(padded[:, :37], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_of_a_batch_do_not_touch(implementation):
    query_key, value, _, buckets, _ = make_inputs(37, 2)
    options = {"chunk_length": 8, "implementation": implementation}
    both, _ = lsh_attention(query_key, value, buckets, **options)
    for row in range(2):
        alone, _ = lsh_attention(query_key[row, None], value[row, None], buckets[row, None], **options)
        torch.testing.assert_close(both[row, None], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_takes_non_contiguous_inputs(implementation):
    query_key, value, _, buckets, _ = make_inputs(37, 2)
    options = {"chunk_length": 8, "implementation": implementation}
    expected, _ = lsh_attention(query_key, value, buckets, **options)
    strided = [rows.transpose(1, 2).contiguous().transpose(1, 2) for rows in (query_key, value)]
    assert not strided[0].is_contiguous()
    actual, _ = lsh_attention(*strided, buckets.mT.contiguous().mT, **options)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    "case",
    [
        "causal",
        "odd length",
        "far neighbours",
        "no duplicates, no circle",
        "longer circle",
        "successors",
        "successors, windows, own bucket",
    ],
)
@pytest.mark.parametrize("mask", MASKS)
def test_attention_map_reproduces_the_output(case, mask):
    options = dict(CASES[case])
    query_key, value, _, buckets, attention_mask = make_inputs(options.pop("length"), options.pop("rounds"), mask)
    output, weights = lsh_attention(
        query_key, value, buckets, chunk_length=8, attention_mask=attention_mask, return_weights=True, **options
    )
    expected = (weights @ value.transpose(1, 2)).transpose(1, 2)
    if attention_mask is None:
        attention_mask = torch.ones(query_key.shape[:2], dtype=torch.bool)
    torch.testing.assert_close(output[attention_mask], expected[attention_mask], rtol=1e-10, atol=1e-10)
    rows = weights.transpose(1, 2)[attention_mask]
    sums = torch.ones_like(rows.sum(-1))
    if "value_shift" in options:
        sums = lsh_attention(
            query_key, torch.ones_like(value), buckets, chunk_length=8, attention_mask=attention_mask, **options
        )[0][attention_mask].mean(-1)
        # Who sees nothing reads nothing.
        assert set(sums.round(decimals=9).flatten().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(rows.sum(-1), sums)
    if CASES[case].get("causal"):
        assert not weights.triu(1).any()


def test_dropout_zeroes_probabilities_and_keeps_their_expectation():
    query_key, value, _, buckets, _ = make_inputs(40, 1)
    value = torch.ones_like(value)
    options = {"chunk_length": 8, "num_chunks_before": 0}
    one, weights = lsh_attention(query_key, value, buckets, dropout_p=0.25, return_weights=True, **options)
    full = lsh_attention(query_key, value, buckets, return_weights=True, **options)[1]
    dropped = (weights == 0) & (full > 0)
    # 2 * 2 * 40 * 7 probabilities: five standard deviations around a quarter.
    assert dropped.sum() / (full > 0).sum() == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / 1120) ** 0.5)
    kept = ~dropped & (full > 0)
    torch.testing.assert_close(weights[kept], full[kept] / 0.75)
    again, _ = lsh_attention(query_key, value, buckets, dropout_p=0.25, **options)
    assert not torch.equal(one, again)


def test_full_attention_is_one_chunk():
    """With one bucket and one chunk the operator is softmax attention with shared queries and keys."""
    query_key, value, _, buckets, _ = make_inputs(20, 1)
    output, _ = lsh_attention(query_key, value, torch.zeros_like(buckets), chunk_length=20, num_chunks_before=0)
    query = query_key.transpose(1, 2)
    scores = query @ torch.nn.functional.normalize(query, dim=-1).mT
    scores.diagonal(dim1=-2, dim2=-1).fill_(-torch.inf)
    expected = (scores.softmax(-1) @ value.transpose(1, 2)).transpose(1, 2)
    # The epsilon inside the norm is relative to a mean square of about 1.
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


ERRORS = {
    "value": ({"value": torch.randn(2, 10, 2, 5)}, r"share one shape .* \[2, 10, 2, 4\] and \[2, 10, 2, 5\]"),
    "rank": ({"query_key": torch.randn(2, 10, 4), "value": torch.randn(2, 10, 4)}, "share one shape"),
    "buckets": ({"buckets": torch.zeros(2, 2, 1, 9, dtype=torch.int32)}, r"shape \[2, 2, rounds, 10\]"),
    "no rounds": ({"buckets": torch.zeros(2, 2, 0, 10, dtype=torch.int32)}, r"\[2, 2, rounds, 10\]"),
    "float buckets": ({"buckets": torch.zeros(2, 2, 1, 10)}, "must hold integers, but is torch.float32"),
    "mask": ({"attention_mask": torch.ones(2, 9)}, r"`attention_mask` must have shape \[2, 10\], but has \[2, 9\]"),
    "chunk": ({"chunk_length": 0}, "`chunk_length` must be at least 1 .* got 0"),
    "before": ({"num_chunks_before": -1}, "at least 0, but got 4, -1 before"),
    "padded": ({"padded_length": 8}, "multiple of `chunk_length=4` that holds 10 tokens, but is 8"),
    "windows on the circle": ({"sliding_window": True}, "`sliding_window=True` needs `circular_look_around=False`"),
    "shift": ({"value_shift": 2}, "`value_shift` must be 0 or 1, but got 2"),
    "successors both ways": ({"value_shift": 1}, "`value_shift=1` needs `causal=True`"),
    "maps of sdpa": (
        {"implementation": "sdpa", "return_weights": True},
        "'sdpa' implementation .* keeps no attention probabilities to return; use 'eager'",
    ),
    "dropout of sdpa": (
        {"implementation": "sdpa", "dropout_p": 0.1},
        "'sdpa' implementation .* no dropout .* `dropout_p` is 0.1. Set `lsh_attention_probs_dropout_prob=0`",
    ),
    "dropout": ({"dropout_p": 1.5}, "between 0 and 1, but got 1.5"),
    "implementation": (
        {"implementation": "flash"},
        r"no implementation 'flash' .* choose one of \['eager', 'sdpa', 'triton'\]",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_to_do(case):
    change, message = ERRORS[case]
    arguments = {
        "query_key": torch.randn(2, 10, 2, 4),
        "value": torch.randn(2, 10, 2, 4),
        "buckets": torch.zeros(2, 2, 1, 10, dtype=torch.int32),
        "chunk_length": 4,
    }
    with pytest.raises(ValueError, match=message):
        lsh_attention(**(arguments | change))


def test_an_empty_sequence_is_refused():
    with pytest.raises(ValueError, match="at least one token"):
        lsh_attention(
            torch.zeros(1, 0, 1, 4),
            torch.zeros(1, 0, 1, 4),
            torch.zeros(1, 1, 1, 0, dtype=torch.int32),
            chunk_length=4,
        )


def test_examples_run():
    module = importlib.import_module("hf_reformer.modeling.ops.lsh_operator")
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0
