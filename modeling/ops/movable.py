"""Dataclasses of tensors that go to the device of a layer."""

from dataclasses import replace
from typing import Any, TypeVar

import torch


Moved = TypeVar("Moved", bound="Movable")


class Movable:
    """What a dataclass needs so that accelerate, which spreads layers over devices, moves it as it moves a tensor."""

    def to(self: Moved, device: torch.device, non_blocking: bool = False) -> Moved:
        """The same with all tensors on another device."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, (torch.Tensor, Movable))}
        instance: Any = self
        return replace(
            instance, **{name: tensor.to(device, non_blocking=non_blocking) for name, tensor in tensors.items()}
        )
