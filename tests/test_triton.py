"""
The Triton kernels against the dense float64 oracle, in outputs and all gradients.

Without a GPU they run in Triton's interpreter, on NumPy: slowly, and with bfloat16 cut off rather than rounded.
"""

import importlib.util
import os
import re
import sys
from dataclasses import replace

import pytest
import torch

from hf_reformer.modeling.kernels import kernel_arguments, triton_launch
from hf_reformer.modeling.ops.chunking import pad_mask, padded_to_multiple
from hf_reformer.modeling.ops.implementations import AttentionCall
from hf_reformer.modeling.ops.local_options import LocalOptions
from hf_reformer.modeling.ops.local_triton import local_attention_triton
from hf_reformer.modeling.ops.lsh_hashing import draw_rotations, hash_vectors, sort_by_bucket
from hf_reformer.modeling.ops.lsh_operator import lsh_attention
from hf_reformer.modeling.ops.lsh_options import LSHOptions
from hf_reformer.modeling.ops.lsh_reference import lsh_attention_reference
from hf_reformer.modeling.ops.lsh_triton import lsh_attention_triton
from hf_reformer.modeling.ops.triton_support import why_not_triton
from hf_reformer.modeling.ops.value_shift import shift_values


IS_GPU = torch.cuda.is_available()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (IS_GPU or triton_launch.IS_INTERPRETED), reason="Triton is not installed, or not set to its interpreter"
    ),
    # Of what a query may not see; it is masked afterwards. A GPU says nothing.
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning"),
]

DEVICE = "cuda" if IS_GPU else "cpu"
NUM_BUCKETS = 6
# A sum of some dozens of float32 products.
FLOAT32_ERROR = 16 * torch.finfo(torch.float32).eps
NO_CIRCLE = {"circular_look_around": False}
WINDOWS = {"circular_look_around": False, "sliding_window": True}

# One line per thing that can differ; what is not named is as in `make_inputs` and `LSHOptions`.
CASES = {
    "causal": {"length": 40, "heads": 2, "batch": 2, "causal": True},
    "bidirectional": {"rounds": 3},
    "one round": {"rounds": 1, "mask": "right"},
    "odd length": {"length": 37, "causal": True},
    "odd length, no circle": {"length": 37, "rounds": 3, **NO_CIRCLE},
    "padding on the right": {"length": 37, "mask": "right", "causal": True},
    "padding on the left": {"mask": "left", "causal": True},
    "scattered padding": {"heads": 2, "length": 37, "mask": "scattered"},
    "scattered padding, no circle": {"mask": "scattered", **NO_CIRCLE},
    "one token": {"length": 1, "causal": True},
    "one chunk": {"length": 16},
    "no neighbours": {"num_chunks_before": 0},
    "look ahead only": {"length": 37, "num_chunks_before": 0, "num_chunks_after": 1, "causal": True},
    "far neighbours": {"num_chunks_before": 2, "num_chunks_after": 2},
    "far neighbours, no circle": {"num_chunks_before": 2, "num_chunks_after": 1, **NO_CIRCLE},
    "more neighbours than chunks": {"length": 20, "rounds": 1, "num_chunks_before": 2, "num_chunks_after": 2},
    "fewer chunks than neighbours": {"length": 10, "rounds": 1, "num_chunks_before": 2, "num_chunks_after": 1},
    "own bucket": {"length": 37, "attend_across_buckets": False},
    "own bucket of several rounds": {"rounds": 3, "attend_across_buckets": False, "one_bucket": True},
    "own bucket, no circle": {"attend_across_buckets": False, "causal": True, "mask": "left", **NO_CIRCLE},
    "windows": {"length": 37, "rounds": 1, **WINDOWS},
    "windows, causal, own bucket": {"attend_across_buckets": False, "causal": True, **WINDOWS},
    "windows on both sides": {"length": 60, "rounds": 1, "num_chunks_before": 2, "num_chunks_after": 1, **WINDOWS},
    "windows over blocks": {"length": 200, "chunk_length": 128, "rounds": 1, "batch": 1, **WINDOWS},
    "longer circle": {"length": 20, "padded_length": 64},
    "all tokens in one odd chunk": {"length": 21, "chunk_length": 21, "num_chunks_before": 0, "mask": "scattered"},
    "all tokens in the first of two chunks": {
        "length": 21,
        "chunk_length": 40,
        "padded_length": 80,
        "num_chunks_before": 0,
        "attend_across_buckets": False,
        "causal": True,
    },
    "chunks of 32": {"length": 90, "chunk_length": 32, "size": 64, "causal": True},
    "chunks of 64": {"length": 180, "chunk_length": 64, "size": 64, "batch": 1, "causal": True},
    "chunks of 128": {"length": 150, "chunk_length": 128, "rounds": 1, "batch": 1, "mask": "right"},
    "chunks of 256": {"length": 250, "chunk_length": 256, "num_chunks_before": 0, "rounds": 1, "batch": 1},
    "heads of 128": {"length": 90, "chunk_length": 64, "size": 128, "batch": 1},
    "long queries": {"scale": 1e3, "causal": True},
    "successors": {"length": 37, "rounds": 3, "mask": "left", "causal": True, "value_shift": 1},
    "successors, windows, own bucket": {
        "length": 37,
        "rounds": 1,
        "mask": "scattered",
        "causal": True,
        "value_shift": 1,
        "attend_across_buckets": False,
        **WINDOWS,
    },
}


def rows_for(mask):
    """Masks differ from row to row; without one a second row takes time alone."""
    return 1 if mask == "none" else 2


def make_mask(kind, batch, length):
    mask = torch.ones(batch, length, dtype=torch.bool)
    if kind == "right":
        mask[-1, -(length // 3) :] = False
    elif kind == "left":
        mask[-1, : length // 3] = False
    elif kind == "scattered":
        mask[:, ::3] = False
        mask[0, 0] = True
    return None if kind == "none" else mask


def make_inputs(length=48, rounds=2, mask="none", batch=None, heads=1, size=32, scale=1.0, one_bucket=False):
    """Query-key, value and gradient in float64, buckets and mask; what a masked token attends to means nothing."""
    batch = batch or rows_for(mask)
    query_key, value, gradient = torch.randn(3, batch, length, heads, size, dtype=torch.float64)
    rotations = draw_rotations(heads, size, rounds, NUM_BUCKETS, device=query_key.device, seed=rounds)
    buckets = hash_vectors(query_key, rotations, NUM_BUCKETS) * (not one_bucket)
    mask = make_mask(mask, batch, length)
    if mask is not None:
        gradient = gradient * mask[..., None, None]
    return scale * query_key, value, gradient, buckets, mask


def attend(query_key, value, buckets, mask=None, padded_length=None, chunk_length=16, **options):
    """`lsh_attention_triton`, with the order, the padding and the values that the operator gives it."""
    batch, length = query_key.shape[:2]
    options = LSHOptions(chunk_length=chunk_length, **options)
    padded_length = padded_length or padded_to_multiple(length, chunk_length)
    key_mask = pad_mask(mask, batch, length, padded_length, buckets.device)
    buckets = torch.nn.functional.pad(buckets, (0, padded_length - length))
    # Without a mask, the kernels know padding by its position.
    tables = buckets, sort_by_bucket(buckets, key_mask), None if mask is None else key_mask
    tables = [None if table is None else table.to(query_key.device) for table in tables]
    if options.value_shift:
        value = shift_values(value, None if mask is None else mask.to(value.device))
    return lsh_attention_triton(query_key, value, *tables, None, options)[0]


def run(function, rows, gradient, mask=None):
    """Output and gradients, on the CPU; zeros for the output of masked tokens."""
    rows = [each.detach().requires_grad_() for each in rows]
    output = function(*rows)
    gradients = torch.autograd.grad(output, rows, gradient)
    output = output.detach().cpu()
    if mask is not None:
        output = output.masked_fill(~mask[..., None, None], 0)
    return output, *(each.cpu() for each in gradients)


def run_kernels(query_key, value, gradient, buckets, mask=None, **options):
    rows, gradient = [query_key.to(DEVICE), value.to(DEVICE)], gradient.to(DEVICE)
    return run(lambda *rows: attend(*rows, buckets, mask, **options), rows, gradient, mask)


def run_oracle(query_key, value, gradient, buckets, mask=None, chunk_length=16, **options):
    options |= {"attention_mask": mask, "chunk_length": chunk_length}
    return run(lambda *rows: lsh_attention_reference(*rows, buckets, **options), [query_key, value], gradient, mask)


def error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


def split_case(case):
    """The arguments of `make_inputs` and those of the operator."""
    options = dict(CASES[case])
    names = ("length", "rounds", "mask", "batch", "heads", "size", "scale", "one_bucket")
    return {name: options.pop(name) for name in names if name in options}, options


@pytest.mark.parametrize("case", CASES)
def test_equals_the_oracle(case):
    shape, options = split_case(case)
    query_key, value, gradient, buckets, mask = make_inputs(**shape)
    expected = run_oracle(query_key, value, gradient, buckets, mask, **options)
    rows = [tensor.float() for tensor in (query_key, value, gradient)]
    actual = run_kernels(*rows, buckets, mask, **options)
    # Rounding the rows themselves moves the scores of long queries.
    rounded = run_oracle(*[row.double() for row in rows], buckets, mask, **options) if "scale" in shape else expected
    for name, ours, truth in zip(("output", "query_key", "value"), actual, rounded, strict=True):
        assert ours.dtype == torch.float32
        if not truth.any():
            assert not ours.any(), name
        else:
            assert error(ours, truth) <= FLOAT32_ERROR * shape.get("scale", 1), name


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e9, 1e15])
def test_vectors_of_any_length(scale):
    query_key, value, gradient, buckets, mask = make_inputs(37, 3, "left", scale=scale)
    # One row has a single token.
    mask[0, 1:] = False
    gradient *= mask[..., None, None]
    rows = [tensor.float() for tensor in (query_key, value, gradient)]
    options = {"causal": True, **NO_CIRCLE}
    expected = run_oracle(*[row.double() for row in rows], buckets, mask, **options)
    actual = run_kernels(*rows, buckets, mask, **options)
    assert error(actual[0], expected[0]) <= FLOAT32_ERROR
    # Long vectors see one key only: their gradient vanishes. That of the value: see `lsh_attention`.
    least = gradient.norm() if scale > 1 else 0
    assert (actual[1] - expected[1]).norm() <= FLOAT32_ERROR * max(expected[1].norm(), least)
    if scale < 1:
        assert error(actual[2], expected[2]) <= FLOAT32_ERROR


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", ["causal", "padding on the right", "chunks of 128"])
def test_low_precision_is_as_good_as_the_oracle_in_it(case, dtype):
    shape, options = split_case(case)
    *rows, buckets, mask = make_inputs(**shape)
    low = [row.to(dtype) for row in rows]
    expected = run_oracle(*rows, buckets, mask, **options)
    reference = run_oracle(*low, buckets, mask, **options)
    actual = run_kernels(*low, buckets, mask, **options)
    for ours, theirs, truth in zip(actual, reference, expected, strict=True):
        assert ours.dtype == dtype
        # The interpreter cuts bfloat16 off, with up to twice the error of rounding, again and again.
        cut_off = 1.5e-2 if dtype == torch.bfloat16 and not IS_GPU else 0.0
        assert error(ours, truth) <= max(2 * error(theirs, truth), cut_off)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rounds", [1, 3])
def test_a_token_that_sees_only_itself_gets_exactly_its_value(rounds, dtype):
    query_key, value, gradient, buckets, _ = make_inputs(20, rounds)
    # The first token of a causal text, and the only real one of a text without direction.
    for causal, mask in ((True, None), (False, torch.arange(20)[None] == 0)):
        gradient[:, 1:] = 0
        rows = [row.to(dtype) for row in (query_key, value, gradient)]
        output, grad_query_key, grad_value = run_kernels(*rows, buckets, mask, causal=causal)
        assert torch.equal(output[:, 0], rows[1][:, 0])
        assert torch.equal(grad_value[:, 0], rows[2][:, 0])
        assert not grad_value[:, 1:].any()
        assert not grad_query_key.any()


@pytest.mark.parametrize("circular", [True, False])
def test_masked_tokens_have_exactly_no_influence(circular):
    query_key, value, gradient, buckets, mask = make_inputs(37, 2, "scattered")
    query_key, value, gradient = query_key.float(), value.float(), gradient.float()
    before = run_kernels(query_key, value, gradient, buckets, mask, circular_look_around=circular)
    query_key[~mask], value[~mask] = 1e3 * torch.randn(2, *query_key[~mask].shape)
    after = run_kernels(
        query_key, value, gradient, buckets.masked_fill(~mask[:, None, None], 5), mask, circular_look_around=circular
    )
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[mask], new[mask])
        assert not new[~mask].any()


@pytest.mark.parametrize("options", [{}, NO_CIRCLE, {"num_chunks_after": 1}], ids=str)
def test_the_future_has_no_influence(options):
    query_key, value, gradient, buckets, _ = make_inputs(37, 2)
    query_key, value = query_key.float(), value.float()
    before = run_kernels(query_key, value, gradient.float(), buckets, causal=True, **options)[0]
    query_key[:, 25:], value[:, 25:] = torch.randn(2, *query_key[:, 25:].shape)
    after = run_kernels(query_key, value, gradient.float(), buckets, causal=True, **options)[0]
    assert torch.equal(before[:, :25], after[:, :25])
    assert not torch.equal(before[:, 25:], after[:, 25:])


def test_two_runs_agree_bit_for_bit():
    query_key, value, gradient, buckets, mask = make_inputs(37, 2, "left")
    rows = [row.float() for row in (query_key, value, gradient)]
    for one, other in zip(run_kernels(*rows, buckets, mask), run_kernels(*rows, buckets, mask), strict=True):
        assert torch.equal(one, other)


def test_takes_inputs_with_any_strides():
    query_key, value, gradient, buckets, _ = make_inputs(20, 1, batch=2, heads=2)
    rows = [row.float() for row in (query_key, value, gradient)]
    expected = run_kernels(*rows, buckets)
    by_heads = [row.transpose(1, 2).contiguous().transpose(1, 2) for row in rows]
    by_columns = [row.mT.contiguous().mT for row in rows]
    beside_others = [torch.cat([row, row], dim=-1)[..., :32] for row in rows]
    for strided in (by_heads, by_columns, beside_others):
        assert not strided[0].is_contiguous()
        for ours, theirs in zip(run_kernels(*strided, buckets.mT.contiguous().mT), expected, strict=True):
            assert torch.equal(ours, theirs)


def test_rows_that_must_be_copied_are_copied_once(monkeypatch):
    copies, with_contiguous_rows = [], kernel_arguments.with_contiguous_rows

    def counted(rows):
        copied = with_contiguous_rows(rows)
        copies.extend([copied] if copied is not rows else [])
        return copied

    monkeypatch.setattr(kernel_arguments, "with_contiguous_rows", counted)
    *rows, gradient, buckets, _ = make_inputs(20, 1, heads=2)
    run_kernels(*(row.float().mT.contiguous().mT for row in rows), gradient.float(), buckets)
    assert len(copies) == len(rows)


def test_runs_without_gradients_and_for_one_of_two():
    query_key, value, gradient, buckets, _ = make_inputs(20, 1)
    query_key, value, gradient = (row.float().to(DEVICE) for row in (query_key, value, gradient))
    expected = run_kernels(query_key, value, gradient, buckets)
    assert torch.equal(attend(query_key, value, buckets).cpu(), expected[0])
    output = attend(query_key, value.requires_grad_(), buckets)
    assert torch.equal(torch.autograd.grad(output, value, gradient)[0].cpu(), expected[2])


# `circle` is the length of the circle of chunks, 0 for the next multiple of the chunk length, None for no circle.
LOCAL_CASES = {
    "causal": {"heads": 2, "batch": 2, "causal": True},
    "bidirectional": {"around": (1, 1)},
    "odd length": {"length": 37, "causal": True},
    "odd length, no circle": {"length": 37, "around": (1, 1), "circle": None},
    "no neighbours": {"length": 37, "around": (0, 0)},
    "far neighbours": {"length": 70, "around": (2, 1)},
    "look ahead only": {"length": 37, "around": (0, 2), "circle": None},
    "more neighbours than chunks": {"length": 21, "around": (2, 2)},
    "longer circle": {"length": 37, "around": (1, 1), "circle": 64},
    "no circle, causal": {"causal": True, "circle": None},
    "padding on the right": {"length": 37, "mask": "right", "causal": True},
    "padding on the left": {"mask": "left", "around": (1, 1), "circle": None},
    "scattered padding": {"heads": 2, "length": 37, "mask": "scattered", "around": (1, 1)},
    "one short chunk": {"length": 13, "around": (0, 0), "chunk_length": 13, "mask": "scattered"},
    "one token": {"length": 1, "around": (0, 0), "chunk_length": 1, "causal": True},
    "first of two chunks": {"length": 20, "around": (0, 0), "chunk_length": 40, "circle": 80, "mask": "left"},
    "chunks of 64": {"length": 150, "chunk_length": 64, "size": 64, "causal": True, "circle": None},
    "chunks of 128": {"length": 150, "chunk_length": 128, "around": (1, 1)},
    "heads of 128": {"length": 90, "chunk_length": 64, "size": 128, "batch": 1, "around": (1, 1)},
}


def dense_local_attention(query, key, value, mask, padded_length, chunk_length, around, causal, circular):
    """Softmax over the multiset of keys that a query has in its window, one pair of chunks at a time."""
    length, size = query.shape[1], query.shape[3]
    num_chunks = padded_length // chunk_length
    times = torch.zeros(num_chunks, num_chunks, dtype=query.dtype)
    for chunk in range(num_chunks):
        for offset in range(-around[0], around[1] + 1):
            if circular:
                # Further round the circle than once is the chunk itself, as in stock Reformer.
                times[chunk, (chunk + offset) % num_chunks if abs(offset) < num_chunks else chunk] += 1
            elif 0 <= chunk + offset < num_chunks:
                times[chunk, chunk + offset] += 1
    times = times.repeat_interleave(chunk_length, 0).repeat_interleave(chunk_length, 1)[:length, :length]
    times = times.tril() if causal else times
    if mask is not None:
        # A masked row means nothing, so it may see itself here.
        times = torch.where(mask[..., None], times * mask[:, None], torch.eye(length, dtype=times.dtype))[:, None]
    query, key, value = (rows.transpose(1, 2) for rows in (query, key, value))
    weights = (query @ key.mT / size**0.5 + times.log()).softmax(-1)
    return (weights @ value).transpose(1, 2)


def make_local(
    length=48, mask="none", batch=None, heads=1, size=32, chunk_length=16, around=(1, 0), circle=0, causal=False
):
    """Query, key, value and gradient in float64, the mask, and the arguments of `dense_local_attention`."""
    batch = batch or rows_for(mask)
    mask = make_mask(mask, batch, length)
    rows = list(torch.randn(4, batch, length, heads, size, dtype=torch.float64))
    if mask is not None:
        rows[3] = rows[3] * mask[..., None, None]
    padded_length = circle or padded_to_multiple(length, chunk_length)
    return *rows, mask, (padded_length, chunk_length, around, causal, circle is not None)


def run_local_kernels(query, key, value, gradient, mask, definition):
    padded_length, chunk_length, around, causal, circular = definition
    # Without a mask, the kernels know padding by its position.
    key_mask = None if mask is None else torch.nn.functional.pad(mask, (0, padded_length - mask.shape[1]))

    options = LocalOptions(
        chunk_length=chunk_length,
        num_chunks_before=around[0],
        num_chunks_after=around[1],
        padded_length=padded_length,
        causal=causal,
        circular_look_around=circular,
    )

    def attend_locally(*rows):
        return local_attention_triton(*rows, None if key_mask is None else key_mask.to(DEVICE), None, options)[0]

    return run(attend_locally, [rows.to(DEVICE) for rows in (query, key, value)], gradient.to(DEVICE), mask)


@pytest.mark.parametrize("case", LOCAL_CASES)
def test_local_attention_equals_the_definition(case):
    *rows, gradient, mask, definition = make_local(**LOCAL_CASES[case])
    expected = run(lambda *rows: dense_local_attention(*rows, mask, *definition), rows, gradient, mask)
    actual = run_local_kernels(*[row.float() for row in (*rows, gradient)], mask, definition)
    for name, ours, truth in zip(("output", "query", "key", "value"), actual, expected, strict=True):
        if truth.abs().max() < 1e-12:
            assert ours.abs().max() < 1e-6, name
        else:
            assert error(ours, truth) <= FLOAT32_ERROR, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_local_attention_in_low_precision(dtype):
    *rows, mask, definition = make_local(37, "left", causal=True)
    results = []
    for kind in (torch.float64, dtype):
        *each, gradient = [row.to(kind) for row in rows]
        results.append(run(lambda *rows: dense_local_attention(*rows, mask, *definition), each, gradient, mask))
    actual = run_local_kernels(*[row.to(dtype) for row in rows], mask, definition)
    for ours, truth, theirs in zip(actual, *results, strict=True):
        assert ours.dtype == dtype
        cut_off = 1.5e-2 if dtype == torch.bfloat16 and not IS_GPU else 0.0
        assert error(ours, truth) <= max(2 * error(theirs, truth), cut_off)


def test_masked_tokens_have_exactly_no_influence_on_local_attention():
    *rows, gradient, mask, definition = make_local(37, "scattered", around=(1, 1))
    rows, gradient = [row.float() for row in rows], gradient.float()
    before = run_local_kernels(*rows, gradient, mask, definition)
    for row in rows:
        row[~mask] = 1e3 * torch.randn_like(row[~mask])
    for old, new in zip(before, run_local_kernels(*rows, gradient, mask, definition), strict=True):
        assert torch.equal(old[mask], new[mask])
        assert not new[~mask].any()


POSSIBLE = AttentionCall(
    device=torch.device(DEVICE),
    dtype=torch.float32,
    head_size=32,
    chunk_length=16,
    num_chunks_before=1,
    num_chunks_after=0,
    length=64,
)
REFUSALS = {
    "maps": ({"return_weights": True}, "keeps no attention probabilities to return; use 'eager' for attention maps"),
    "dropout": ({"dropout_p": 0.1}, "has no dropout on attention probabilities, but `dropout_p` is 0.1"),
    "duplicates": (
        {"allow_duplicate_attention": False},
        "counts a key once for each round .* use another with `allow_duplicate_attention=False`",
    ),
    "head size": ({"head_size": 48}, r"head sizes \[32, 64, 128\], but not 48; use 'eager'"),
    "chunk length": ({"chunk_length": 24}, r"chunks of \[16, 32, 64, 128, 256\] tokens, but not 24; use 'eager'"),
    "long chunk": ({"chunk_length": 300, "num_chunks_before": 0, "length": 290}, "but not 300"),
    "neighbours": ({"num_chunks_after": 3}, "looks at up to 2 chunks on either side, but not at 3; use 'eager'"),
    "dtype": ({"dtype": torch.float64}, "but not in torch.float64; use 'eager'"),
    "device": (
        {"device": torch.device("meta")},
        "needs a CUDA device, but the tensors are on meta; move the model to one, or use 'eager'",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_say_what_to_do(case, monkeypatch):
    change, message = REFUSALS[case]
    if case == "device":
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert why_not_triton(POSSIBLE) is None or case == "device"
    assert re.search(message, why_not_triton(replace(POSSIBLE, **change)))


def test_the_operator_raises_what_is_refused():
    rows = torch.zeros(1, 32, 1, 48)
    buckets = torch.zeros(1, 1, 1, 32, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"'triton' implementation of this attention .* but not 48"):
        lsh_attention(rows, rows, buckets, chunk_length=16, implementation="triton")


def test_without_triton_the_kernels_can_be_imported_and_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    path = os.path.join(os.path.dirname(triton_launch.__file__), "triton_kernels.py")
    spec = importlib.util.spec_from_file_location("kernels_without_triton", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    assert module.triton is None
    monkeypatch.setattr(triton_launch, "triton", None)
    assert "pip install triton" in why_not_triton(POSSIBLE)


def test_a_late_change_of_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setattr(triton_launch, "IS_INTERPRETED", not triton_launch.IS_INTERPRETED)
    assert "set it before Python starts" in why_not_triton(POSSIBLE)
