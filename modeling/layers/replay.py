"""
Running modules a second time with the same result.

What they compute depends on more than their inputs. Here it is recorded when they run and put back when they run
again: PyTorch's default random generators, what is in training and what in evaluation, weights and buffers. Generators
of other kinds (Python's, NumPy's, those somebody has made) and other attributes of modules are not.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize


def version_of(tensor: torch.Tensor) -> int | None:
    """PyTorch's count of a tensor's changes in place; nobody counts them where it was made in inference mode."""
    return None if tensor.is_inference() else tensor._version


@dataclass
class _Held:
    """
    A tensor that a module holds, as it is before the module runs.

    Attributes:
        place: The module's dictionary of parameters or of buffers.
        name: In it.
        version: See `version_of`.
        before: The numbers, where the module itself changes them.
    """

    place: dict[str, torch.Tensor | None]
    name: str
    tensor: torch.Tensor
    version: int | None
    before: torch.Tensor | None = None

    def is_changed(self) -> bool:
        return version_of(self.tensor) != self.version

    def to_replay(self) -> torch.Tensor:
        if self.before is not None:
            return self.before
        if self.is_changed():
            raise RuntimeError(
                f"`{self.name}` of a reversible layer was changed in place between forward and backward, which needs "
                "what it was. Change weights and buffers after backward."
            )
        return self.tensor


class _RandomStates(NamedTuple):
    """States of PyTorch's generators: that of the CPU, and that of another device if there is one."""

    cpu: torch.Tensor
    device: torch.Tensor | None


class Recording:
    """
    What the result of a module and of all in it depends on beside its inputs.

    Attributes:
        module: The module.
        modules: It and all in it.
        parameters: Theirs, each once.
    """

    def __init__(self, module: nn.Module):
        self.module, self.modules = module, tuple(module.modules())
        # CODEPATH: a parametrisation is what a user adds to a weight.
        if parametrize._cache_enabled and any(map(parametrize.is_parametrized, self.modules)):
            raise ValueError(
                "Reversible layers compute parametrised weights again in backward, and `parametrize.cached()` would "
                "give them those of forward, which have no graph. Leave it out, or set `config.reversible=False`."
            )
        self.parameters = list(module.parameters())
        self._parameters = _held_by(self.modules, "_parameters")
        self._buffers: list[_Held] = []
        self._training: list[bool] = []
        self._random_states: _RandomStates

    @contextmanager
    def recorded(self, device: torch.device) -> Iterator[None]:
        """For the first run, which draws its random numbers on `device` or on the CPU."""
        self._training = [module.training for module in self.modules]
        self._buffers = _held_by(self.modules, "_buffers")
        for held in self._buffers:
            held.before = held.tensor.clone()
        self._device, self._random_states = device, _random_states(device)
        yield
        for held in self._buffers:
            if not held.is_changed():
                held.before = None

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """For a run like the first. Afterwards everything is as it was before this one."""
        random_states = _random_states(self._device)
        training = [module.training for module in self.modules]
        held_now = []
        try:
            again = {held.tensor: held.to_replay() for held in (*self._parameters, *self._buffers)}
            # The run may change them again.
            again |= {held.tensor: again[held.tensor].clone() for held in self._buffers}
            for held in (*self._parameters, *self._buffers):
                now, then = held.place.get(held.name), again[held.tensor]
                if now is not then:
                    held_now.append((held.place, held.name, now))
                    held.place[held.name] = then
            self._switch(self._training)
            _set_random_states(self._device, self._random_states)
            yield
        finally:
            _set_random_states(self._device, random_states)
            self._switch(training)
            for place, name, tensor in held_now:
                place[name] = tensor

    def _switch(self, training: list[bool]):
        for module, is_training in zip(self.modules, training, strict=True):
            if module.training != is_training:
                module.training = is_training


def _held_by(modules: tuple[nn.Module, ...], kind: str) -> list[_Held]:
    """What modules hold in their dictionaries of a kind, "_parameters" or "_buffers"."""
    held = []
    for module in modules:
        place = getattr(module, kind)
        for name, tensor in place.items():
            if tensor is not None:
                held.append(_Held(place, name, tensor, version_of(tensor)))
    return held


def _random_states(device: torch.device) -> _RandomStates:
    if device.type in ("cpu", "meta"):
        return _RandomStates(torch.get_rng_state(), None)
    return _RandomStates(torch.get_rng_state(), torch.get_device_module(device).get_rng_state(*_arguments(device)))


def _set_random_states(device: torch.device, states: _RandomStates):
    torch.set_rng_state(states.cpu)
    if states.device is not None:
        torch.get_device_module(device).set_rng_state(states.device, *_arguments(device))


def _arguments(device):
    # There is one MPS device, and its functions take none.
    return () if device.type == "mps" else (device,)
