"""LSH self-attention as a layer: projections, hashing, and the operator (paper section 2)."""

import torch
from torch import nn

from ..decoding.decoding_attention import attend_exactly, attend_in_buckets
from ..decoding.decoding_cache import CacheStep, LSHCacheLayer
from ..ops.chunking import padded_to_multiple
from ..ops.lsh_hashing import draw_rotations, hash_vectors, num_buckets_of
from ..ops.lsh_operator import dense_attention, lsh_attention
from ..ops.lsh_options import LSHOptions
from ..ops.padding import attend_by_map, last_real_token
from ..ops.value_shift import zero_of_masked
from .rotary_positions import Rotation


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
        if config.lsh_value_shift and not config.is_decoder:
            raise ValueError(
                "`lsh_value_shift=1` is for causal models: elsewhere a key can carry the query's own value. Set it to "
                "0, or `is_decoder=True`."
            )
        threshold = config.full_attention_threshold
        self.full_attention_threshold = self.chunk_length if threshold is None else threshold
        self.dropout = nn.Dropout(config.lsh_attention_probs_dropout_prob or 0.0)
        self.query_key = nn.Linear(config.hidden_size, self.num_heads * self.head_size, bias=False)
        self.value = nn.Linear(config.hidden_size, self.num_heads * self.head_size, bias=False)

    @torch.compiler.disable
    def draw_rotations(
        self, length: int, circle_length: int | None, num_hashes: int | None, device: torch.device, cache=None
    ) -> torch.Tensor | None:
        """
        The rotations to hash `length` tokens with, or None where attention is exact and nothing is hashed.

        In training without `hash_seed` they come from the default generator of `device`; otherwise from a private one.
        A cache keeps them for all later calls.
        """
        if self._is_exact(length, circle_length):
            return None
        if cache is not None and cache.rotations is not None:
            if num_hashes not in (None, cache.rotations.shape[2]):
                raise ValueError(
                    f"`num_hashes={num_hashes}`, but the cache was made with {cache.rotations.shape[2]} "
                    "hashing rounds. Use the same number for the whole text."
                )
            return cache.rotations
        seed = self.config.hash_seed
        if seed is None and not self.training:
            seed = self.layer_idx
        num_hashes = self.config.num_hashes if num_hashes is None else num_hashes
        num_buckets = self._num_buckets(length, circle_length, cache)
        rotations = draw_rotations(self.num_heads, self.head_size, num_hashes, num_buckets, device=device, seed=seed)
        if cache is not None:
            cache.num_buckets, cache.rotations = num_buckets, rotations
        return rotations

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        circle_length: int | None = None,
        rotations: torch.Tensor | None = None,
        buckets: torch.Tensor | None = None,
        return_weights: bool = False,
        shift: torch.Tensor | None = None,
        cache: LSHCacheLayer | None = None,
        step: CacheStep | None = None,
        rotation: Rotation | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """
        Args:
            hidden_states: `[B, L, hidden_size]`.
            attention_mask: `[B, L]`, bool, or None.
            circle_length: Tokens on the circle of chunks, padding included; None without a circle.
            rotations: From `draw_rotations`; not needed with `buckets`.
            buckets: `[B, H, R, L]`, to repeat an earlier call with the same buckets.
            shift: By how much the caller's rows were shifted, `[B]`, or None; the map is that of the caller's.
            cache, step: What is known of the text so far, and where the tokens of this call go in it.
            rotation: Of queries, which are also keys, with `config.lsh_rotary`.

        Returns:
            Output `[B, L, H * D]`, the attention map `[B, H, L, L]` or, of what continues a text,
            `[B, H, L, step.longest]`, or None; and the buckets or None.
        """
        query_key, value = self._project(hidden_states, rotation)
        # Longer than `hidden_states` where the sequence is sharded over processes (docs/sequence_parallel.md).
        length = query_key.shape[1]
        if cache is not None:
            cache.update(query_key, value, step)
            if not step.is_first:
                output, weights = self._attend_to_cache(query_key, cache, step, circle_length, return_weights)
                return output.flatten(2), weights, None
        if self._is_exact(length, circle_length):
            buckets = None
            output, weights = self._attend_exactly(query_key, value, attention_mask, return_weights)
        else:
            num_buckets = self._num_buckets(length, circle_length, cache)
            if buckets is None:
                buckets = self._hash(query_key.detach(), rotations, num_buckets)
                if cache is not None:
                    cache.add_to_order(buckets, step, all_positions=True)
            output, weights = lsh_attention(
                query_key,
                value,
                buckets,
                attention_mask=attention_mask,
                padded_length=circle_length,
                num_buckets=num_buckets,
                **self._options(),
                **self._common_arguments(return_weights),
            )
            if self._begins_exactly() or (attention_mask is not None and self._short_rows_differ()):
                output, weights = self._keep_exact(output, weights, query_key, value, attention_mask, return_weights)
        output, weights = attend_by_map(output, weights, value, shift)
        return output.flatten(2), weights, buckets

    def _project(self, hidden_states, rotation):
        heads = (-1, self.head_size)
        query_key, value = (project(hidden_states).unflatten(-1, heads) for project in (self.query_key, self.value))
        # CODEPATH: published checkpoints have no rotation, and new models look for content wherever it stands.
        return rotation.turn(query_key) if self.config.lsh_rotary else query_key, value

    def _hash(self, vectors, rotations, num_buckets):
        return hash_vectors(vectors, rotations, num_buckets, self.config._attn_implementation)

    def _attend_to_cache(self, query_key, cache, step, circle_length, return_weights):
        """New tokens' `[B, M, H, D]` to what the cache holds, them included; output and map."""
        output, weights = self._attend_as_uncached(query_key, cache, step, circle_length, return_weights)
        # CODEPATH: published checkpoints carry a key's own value; the next token's is for new models.
        return zero_of_masked(output, weights, step.is_real if self.config.lsh_value_shift else None)

    def _attend_as_uncached(self, query_key, cache, step, circle_length, return_weights):
        if self._is_exact(step.num_columns, circle_length):
            # After a crop there may be an order. It would miss these tokens; the next call that hashes begins anew.
            cache.order = None
            return self._attend_exactly_to_cache(query_key, cache, step, step.longest, return_weights)
        if cache.order is None:
            # Up to now attention was exact.
            all_keys = cache.rows.keys[:, : step.longest]
            buckets = self._hash(all_keys, cache.rotations, cache.num_buckets)
            codes = cache.add_to_order(buckets, step, all_positions=True)
            codes = codes.gather(3, step.positions[:, None, None].expand(-1, *codes.shape[1:3], -1))
        else:
            buckets = self._hash(query_key.detach(), cache.rotations, cache.num_buckets)
            codes = cache.add_to_order(buckets, step, all_positions=False)
        padded_length = circle_length or padded_to_multiple(step.num_columns, self.chunk_length)
        options = LSHOptions(causal=True, **self._options())
        output, weights = attend_in_buckets(query_key, cache, step, codes, options, padded_length, return_weights)
        if step.start is not None and not self._begins_exactly(step.start):
            return output, weights
        is_exact = self._exact_queries(step.positions, step.real_lengths)
        if is_exact is not None:
            exact, exact_weights = self._attend_exactly_to_cache(
                query_key, cache, step, self.full_attention_threshold, return_weights
            )
            output = torch.where(is_exact[:, :, None, None], exact, output)
            if return_weights:
                weights = torch.where(is_exact[:, None, :, None], exact_weights, weights)
        return output, weights

    def _attend_exactly_to_cache(self, query_key, cache, step, reach, return_weights):
        return attend_exactly(query_key, cache, step, reach, self.config.lsh_value_shift, return_weights)

    def _exact_queries(self, positions, lengths):
        """`[B, L]` or `[B, 1]`, bool: queries that get exact attention while others are hashed; None for none."""
        if self._begins_exactly():
            return positions < self.full_attention_threshold
        # CODEPATH: on the circle padding counts, as in published checkpoints; without it a row's own length decides.
        if self.config.circular_look_around:
            return None
        return lengths[:, None] <= self.full_attention_threshold

    def _begins_exactly(self, position: int = 0) -> bool:
        """Whether a token at `position` gets exact attention because the beginning of a text does."""
        # CODEPATH: published checkpoints see what chunks and the circle give; windows are for new models. Then the
        # beginning of a causal text is exact, whatever follows.
        is_windowed = self.config.lsh_sliding_window and self.config.is_decoder
        return is_windowed and position < self.full_attention_threshold

    def _options(self) -> dict:
        return {
            "chunk_length": self.chunk_length,
            "num_chunks_before": self.config.lsh_num_chunks_before,
            "num_chunks_after": self.config.lsh_num_chunks_after,
            "attend_across_buckets": self.config.attend_across_buckets,
            "allow_duplicate_attention": self.config.allow_duplicate_attention,
            "circular_look_around": self.config.circular_look_around,
            "sliding_window": self.config.lsh_sliding_window,
            "value_shift": self.config.lsh_value_shift,
        }

    def _is_exact(self, length: int, circle_length: int | None) -> bool:
        # On the circle padding counts, as in stock Reformer; without it a row's own length decides.
        return (circle_length or length) <= self.full_attention_threshold

    def _num_buckets(self, length: int, circle_length: int | None, cache=None):
        if cache is not None and cache.num_buckets is not None:
            return cache.num_buckets
        return num_buckets_of(self.config, length, circle_length)

    def _common_arguments(self, return_weights: bool) -> dict:
        return {
            "causal": self.config.is_decoder,
            "dropout_p": self.dropout.p if self.dropout.training else 0.0,
            "return_weights": return_weights,
            "implementation": self.config._attn_implementation,
        }

    def _attend_exactly(self, query_key, value, attention_mask, return_weights):
        return dense_attention(
            query_key,
            value,
            attention_mask=attention_mask,
            value_shift=self.config.lsh_value_shift,
            **self._common_arguments(return_weights),
        )

    def _short_rows_differ(self) -> bool:
        """Whether hashing gives a row up to the threshold something else than exact attention, to be set right."""
        beyond_one_chunk = self.full_attention_threshold > self.chunk_length
        return not self.config.circular_look_around and (beyond_one_chunk or not self.config.attend_across_buckets)

    def _keep_exact(self, output, weights, query_key, value, attention_mask, return_weights):
        """Rows that alone would be attended to exactly get exact attention in a batch with longer ones, too."""
        batch, length = query_key.shape[:2]
        reach, device = self.full_attention_threshold, query_key.device
        mask = None if attention_mask is None else attention_mask[:, :reach]
        exact, exact_weights = self._attend_exactly(query_key[:, :reach], value[:, :reach], mask, return_weights)
        lengths = None if attention_mask is None else last_real_token(attention_mask) + 1
        is_exact = self._exact_queries(torch.arange(length, device=device).expand(batch, -1), lengths)
        rest = length - reach
        output = torch.where(is_exact[:, :, None, None], nn.functional.pad(exact, (0, 0, 0, 0, 0, rest)), output)
        if weights is not None:
            exact_weights = nn.functional.pad(exact_weights, (0, rest, 0, rest))
            weights = torch.where(is_exact[:, None, :, None], exact_weights, weights)
        return output, weights
