"""
What else the values of successors give: LSH layers whose keys carry other values than their own or their successors'.

Hashing, sorting and kernels are the package's. The causal layers need `lsh_value_shift=1`: of what is projected to the
place j + 1, key j carries the value, and a token that sees only itself reads nothing. So a layer moves what it has
projected, and causality follows from the package's.

None of them knows caches or padding: they are for training and evaluation on whole windows.

Shapes: B batch, L length, H heads, D head size.
"""

from collections.abc import Callable
from unittest.mock import patch

import torch
from torch import nn

from hf_reformer.modeling.layers.encoder import SELF_ATTENTION
from hf_reformer.modeling.layers.lsh_attention import LSHSelfAttention


def one_later(vectors: torch.Tensor) -> torch.Tensor:
    """`[B, L, H, D]`, each vector at the next place; zeros at the first."""
    return nn.functional.pad(vectors[:, :-1], (0, 0, 0, 0, 1, 0))


def one_earlier(vectors: torch.Tensor) -> torch.Tensor:
    """`[B, L, H, D]`, each vector at the place before; zeros at the last."""
    return nn.functional.pad(vectors[:, 1:], (0, 0, 0, 0, 0, 1))


def in_half_of_the_heads(move: Callable[[torch.Tensor], torch.Tensor], vectors: torch.Tensor) -> torch.Tensor:
    """`[B, L, H, D]`, the second half of the heads moved."""
    first, second = vectors.tensor_split(2, dim=2)
    return torch.cat([first, move(second)], dim=2)


def scaled(weights: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Each head's vectors `[B, L, H, D]` times its weight `[H]`."""
    return weights.to(vectors.dtype)[:, None] * vectors


class VariedAttention(LSHSelfAttention):
    """LSH attention to vectors that `vary` has changed."""

    def vary(self, query_key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is hashed and compared, and what is read, from what is projected; `[B, L, H, D]` each."""
        raise NotImplementedError

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, cached=None, **kwargs):
        if attention_mask is not None or cached is not None:
            raise ValueError(f"{type(self).__name__} takes whole windows only: no attention mask and no cache.")
        return super().forward(hidden_states, **kwargs)

    def _project(self, hidden_states, rotation):
        query_key, value, _ = super()._project(hidden_states, rotation)
        query_key, value = self.vary(query_key, value)
        return query_key, value, query_key


class HalfShifted(VariedAttention):
    """Keys carry their successors' values in the first half of the heads, their own in the second."""

    def vary(self, query_key, value):
        return query_key, in_half_of_the_heads(one_later, value)


class LearnedMix(VariedAttention):
    """Keys carry a mix of their own and their successors' values, learned per head; at first the successors' alone."""

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        # Vectors and no matrix, which Muon would take.
        self.of_own = nn.Parameter(torch.zeros(self.num_heads))
        self.of_successor = nn.Parameter(torch.ones(self.num_heads))

    def vary(self, query_key, value):
        return query_key, scaled(self.of_own, one_later(value)) + scaled(self.of_successor, value)


class HalfTwoOn(VariedAttention):
    """
    In the second half of the heads, what followed two places after the tokens like the one before.

    The nearest key is the token before, and what stands two places after that one is of the future. So here the query
    and key of a token are those of the token before it: key j is what token j - 1 is like and carries value j + 1.
    """

    def vary(self, query_key, value):
        return in_half_of_the_heads(one_later, query_key), value


class BothNeighbours(VariedAttention):
    """
    For masked models: keys carry a mix of the values before and after them and of their own, learned per head.

    At first it is the value before in the first half of the heads and the one after in the second. A model in both
    directions may read anything, since what it is to predict is masked; a token that sees only itself reads the same
    mix. Needs `is_decoder=False` and `lsh_value_shift=0`.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        is_second_half = torch.arange(self.num_heads) >= (self.num_heads + 1) // 2
        self.of_own = nn.Parameter(torch.zeros(self.num_heads))
        self.of_predecessor = nn.Parameter(1 - is_second_half.float())
        self.of_successor = nn.Parameter(is_second_half.float())

    def vary(self, query_key, value):
        mix = scaled(self.of_own, value) + scaled(self.of_predecessor, one_later(value))
        return query_key, mix + scaled(self.of_successor, one_earlier(value))


def with_lsh_layers(kind: type[LSHSelfAttention], make_model: Callable[[], nn.Module]) -> nn.Module:
    """A model that is made with LSH layers of another kind."""
    with patch.dict(SELF_ATTENTION, lsh=kind):
        return make_model()


def learned_mix(model: nn.Module, *_) -> dict[str, dict[str, list[float]]]:
    """For the record of a training: the weights by which a model mixes values, by name; nothing if it does not."""
    names = ("of_own", "of_predecessor", "of_successor")
    found = {name: weight.tolist() for name, weight in model.named_parameters() if name.endswith(names)}
    return {"mix": found} if found else {}
