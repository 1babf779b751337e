"""The kernels that hash and sort, against what PyTorch's operators give."""

import pytest
import torch

from hf_reformer.modeling.kernels import triton_hash_launch, triton_launch
from hf_reformer.modeling.ops.lsh_hashing import draw_rotations, hash_vectors, sort_by_bucket
from hf_reformer.modeling.ops.lsh_operator import lsh_attention


IS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if IS_GPU else "cpu"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (IS_GPU or triton_launch.IS_INTERPRETED), reason="Triton is not installed, or not set to its interpreter"
    ),
]

# Half of a factor less than, equal to and more than what is worked on at a time, and no multiple of it.
NUMBERS_OF_BUCKETS = [2, 6, 32, 300, [4, 6], [32, 64]]


@pytest.fixture(autouse=True)
def counted_launches(monkeypatch):
    """How often each kernel's function was called."""
    counts = {"hash_with_kernels": 0, "sort_with_kernels": 0}

    def counted(name, function):
        def call(*args):
            counts[name] += 1
            return function(*args)

        return call

    for name in counts:
        monkeypatch.setattr(triton_hash_launch, name, counted(name, getattr(triton_hash_launch, name)))
    return counts


def make_vectors(length, heads=2, size=32, dtype=torch.float32):
    """`[2, length, heads, size]`, a part of something larger."""
    return torch.randn(2, length, 3, heads, size, device=DEVICE).to(dtype)[:, :, 1]


def draw(num_buckets, heads=2, size=32, rounds=3):
    return draw_rotations(heads, size, rounds, num_buckets, device=torch.device(DEVICE), seed=7)


@pytest.mark.parametrize("num_buckets", NUMBERS_OF_BUCKETS, ids=str)
@pytest.mark.parametrize("length", [1, 150])
def test_buckets_are_those_of_matrix_products(length, num_buckets, counted_launches):
    vectors, rotations = make_vectors(length), draw(num_buckets)
    buckets = hash_vectors(vectors, rotations, num_buckets, "triton")
    assert counted_launches["hash_with_kernels"] == 1
    assert buckets.dtype == torch.int32
    assert torch.equal(buckets, hash_vectors(vectors, rotations, num_buckets, "eager"))
    assert counted_launches["hash_with_kernels"] == 1


@pytest.mark.parametrize("size", [64, 128])
def test_larger_heads(size, counted_launches):
    vectors, rotations = make_vectors(40, heads=1, size=size), draw(20, heads=1, size=size)
    assert torch.equal(hash_vectors(vectors, rotations, 20, "triton"), hash_vectors(vectors, rotations, 20, "eager"))
    assert counted_launches["hash_with_kernels"] == 1


def test_any_strides(counted_launches):
    vectors = make_vectors(40, heads=32, size=2).transpose(2, 3)
    assert torch.equal(hash_vectors(vectors, draw(20), 20, "triton"), hash_vectors(vectors, draw(20), 20, "eager"))
    assert counted_launches["hash_with_kernels"] == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_the_projection_on_the_bucket_is_the_largest_but_for_rounding(dtype):
    factors = [12, 40]
    vectors, rotations = make_vectors(200, dtype=dtype), draw(factors)
    buckets = hash_vectors(vectors, rotations, factors, "triton").long()
    exact = torch.einsum("blhd,hdrw->bhrlw", vectors.double(), rotations.to(dtype).double())
    # Rounded once, or in the interpreter cut off; the sum is one of 32 products in float32.
    roundings = 1 if IS_GPU or dtype == torch.float16 else 2
    for projection, bucket in zip(exact.split([6, 20], dim=-1), (buckets % 12, buckets // 12), strict=True):
        both = torch.cat([projection, -projection], dim=-1)
        largest, found = both.amax(-1), both.gather(-1, bucket[..., None])[..., 0]
        assert ((largest - found) <= roundings * torch.finfo(dtype).eps * largest.abs() + 1e-5).all()
        # Most are not near a tie.
        assert (both.argmax(-1) == bucket).float().mean() > 0.9


def test_of_equal_projections_the_first_counts():
    # Whole numbers, whose sums are exact: a matrix product may add up equal columns in another order.
    rotations = draw(300).round()
    # Each direction again, further on than the kernel looks at once, and rows that have none.
    rotations[..., 75:] = rotations[..., :75]
    vectors = make_vectors(40).round()
    vectors[:, 30:] = 0
    buckets = hash_vectors(vectors, rotations, 300, "triton")
    assert torch.equal(buckets, hash_vectors(vectors, rotations, 300, "eager"))
    assert (buckets % 150 < 75).all()
    assert not buckets[..., 30:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_buckets", [6, 300, [4, 6]], ids=str)
def test_infinities_stay_within_the_buckets(num_buckets, dtype):
    vectors, rotations = make_vectors(40, dtype=dtype), draw(num_buckets)
    vectors[:, 3, 0, 5], vectors[:, 4, 1, 0] = torch.inf, -torch.inf
    buckets = hash_vectors(vectors, rotations, num_buckets, "triton")
    expected = hash_vectors(vectors, rotations, num_buckets, "eager")
    assert torch.equal(buckets[..., 3:5], expected[..., 3:5])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_buckets", [300, 12_000])
def test_in_half_precision_the_first_of_equals_counts(num_buckets, dtype):
    # Whole numbers, whose sums are exact and often equal; 12,000 buckets leave no room for the column in 32 bits.
    vectors, rotations = make_vectors(33, heads=1).round().clamp(-2, 2).to(dtype), draw(num_buckets, heads=1, rounds=1)
    rotations = rotations.round().clamp(-1, 1)
    buckets = hash_vectors(vectors, rotations, num_buckets, "triton")
    assert torch.equal(buckets, hash_vectors(vectors, rotations, num_buckets, "eager"))


def make_mask(length):
    mask = torch.rand(2, length, device=DEVICE) < 0.7
    mask[1] = True
    return mask


# Padding sorts as one bucket more, so each number of digits has its bounds with a mask, and one within them without.
# Then one token alone, and more tiles than are added up at once.
ORDERS = [(37, num_buckets, True) for num_buckets in (1, 2, 15, 16, 255, 256, 5000, 70_000)]
ORDERS += [(37, num_buckets, False) for num_buckets in (1, 16, 256, 5000)]
ORDERS += [
    (1, 1, False),
    (1, 70_000, True),
    (150, 16, True),
    (150, 255, False),
    (150, 5000, True),
    (150, 70_000, False),
]


@pytest.mark.parametrize(("length", "num_buckets", "masked"), ORDERS)
def test_the_order_is_that_of_a_stable_sort(length, num_buckets, masked, counted_launches, monkeypatch):
    # The interpreter takes seconds to sort a thousand; and fewer tiles are added up at once than there are.
    monkeypatch.setattr(triton_hash_launch, "TOKENS_PER_TILE", 32)
    monkeypatch.setattr(triton_hash_launch, "COUNTS_PER_PROGRAM", 64)
    buckets = torch.randint(num_buckets, (2, 1, 2, length), dtype=torch.int32, device=DEVICE)
    buckets[0, 0, 0] = num_buckets - 1
    mask = make_mask(length) if masked else None
    order = sort_by_bucket(buckets, mask, num_buckets, "triton")
    assert counted_launches["sort_with_kernels"] == 1
    assert order.dtype == torch.int32
    assert torch.equal(order, sort_by_bucket(buckets, mask))
    assert counted_launches["sort_with_kernels"] == 1


@pytest.mark.parametrize("masked", [False, True], ids=["all real", "masked"])
def test_the_largest_digits_of_the_largest_tiles(masked, counted_launches):
    buckets = torch.randint(2040, 2048, (1, 1, 1, 1100), dtype=torch.int32, device=DEVICE)
    mask = make_mask(1100)[:1] if masked else None
    assert torch.equal(sort_by_bucket(buckets, mask, 2048, "triton"), sort_by_bucket(buckets, mask))
    assert counted_launches["sort_with_kernels"] == 1


def test_64_bit_buckets_and_any_strides(counted_launches):
    buckets = torch.randint(9, (2, 50, 1, 3), device=DEVICE).permute(0, 2, 3, 1)
    assert torch.equal(sort_by_bucket(buckets, None, 9, "triton"), sort_by_bucket(buckets))
    assert counted_launches["sort_with_kernels"] == 1


@pytest.mark.parametrize(
    ("size", "factors", "dtype"),
    [(24, [8], torch.float32), (32, [2, 4, 2], torch.float32), (32, [8], torch.float64)],
    ids=["head size", "three factors", "float64"],
)
def test_what_no_kernel_hashes_is_hashed_all_the_same(size, factors, dtype, counted_launches):
    vectors, rotations = make_vectors(30, size=size, dtype=dtype), draw(factors, size=size)
    buckets = hash_vectors(vectors, rotations, factors, "triton")
    assert torch.equal(buckets, hash_vectors(vectors, rotations, factors, "eager"))
    assert not counted_launches["hash_with_kernels"]


@pytest.mark.parametrize("num_buckets", [12, [4, 6]], ids=str)
def test_attention_sorts_with_them_where_it_knows_the_number_of_buckets(num_buckets, counted_launches):
    query_key, value = make_vectors(40, heads=1), make_vectors(40, heads=1)
    buckets = hash_vectors(query_key, draw(num_buckets, heads=1, rounds=1), num_buckets, "triton")
    options = {"chunk_length": 16, "attention_mask": make_mask(40), "implementation": "triton"}
    expected, _ = lsh_attention(query_key, value, buckets, **options)
    assert not counted_launches["sort_with_kernels"]
    actual, _ = lsh_attention(query_key, value, buckets, num_buckets=num_buckets, **options)
    assert counted_launches["sort_with_kernels"] == 1
    assert torch.equal(actual, expected)
