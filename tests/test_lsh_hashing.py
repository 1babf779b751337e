"""Hashing against its definition, one vector at a time, and the randomness behind it."""

from math import prod

import pytest
import torch

from hf_reformer.modeling.ops import lsh_hashing
from hf_reformer.modeling.ops.lsh_hashing import (
    bucket_factors,
    default_num_buckets,
    draw_rotations,
    hash_vectors,
    sort_by_bucket,
)


CPU = torch.device("cpu")
NUM_BUCKETS = [2, 8, (6,), (4, 6), [2, 4, 6]]
HEADS, SIZE, ROUNDS = 3, 5, 4


def draw(num_buckets, seed=0, rounds=ROUNDS):
    return draw_rotations(HEADS, SIZE, rounds, num_buckets, device=CPU, seed=seed)


def slow_bucket(vector, rotation, factors):
    """`argmax([xR; -xR])` for each factor's columns, the first factor counting fastest."""
    bucket, stride, column = 0, 1, 0
    for factor in factors:
        projected = [float(vector @ rotation[:, column + i]) for i in range(factor // 2)]
        both = projected + [-number for number in projected]
        bucket += stride * both.index(max(both))
        stride *= factor
        column += factor // 2
    return bucket


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("num_buckets", NUM_BUCKETS, ids=str)
def test_definition(num_buckets, contiguous):
    vectors, rotations = torch.randn(2, 9, HEADS, SIZE, dtype=torch.float64), draw(num_buckets).double()
    if not contiguous:
        vectors = vectors.transpose(1, 2).contiguous().transpose(1, 2)
    buckets = hash_vectors(vectors, rotations, num_buckets)
    assert buckets.shape == (2, HEADS, ROUNDS, 9)
    assert buckets.dtype == torch.int32
    for b, h, r, i in torch.cartesian_prod(*map(torch.arange, buckets.shape)):
        expected = slow_bucket(vectors[b, i, h], rotations[h, :, r], bucket_factors(num_buckets))
        assert buckets[b, h, r, i] == expected


@pytest.mark.parametrize("num_buckets", NUM_BUCKETS, ids=str)
def test_every_bucket_is_used_and_no_other(num_buckets):
    # In more dimensions than rotations, where every combination of signs occurs.
    rotations = draw_rotations(HEADS, 32, ROUNDS, num_buckets, device=CPU, seed=0)
    buckets = hash_vectors(torch.randn(1, 3000, HEADS, 32), rotations, num_buckets)
    for round_buckets in buckets.flatten(0, 2):
        assert round_buckets.unique().tolist() == list(range(prod(bucket_factors(num_buckets))))


def test_buckets_depend_on_the_direction_only():
    vectors, rotations = torch.randn(2, 50, HEADS, SIZE), draw(8)
    buckets = hash_vectors(vectors, rotations, 8)
    assert torch.equal(hash_vectors(0.125 * vectors, rotations, 8), buckets)
    # The opposite direction is half the buckets away.
    assert torch.equal(hash_vectors(-vectors, rotations, 8), (buckets + 4) % 8)
    # Of equal projections the first counts.
    assert not hash_vectors(torch.zeros(1, 2, HEADS, SIZE), rotations, 8).any()


@pytest.mark.parametrize("at_once", [1, 500])
def test_pieces_make_no_difference(at_once, monkeypatch):
    vectors, rotations = torch.randn(2, 50, HEADS, SIZE), draw((4, 6))
    expected = hash_vectors(vectors, rotations, (4, 6))
    monkeypatch.setattr(lsh_hashing, "PROJECTIONS_AT_ONCE", at_once)
    assert torch.equal(hash_vectors(vectors, rotations, (4, 6)), expected)


def test_near_vectors_meet_more_often_than_far_ones():
    vectors, rotations = torch.randn(1, 400, HEADS, SIZE), draw(8, rounds=8)
    buckets = hash_vectors(vectors, rotations, 8)
    met = [
        (hash_vectors(vectors + distance * torch.randn_like(vectors), rotations, 8) == buckets).float().mean()
        for distance in (0.01, 0.1, 1.0, 100.0)
    ]
    assert 1 > met[0] > met[1] > met[2] > met[3] > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_buckets", [8, (4, 6)], ids=str)
def test_low_precision_errs_only_between_near_equals(num_buckets, dtype):
    vectors, rotations = torch.randn(2, 200, HEADS, SIZE).to(dtype), draw(num_buckets)
    buckets = hash_vectors(vectors, rotations, num_buckets)
    assert buckets.dtype == torch.int32
    # Rounding of the rotations and of the projections, on either side of a comparison.
    eps = torch.finfo(dtype).eps
    per_round = vectors.double().transpose(1, 2)[:, :, None]
    projected = per_round @ rotations.double().permute(0, 2, 1, 3)
    slack = 2 * eps * (per_round.abs() @ rotations.double().abs().permute(0, 2, 1, 3)).amax(-1)
    stride, column = 1, 0
    for factor in bucket_factors(num_buckets):
        part = projected[..., column : column + factor // 2]
        both = torch.cat([part, -part], dim=-1)
        chosen = both.gather(-1, (buckets // stride % factor).long()[..., None])[..., 0]
        assert (both.amax(-1) - chosen <= slack).all()
        assert (both.amax(-1) == chosen).double().mean() > 0.9
        stride *= factor
        column += factor // 2


def test_no_gradient_flows_through_hashing():
    vectors = torch.randn(2, 9, HEADS, SIZE, requires_grad=True)
    assert not hash_vectors(vectors, draw(8), 8).requires_grad


def test_rounds_and_heads_are_hashed_apart():
    buckets = hash_vectors(torch.randn(1, 200, 1, SIZE).expand(-1, -1, HEADS, -1), draw(8), 8)
    assert len(buckets.flatten(0, 2).unique(dim=0)) == HEADS * ROUNDS


@pytest.mark.parametrize("num_buckets", NUM_BUCKETS, ids=str)
def test_rotations(num_buckets):
    rotations = draw(num_buckets)
    columns = sum(bucket_factors(num_buckets)) // 2
    assert rotations.shape == (HEADS, SIZE, ROUNDS, columns)
    assert rotations.dtype == torch.float32
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(rotations, torch.randn(HEADS, SIZE, ROUNDS, columns, generator=generator))
    assert torch.equal(rotations, draw(num_buckets))
    assert not torch.equal(rotations, draw(num_buckets, seed=1))


def test_a_seed_leaves_the_default_generator_alone():
    before = torch.get_rng_state()
    rotations = draw(8, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(draw(8, seed=3), rotations)


def test_without_a_seed_the_default_generator_is_used():
    torch.manual_seed(5)
    first, second = draw(8, seed=None), draw(8, seed=None)
    torch.manual_seed(5)
    expected = torch.randn(2, HEADS, SIZE, ROUNDS, 4)
    assert torch.equal(first, expected[0])
    assert torch.equal(second, expected[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rotations_are_the_same_whatever_the_default_dtype(dtype):
    """The numbers drawn depend on it."""
    expected = draw(8)
    torch.set_default_dtype(dtype)
    assert torch.equal(draw(8), expected)
    assert draw(8, seed=None).dtype == torch.float32


@pytest.mark.parametrize("masked", [True, False])
def test_sort_by_bucket_is_stable_with_masked_tokens_last(masked):
    # Few buckets and many tokens: a sort that is not stable shows.
    buckets = torch.randint(3, (2, HEADS, ROUNDS, 300), dtype=torch.int32)
    mask = torch.rand(2, 300) < 0.7 if masked else None
    order = sort_by_bucket(buckets, mask)
    assert order.dtype == torch.int32
    for b, h, r in torch.cartesian_prod(*map(torch.arange, order.shape[:3])):
        is_real = [True] * 300 if mask is None else mask[b].tolist()
        row = buckets[b, h, r].tolist()
        expected = sorted(range(300), key=lambda i: (not is_real[i], row[i] if is_real[i] else 0, i))
        assert order[b, h, r].tolist() == expected


def test_bucket_factors():
    assert bucket_factors(8) == (8,)
    assert bucket_factors([4, 6]) == bucket_factors((4, 6)) == (4, 6)
    assert [prod(bucket_factors(num_buckets)) for num_buckets in NUM_BUCKETS] == [2, 8, 6, 24, 48]


@pytest.mark.parametrize("longest", [64, 4096, 2**19])
@pytest.mark.parametrize("chunk_length", [2, 16, 64])
def test_default_num_buckets(chunk_length, longest):
    """The largest power of two in twice the number of chunks; two factors, as equal as can be, when it is large."""
    for length in range(chunk_length + 1, 200 * chunk_length, 7 * chunk_length - 3):
        num_buckets = default_num_buckets(length, chunk_length, longest)
        factors, total = bucket_factors(num_buckets), prod(bucket_factors(num_buckets))
        assert total <= 2 * (length // chunk_length) < 2 * total
        assert all(factor >= 2 and factor & (factor - 1) == 0 for factor in factors)
        limit = 2 * max(int((longest // chunk_length) ** 0.5), chunk_length)
        assert len(factors) == (2 if total > limit else 1)
        assert len(factors) == 1 or factors[1] in (factors[0], 2 * factors[0])
        assert prod(factors) == total
