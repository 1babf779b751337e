"""Several documents in a row: none sees another, and each computes what it computes alone."""

from functools import partial

import pytest
import torch

from hf_reformer.modeling.ops.documents import lay_out
from hf_reformer.modeling.ops.local_operator import local_attention
from hf_reformer.modeling.ops.lsh_operator import lsh_attention
from hf_reformer.modeling.ops.lsh_reference import lsh_attention_reference


HEADS, SIZE, CHUNK, BUCKETS = 2, 8, 8, 4
LENGTHS = (37, 5, 40, 1, 16)
IMPLEMENTATIONS = ["eager", "sdpa"]
EXACT = {"circular_look_around": False}
LSH_CASES = {
    "windows": {"sliding_window": True, "attend_across_buckets": False, **EXACT},
    "windows over buckets": {"sliding_window": True, **EXACT},
    "windows, successors": {"sliding_window": True, "attend_across_buckets": False, "value_shift": 1, **EXACT},
    "chunks": EXACT,
    "chunks, own bucket": {"attend_across_buckets": False, **EXACT},
    "chunks, each key once": {"allow_duplicate_attention": False, **EXACT},
    "chunks, neighbours on both sides": {"num_chunks_after": 1, **EXACT},
    "circle": {},
    "circle, own bucket": {"attend_across_buckets": False},
    "circle, successors": {"value_shift": 1},
}


def packed(alignment, *shapes):
    """Random tensors `[1, P, ...]` of all documents in a row, their mask and numbers, and where each document is."""
    numbers = torch.cat([torch.full((length,), i + 1) for i, length in enumerate(LENGTHS)])[None]
    _, mask, documents = lay_out(numbers, alignment)
    return [torch.randn(1, mask.shape[1], *shape, dtype=torch.float64) for shape in shapes], mask, documents


def run(attend, rows, gradient):
    """Output and the gradients of all rows."""
    rows = [row.clone().requires_grad_() for row in rows]
    output = attend(*rows)
    output.backward(gradient)
    return [output.detach(), *(row.grad for row in rows)]


def lsh_arguments(case, causal):
    options = LSH_CASES[case]
    if options.get("value_shift") and not causal:
        pytest.skip("values of successors are for causal models")
    return {"chunk_length": CHUNK, "causal": causal, **options}


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("case", LSH_CASES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_lsh_attention_is_the_oracles(implementation, case, causal, rounds):
    torch.manual_seed(0)
    options = lsh_arguments(case, causal)
    (query_key, value, gradient), mask, documents = packed(CHUNK, *[(HEADS, SIZE)] * 3)
    buckets = torch.randint(BUCKETS, (1, HEADS, rounds, mask.shape[1]))
    given = {"attention_mask": mask, "documents": documents.number, **options}
    gradient = gradient * mask[..., None, None]
    expected = run(lambda *rows: lsh_attention_reference(*rows, buckets, **given), [query_key, value], gradient)

    def attend(*rows):
        return lsh_attention(*rows, buckets, num_buckets=BUCKETS, implementation=implementation, **given)[0]

    for actual, wanted in zip(run(attend, [query_key, value], gradient), expected, strict=True):
        torch.testing.assert_close(actual[mask], wanted[mask], rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("case", [case for case in LSH_CASES if "circle" not in case])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_lsh_attention_of_each_document_is_that_of_the_document_alone(implementation, case, causal):
    torch.manual_seed(0)
    options = lsh_arguments(case, causal)
    # Windows need no borders.
    (query_key, value, gradient), mask, documents = packed(1 if "windows" in case else CHUNK, *[(HEADS, SIZE)] * 3)
    buckets = torch.randint(BUCKETS, (1, HEADS, 2, mask.shape[1]))
    gradient = gradient * mask[..., None, None]

    def attend(*rows, buckets=buckets, **given):
        return lsh_attention(*rows, buckets, implementation=implementation, **options, **given)[0]

    together = run(
        lambda *rows: attend(*rows, attention_mask=mask, documents=documents.number), [query_key, value], gradient
    )
    for _, start, length in documents.spans:
        where = slice(start, start + length)
        attend_alone = partial(attend, buckets=buckets[..., where])
        alone = run(attend_alone, [query_key[:, where], value[:, where]], gradient[:, where])
        for actual, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(actual[:, where], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("around", [(1, 0), (1, 1), (0, 0), (2, 1)])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_local_attention_of_each_document_is_that_of_the_document_alone(implementation, causal, around):
    torch.manual_seed(0)
    (*rows, gradient), mask, documents = packed(CHUNK, *[(HEADS, SIZE)] * 4)
    gradient = gradient * mask[..., None, None]

    def attend(*rows, **given):
        return local_attention(
            *rows,
            chunk_length=CHUNK,
            num_chunks_before=around[0],
            num_chunks_after=around[1],
            causal=causal,
            circular_look_around=False,
            implementation=implementation,
            **given,
        )[0]

    together = run(lambda *rows: attend(*rows, attention_mask=mask, documents=documents.number), rows, gradient)
    for _, start, length in documents.spans:
        where = slice(start, start + length)
        alone = run(attend, [row[:, where] for row in rows], gradient[:, where])
        for actual, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(actual[:, where], expected, rtol=0, atol=1e-12)
