"""The projection that a module ends with, and its gradients without its result."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from ..ops.differentiation import once_differentiable
from .hooks import is_wrapped


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
        return self.dropout(self.dense(hidden_states))


def ends_in_projection(forward: Callable) -> Callable:
    """Marks a `forward` that returns what its module's `output` makes, and does nothing else with it."""
    forward.ends_in_projection = True  # type: ignore[attr-defined]
    return forward


def can_do_without_result(module: nn.Module) -> bool:
    """
    Whether nobody reads what comes of a module's last projection before the module returns it.

    Hooks may, compiled programs, and classes that are not ours: adapters, quantised or sharded weights.
    """
    output: Any = getattr(module, "output", None)
    if not getattr(type(module).forward, "ends_in_projection", False) or type(output) is not OutputProjection:
        return False
    # Tensors that are made of others, as sharded ones are, have a way to be taken apart.
    is_plain = type(output.dense) is nn.Linear and not any(
        hasattr(parameter, "__tensor_flatten__") for parameter in output.dense.parameters()
    )
    return (
        is_plain
        and not _has_any_global_hook()
        and not any(is_wrapped(each) or each._compiled_call_impl is not None for each in module.modules())
    )


@contextmanager
def without_result(module: Any, dtype: torch.dtype | None) -> Iterator[None]:
    """
    Within it, the last projection of a module has gradients as ever, and its numbers are whatever was in memory.

    Args:
        dtype: What autocast computes in; None without it.
    """
    dense = module.output.dense
    dense.forward = partial(_project_nothing, dense.weight, dense.bias, dtype)
    try:
        yield
    finally:
        del dense.forward


def _project_nothing(weight, bias, dtype, vectors):
    given = vectors, weight, bias
    return _GradientsOfProjection.apply(*(each if each is None or dtype is None else each.to(dtype) for each in given))


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
