"""
The layers as one program, for `torch.compile`.

A compiler can follow neither the tape of `reversible.py` nor its recordings. Here the whole stack is one autograd
Function, whose backward inverts one layer after the other. Nothing is stored but the output of the last layer and the
buckets of LSH layers.

The program of a layer's second run need not round as that of its first, and its random numbers are others. So the
inversion is exact to rounding, not bit by bit, and where layers draw random numbers, ordinary autograd stores what
they made of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.func import functional_call, vjp

from ..decoding.decoding_cache import CachedStep
from .feed_forward import ChunkReformerFeedForward, ReformerFeedForwardDense
from .full_attention import FullSelfAttention
from .hooks import is_wrapped
from .local_attention import LocalSelfAttention
from .lsh_attention import LSHSelfAttention
from .output_projection import OutputProjection
from .reversible import autocast_state, narrowed, round_to_grid, summed
from .source import Source


# Modules of a layer that compute the same each time. Whatever else is in it, such as an adapter, may not.
REPEATABLE = (
    nn.Linear,
    nn.LayerNorm,
    nn.Dropout,
    ChunkReformerFeedForward,
    ReformerFeedForwardDense,
    OutputProjection,
    FullSelfAttention,
    LocalSelfAttention,
    LSHSelfAttention,
)
ACTIVATIONS = ("torch.nn.modules.activation", "transformers.activations")


def can_be_traced(layer: Any) -> bool:
    """Whether calling a layer is no more than what its parts compute. Hooks, wrappers and checkpoints do more."""
    is_checkpointed = layer.gradient_checkpointing and layer.training and not layer.config.reversible
    return not is_wrapped(layer) and not is_checkpointed


def is_repeatable(layers: nn.ModuleList, others: Sequence[type]) -> bool:
    """
    Whether layers compute the same each time they are given the same, each with weights of its own.

    Args:
        others: Further types of modules that do.
    """
    for module in layers.modules():
        if is_wrapped(module) or (type(module) is nn.Dropout and module.training and module.p > 0):
            return False
        is_activation = module.__module__ in ACTIVATIONS and type(module) is not nn.RReLU
        if not is_activation and type(module) not in (nn.ModuleList, *REPEATABLE, *others):
            return False
    # All together count a shared weight once.
    return len(_trained(layers)) == sum(len(_trained(part)) for part in _parts(layers))


def _parts(layers: nn.ModuleList) -> list[nn.Module]:
    all_layers: list[Any] = list(layers)
    return [half.module for layer in all_layers for half in layer.halves({})]


@dataclass
class TracedStack:
    """
    The layers of one forward pass.

    Attributes:
        layers: Of `encoder.ReformerLayer`.
        on_grid: Exact mode: round updates to the grid on which sums are exact.
        num_hashes: Hashing rounds, instead of the config's.
        kwargs: For the self-attention of all layers.
        cached: What each layer knows of the text so far, and where the tokens of this call go in it.
        source: What a decoder's layers read of the encoder.
    """

    layers: nn.ModuleList
    on_grid: bool
    num_hashes: int | None
    kwargs: dict[str, Any]
    cached: list[CachedStep] | None = None
    source: Source | None = None

    def run(self, hidden_states: torch.Tensor, reversible: bool) -> tuple[tuple[torch.Tensor, torch.Tensor], list]:
        """`[B, L, hidden_size]`, the input of both streams, to their outputs, and the maps or None of each layer."""
        if not reversible:
            streams, maps, _ = self.forward(hidden_states)
            return streams, maps
        weights = [weight for part in _parts(self.layers) for weight in _trained(part).values()]
        source = None if self.source is None else self.source.hidden_states
        return _ReversibleStack.apply(self, hidden_states, source, *weights), [None] * len(self.layers)

    def forward(self, hidden_states):
        x1 = x2 = hidden_states
        all_maps, all_buckets = [], []
        for i, layer in enumerate(self.layers):
            cached = None if self.cached is None else self.cached[i]
            rotations = layer.draw_rotations(
                hidden_states, self.kwargs.get("length"), self.num_hashes, self.kwargs["circle_length"], cached
            )
            maps, found = [], None
            for half in layer.halves({"rotations": rotations, "cached": cached, **self.kwargs}, self.source):
                update, weights, buckets = half.run(narrowed(x2, half.module), self.source)
                x1, x2 = x2, self._add(x1, update)
                found = buckets if found is None else found
                maps.append(weights)
            all_maps.append(maps)
            all_buckets.append(found)
        return (x1, x2), all_maps, all_buckets

    def backward(self, streams, all_buckets, weights, gradients, autocast):
        """Gradients of the input, of the source and of each trained weight, by inverting one half after the other."""
        (x1, x2), (x1_grad, x2_grad) = streams, gradients
        source_grad, all_grads, end = None, [], len(weights)
        for layer, buckets in zip(reversed(self.layers), reversed(all_buckets), strict=True):
            for half in reversed(layer.halves(self.kwargs | {"buckets": buckets}, self.source)):
                begin = end - len(_trained(half.module))
                update, through, source_part, grads = self._recompute(half, x1, weights[begin:end], x2_grad, autocast)
                x1, x2 = self._add(x2, update, sign=-1), x1
                x1_grad, x2_grad, end = x2_grad, x1_grad + through, begin
                source_grad = summed(source_grad, source_part)
                all_grads = [*grads, *all_grads]
        return x1_grad + x2_grad, source_grad, all_grads

    def _add(self, stream, update, sign=1):
        update = round_to_grid(update, stream.dtype) if self.on_grid else update
        return torch.add(stream, update, alpha=sign)

    def _recompute(self, half, stream, weights, output_grad, autocast):
        """
        What a half adds for `stream`, and the gradients of its input, of the source, or None, and of its trained
        weights.
        """
        if half.module.__class__ is not ChunkReformerFeedForward or half.module.chunk_size:
            return self._recompute_whole(half, stream, weights, output_grad, autocast)
        # Inside of `torch.func`, a projection with a bias of more than two dimensions becomes a program for each
        # length. Each token is worked on by itself.
        rows, rows_grad = stream.flatten(0, 1), output_grad.flatten(0, 1)
        update, inputs_grad, _, grads = self._recompute_whole(half, rows, weights, rows_grad, autocast)
        return update.unflatten(0, stream.shape[:2]), inputs_grad.unflatten(0, stream.shape[:2]), None, grads

    def _recompute_whole(self, half, stream, weights, output_grad, autocast):
        names = list(_trained(half.module))
        read = [self.source.hidden_states] if half.reads_source and self.source.hidden_states.requires_grad else []

        def update_of(inputs, *others):
            weights, kwargs = dict(zip(names, others[len(read) :], strict=True)), half.kwargs
            if half.reads_source:
                source = replace(self.source, hidden_states=others[0]) if read else self.source
                kwargs = kwargs | {"source": source}
            with torch.autocast(**autocast):
                output = functional_call(half.module, weights, (inputs,), kwargs)
            update, *_ = output if isinstance(output, tuple) else (output,)
            return update

        inputs = narrowed(stream, half.module)
        if torch.compiler.is_compiling():
            update, pull_back = vjp(update_of, inputs, *read, *weights)
            inputs_grad, *grads = pull_back(output_grad.to(update.dtype))
        else:
            # Something broke the program in two. Inside of `torch.func` attention would be computed in another way.
            with torch.enable_grad():
                variables = [tensor.detach().requires_grad_() for tensor in (inputs, *read, *weights)]
                update = update_of(*variables)
            inputs_grad, *grads = torch.autograd.grad(update, variables, output_grad.to(update.dtype))
            update = update.detach()
        source_grad = grads.pop(0) if read else None
        return update, inputs_grad.to(output_grad.dtype), source_grad, grads


class _ReversibleStack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, stack, hidden_states, source, *weights):
        streams, _, all_buckets = stack.forward(hidden_states)
        ctx.stack, ctx.autocast = stack, autocast_state(hidden_states.device)
        # Who changes a weight before backward is told so.
        ctx.save_for_backward(*streams, source, *all_buckets, *weights)
        return streams

    @staticmethod
    def backward(ctx, *gradients):
        x1, x2, _, *saved = ctx.saved_tensors
        num_layers = len(ctx.stack.layers)
        all_buckets, weights = saved[:num_layers], saved[num_layers:]
        input_grad, source_grad, weights_grads = ctx.stack.backward(
            (x1, x2), all_buckets, weights, gradients, ctx.autocast
        )
        return None, input_grad, source_grad, *weights_grads


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
