"""What conversions share: weights as they were saved, taken by name and checked; settings; a model made of weights."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from ...configuration.configuration_reformer import ReformerConfig


ModelClass = TypeVar("ModelClass", bound=PreTrainedModel)


def read_state_dict(weights: Mapping[str, torch.Tensor] | str | os.PathLike) -> dict[str, torch.Tensor]:
    """
    A state dict, or the one in a file of `torch.save` or safetensors, on the CPU. Nothing in the file is executed.

    Raises:
        ValueError: There is no such file, or something else than tensors by name is in it.
    """
    what, state = "weights", weights
    if not isinstance(weights, Mapping):
        path = Path(weights)
        if not path.is_file():
            raise ValueError(
                f"{path} is no file. Give one that `torch.save(model.state_dict(), path)` wrote, or a `.safetensors`."
            )
        what = str(path)
        try:
            if path.suffix == ".safetensors":
                state = load_file(path)
            else:
                state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged or foreign file makes a reader raise
            raise ValueError(
                f"{path} is damaged, or holds no state dict that can be read without running code "
                f"({type(error).__name__}). Save `model.state_dict()`."
            ) from error
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{what}: no state dict, tensors by name. Give or save `model.state_dict()`.")
    return {name: weight.detach().cpu() for name, weight in state.items()}


class Source:
    """
    Weights that are taken one by one, each with the shape that the settings ask for.

    Args:
        state: By name.
        settings: Whose words errors use.
    """

    def __init__(self, state: Mapping[str, torch.Tensor], settings: str):
        self._state, self._settings = state, settings
        self._taken: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._state

    def take(self, name: str, *shape: int) -> torch.Tensor:
        """
        The weight of this name.

        Raises:
            ValueError: There is none, or it has another shape.
        """
        if name not in self._state:
            raise ValueError(f"The weights have no `{name}`, which {self._settings} ask for.")
        weight = self._state[name]
        if tuple(weight.shape) != shape:
            raise ValueError(f"`{name}` has the shape {tuple(weight.shape)}, but {self._settings} ask for {shape}.")
        self._taken.add(name)
        return weight

    def check_nothing_is_left(self):
        """
        Raises:
            ValueError: There is a weight that nobody took.
        """
        left = [name for name in self._state if name not in self._taken]
        if left:
            names = ", ".join(left[:5]) + (", ..." if len(left) > 5 else "")
            raise ValueError(f"The weights hold {names}: {self._settings} say nothing of these.")


def check_settings(settings: Mapping[str, Any], known: Mapping[str, Any], source: str) -> None:
    """
    Raises:
        ValueError: A setting contradicts what is known from the source, whose name the message has.
    """
    for name, value in known.items():
        given = settings.get(name)
        if given is not None and _plain(given) != _plain(value):
            raise ValueError(f"`{name}={given!r}` contradicts {source}: there it is {value!r}. Leave it out.")


def _plain(setting):
    return list(setting) if isinstance(setting, list | tuple) else setting


def build(
    model_class: type[ModelClass], config: ReformerConfig, state: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> ModelClass:
    """
    A model in evaluation mode, with weights of its own.

    Args:
        state: Each parameter of the model, by its name.

    Raises:
        ValueError: One is missing, has another shape or values that are no numbers, or there is one more.
    """
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
    damaged = [name for name, weight in state.items() if not weight.isfinite().all()]
    if damaged:
        raise ValueError(
            f"The weights hold values that are not finite (NaN or infinity), in {damaged[:5]}. The training run "
            "diverged or the file is damaged; use an earlier checkpoint."
        )
    # Copies, because weights that were shared there are trained one by one here, and nobody else's are touched.
    own = {name: torch.empty(weight.shape, dtype=dtype).copy_(weight) for name, weight in state.items()}
    model.load_state_dict(own, assign=True)
    model.tie_weights()
    model.config.dtype = dtype
    return model.eval()
