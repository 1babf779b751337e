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
        self._share()

    def _share(self) -> None:
        """Let the parts work on this optimizer's groups, one each, and its state: to others it is one optimizer."""
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state

    @torch.no_grad()
    def step(self, closure=None):
        """One step of each part."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            ValueError: if another optimizer gave it.
        """
        kinds = ["ns_steps" in group for group in state_dict.get("param_groups", ())]
        if kinds != ["ns_steps" in group for group in self.param_groups]:
            raise ValueError(
                "This state is not of Muon with AdamW, but of another optimizer. Resume with the optimizer the run "
                "began with (--muon)."
            )
        super().load_state_dict(state_dict)
        self._share()
