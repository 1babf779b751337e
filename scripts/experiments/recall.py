"""
Recall of LSH attention: what it meets of the keys that dense attention with the same queries attends to.

Shapes: B batch, L length, H heads.
"""

from collections.abc import Iterator

import torch
from torch import nn

from hf_reformer.modeling.layers.lsh_attention import LSHSelfAttention
from hf_reformer.modeling.ops.chunking import circle_length_of
from hf_reformer.modeling.ops.lsh_operator import lsh_attention


# The keys with the largest weights, so many of a query; queries that have fewer do not count.
TOP = (1, 8)
# What LSH attention is held against: as many earlier keys as a window of the recipe holds, whatever is in them.
NUM_KEYS = 64
NEAREST, RANDOM = f"the {NUM_KEYS} nearest keys", f"{NUM_KEYS} random keys"


def lsh_layers(model: nn.Module) -> list[LSHSelfAttention]:
    """The self-attention of each LSH layer."""
    return [module for module in model.modules() if isinstance(module, LSHSelfAttention)]


@torch.no_grad()
def inputs_of_lsh_layers(model: nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    """What the self-attention of each LSH layer is given for `ids`, `[B, L]`."""
    inputs = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
        for layer in lsh_layers(model)
    ]
    model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return inputs


@torch.no_grad()
def keys_met(layer: LSHSelfAttention, hidden_states: torch.Tensor) -> torch.Tensor:
    """
    Which keys the queries meet, `[B, H, L, L]`, bool; a query meets itself only when it meets nothing else.

    The map of queries of zeros, with the buckets of the real ones, has weights of one size, so none is too small for a
    number.

    Args:
        layer: In evaluation mode, with values where they stand: then a column of its map is a key.
        hidden_states: Its input.
    """
    length = hidden_states.shape[1]
    common = {"circle_length": circle_length_of(layer.config, length)}
    rotations = layer.draw_rotations(length, num_hashes=None, device=hidden_states.device, **common)
    _, _, buckets = layer(hidden_states, rotations=rotations, **common)
    _, weights, _ = layer(torch.zeros_like(hidden_states), buckets=buckets, return_weights=True, **common)
    return weights > 0


def baselines(length: int) -> dict[str, torch.Tensor]:
    """The nearest earlier keys of each query, and random ones, `[1, L, L]`, bool."""
    distance = torch.arange(length)[:, None] - torch.arange(length)
    draws = torch.rand(length, length, generator=torch.Generator().manual_seed(0)).masked_fill(distance < 1, 2.0)
    chosen = torch.zeros(length, length, dtype=torch.bool).scatter(
        1, draws.topk(min(NUM_KEYS, length), largest=False).indices, True
    )
    masks = {NEAREST: distance <= NUM_KEYS, RANDOM: chosen}
    return {name: (mask & (distance > 0))[None] for name, mask in masks.items()}


@torch.no_grad()
def dense_weights(layer: LSHSelfAttention, hidden_states: torch.Tensor) -> Iterator[torch.Tensor]:
    """The weights of dense attention with the layer's queries, `[B, L, L]`, float64, head by head."""
    vectors = layer.query_key(hidden_states).unflatten(-1, (layer.num_heads, -1)).double()
    batch, length = vectors.shape[:2]
    one_bucket = torch.zeros(batch, 1, 1, length, dtype=torch.int32, device=vectors.device)
    one_chunk = {"chunk_length": length, "num_chunks_before": 0, "causal": layer.config.is_decoder}
    for head in vectors.split(1, dim=2):
        yield lsh_attention(head, head, one_bucket, return_weights=True, **one_chunk)[1].squeeze(1)


def recall_of(weights: torch.Tensor, largest: torch.Tensor, met: torch.Tensor) -> torch.Tensor:
    """
    Shares of what is met: of all weight, and of the keys with the largest weights, for each number in `TOP`.

    Args:
        weights: Of dense attention, `[B, L, L]`.
        largest: Of each query the keys with the largest weights, the largest first, `[B, L, TOP[-1]]`.
        met: `[B, L, L]`, bool.

    Returns:
        `[1 + len(TOP)]`, means over queries.
    """
    first = TOP[-1]
    top = met.gather(2, largest)[:, first:].double()
    return torch.stack([(weights * met)[:, first:].sum(-1).mean(), *(top[..., :number].mean() for number in TOP)])


def recalls(
    model: nn.Module, others: dict[str, nn.Module], windows: torch.Tensor
) -> dict[str, dict[str, list[float]]]:
    """
    Recall of the LSH layers of other models, given the inputs that those of `model` get.

    Args:
        model: A causal one.
        others: Models of the same weights by name, with `lsh_value_shift=0`.
        windows: `[N, L]`.

    Returns:
        By name, and by that of the baselines, `weight`, `top 1` and `top 8`: a number for each LSH layer, the mean
        over windows, heads and queries.
    """
    fixed = baselines(windows.shape[1])
    totals = dict.fromkeys([*others, *fixed], 0)
    layers = {name: lsh_layers(other) for name, other in others.items()}
    for ids in windows:
        inputs = inputs_of_lsh_layers(model, ids[None])
        sums = {name: [] for name in totals}
        for number, (layer, hidden_states) in enumerate(zip(lsh_layers(model), inputs, strict=True)):
            dense = [(weights, weights.topk(TOP[-1]).indices) for weights in dense_weights(layer, hidden_states)]
            for name in totals:
                met = (
                    keys_met(layers[name][number], hidden_states).unbind(1)
                    if name in others
                    else [fixed[name]] * len(dense)
                )
                by_head = [recall_of(*of_head, met_by_it) for of_head, met_by_it in zip(dense, met, strict=True)]
                sums[name].append(torch.stack(by_head).mean(0))
        totals = {name: total + torch.stack(sums[name]) / len(windows) for name, total in totals.items()}
    names = ["weight", *(f"top {number}" for number in TOP)]
    return {name: dict(zip(names, total.T.tolist(), strict=True)) for name, total in totals.items()}
