"""Muon for the matrices of the layers and AdamW for everything else, as one optimizer."""

import math
from typing import Any

import torch
from bfloat16 import multiplies_in_bfloat16
from torch import nn


class Muon(torch.optim.Muon):
    """
    `torch.optim.Muon`, scaled to match AdamW, in a precision that the device multiplies fast.

    PyTorch's own step always computes in bfloat16. Settings and state are those of PyTorch's class.

    Args:
        params: Matrices, or groups of them.
        dtype: What updates are made orthogonal in; None for bfloat16 where the device multiplies in it, else float32.
        **settings: Those of `torch.optim.Muon`, but `adjust_lr_fn`.
    """

    def __init__(self, params, *, dtype: torch.dtype | None = None, **settings) -> None:
        super().__init__(params, adjust_lr_fn="match_rms_adamw", **settings)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):
        """One step (Jordan et al. 2024), whose length matches AdamW's (Liu et al. 2025, section 2.2)."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)
        return loss

    def _update(self, weight: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight.grad)
        momentum = state["momentum_buffer"]
        momentum.lerp_(weight.grad, 1 - group["momentum"])
        update = weight.grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        fast = torch.bfloat16 if multiplies_in_bfloat16(weight.device) else torch.float32
        update = orthogonal(update.to(self.dtype or fast), group["ns_coefficients"], group["ns_steps"], group["eps"])
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(weight.shape)))


def orthogonal(
    matrix: torch.Tensor, coefficients: tuple[float, float, float], num_steps: int, eps: float
) -> torch.Tensor:
    """
    `matrix`, `[M, N]`, with its singular values near 1, by Newton and Schulz's iteration (Jordan et al. 2024).

    Args:
        matrix: Computed with in its own dtype.
        coefficients: Of the singular value, its cube and its fifth power in a step.
        num_steps: How many.
        eps: Smallest norm that is divided by.
    """
    linear, cubic, quintic = coefficients
    is_tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if is_tall else matrix
    wide = wide / wide.norm().clamp(min=eps)
    for _ in range(num_steps):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=cubic, alpha=quintic), wide, beta=linear)
    return wide.T if is_tall else wide


class MuonWithAdamW(torch.optim.Optimizer):
    """
    `Muon` on the weight matrices inside the layers, `torch.optim.AdamW` on embeddings, head, norms and biases.

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
        self.parts = [Muon(matrices, lr=learning_rate, weight_decay=weight_decay)]
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
