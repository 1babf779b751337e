"""LSH self-attention as a layer: projections, hashing, and the operator (paper section 2)."""

import torch
from torch import nn

from .chunking import padded_to_multiple
from .lsh_hashing import default_num_buckets, draw_rotations, hash_vectors
from .lsh_operator import lsh_attention
from .padding import last_real_token


class LSHSelfAttention(nn.Module):
    """
    Multi-head LSH attention with shared queries and keys.

    Up to `full_attention_threshold` tokens it attends to everything, exactly.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.head_size = config.attention_head_size
        self.chunk_length = config.lsh_attn_chunk_length
        threshold = config.full_attention_threshold
        self.full_attention_threshold = self.chunk_length if threshold is None else threshold
        self.dropout = config.lsh_attention_probs_dropout_prob or 0.0
        self.query_key = nn.Linear(config.hidden_size, self.num_heads * self.head_size, bias=False)
        self.value = nn.Linear(config.hidden_size, self.num_heads * self.head_size, bias=False)

    @torch.compiler.disable
    def draw_rotations(
        self, length: int, circle_length: int | None, num_hashes: int | None, device: torch.device
    ) -> torch.Tensor | None:
        """
        The rotations to hash `length` tokens with, or None where attention is exact and nothing is hashed.

        In training without `hash_seed` they come from the default generator of `device`; otherwise from a private one.
        """
        if self._is_exact(length, circle_length):
            return None
        seed = self.config.hash_seed
        if seed is None and not self.training:
            seed = self.layer_idx
        num_hashes = self.config.num_hashes if num_hashes is None else num_hashes
        num_buckets = self._num_buckets(length, circle_length)
        return draw_rotations(self.num_heads, self.head_size, num_hashes, num_buckets, device=device, seed=seed)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        circle_length: int | None = None,
        rotations: torch.Tensor | None = None,
        buckets: torch.Tensor | None = None,
        return_weights: bool = False,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """
        Args:
            hidden_states: `[B, L, hidden_size]`.
            attention_mask: `[B, L]`, bool, or None.
            circle_length: Tokens on the circle of chunks, padding included; None without a circle.
            rotations: From `draw_rotations`; not needed with `buckets`.
            buckets: `[B, H, R, L]`, to repeat an earlier call with the same buckets.

        Returns:
            Output `[B, L, H * D]`, the attention map `[B, H, L, L]` or None, and the buckets or None.
        """
        heads = (-1, self.head_size)
        query_key = self.query_key(hidden_states).unflatten(-1, heads)
        value = self.value(hidden_states).unflatten(-1, heads)
        # Longer than `hidden_states` where the sequence is sharded over processes (docs/sequence_parallel.md).
        length = query_key.shape[1]
        if self._is_exact(length, circle_length):
            output, weights = self._attend_exactly(query_key, value, attention_mask, return_weights)
            return output.flatten(2), weights, None

        if buckets is None:
            buckets = hash_vectors(query_key.detach(), rotations, self._num_buckets(length, circle_length))
        output, weights = lsh_attention(
            query_key,
            value,
            buckets,
            chunk_length=self.chunk_length,
            num_chunks_before=self.config.lsh_num_chunks_before,
            num_chunks_after=self.config.lsh_num_chunks_after,
            attend_across_buckets=self.config.attend_across_buckets,
            allow_duplicate_attention=self.config.allow_duplicate_attention,
            circular_look_around=self.config.circular_look_around,
            attention_mask=attention_mask,
            padded_length=circle_length,
            **self._common_arguments(return_weights),
        )
        if attention_mask is not None and self._short_rows_differ():
            output, weights = self._keep_short_rows_exact(
                output, weights, query_key, value, attention_mask, return_weights
            )
        return output.flatten(2), weights, buckets

    def _is_exact(self, length: int, circle_length: int | None) -> bool:
        # On the circle padding counts, as in stock Reformer; without it a row's own length decides.
        return (circle_length or length) <= self.full_attention_threshold

    def _num_buckets(self, length: int, circle_length: int | None):
        # CODEPATH: published checkpoints give the number; stock's default config leaves it to the length.
        if self.config.num_buckets is not None:
            return self.config.num_buckets
        padded_length = circle_length or padded_to_multiple(length, self.chunk_length)
        return default_num_buckets(padded_length, self.chunk_length, self.config.max_position_embeddings)

    def _common_arguments(self, return_weights: bool) -> dict:
        return {
            "causal": self.config.is_decoder,
            "dropout_p": self.dropout if self.training else 0.0,
            "return_weights": return_weights,
            "implementation": self.config._attn_implementation or "eager",
        }

    def _attend_exactly(self, query_key, value, attention_mask, return_weights):
        """Shared-query/key attention to everything: LSH attention with one chunk and one bucket."""
        batch, length, heads, _ = query_key.shape
        return lsh_attention(
            query_key,
            value,
            torch.zeros(batch, heads, 1, length, dtype=torch.int32, device=query_key.device),
            chunk_length=length,
            num_chunks_before=0,
            num_chunks_after=0,
            attention_mask=attention_mask,
            **self._common_arguments(return_weights),
        )

    def _short_rows_differ(self) -> bool:
        """Whether hashing gives a row up to the threshold something else than exact attention, to be set right."""
        beyond_one_chunk = self.full_attention_threshold > self.chunk_length
        return not self.config.circular_look_around and (beyond_one_chunk or not self.config.attend_across_buckets)

    def _keep_short_rows_exact(self, output, weights, query_key, value, attention_mask, return_weights):
        """Rows that alone would be attended to exactly get exact attention in a batch with longer ones, too."""
        length, reach = query_key.shape[1], self.full_attention_threshold
        is_short = last_real_token(attention_mask) < reach
        exact, exact_weights = self._attend_exactly(
            query_key[:, :reach], value[:, :reach], attention_mask[:, :reach], return_weights
        )
        rest = length - reach
        output = torch.where(is_short[:, None, None, None], nn.functional.pad(exact, (0, 0, 0, 0, 0, rest)), output)
        if weights is not None:
            exact_weights = nn.functional.pad(exact_weights, (0, rest, 0, rest))
            weights = torch.where(is_short[:, None, None, None], exact_weights, weights)
        return output, weights
