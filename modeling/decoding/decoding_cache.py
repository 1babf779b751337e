"""
What a causal model keeps of a text, so that new tokens cost the same at any length: transformers' `Cache`.

Rows may have different lengths: padding is not kept, wherever it stands. Positions are places in a row's text, which
are real tokens; columns are what `generate` counts: tokens of the padded batch.

Shapes: B batch, M new tokens, H heads, D head size.
"""

from dataclasses import dataclass, replace
from math import prod
from typing import Generic, TypeVar

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from ..ops.chunking import circle_length_of, key_scale
from ..ops.lsh_hashing import bucket_factors, num_buckets_of
from ..ops.row_layout import RowLayout
from .bucket_order import NO_TOKEN, BucketOrder, encode
from .cache_step import CacheStep
from .row_buffer import RowBuffer


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

    def update(self, key_states, value_states, step: CacheStep, hashed: torch.Tensor | None = None):
        """
        Put in the new tokens' queries, which are also keys, and values, `[B, M, H, D]`, their scales, and what is
        hashed if that is something else.
        """
        query_key = key_states.detach()
        others = [] if hashed is None or hashed is key_states else [hashed.detach()]
        self.rows.append(step, query_key, value_states.detach(), key_scale(query_key).squeeze(-1), *others)
        return key_states, value_states

    @property
    def scales(self) -> torch.Tensor:
        """What makes keys of queries: `[B, capacity, H]`."""
        return self.rows.tensors[2]

    @property
    def hashed(self) -> torch.Tensor:
        """What buckets follow from: `[B, capacity, H, D]`."""
        return self.rows.tensors[3] if len(self.rows.tensors) > 3 else self.rows.keys

    def add_to_order(self, buckets: torch.Tensor, step: CacheStep, all_positions: bool) -> torch.Tensor:
        """
        Put the buckets `[B, H, R, M]` of the new tokens into the order, or, with `all_positions`, begin it with those
        of the whole text.

        Returns:
            Codes of the new tokens, `[B, H, R, M]`; of padding `NO_TOKEN`.
        """
        num_buckets = prod(bucket_factors(self.num_buckets))
        if not all_positions:
            codes = encode(buckets, step.positions, step.is_real, num_buckets)
            self.order.append(codes)
            return codes
        positions = torch.arange(buckets.shape[3], device=buckets.device)[None]
        codes = encode(buckets, positions, positions < step.lengths[:, None], num_buckets)
        # One code for each column; rows that are shorter than the batch have some without a token.
        missing = codes.new_full((*codes.shape[:3], step.num_columns - codes.shape[3]), NO_TOKEN)
        self.order = BucketOrder(torch.cat([codes, missing], dim=3), self.rows.most)
        codes = codes.gather(3, step.positions[:, None, None].expand(-1, *codes.shape[1:3], -1))
        return codes if step.is_real is None else codes.masked_fill(~step.is_real[:, None, None], NO_TOKEN)

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
    per head and 8 bytes per head and round; with `lsh_rotary="after_hashing"` half as many numbers again. Local layers
    hold a fixed number of tokens.

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
        self.num_columns, self._lengths, self._columns = 0, None, None
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
        self, new: torch.Tensor, is_real: torch.Tensor | None = None, layout: RowLayout | None = None
    ) -> CacheStep:
        """
        Where new columns will go. The cache has them when `end` is told so.

        Args:
            new: `[B, M, ...]`.
            is_real: `[B, M]`, bool, False for padding; None if there is none.
            layout: Where the caller's columns stand in these rows, or None if the rows are the caller's.
        """
        batch, count, device = *new.shape[:2], new.device
        num_columns, is_first = self.num_columns + count, self.num_columns == 0
        lengths = torch.zeros(batch, dtype=torch.int64, device=device) if is_first else self._lengths
        if len(lengths) != batch:
            raise ValueError(f"The cache holds {len(lengths)} rows, the input has {batch}. They must be the same.")
        if is_real is None or _are_all_real(is_real):
            positions, after = lengths[:, None] + torch.arange(count, device=device), lengths + count
            is_real, start, longest, columns = None, self._length, self._longest + count, self._columns
        else:
            positions, after = (lengths[:, None] + is_real.cumsum(1) - 1).clamp(min=0), lengths + is_real.sum(1)
            # Of rows that have not begun, one position is there to be looked at.
            start, longest = None, max(1, int(after.max()))
            new_columns = is_real if layout is None else layout.back(is_real) & layout.has_place
            columns = torch.cat([self._all_columns(batch, device), new_columns], dim=1)
        return CacheStep(positions, is_real, start, self._shortest, after, longest, num_columns, columns, is_first)

    def check_mask(self, attention_mask: torch.Tensor | None):
        """
        ValueError where a mask of all columns, `[B, columns so far + M]`, hides others than those that were hidden.

        What is not kept cannot be shown again, nor what is kept be hidden.
        """
        if attention_mask is None or self._lengths is None or torch.compiler.is_compiling() or attention_mask.is_meta:
            return
        given = attention_mask[:, : self.num_columns]
        if self._columns is None and given.count_nonzero() == given.numel():
            # The usual case, asked for every token of a text, must cost little.
            return
        given = given.bool()
        held = self._all_columns(len(given), given.device).to(given.device)
        if len(given) == len(self._lengths) and not torch.equal(given, held):
            row, column = (given != held).nonzero()[0].tolist()
            raise ValueError(
                f"`attention_mask` {'hides' if held[row, column] else 'shows'} token {column} of row {row}, and the "
                f"cache was filled {'with' if held[row, column] else 'without'} it. Give the mask of the calls before "
                "with a column for each new token behind it."
            )

    def _all_columns(self, batch, device):
        """`[B, num_columns]`, bool: which columns so far are real."""
        known = torch.ones(batch, 0, dtype=torch.bool, device=device) if self._columns is None else self._columns
        return torch.nn.functional.pad(known, (0, self.num_columns - known.shape[1]), value=True)

    def at(self, step: CacheStep) -> list[CachedStep]:
        """Each layer with `step`, which `begin` has returned."""
        return [CachedStep(layer, step) for layer in self.layers]

    def end(self, step: CacheStep):
        """All layers have taken in what `begin` has announced."""
        self.num_columns, self._lengths, self._columns = step.num_columns, step.lengths, step.columns
        self._most_columns = max(self._most_columns, step.num_columns)
        if step.is_real is None:
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
        # Some releases of transformers pass the count as a tensor.
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
            newest, self._columns = self._split_columns(count)
            self._lengths = self._lengths - newest.sum(1)
            self.num_columns -= count
            self._note_lengths()
            for layer in self.layers:
                layer.crop(count, self._lengths)

    def _split_columns(self, count):
        """`[B, count]`, bool, which of the newest columns are real, and `_columns` without them."""
        columns = self._all_columns(len(self._lengths), self._lengths.device)
        older, newest = columns[:, :-count], columns[:, -count:]
        return newest, None if self._columns is None else older

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
        self._lengths = self._lengths[indices]
        self._columns = None if self._columns is None else self._columns[indices]
        if self._length is None:
            self._note_lengths()
        for layer in self.layers:
            layer.select(indices)

    def batch_repeat_interleave(self, repeats: int):
        """Each row `repeats` times, one after the other."""
        if self._lengths is not None:
            rows = torch.arange(len(self._lengths), device=self._lengths.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))
