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
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call, vjp

from ..decoding.decoding_cache import CachedStep
from .feed_forward import ChunkReformerFeedForward, ReformerFeedForwardDense, ReformerFeedForwardOutput
from .full_attention import FullSelfAttention
from .hooks import is_wrapped
from .local_attention import LocalSelfAttention
from .lsh_attention import LSHSelfAttention
from .reversible import autocast_state, narrowed, round_to_grid


# Modules of a layer that compute the same each time. Whatever else is in it, such as an adapter, may not.
REPEATABLE = (
    nn.Linear,
    nn.LayerNorm,
    nn.Dropout,
    ChunkReformerFeedForward,
    ReformerFeedForwardDense,
    ReformerFeedForwardOutput,
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
    return [getattr(layer, name) for layer in layers for name in ("attention", "feed_forward")]


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
    """

    layers: nn.ModuleList
    on_grid: bool
    num_hashes: int | None
    kwargs: dict[str, Any]
    cached: list[CachedStep] | None = None

    def run(self, hidden_states: torch.Tensor, reversible: bool) -> tuple[tuple[torch.Tensor, torch.Tensor], list]:
        """`[B, L, hidden_size]`, the input of both streams, to their outputs, and the attention maps or None."""
        if not reversible:
            streams, weights, _ = self.forward(hidden_states)
            return streams, weights
        weights = [weight for part in _parts(self.layers) for weight in _trained(part).values()]
        return _ReversibleStack.apply(self, hidden_states, *weights), [None] * len(self.layers)

    def forward(self, hidden_states):
        x1 = x2 = hidden_states
        all_weights, all_buckets = [], []
        for i, layer in enumerate(self.layers):
            attention, feed_forward = layer.attention, layer.feed_forward
            cached = None if self.cached is None else self.cached[i]
            rotations = layer.draw_rotations(
                hidden_states, self.kwargs.get("length"), self.num_hashes, self.kwargs["circle_length"], cached
            )
            update, weights, buckets = attention(
                narrowed(x2, attention), rotations=rotations, cached=cached, **self.kwargs
            )
            x1 = self._add(x1, update)
            x2 = self._add(x2, feed_forward(narrowed(x1, feed_forward)))
            all_weights.append(weights)
            all_buckets.append(buckets)
        return (x1, x2), all_weights, all_buckets

    def backward(self, streams, all_buckets, weights, gradients, autocast):
        """Gradients of the input and of each trained weight, by inverting one layer after the other."""
        (y1, y2), (y1_grad, y2_grad) = streams, gradients
        all_grads, end = [], len(weights)
        for i in reversed(range(len(self.layers))):
            layer, buckets = self.layers[i], all_buckets[i]
            begin = end - len(_trained(layer.feed_forward))
            update, part, grads = _recompute_rows(layer.feed_forward, y1, weights[begin:end], y2_grad, autocast)
            x2, y1_grad, end = self._add(y2, update, sign=-1), y1_grad + part, begin
            all_grads = [*grads, *all_grads]
            begin = end - len(_trained(layer.attention))
            kwargs = self.kwargs | {"buckets": buckets}
            update, part, grads = _recompute(layer.attention, x2, weights[begin:end], y1_grad, autocast, kwargs)
            y1, y2, end = self._add(y1, update, sign=-1), x2, begin
            y2_grad = y2_grad + part
            all_grads = [*grads, *all_grads]
        return y1_grad + y2_grad, all_grads

    def _add(self, stream, update, sign=1):
        update = round_to_grid(update, stream.dtype) if self.on_grid else update
        return torch.add(stream, update, alpha=sign)


class _ReversibleStack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, stack, hidden_states, *weights):
        streams, _, all_buckets = stack.forward(hidden_states)
        ctx.stack, ctx.autocast = stack, autocast_state(hidden_states.device)
        # Who changes a weight before backward is told so.
        ctx.save_for_backward(*streams, *all_buckets, *weights)
        return streams

    @staticmethod
    def backward(ctx, *gradients):
        y1, y2, *saved = ctx.saved_tensors
        num_layers = len(ctx.stack.layers)
        all_buckets, weights = saved[:num_layers], saved[num_layers:]
        input_grad, weights_grads = ctx.stack.backward((y1, y2), all_buckets, weights, gradients, ctx.autocast)
        return None, input_grad, *weights_grads


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in module.named_parameters() if weight.requires_grad}


def _recompute(module, stream, weights, output_grad, autocast, kwargs):
    """What a module adds for `stream`, and the gradients of its input and of its trained weights."""
    names = list(_trained(module))

    def update_of(inputs, *weights):
        with torch.autocast(**autocast):
            output = functional_call(module, dict(zip(names, weights, strict=True)), (inputs,), kwargs)
        update, *_ = output if isinstance(output, tuple) else (output,)
        return update

    inputs = narrowed(stream, module)
    if torch.compiler.is_compiling():
        update, pull_back = vjp(update_of, inputs, *weights)
        inputs_grad, *weights_grads = pull_back(output_grad.to(update.dtype))
    else:
        # Something broke the program in two. Inside of `torch.func` attention would be computed in another way.
        with torch.enable_grad():
            variables = [tensor.detach().requires_grad_() for tensor in (inputs, *weights)]
            update = update_of(*variables)
        inputs_grad, *weights_grads = torch.autograd.grad(update, variables, output_grad.to(update.dtype))
        update = update.detach()
    return update, inputs_grad.to(output_grad.dtype), weights_grads


def _recompute_rows(feed_forward, stream, weights, output_grad, autocast):
    """`_recompute`, where each token is worked on by itself."""
    if feed_forward.chunk_size:
        return _recompute(feed_forward, stream, weights, output_grad, autocast, {})
    # Inside of `torch.func`, a projection with a bias of more than two dimensions becomes a program for each length.
    rows, rows_grad = stream.flatten(0, 1), output_grad.flatten(0, 1)
    update, inputs_grad, weights_grads = _recompute(feed_forward, rows, weights, rows_grad, autocast, {})
    return update.unflatten(0, stream.shape[:2]), inputs_grad.unflatten(0, stream.shape[:2]), weights_grads
