"""The position-wise feed-forward layer, a chunk of the sequence at a time (paper section 3, "Chunking")."""

import torch
from torch import nn
from transformers.activations import ACT2FN

from .output_projection import OutputProjection, ends_in_projection


# Activations of the wide layer that are computed at a time on a CPU, unless the config says otherwise. They fit the
# cache, and one piece reuses the memory of the one before.
ACTIVATIONS_AT_ONCE = 2**22


def join(pieces: list[torch.Tensor]) -> torch.Tensor:
    """What was made of the pieces of a sequence, `[B, l, ...]`, as one sequence again."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


class ReformerFeedForwardDense(nn.Module):
    """The layer's first half: projection to `feed_forward_size`, dropout, activation; with a gate, two projections."""

    def __init__(self, config):
        super().__init__()
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.act_fn = ACT2FN[config.hidden_act]
        self.is_gated = config.gated_feed_forward
        self.dense = nn.Linear(config.hidden_size, config.feed_forward_size * (2 if self.is_gated else 1))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        projected = self.dropout(self.dense(hidden_states))
        # CODEPATH: published checkpoints have no gate; converted models may.
        if not self.is_gated:
            return self.act_fn(projected)
        gate, value = projected.chunk(2, dim=-1)
        return self.act_fn(gate) * value


class ChunkReformerFeedForward(nn.Module):
    """LayerNorm and feed-forward, the function G of the reversible layer."""

    def __init__(self, config):
        super().__init__()
        self.chunk_size = config.chunk_size_feed_forward
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dense = ReformerFeedForwardDense(config)
        self.output = OutputProjection(config, config.feed_forward_size)
        self.num_activations = self.dense.dense.out_features

    def split(self, sequence: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """
        `[B, L, ...]` in pieces of `chunk_size_feed_forward` tokens, the last one possibly shorter.

        With 0, a CPU takes as many as suit it, and everything else, compiled programs included, takes all.
        """
        if self.chunk_size:
            return sequence.split(self.chunk_size, dim=1)
        # A compiled program serves any length, and every piece would make it larger.
        if sequence.shape[1] == 1 or sequence.device.type != "cpu" or torch.compiler.is_compiling():
            return (sequence,)
        return sequence.split(max(1, ACTIVATIONS_AT_ONCE // (max(1, len(sequence)) * self.num_activations)), dim=1)

    @ends_in_projection
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[B, L, hidden_size]` to `[B, L, hidden_size]`."""
        pieces = []
        for piece in self.split(hidden_states):
            normalised = self.layer_norm(piece.to(self.layer_norm.weight.dtype))
            pieces.append(self.output(self.dense(normalised)))
        return join(pieces)
