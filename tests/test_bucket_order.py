"""The order of buckets in a growing text, against a list that is sorted anew."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_reformer.modeling.decoding.bucket_order import NO_TOKEN, BucketOrder, bucket_of, encode, position_of


ROWS, HEADS, ROUNDS, BUCKETS = 2, 2, 3, 4


def some_codes(start, count):
    """Codes of new columns; a few hold no token."""
    buckets = torch.randint(BUCKETS, (ROWS, HEADS, ROUNDS, count))
    positions = torch.arange(start, start + count).expand(ROWS, -1)
    return encode(buckets, positions, torch.rand(ROWS, count) < 0.9, BUCKETS)


def check(order, codes, padded_length):
    """All that `order` tells, against the sorted codes."""
    ordered = codes.sort(dim=-1).values
    expected = ordered.new_full((ROWS, HEADS, ROUNDS, padded_length), NO_TOKEN)
    expected[..., : codes.shape[3]] = ordered
    expected = expected.flatten(2)
    places = torch.randint(ROUNDS * padded_length, (ROWS, HEADS, 50))
    assert torch.equal(order.look_up(places, padded_length), expected.gather(2, places))
    assert torch.equal(order.places(codes), torch.searchsorted(ordered, codes.contiguous()))


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(st.one_of(st.integers(1, 5), st.integers(60, 70), st.integers(-80, -1)), min_size=1, max_size=12),
    seed=st.integers(0, 99),
)
def test_tells_what_sorting_anew_would(steps, seed):
    torch.manual_seed(seed)
    codes = some_codes(0, 10)
    order = BucketOrder(codes)
    for step in steps:
        length = codes.shape[3]
        if step > 0:
            added = some_codes(length, step)
            order.append(added)
            codes = torch.cat([codes, added], dim=3)
        else:
            removed = min(-step, length - 1)
            codes = codes[..., : length - removed]
            order.crop(removed, torch.full((ROWS,), length - removed))
        check(order, codes, padded_length=codes.shape[3] + 7)
        rows = torch.randint(ROWS, (ROWS,))
        order.select(rows)
        codes = codes[rows]
        check(order, codes, padded_length=codes.shape[3])


def test_codes_hold_bucket_and_position():
    buckets = torch.tensor([[[[3, 0]], [[1, 2]]]]).expand(1, 2, 1, 2).repeat(1, 1, 2, 1)
    codes = encode(buckets, torch.tensor([[5, 2**20]]), torch.tensor([[True, False]]), num_buckets=4)
    assert position_of(codes)[0, 0, :, 0].tolist() == [5, 5]
    assert bucket_of(codes)[0, 0, :, 0].tolist() == [3, 7]
    assert (codes[..., 1] == NO_TOKEN).all()
