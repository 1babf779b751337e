"""What conversions share: weights as they were saved, taken by name and checked; a model made of them."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from ...configuration.configuration_reformer import ReformerConfig


ModelClass = TypeVar("ModelClass", bound=PreTrainedModel)


def read_state_dict(weights: Mapping[str, torch.Tensor] | str | os.PathLike) -> dict[str, torch.Tensor]:
    """
    A state dict, or the one in a file of `torch.save` or safetensors. Nothing in the file is executed.

    Raises:
        ValueError: There is no such file, or something else than tensors by name is in it.
    """
    if isinstance(weights, Mapping):
        return dict(weights)
    path = Path(weights)
    if not path.is_file():
        raise ValueError(f"{path} is no file. Give one that `torch.save(model.state_dict(), path)` wrote.")
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or foreign file makes the unpickler raise
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} holds no state dict that can be read without running code: {reason}") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict, tensors by name. Save `model.state_dict()`.")
    return dict(state)


class Source:
    """
    Weights that are taken one by one, each with the shape that the settings ask for.

    Args:
        state: By name.
        settings: Whose words errors use.
    """

    def __init__(self, state: Mapping[str, torch.Tensor], settings: str):
        self._state, self._settings = dict(state), settings

    def __contains__(self, name: str) -> bool:
        return name in self._state

    def take(self, name: str, *shape: int) -> torch.Tensor:
        """
        The weight of this name.

        Raises:
            ValueError: There is none, or it has another shape.
        """
        weight = self._state.pop(name, None)
        if weight is None:
            raise ValueError(f"The weights have no `{name}`, which {self._settings} ask for.")
        if tuple(weight.shape) != shape:
            raise ValueError(f"`{name}` has the shape {tuple(weight.shape)}, but {self._settings} ask for {shape}.")
        return weight

    def check_nothing_is_left(self):
        """
        Raises:
            ValueError: There is a weight that nobody took.
        """
        if self._state:
            names = ", ".join(list(self._state)[:5]) + (", ..." if len(self._state) > 5 else "")
            raise ValueError(f"The weights hold {names}: {self._settings} say nothing of these.")


def build(model_class: type[ModelClass], config: ReformerConfig, state: dict[str, torch.Tensor]) -> ModelClass:
    """
    A model in evaluation mode, in the precision of its weights.

    Args:
        state: Each parameter of the model, by its name.

    Raises:
        ValueError: One is missing or has another shape, or there is one more.
    """
    dtype = next(iter(state.values())).dtype
    with torch.device("meta"):
        model = model_class(config)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in state.items()}
    if expected != given:
        wrong = sorted(name for name in expected | given if expected.get(name) != given.get(name))
        raise ValueError(
            f"These settings make a model with other weights than there are; {len(wrong)} do not fit: "
            f"{', '.join(wrong[:5])}."
        )
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.config.dtype = dtype
    return model.eval()
