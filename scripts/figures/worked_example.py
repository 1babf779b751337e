"""The worked example of docs/how_it_works.md: 16 letters, two hash rounds of 4 buckets, chunks of 4."""

import math
from dataclasses import dataclass

import torch

from hf_reformer import draw_rotations, hash_vectors, lsh_attention
from hf_reformer.modeling.ops.lsh_hashing import sort_by_bucket


TEXT = "the cat, the hat"
CHUNK_LENGTH, NUM_BUCKETS, NUM_HASHES, SEED = 4, 4, 2, 29
# Vectors of two numbers, so that they can be drawn; this long, attention is sharp.
LENGTH_OF_VECTORS = 6.0
# What the recipe sets.
OPTIONS = {
    "chunk_length": CHUNK_LENGTH,
    "causal": True,
    "circular_look_around": False,
    "attend_across_buckets": False,
    "sliding_window": True,
}


@dataclass(frozen=True)
class Example:
    """
    Everything that is drawn.

    Attributes:
        vectors: `[16, 2]`, queries; a letter has nearly the same vector wherever it stands.
        rotations: `[1, 2, 2, 2]`, of one head, two numbers, two rounds.
        buckets, order: `[2, 16]`, of each round.
    """

    vectors: torch.Tensor
    rotations: torch.Tensor
    buckets: torch.Tensor
    order: torch.Tensor

    def attend(self, rounds: list[int], query_key: torch.Tensor | None = None, **changes) -> torch.Tensor:
        """The attention map `[16, 16]` of these rounds."""
        vectors = (self.vectors if query_key is None else query_key)[None, :, None]
        buckets = self.buckets[rounds][None, None]
        _, weights = lsh_attention(vectors, vectors, buckets, return_weights=True, **OPTIONS | changes)
        return weights[0, 0]

    def keys_met(self, rounds: list[int]) -> torch.Tensor:
        """How often each query meets each key in these rounds, `[16, 16]`; itself only where it meets nothing else."""
        # Queries of zeros give all keys that are met the same weight.
        zeros = torch.zeros_like(self.vectors)
        counts = sum((self.attend([number], zeros) > 0).int() for number in rounds)
        return counts * (self.attend(rounds, zeros) > 0)


def make_example() -> Example:
    """The vectors of the letters, their buckets and their order."""
    letters = sorted(set(TEXT))
    generator = torch.Generator().manual_seed(SEED)
    turns = torch.randperm(len(letters), generator=generator) / len(letters)
    noise = torch.randn(len(TEXT), generator=generator) * 0.012
    angles = torch.tensor([turns[letters.index(letter)] for letter in TEXT]) + noise
    vectors = torch.stack([torch.cos(2 * math.pi * angles), torch.sin(2 * math.pi * angles)], dim=1)
    vectors = LENGTH_OF_VECTORS * vectors
    rotations = draw_rotations(1, 2, NUM_HASHES, NUM_BUCKETS, device=torch.device("cpu"), seed=SEED)
    buckets = hash_vectors(vectors[None, :, None], rotations, NUM_BUCKETS)
    return Example(vectors, rotations, buckets[0, 0], sort_by_bucket(buckets)[0, 0])
