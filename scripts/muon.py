"""Muon for the matrices of the layers and AdamW for everything else, as one optimizer."""

from typing import Any

import torch
from torch import nn


class MuonWithAdamW(torch.optim.Optimizer):
    """
    `torch.optim.Muon` on the weight matrices inside the layers, `torch.optim.AdamW` on embeddings, head, norms and
    biases.

    Muon (Jordan et al. 2024) makes every update of a matrix orthogonal, so a layer learns in all its directions at
    the same pace. Its learning rate is scaled to match AdamW's (Liu et al. 2025, arXiv 2502.16982), so one value
    serves both.

    Args:
        model: A Reformer; its layers are in `encoder.layers`.
        learning_rate: Of both.
        weight_decay: Of the matrices; the rest has none.
        betas: Of AdamW.

    Raises:
        ValueError: the model has no matrices in `encoder.layers`.
    """

    def __init__(
        self, model: nn.Module, *, learning_rate: float, weight_decay: float, betas: tuple[float, float]
    ) -> None:
        trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
        matrices = [weight for name, weight in trained if "encoder.layers." in name and weight.ndim == 2]
        others = [weight for name, weight in trained if not ("encoder.layers." in name and weight.ndim == 2)]
        if not matrices:
            raise ValueError(f"{type(model).__name__} has no weight matrices in encoder.layers; use --muon False.")
        self.parts = [
            torch.optim.Muon(matrices, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        ]
        if others:
            self.parts.append(torch.optim.AdamW(others, lr=learning_rate, weight_decay=0.0, betas=betas))
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure=None):
        """One step of each part; the parts share this optimizer's groups, and with them its learning rate."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The states of the parts, in their order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            ValueError: if another optimizer gave it.
        """
        states = state_dict.get("parts", ())
        if len(states) != len(self.parts):
            raise ValueError(
                f"This state has {len(states)} parts and not the {len(self.parts)} of Muon with AdamW: it is from "
                "another optimizer. Resume with the optimizer the run began with (--muon)."
            )
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]
