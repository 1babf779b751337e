"""
What a causal model keeps of a text, so that new tokens cost the same at any length: transformers' `Cache`.

Rows may have different lengths. A row's text begins with its first real token; padding before it is not kept, and
what is masked later keeps its place, unseen. Positions are places in a row's text, columns are what `generate` counts:
tokens of the padded batch.

Shapes: B batch, M new tokens, H heads, D head size.
"""

from dataclasses import dataclass, replace
from math import prod
from typing import Generic, TypeVar

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from ..ops.chunking import circle_length_of, key_scale
from ..ops.lsh_hashing import bucket_factors, num_buckets_of
from .bucket_order import NO_TOKEN, BucketOrder, encode
from .cache_step import CacheStep, RowBuffer


# A local layer keeps this many tokens more than it looks at, so that they can be taken back.
CROP_REACH = 256
MASKED_IN_COMPILED_STEP = "`attention_mask` hides a new token. Compiled steps cannot: call the uncompiled model."


class ReformerCacheLayer(CacheLayerMixin):
    """The vectors that one layer keeps; by itself that of a full layer, which keeps all."""

    is_croppable = True

    def __init__(self, ring: int | None = None, most: int | None = None):
        super().__init__()
        self.rows = RowBuffer(ring, most)
        self.num_columns = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor):
        """Nothing: buffers are made when the first tokens come."""

    def update(self, key_states, value_states, step: CacheStep):
        """Put in the new tokens' `[B, M, H, D]`."""
        self.rows.append(step, key_states.detach(), value_states.detach())
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.num_columns + query_length, 0

    def get_seq_length(self) -> int:
        return self.num_columns

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def offload(self):
        """Not possible: the vectors of a step are read where they are."""
        raise ValueError("A Reformer's cache cannot be offloaded. Leave `cache_implementation` out.")

    prefetch = offload

    def reset(self):
        """Forget the text."""
        self.rows = RowBuffer(self.rows.ring, self.rows.most)
        self.num_columns = 0
        self.is_initialized = False

    def select(self, rows: torch.Tensor):
        """Keep the rows of the batch that are listed, in this order."""
        self.rows.select(rows)

    def crop(self, count: int, lengths: torch.Tensor):
        """Forget `count` columns, the newest ones: `lengths` tokens remain of each row."""
        self.num_columns -= count


Layer = TypeVar("Layer", bound=ReformerCacheLayer)


# trf-ignore: TRF031 this goes into the layers, it is no output
@dataclass(frozen=True)
class CachedStep(Generic[Layer]):
    """
    What a layer knows of the text so far, and where the tokens of this call go in it.

    Attributes:
        layer: What the layer keeps.
        step: The same for all layers.
    """

    layer: Layer
    step: CacheStep

    def to(self, device: torch.device, non_blocking: bool = False) -> "CachedStep[Layer]":
        """The step on another device, for a layer that is there; what the layer keeps is there already."""
        return replace(self, step=self.step.to(device, non_blocking))


class LocalCacheLayer(ReformerCacheLayer):
    """Keeps the tokens that the next ones look at, in a ring; all of them where the circle leads back to the first."""

    def __init__(self, config):
        window = config.local_attn_chunk_length * (config.local_num_chunks_before + 1)
        reaches_back = config.circular_look_around and config.local_num_chunks_after > 0
        super().__init__(None if reaches_back else window + CROP_REACH)


class LSHCacheLayer(ReformerCacheLayer):
    """
    Keeps queries / keys and values of all tokens and, from the first call that hashes, their order and the rotations.

    Args:
        num_buckets: To hash with; None to let that first call decide by its length.
        most: See `RowBuffer`.
    """

    def __init__(self, num_buckets, most: int | None = None):
        super().__init__(most=most)
        self._given_num_buckets = num_buckets
        self.reset()

    def reset(self):
        super().reset()
        self.num_buckets, self.rotations, self.order = self._given_num_buckets, None, None

    def update(self, key_states, value_states, step: CacheStep):
        """Put in the new tokens' queries, which are also keys, and values, `[B, M, H, D]`, and their scales."""
        query_key = key_states.detach()
        self.rows.append(step, query_key, value_states.detach(), key_scale(query_key).squeeze(-1))
        return key_states, value_states

    @property
    def scales(self) -> torch.Tensor:
        """What makes keys of queries: `[B, capacity, H]`."""
        return self.rows.tensors[2]

    def add_to_order(self, buckets: torch.Tensor, step: CacheStep, all_positions: bool) -> torch.Tensor:
        """
        Put the buckets `[B, H, R, M]` of the new tokens into the order, or, with `all_positions`, begin it with those
        of the whole text.

        Returns:
            Codes, of the shape of `buckets`.
        """
        num_buckets = prod(bucket_factors(self.num_buckets))
        if not all_positions:
            codes = encode(buckets, step.positions, step.is_real, num_buckets)
            self.order.append(codes)
            return codes
        positions = torch.arange(buckets.shape[3], device=buckets.device)[None]
        is_token = positions < step.lengths[:, None]
        if step.mask is not None:
            is_token = is_token & torch.nn.functional.pad(step.mask, (0, buckets.shape[3] - step.longest))
        codes = encode(buckets, positions, is_token, num_buckets)
        # One code for each column; rows that are shorter than the batch have some without a token.
        missing = codes.new_full((*codes.shape[:3], step.num_columns - codes.shape[3]), NO_TOKEN)
        self.order = BucketOrder(torch.cat([codes, missing], dim=3), self.rows.most)
        return codes

    def select(self, rows):
        super().select(rows)
        if self.order is not None:
            self.order.select(rows)

    def crop(self, count, lengths):
        super().crop(count, lengths)
        if self.order is not None:
            self.order.crop(count, lengths)


def _are_all_real(is_real: torch.Tensor) -> bool:
    """Whether none of the new tokens `[B, M]` is masked. A compiled step takes no others, because it cannot ask."""
    if is_real.is_meta:
        return True
    if torch.compiler.is_compiling():
        torch._assert_async(is_real.all(), MASKED_IN_COMPILED_STEP)
        return True
    return bool(is_real.all())


class ReformerCache(Cache):
    """
    The cache of a causal Reformer, for the argument `cache` (`past_key_values`).

    It holds, per token, `2 * heads * head size` numbers for each LSH and full layer, and for each LSH layer 4 bytes
    per head and 8 bytes per head and round; local layers hold a fixed number of tokens.

    Buckets do not change while the text grows: with `num_buckets=None` in the config their number is the one for
    `max_length` tokens, or else for the length of the first call that hashes, and stays.

    No gradient passes through it. After an error in the middle of a call, `reset` it.

    Args:
        config: The model's.
        max_length: Tokens that the text is to have in the end. It decides the number of buckets and how much room is
            made at once; longer texts work, too.

    Example:

    >>> import torch
    >>> from hf_reformer import ReformerCache, ReformerConfig, ReformerForCausalLM
    >>> config = ReformerConfig(is_decoder=True, num_buckets=8)
    >>> model, cache = ReformerForCausalLM(config).eval(), ReformerCache(config)
    >>> with torch.no_grad():
    ...     for piece in torch.randint(320, (1, 300)).split(100, dim=1):
    ...         logits = model(piece, cache=cache).logits
    >>> cache.get_seq_length()
    300
    """

    layers: list[ReformerCacheLayer]  # type: ignore[assignment]

    def __init__(self, config, max_length: int | None = None):
        num_buckets = config.num_buckets
        # CODEPATH: published checkpoints have LSH layers; others need no buckets.
        if max_length is not None and "lsh" in config.attn_layers:
            length = max(max_length, config.lsh_attn_chunk_length + 1)
            num_buckets = num_buckets_of(config, length, circle_length_of(config, length))
        make_layer = {
            "full": lambda: ReformerCacheLayer(most=max_length),
            "local": lambda: LocalCacheLayer(config),
            "lsh": lambda: LSHCacheLayer(num_buckets, max_length),
        }
        super().__init__(layers=[make_layer[kind]() for kind in config.attn_layers])
        self._forget_rows()

    def _forget_rows(self):
        self.num_columns, self._lengths, self._real_lengths, self._mask = 0, None, None, None
        # The length of all rows, if it is one; and the most columns there have been, which rings have seen.
        self._length, self._most_columns = 0, 0
        # Bounds of the lengths of rows, which a compiled step cannot ask the tensor for.
        self._shortest, self._longest = 0, 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns so far, padding included."""
        return self.num_columns

    @property
    def batch_size(self) -> int:
        """Rows; -1 while empty."""
        return -1 if self._lengths is None else len(self._lengths)

    def begin(
        self, new: torch.Tensor, is_real: torch.Tensor | None = None, padding: torch.Tensor | None = None
    ) -> CacheStep:
        """
        Where new columns will go. The cache has them when `end` is told so.

        Args:
            new: `[B, M, ...]`.
            is_real: `[B, M]`, bool, or None if all are.
            padding: `[B]`, for the first call: what has been moved from the front of each row to its end.
        """
        batch, count, device = *new.shape[:2], new.device
        num_columns, is_first = self.num_columns + count, self.num_columns == 0
        lengths = torch.zeros(batch, dtype=torch.int64, device=device) if is_first else self._lengths
        if len(lengths) != batch:
            raise ValueError(f"The cache holds {len(lengths)} rows, the input has {batch}. They must be the same.")
        steps = torch.arange(count, device=device).expand(batch, -1)
        if is_real is None or _are_all_real(is_real):
            positions, after, longest = lengths[:, None] + steps, lengths + count, self._longest + count
            bounds = self._length if self._mask is None else None, self._shortest
            mask = self._mask
            if mask is not None:
                mask = torch.nn.functional.pad(mask, (0, longest - mask.shape[1]), value=True)
                mask = mask.scatter(1, positions, True)
            return CacheStep(positions, None, None, *bounds, after, after, longest, num_columns, mask, is_first)
        if is_first:
            last = count if padding is None else count - padding[:, None]
            is_kept = (steps < last) & is_real.any(dim=1, keepdim=True)
        else:
            is_kept = (lengths > 0)[:, None] | is_real.cummax(dim=1).values
        positions = (lengths[:, None] + is_kept.cumsum(dim=1) - 1).clamp(min=0)
        after = lengths + is_kept.sum(dim=1)
        real = is_kept & is_real
        real_lengths = torch.maximum(lengths if is_first else self._real_lengths, ((positions + 1) * real).amax(dim=1))
        # Of rows that have not begun, one position is there to be looked at.
        longest = max(1, int(after.max()))
        mask = self._extended_mask(longest, positions, is_kept, is_real)
        bounds = None, self._shortest
        return CacheStep(positions, is_kept, real, *bounds, after, real_lengths, longest, num_columns, mask, is_first)

    def at(self, step: CacheStep) -> list[CachedStep]:
        """Each layer with `step`, which `begin` has returned."""
        return [CachedStep(layer, step) for layer in self.layers]

    def _extended_mask(self, longest, positions, is_kept, is_real):
        """`[B, longest]` with the new tokens, or None where nothing is masked."""
        if self._mask is None and bool((is_real | ~is_kept).all()):
            return None
        known = 0 if self._mask is None else self._mask.shape[1]
        mask = torch.ones(len(positions), longest, dtype=torch.bool, device=positions.device)
        if known:
            mask[:, : min(known, longest)] = self._mask[:, :longest]
        row, column = is_kept.nonzero(as_tuple=True)
        mask[row, positions[row, column]] = is_real[row, column]
        return mask

    def end(self, step: CacheStep):
        """All layers have taken in what `begin` has announced."""
        self.num_columns, self._lengths, self._real_lengths = step.num_columns, step.lengths, step.real_lengths
        self._mask = step.mask
        self._most_columns = max(self._most_columns, step.num_columns)
        if step.is_kept is None:
            self._shortest += step.positions.shape[1]
            self._longest, self._length = step.longest, None if self._length is None else step.longest
        else:
            self._note_lengths()
        for layer in self.layers:
            layer.num_columns = step.num_columns
            layer.is_initialized = True

    def _note_lengths(self):
        self._shortest, self._longest = (int(length) for length in self._lengths.aminmax())
        self._length = self._longest if self._shortest == self._longest else None

    def reset(self):
        """Forget the text."""
        self._forget_rows()
        for layer in self.layers:
            layer.reset()

    def crop(self, tokens_to_remove: int):
        """
        Forget the newest columns: `crop(-n)` forgets n.

        Raises:
            ValueError: More than a local layer can take back (`CROP_REACH`), or than there are.
        """
        # Some releases of transformers count in tensors.
        count = -int(tokens_to_remove)
        if not 0 <= count <= self.num_columns:
            raise ValueError(
                f"`crop({tokens_to_remove})`: give the negative number of tokens to forget; the cache has "
                f"{self.num_columns}."
            )
        if count == self.num_columns:
            self.reset()
            return
        rings = [layer.rows.ring for layer in self.layers if layer.rows.ring is not None]
        reach = CROP_REACH - (self._most_columns - self.num_columns)
        if rings and self._most_columns > min(rings) and count > reach:
            raise ValueError(
                f"`crop({tokens_to_remove})`: local layers keep a window of the text and can take back {reach} tokens "
                "at most. Call `reset()` and read the text again."
            )
        if count:
            self.num_columns -= count
            self._lengths = (self._lengths - count).clamp(min=0)
            self._shortest, self._longest = max(0, self._shortest - count), max(0, self._longest - count)
            self._length = None if self._length is None else self._longest
            self._real_lengths = self._cropped_real_lengths()
            for layer in self.layers:
                layer.crop(count, self._lengths)

    def _cropped_real_lengths(self):
        if self._mask is None:
            return self._lengths
        places = torch.arange(1, self._mask.shape[1] + 1, device=self._mask.device)
        return (places * self._mask * (places <= self._lengths[:, None])).amax(dim=1)

    def reorder_cache(self, beam_idx: torch.Tensor):
        """Row `i` goes on with what row `beam_idx[i]` has."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor):
        """Keep the rows listed, in this order."""
        if self._lengths is None:
            return
        indices = indices.to(self._lengths.device)
        if torch.equal(indices, torch.arange(len(self._lengths), device=indices.device)):
            return
        self._lengths, self._real_lengths = self._lengths[indices], self._real_lengths[indices]
        self._mask = None if self._mask is None else self._mask[indices]
        if self._length is None:
            self._note_lengths()
        for layer in self.layers:
            layer.select(indices)

    def batch_repeat_interleave(self, repeats: int):
        """Each row `repeats` times, one after the other."""
        if self._lengths is not None:
            rows = torch.arange(len(self._lengths), device=self._lengths.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))
