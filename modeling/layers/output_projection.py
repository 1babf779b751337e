"""The projection that a module ends with, and its gradients without its result."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import local
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from ..ops.differentiation import once_differentiable
from .hooks import is_wrapped


class _Results(local):
    """
    Whether this thread needs what projections make.

    Attributes:
        unneeded: It does not.
        dtype: What autocast computes in; None without it.
    """

    unneeded = False
    dtype: torch.dtype | None = None


_results = _Results()


class OutputProjection(nn.Module):
    """
    Projection to `hidden_size`, dropout: how attention and feed-forward end.

    Args:
        size: Of the vectors that come in.
    """

    def __init__(self, config, size: int, bias: bool = True):
        super().__init__()
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.dense = nn.Linear(size, config.hidden_size, bias=bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling() and _results.unneeded:
            return self.dropout(_without_numbers(hidden_states, self.dense.weight, self.dense.bias))
        return self.dropout(self.dense(hidden_states))


# As they are when this is imported: whoever puts another in the place of one may read what it makes.
_FORWARDS: dict[type[nn.Module], Callable] = {
    module: module.forward for module in (OutputProjection, nn.Linear, nn.Dropout)
}
_ENDING_IN_PROJECTION: set[Callable] = set()


def ends_in_projection(forward: Callable) -> Callable:
    """Marks a `forward` that returns what its module's `output` makes, and does nothing else with it."""
    _ENDING_IN_PROJECTION.add(forward)
    return forward


def can_do_without_result(module: nn.Module) -> bool:
    """
    Whether nobody reads what comes of a module's last projection before the module returns it.

    Hooks may, compiled programs, and what is not ours: adapters, quantised or sharded weights, other `forward`s.
    """
    output: Any = getattr(module, "output", None)
    if type(module).forward not in _ENDING_IN_PROJECTION or type(output) is not OutputProjection:
        return False
    parts = output, *output.children()
    if [type(part) for part in parts] != [OutputProjection, nn.Dropout, nn.Linear] or _has_any_global_hook():
        return False
    return (
        all(type(part).forward is _FORWARDS[type(part)] for part in parts)
        # Tensors that are made of others, as sharded ones are, have a way to be taken apart.
        and not any(hasattr(weight, "__tensor_flatten__") for weight in output.dense.parameters())
        and not any(is_wrapped(each) or each._compiled_call_impl is not None for each in module.modules())
    )


@contextmanager
def without_result(dtype: torch.dtype | None) -> Iterator[None]:
    """
    Within it, projections have gradients as ever, and their numbers are whatever was in memory.

    Args:
        dtype: What autocast computes in; None without it.
    """
    _results.unneeded, _results.dtype = True, dtype
    try:
        yield
    finally:
        _results.unneeded, _results.dtype = False, None


def _without_numbers(*given):
    if _results.dtype is not None:
        # Autocast leaves float64 as it is.
        given = [each if each is None or each.dtype == torch.float64 else each.to(_results.dtype) for each in given]
    return _GradientsOfProjection.apply(*given)


class _GradientsOfProjection(torch.autograd.Function):
    """`nn.functional.linear` that computes gradients alone."""

    @staticmethod
    def forward(ctx, vectors, weight, bias):
        ctx.save_for_backward(vectors, weight)
        return vectors.new_empty(*vectors.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        vectors, weight = ctx.saved_tensors
        needs_vectors, needs_weight, needs_bias = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)
        return (
            gradient @ weight if needs_vectors else None,
            rows.T @ vectors.flatten(0, -2) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )
