"""
How long the matrix multiplications of a training step would take alone: no step of the method can be faster.

Counted are those that LSH or local attention in chunks, the feed-forward and the head cannot do without; to multiply
and add counts 2. For T tokens, hidden size D, feed-forward F, chunks of C tokens, R rounds and vocabulary V:

- projections of a layer: 2 T D^2 for each, 3 of an LSH layer (query and key are one) and 4 of a local layer;
- attention of a layer: each token meets the 2 C keys of its chunk and the one before, once for scores and once for
  values, so 8 T C D, times R in an LSH layer. That causality hides half of them does not count: chunks are dense;
- hashing of an LSH layer: 2 T D R for each column of a rotation, half of the sum of the factors of the buckets;
- feed-forward of a layer: 4 T D F;
- head: 4 T D V, as it reads both streams.

Backward does each of them twice, for what went in and for the weights or the other factor, except hashing. Reversible
layers do all of a layer but hashing once more, to have their activations back: `recomputed`. Attention that keeps no
map computes its scores once more in backward; that is a choice, and not counted. `tests/test_benchmark.py` compares
the count to what PyTorch's counter sees.

The rate is measured, by large square matrices in float32 with the same threads in the same process, between the
samples of a benchmark. The highest counts, so the bound is the lowest.
"""

import time
from functools import lru_cache

import torch

from hf_reformer.modeling.ops.lsh_hashing import bucket_factors

from .shape import Shape


SIDE = 2048
REPEATS = 3


def count_step(shape: Shape, layer: str = "lsh") -> dict[str, int]:
    """
    Operations of a step, by what they are for: those of a model that stores activations, and `recomputed`.

    Args:
        layer: The kind of all attention layers, "lsh" or "local".
    """
    tokens, width, layers = shape.batch_size * shape.length, shape.hidden_size, shape.num_layers
    hashes = layer == "lsh"
    rounds = shape.rounds if hashes else 1
    columns = sum(bucket_factors(shape.num_buckets)) // 2
    in_layers = {
        "projections": layers * (3 if hashes else 4) * 2 * tokens * width**2,
        "attention": layers * rounds * 8 * tokens * shape.chunk_length * width,
        "feed-forward": layers * 4 * tokens * width * shape.feed_forward_of(layer),
    }
    forward = in_layers | {"head": 4 * tokens * width * shape.vocab_size}
    counted = {name: 3 * operations for name, operations in forward.items()}
    counted["hashing"] = layers * 2 * tokens * width * rounds * columns if hashes else 0
    return counted | {"recomputed": sum(in_layers.values())}


@lru_cache(maxsize=1)
def _matrices(side: int) -> list[torch.Tensor]:
    return [torch.randn(side, side, generator=torch.Generator().manual_seed(place)) for place in range(3)]


def operations_per_cpu_second(side: int = SIDE) -> float:
    """Of the fastest of some multiplications of two matrices of this side, after one that does not count."""
    first, second, product = _matrices(side)
    torch.mm(first, second, out=product)
    seconds = []
    for _ in range(REPEATS):
        begun = time.process_time()
        torch.mm(first, second, out=product)
        seconds.append(time.process_time() - begun)
    return 2 * side**3 / min(seconds)


def bound_of(shape: Shape, layer: str, reversible: bool, rate: float) -> dict[str, float]:
    """
    The bound of a model of ours.

    Args:
        layer: The kind of all attention layers, "lsh" or "local".
        reversible: Whether its layers recompute their activations.
        rate: Operations per CPU second.

    Returns:
        `operations` and, among them, `recomputed`; `rate`; and `bound_s`, CPU seconds.
    """
    counted = count_step(shape, layer)
    recomputed = counted.pop("recomputed") * reversible
    operations = sum(counted.values()) + recomputed
    return {"operations": operations, "recomputed": recomputed, "rate": rate, "bound_s": operations / rate}
