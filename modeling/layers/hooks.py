"""Whether anybody looks at what modules are given and give: then it must stay as it is."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from ..ops.differentiation import is_inside_transform


def is_wrapped(module: nn.Module) -> bool:
    """Whether hooks look at a module's calls, but for `blind` ones, or something took the place of its `forward`."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    looks = any(not getattr(hook, "is_blind", False) for each in hooks for hook in each.values())
    return looks or "forward" in module.__dict__


def blind(hook: Callable) -> Callable:
    """A hook that takes note of a call and of nothing that is given or comes back."""
    hook.is_blind = True  # type: ignore[attr-defined]
    return hook


def works_unseen(module: nn.Module) -> bool:
    """Whether what goes through a module is lost afterwards: no graph is made, and neither hooks nor wrappers look."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or is_inside_transform() or _has_any_global_hook():
        return False
    return not any(map(is_wrapped, module.modules()))
