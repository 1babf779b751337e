"""Several documents in a row, on the Triton kernels; see test_triton.py."""

import pytest
import torch
from test_triton import DEVICE, FLOAT32_ERROR, error, pytestmark, run

from hf_reformer.modeling.ops.documents import lay_out
from hf_reformer.modeling.ops.local_operator import local_attention
from hf_reformer.modeling.ops.lsh_operator import lsh_attention
from hf_reformer.modeling.ops.lsh_reference import lsh_attention_reference


__all__ = ["pytestmark"]

LENGTHS, CHUNK, BUCKETS = (20, 5, 33, 1), 16, 4
NO_CIRCLE = {"circular_look_around": False}
CASES = {
    "windows": {"causal": True, "sliding_window": True, "attend_across_buckets": False, **NO_CIRCLE},
    "windows over buckets": {"sliding_window": True, **NO_CIRCLE},
    "successors": {"causal": True, "value_shift": 1, "sliding_window": True, "attend_across_buckets": False}
    | NO_CIRCLE,
    "chunks": {"num_chunks_after": 1, **NO_CIRCLE},
    "circle, own bucket": {"causal": True, "attend_across_buckets": False},
}


def make(count):
    torch.manual_seed(0)
    numbers = torch.cat([torch.full((length,), i + 1) for i, length in enumerate(LENGTHS)])[None]
    _, mask, documents = lay_out(numbers, CHUNK)
    rows = [torch.randn(1, mask.shape[1], 1, 32) for _ in range(count)]
    rows[-1] *= mask[..., None, None]
    return rows, mask, documents.number


def compare(attend, define, rows, mask):
    *inputs, gradient = rows
    actual = run(attend, [row.to(DEVICE) for row in inputs], gradient.to(DEVICE), mask)
    expected = run(define, [row.double() for row in inputs], gradient.double(), mask)
    for ours, truth in zip(actual, expected, strict=True):
        assert error(ours, truth) <= FLOAT32_ERROR


@pytest.mark.parametrize("case", CASES)
def test_lsh_attention_is_the_oracles(case):
    rows, mask, numbers = make(3)
    buckets = torch.randint(BUCKETS, (1, 1, 2, mask.shape[1]), dtype=torch.int32)
    options = {"chunk_length": CHUNK, **CASES[case]}

    def attend(*rows):
        tables = {"attention_mask": mask.to(DEVICE), "documents": numbers.to(DEVICE), "num_buckets": BUCKETS}
        return lsh_attention(*rows, buckets.to(DEVICE), implementation="triton", **tables, **options)[0]

    def define(*rows):
        return lsh_attention_reference(*rows, buckets, attention_mask=mask, documents=numbers, **options)

    compare(attend, define, rows, mask)


@pytest.mark.parametrize("around", [(1, 0), (1, 1)])
def test_local_attention_is_that_of_plain_operations(around):
    rows, mask, numbers = make(4)

    def attend(*rows, implementation="triton", device=DEVICE):
        return local_attention(
            *rows,
            chunk_length=CHUNK,
            num_chunks_before=around[0],
            num_chunks_after=around[1],
            causal=around == (1, 0),
            circular_look_around=False,
            attention_mask=mask.to(device),
            documents=numbers.to(device),
            implementation=implementation,
        )[0]

    compare(attend, lambda *rows: attend(*rows, implementation="eager", device="cpu"), rows, mask)


def test_what_only_buckets_could_keep_apart_is_refused():
    rows, mask, numbers = make(2)
    buckets = torch.zeros(1, 1, 2, mask.shape[1], dtype=torch.int32)
    tables = {"attention_mask": mask.to(DEVICE), "documents": numbers.to(DEVICE)}
    with pytest.raises(ValueError, match="keeps documents of a row apart by buckets"):
        lsh_attention(
            *[row.to(DEVICE) for row in rows],
            buckets.to(DEVICE),
            chunk_length=CHUNK,
            implementation="triton",
            **tables,
        )
