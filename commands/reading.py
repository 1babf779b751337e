"""
What one token of a text reads in an LSH layer: the keys that each hash round lets it meet, and their weights.

The model runs once over the text. Then only the keys of the token that is asked for are computed, never a map.

Shapes: H heads, L length, D head size, R rounds, K keys.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from operator import and_
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..modeling.layers.lsh_attention import LSHSelfAttention
from ..modeling.ops.chunking import key_scale, pad_mask, padded_to_multiple
from ..modeling.ops.lsh_hashing import sort_by_bucket
from ..modeling.ops.visibility import LSHVisibility


@dataclass(frozen=True)
class KeysRead:
    """
    What a token reads in an LSH layer: an entry for each time that a head meets a key in a round.

    Attributes:
        position: The token's.
        layer: The layer's place in `config.attn_layers`.
        num_heads, num_rounds: Those of the layer.
        is_dense: Whether the layer hashes nothing here and the token sees all that may be seen, as one round.
        value_shift: With 1 a key carries the value of the token behind it.
        heads, rounds, positions: `[K]`, of each entry: head, round, and position of the key.
        weights: `[K]`, what the head gives the entry; those of a head sum up to one, or to zero if it reads nothing.
        buckets, bucket_sizes: `[H, R]`, the token's buckets, and how many tokens are in them; None where dense.
    """

    position: int
    layer: int
    num_heads: int
    num_rounds: int
    is_dense: bool
    value_shift: int
    heads: torch.Tensor
    rounds: torch.Tensor
    positions: torch.Tensor
    weights: torch.Tensor
    buckets: torch.Tensor | None
    bucket_sizes: torch.Tensor | None

    def by_key(self, round_number: int | None = None, head: int | None = None) -> dict[int, float]:
        """
        The weight of each key by its position, the largest first.

        Args:
            round_number: Of this round; None for the sum over rounds.
            head: Of this head; None for the mean of all heads.
        """
        taken = torch.ones_like(self.heads, dtype=torch.bool)
        if round_number is not None:
            taken &= self.rounds == round_number
        if head is not None:
            taken &= self.heads == head
        positions, entry = self.positions[taken].unique(return_inverse=True)
        weights = self.weights.new_zeros(len(positions)).index_add(0, entry, self.weights[taken])
        if head is None:
            weights = weights / self.num_heads
        order = weights.argsort(descending=True, stable=True)
        return dict(zip(positions[order].tolist(), weights[order].tolist(), strict=True))


@dataclass(frozen=True)
class _SeenLayer:
    """
    What an LSH layer made of a text.

    Attributes:
        query_key: `[1, L, H, D]`, queries, which are also keys, as attention gets them.
        buckets: `[1, H, R, L]`, or None where all attention is dense.
        circle_length: Tokens on the circle of chunks, or None without one.
    """

    attention: LSHSelfAttention
    query_key: torch.Tensor
    buckets: torch.Tensor | None
    circle_length: int | None


def lsh_layers(model: PreTrainedModel) -> dict[int, LSHSelfAttention]:
    """The self-attention of each LSH layer, by the layer's place in `config.attn_layers`."""
    layers = {module.layer_idx: module for module in model.modules() if isinstance(module, LSHSelfAttention)}
    return dict(sorted(layers.items()))


class Reading:
    """
    A text that a model has read, to be asked what any of its tokens read.

    The model runs once, and no other thread may run it meanwhile.

    Args:
        model: In evaluation mode.
        input_ids: `[L]`, the tokens.
    """

    def __init__(self, model: PreTrainedModel, input_ids: torch.Tensor):
        self.length = len(input_ids)
        seen: dict[int, dict[str, Any]] = {place: {} for place in lsh_layers(model)}
        if seen:
            with _watched(model, seen), torch.no_grad():
                model.base_model(input_ids=input_ids[None].to(model.device), use_cache=False)
        self._layers = {place: _SeenLayer(attention, **seen[place]) for place, attention in lsh_layers(model).items()}

    @property
    def layers(self) -> list[int]:
        """Places of the LSH layers in `config.attn_layers`."""
        return list(self._layers)

    @torch.no_grad()
    def keys_read(self, position: int, layer: int) -> KeysRead:
        """
        What the token at a position reads in an LSH layer.

        Raises:
            ValueError: There is no such token, or the layer is no LSH layer.
        """
        if layer not in self._layers:
            raise ValueError(f"layer is {layer}, but the LSH layers of this model are {self.layers or 'none'}.")
        if not 0 <= position < self.length:
            raise ValueError(f"position is {position}, but the text has {self.length} tokens, from 0 on.")
        seen = self._layers[layer]
        attention = seen.attention
        if seen.buckets is None or attention.threshold.keeps(position):
            entries = _met_densely(seen, position)
        else:
            entries = _met_by_hash(seen, seen.buckets, position)
        heads, rounds, positions, counts = entries
        weights, is_read = _weights_of(seen, position, heads, positions, counts)
        is_dense = counts is None
        buckets = sizes = None
        if not is_dense and seen.buckets is not None:
            buckets = seen.buckets[0, :, :, position]
            sizes = (seen.buckets[0] == buckets[..., None]).sum(-1).cpu()
        return KeysRead(
            position=position,
            layer=layer,
            num_heads=attention.num_heads,
            num_rounds=1 if buckets is None else buckets.shape[1],
            is_dense=is_dense,
            value_shift=attention.options.value_shift,
            heads=heads[is_read].cpu(),
            rounds=rounds[is_read].cpu(),
            positions=positions[is_read].cpu(),
            weights=weights[is_read].cpu(),
            buckets=None if buckets is None else buckets.cpu(),
            bucket_sizes=sizes,
        )


def keys_read(model: PreTrainedModel, input_ids: torch.Tensor, position: int, layer: int) -> KeysRead:
    """
    What one token of a text reads in an LSH layer.

    Args:
        model: In evaluation mode.
        input_ids: `[L]`, the tokens.
        position: The token's.
        layer: The layer's place in `config.attn_layers`.

    Raises:
        ValueError: There is no such token, or the layer is no LSH layer.
    """
    return Reading(model, input_ids).keys_read(position, layer)


@contextmanager
def _watched(model: PreTrainedModel, seen: dict[int, dict[str, Any]]) -> Iterator[None]:
    """Inside of it each LSH layer that runs puts what it makes of its input into `seen`."""
    hooks = []

    def watch(place: int, attention: LSHSelfAttention):
        def keep_projection(_module: nn.Module, _arguments: Any, output: torch.Tensor):
            seen[place]["query_key"] = output

        def keep_buckets(_module: nn.Module, _arguments: Any, given: dict[str, Any], output: Any):
            vectors = seen[place]["query_key"].unflatten(-1, (attention.num_heads, attention.head_size))
            turns = bool(attention.config.lsh_rotary)
            seen[place]["query_key"] = given["rotation"].turn(vectors) if turns else vectors
            seen[place] |= {"buckets": output[2], "circle_length": given["circle_length"]}

        hooks.append(attention.query_key.register_forward_hook(keep_projection))
        hooks.append(attention.register_forward_hook(keep_buckets, with_kwargs=True))

    for place, attention in lsh_layers(model).items():
        watch(place, attention)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _met_densely(seen, position):
    """Heads, rounds and positions of all that a token may see, itself included; None in the place of counts."""
    length = seen.query_key.shape[1]
    reach = position + 1 if seen.attention.options.causal else length
    heads = seen.attention.num_heads
    positions = torch.arange(reach, device=seen.query_key.device).repeat(heads)
    head_of = torch.arange(heads, device=positions.device).repeat_interleave(reach)
    return head_of, torch.zeros_like(positions), positions, None


def _met_by_hash(seen, buckets, position):
    """Heads, rounds and positions of what a token meets, itself included, and how often it meets each key."""
    options, length = seen.attention.options, buckets.shape[3]
    padded_length = seen.circle_length or padded_to_multiple(length, options.chunk_length)
    key_mask = None
    if padded_length > length:
        key_mask = pad_mask(None, 1, length, padded_length, buckets.device)
        buckets = nn.functional.pad(buckets, (0, padded_length - length))
    order = sort_by_bucket(buckets, key_mask).long()
    visibility = LSHVisibility(buckets, order, key_mask, options)
    # Where the token stands in each round's order, `[H, R]`.
    places = (order[0] == position).int().argmax(-1).tolist()
    entries = []
    for head, places_of_head in enumerate(places):
        for number, place in enumerate(places_of_head):
            chunk = number * visibility.chunks_per_round + place // options.chunk_length
            keys, counts = _met_in_window(visibility, options, position, head, chunk, place % options.chunk_length)
            entries.append((torch.full_like(keys, head), torch.full_like(keys, number), keys, counts))
    return tuple(torch.cat(parts) for parts in zip(*entries, strict=True))


def _met_in_window(visibility, options, position, head, chunk, place):
    """Positions of the keys that the query at this place of a chunk meets, `[K]`, and how often over all rounds."""
    window = slice(chunk, chunk + 1)
    keys = visibility.key_positions[0, head, chunk]
    met = torch.ones_like(keys, dtype=torch.bool)
    if conditions := visibility.conditions(window):
        shape = (*visibility.positions[:, :, window].shape, len(keys))
        met = reduce(and_, conditions).expand(shape)[0, head, 0, place]
    if options.causal:
        met = met & (keys <= position)
    # A token always has itself to fall back on.
    met = met | (keys == position)
    counts = torch.ones_like(keys)
    if not options.allow_duplicate_attention:
        counts = visibility.count_meetings(window)[0, head, 0, place]
    return keys[met], counts[met]


def _weights_of(seen, position, heads, positions, counts):
    """The weight of each entry, `[K]`, and which entries are read: a token itself only where there is nothing else."""
    vectors = seen.query_key[0]
    keys = vectors[positions, heads]
    keys = (keys * key_scale(keys)).to(keys.dtype)
    scores = (vectors[position, heads] * keys).sum(-1, dtype=torch.promote_types(keys.dtype, torch.float32))
    if counts is not None:
        scores = scores - counts.to(scores.dtype).log()
    is_self, is_read = positions == position, torch.zeros_like(positions, dtype=torch.bool)
    weights = torch.zeros_like(scores)
    for head in range(seen.attention.num_heads):
        others = (heads == head) & ~is_self
        if others.any():
            weights[others] = scores[others].softmax(0)
            is_read |= others
        elif not seen.attention.options.value_shift:
            # Each round finds the token itself, and nothing else.
            alone = (heads == head) & is_self
            weights[alone] = 1 / alone.sum()
            is_read |= alone
    return weights, is_read
