"""Rotary positions (Su et al. 2021, arXiv 2104.09864): queries and keys, turned by their place."""

import copy
from dataclasses import dataclass

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..ops.movable import Movable
from ..ops.softmax_kernels import distinct


# Elements that are turned at a time where no graph is made, in memory that one piece leaves to the next.
TURNED_AT_ONCE = 2**20


# trf-ignore: TRF031 this goes into the layers, it is no output
@dataclass(frozen=True)
class Rotation(Movable):
    """
    By how much the vectors of each token are turned. One object, so that no wrapper of a layer narrows its numbers.

    Attributes:
        cos, sin: `[B or 1, L, 1, D / 2]`, float32 at least.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def turn(self, vectors: torch.Tensor) -> torch.Tensor:
        """`[B, L, H, D]`, turned in planes of the numbers `i` and `i + D / 2`, as Llama does."""
        rows = max(1, TURNED_AT_ONCE // max(1, vectors[:, :1].numel()))
        if vectors.shape[1] > rows and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            out = torch.empty_like(vectors)
            pieces = zip(*(whole.split(rows, dim=1) for whole in (vectors, out, self.cos, self.sin)), strict=True)
            for piece, out_piece, cos, sin in distinct(pieces, vectors):
                out_piece.copy_(Rotation(cos, sin).turn(piece))
            return out
        first, second = vectors.chunk(2, dim=-1)
        turned = first * self.cos - second * self.sin, second * self.cos + first * self.sin
        return torch.cat(turned, dim=-1).to(vectors.dtype)


def rotation_of(config, position_ids: torch.Tensor | None, hidden_states: torch.Tensor) -> Rotation | None:
    """
    The rotation of the tokens `hidden_states`, `[B, L, hidden_size]`, for all layers; None for a model without one.

    Args:
        position_ids: `[B or 1, L]`; None counts from 0.
    """
    # CODEPATH: published checkpoints add position vectors to words; rotary positions are for new models.
    if config.position_kind != "rotary":
        return None
    device = hidden_states.device
    if position_ids is None:
        position_ids = torch.arange(hidden_states.shape[1], device=device)[None]
    frequencies, scale = _frequencies(config, device)
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    angles = position_ids.to(dtype)[..., None, None] * frequencies.to(dtype)
    return Rotation(angles.cos() * scale, angles.sin() * scale)


# transformers' functions read and complete the config, which no compiler need follow. A compiled model keeps what they
# returned when it was compiled.
@torch.compiler.assume_constant_result
def _frequencies(config, device):
    """Radians per position of each plane, `[D / 2]`, and what lengths are multiplied with."""
    config = copy.copy(config)
    config.head_dim = config.attention_head_size
    # Without scaling they are those that linear scaling divides by one.
    config.rope_parameters = {"factor": 1.0} | config.rope_parameters
    kind = config.rope_parameters["rope_type"]
    return ROPE_INIT_FUNCTIONS["linear" if kind == "default" else kind](config, device)
