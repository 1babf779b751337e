"""Reversible layers and fused attention give gradients, and nothing else: what more is asked of them is refused."""

from collections.abc import Callable
from functools import wraps

import torch
from torch.autograd import forward_ad


def is_inside_transform() -> bool:
    """Whether `torch.func` is at work (`grad`, `vmap`, `jvp`, ...), or forward mode; False where code is compiled."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def refuse_derivatives(of_a_kind: str):
    """RuntimeError that says what has every derivative."""
    raise RuntimeError(
        f"Reversible layers and fused attention have no derivatives {of_a_kind}. Before the forward pass, set "
        "`model.config.reversible = False` and call `model.set_attn_implementation('eager')`."
    )


def once_differentiable(backward: Callable) -> Callable:
    """A decorator for a Function's `backward` that cannot be differentiated itself."""

    @wraps(backward)
    def backward_without_graph(ctx, *gradients):
        if torch.is_grad_enabled():
            refuse_derivatives("of derivatives (`create_graph=True`)")
        return backward(ctx, *gradients)

    return backward_without_graph
