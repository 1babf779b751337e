"""LSH self-attention as a layer: projections, hashing, and the operator (paper section 2)."""

from dataclasses import replace
from typing import cast

import torch
from torch import nn

from ...configuration.configuration_reformer import AFTER_HASHING
from ..decoding.decoding_attention import attend_in_buckets, attend_to_all
from ..decoding.decoding_cache import CachedStep, LSHCacheLayer
from ..ops.chunking import padded_to_multiple
from ..ops.documents import Documents
from ..ops.lsh_hashing import draw_rotations, hash_vectors, num_buckets_of
from ..ops.lsh_operator import attend_by_hash
from ..ops.lsh_options import LSHOptions
from ..ops.padding import last_real_token
from ..ops.row_layout import RowLayout, attend_by_map
from ..ops.value_shift import of_shifted, shift_values, zero_of_masked
from .dense_threshold import DenseThreshold
from .rotary_positions import Rotation


class LSHSelfAttention(nn.Module):
    """
    Multi-head LSH attention with shared queries and keys.

    Up to `full_attention_threshold` tokens it attends to everything (see `DenseThreshold`).
    """

    # A layer can be given other buckets, such as those of another implementation.
    _hash = staticmethod(hash_vectors)

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.head_size = config.attention_head_size
        if config.lsh_value_shift and not config.is_decoder:
            raise ValueError(
                "`lsh_value_shift=1` is for causal models: elsewhere a key can carry the query's own value. Set it to "
                "0, or `is_decoder=True`."
            )
        self.options = LSHOptions(
            chunk_length=config.lsh_attn_chunk_length,
            num_chunks_before=config.lsh_num_chunks_before,
            num_chunks_after=config.lsh_num_chunks_after,
            causal=config.is_decoder,
            circular_look_around=config.circular_look_around,
            attend_across_buckets=config.attend_across_buckets,
            allow_duplicate_attention=config.allow_duplicate_attention,
            sliding_window=config.lsh_sliding_window,
            value_shift=config.lsh_value_shift,
        )
        self.threshold = DenseThreshold.of(config)
        self.hashes_content = config.lsh_rotary == AFTER_HASHING
        self.dropout = nn.Dropout(config.lsh_attention_probs_dropout_prob or 0.0)
        self.query_key = nn.Linear(config.hidden_size, self.num_heads * self.head_size, bias=False)
        self.value = nn.Linear(config.hidden_size, self.num_heads * self.head_size, bias=False)

    def draw_rotations(
        self,
        length: int,
        circle_length: int | None,
        num_hashes: int | None,
        device: torch.device,
        cache: LSHCacheLayer | None = None,
    ) -> torch.Tensor | None:
        """
        The rotations to hash `length` tokens with, or None where attention is dense and nothing is hashed.

        In training without `hash_seed` they come from the default generator of `device`; otherwise from a private one.
        A cache keeps them for all later calls.
        """
        if self.threshold.covers(length, circle_length):
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
        num_buckets = None if cache is None else cache.num_buckets
        if num_buckets is None:
            num_buckets = num_buckets_of(self.config, length, circle_length)
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
        layout: RowLayout | None = None,
        documents: Documents | None = None,
        cached: CachedStep[LSHCacheLayer] | None = None,
        rotation: Rotation | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """
        Args:
            hidden_states, attention_mask: `[B, L, hidden_size]`, or a shard of L tokens; `[B, L]`, bool, or None.
            circle_length: Tokens on the circle of chunks, padding included; None without a circle.
            rotations, buckets: From `draw_rotations`, or from an earlier call that is to be repeated, `[B, H, R, L]`.
            layout, documents: Where the caller's tokens stand, and the documents of each row; None for as they came.
            cached: What is known of the text so far, and where the tokens of this call go in it.
            rotation: Of queries, which are also keys, with `config.lsh_rotary`.

        Returns:
            Output `[B, L, H * D]`; map `[B, H, L, L]`, with a cache `[B, H, L, longest]`, or None; buckets or None.
        """
        query_key, value, to_hash = self._project(hidden_states, rotation)
        if cached is not None:
            cached.layer.update(query_key, value, cached.step, to_hash)
            if not cached.step.is_first:
                return self._attend_to_cache(query_key, to_hash, cached, circle_length, return_weights)
        length, implementation = query_key.shape[1], self.config._attn_implementation
        options = replace(self.options, dropout_p=self.dropout.p) if self.dropout.training else self.options
        how = {"options": options, "return_weights": return_weights, "implementation": implementation}
        numbers, shown = None if documents is None else documents.number, value if return_weights else None
        how |= {"attention_mask": attention_mask, "documents": numbers}
        value = shift_values(value, attention_mask, numbers) if options.value_shift else value
        if self.threshold.covers(length, circle_length):
            buckets, (output, weights) = None, attend_by_hash(query_key, value, None, **how)
        else:
            num_buckets = (cached and cached.layer.num_buckets) or num_buckets_of(self.config, length, circle_length)
            if buckets is None:
                buckets = self._hash(to_hash.detach(), cast(torch.Tensor, rotations), num_buckets, implementation)
                if cached is not None:
                    cached.layer.add_to_order(buckets, cached.step, all_positions=True)
            how |= {"num_buckets": num_buckets}
            output, weights = attend_by_hash(query_key, value, buckets, padded_length=circle_length, **how)
            if self.threshold.keeps_beginning or (self.threshold.by_row and attention_mask is not None):
                if documents is None:
                    first = slice(self.threshold.length)
                    how["attention_mask"] = None if attention_mask is None else attention_mask[:, first]
                    dense = attend_by_hash(query_key[:, first], value[:, first], None, **how)
                    output, weights = self._put_dense_rows(dense, (output, weights), attention_mask)
                else:
                    output, weights = self._put_dense_documents((output, weights), query_key, value, documents, how)
        if options.value_shift and (return_weights or attention_mask is not None):
            output, weights = of_shifted(output, weights, attention_mask, numbers)
        if weights is not None:
            output, weights = attend_by_map(weights, cast(torch.Tensor, shown), layout, layout)
        return output.flatten(2), weights, buckets

    def _project(self, hidden_states, rotation):
        """Queries, which are also keys; values; and what is hashed, `[B, L, H, D]` each."""
        heads = (-1, self.head_size)
        unturned = query_key = self.query_key(hidden_states).unflatten(-1, heads)
        value = self.value(hidden_states).unflatten(-1, heads)
        # CODEPATH: published checkpoints have no rotation, and new models look for content wherever it stands.
        if self.config.lsh_rotary:
            query_key = rotation.turn(unturned)
        return query_key, value, unturned if self.hashes_content else query_key

    def _attend_to_cache(self, query_key, to_hash, cached, circle_length, return_weights):
        """New tokens' `[B, M, H, D]` to what the cache holds, them included; results as of `forward`."""
        output, weights = self._attend_as_uncached(query_key, to_hash, cached, circle_length, return_weights)
        if self.options.value_shift and cached.step.is_real is not None:
            output, weights = zero_of_masked(output, weights, cached.step.is_real)
        return output.flatten(2), weights, None

    def _attend_as_uncached(self, query_key, to_hash, cached, circle_length, return_weights):
        cache, step, implementation = cached.layer, cached.step, self.config._attn_implementation
        if self.threshold.covers(step.num_columns, circle_length):
            # After a crop there may be an order. It would miss these tokens; the next call that hashes begins anew.
            cache.order = None
            return self._attend_to_all_of(cached, query_key, step.longest, return_weights)
        if cache.order is None:
            # So far attention was dense, and nothing was hashed.
            text = cache.hashed[:, : step.longest]
            buckets = self._hash(text, cache.rotations, cache.num_buckets, implementation)
            codes = cache.add_to_order(buckets, step, all_positions=True)
        else:
            buckets = self._hash(to_hash.detach(), cache.rotations, cache.num_buckets, implementation)
            codes = cache.add_to_order(buckets, step, all_positions=False)
        padded_length = circle_length or padded_to_multiple(step.num_columns, self.options.chunk_length)
        output, weights = attend_in_buckets(query_key, cached, codes, self.options, padded_length, return_weights)
        all_beyond = step.start is not None or (step.is_real is None and step.earliest >= self.threshold.length)
        if all_beyond and not self.threshold.keeps(step.earliest):
            return output, weights
        is_dense = self.threshold.queries(step.positions, step.lengths)
        if is_dense is None:
            return output, weights
        dense = self._attend_to_all_of(cached, query_key, self.threshold.length, return_weights)
        return _choose(is_dense, dense, (output, weights))

    def _attend_to_all_of(self, cached, query_key, reach, return_weights):
        return attend_to_all(query_key, cached, reach, self.options.value_shift, return_weights)

    def _put_dense_rows(self, dense, hashed, attention_mask):
        """`hashed`, output and map, with `dense`, that of the beginning, in the place of what the threshold covers."""
        (dense_output, dense_weights), (output, weights) = dense, hashed
        rest = output.shape[1] - self.threshold.length
        if weights is not None:
            dense_weights = nn.functional.pad(dense_weights, (0, rest))
        if self.threshold.keeps_beginning:
            output = _with_first(output, dense_output, dim=1)
            return output, None if weights is None else _with_first(weights, dense_weights, dim=2)
        dense_output = nn.functional.pad(dense_output, (0, 0, 0, 0, 0, rest))
        if weights is not None:
            dense_weights = nn.functional.pad(dense_weights, (0, 0, 0, rest))
        row_lengths = None if attention_mask is None else last_real_token(attention_mask) + 1
        positions = torch.arange(output.shape[1], device=output.device).expand(len(output), -1)
        return _choose(self.threshold.queries(positions, row_lengths), (dense_output, dense_weights), hashed)

    def _put_dense_documents(self, hashed, query_key, value, documents, how):
        """The same for each document by its own length."""
        output, weights = hashed
        reach = min(self.threshold.length, documents.longest)
        places, is_real = documents.first_places(reach)
        where = documents.row[:, None], places
        how = how | {"attention_mask": is_real, "documents": None}
        dense, dense_weights = attend_by_hash(query_key[where], value[where], None, **how)
        positions = torch.arange(reach, device=places.device).expand_as(places)
        taken = self.threshold.queries(positions, documents.length)
        document, position = (is_real if taken is None else is_real & taken).nonzero(as_tuple=True)
        row, place = documents.row[document], places[document, position]
        output = output.index_put((row, place), dense[document, position])
        if weights is not None:
            # `[T, H, P]`, of the T tokens that are replaced.
            rows = weights.new_zeros(len(row), weights.shape[1], weights.shape[3])
            keys = places[document][:, None].expand(-1, weights.shape[1], -1)
            rows = rows.scatter_add(2, keys, dense_weights[document, :, position])
            weights = weights.index_put((row[:, None], _heads(weights), place[:, None]), rows)
        return output, weights


def _heads(weights):
    return torch.arange(weights.shape[1], device=weights.device)


def _with_first(whole, first, dim):
    """`whole`, of which nobody else knows, that begins with `first`."""
    count = first.shape[dim]
    if torch.is_grad_enabled():
        return torch.cat([first, whole.narrow(dim, count, whole.shape[dim] - count)], dim=dim)
    whole.narrow(dim, 0, count).copy_(first)
    return whole


def _choose(is_dense, dense, hashed):
    """Outputs `[B, L, H, D]` and maps `[B, H, L, K]`, or None, by query, `[B, L]` or `[B, 1]`."""
    (dense_output, dense_weights), (output, weights) = dense, hashed
    output = torch.where(is_dense[:, :, None, None], dense_output, output)
    if weights is not None:
        weights = torch.where(is_dense[:, None, :, None], dense_weights, weights)
    return output, weights
