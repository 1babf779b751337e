"""Muon for the matrices of the layers and AdamW for everything else, as one optimizer."""

import math
from typing import Any

import torch
from torch import nn

from .bfloat16 import multiplies_in_bfloat16


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

    def __getstate__(self) -> dict[str, Any]:
        """What copies have, too; PyTorch's leaves out what it does not know."""
        return super().__getstate__() | {"dtype": self.dtype}

    @torch.no_grad()
    def step(self, closure=None):
        """One step (Jordan et al. 2024), whose length matches AdamW's (Liu et al. 2025, section 2.2)."""
        loss = _loss_of(closure)
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, weight.grad, group)
        return loss

    def _update(self, weight: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum = state["momentum_buffer"]
        momentum.lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
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
    serves both. Where a parameter is, its name says, so this takes the model and not its parameters; the Trainer hands
    it over with `optimizer_cls_and_kwargs=(MuonWithAdamW, {"model": model, "lr": 1e-2})`.

    Args:
        model: Whose layers are in a list called `layers`, as a Reformer's and most others' are.
        lr: Learning rate of both; schedulers find it in `param_groups`.
        weight_decay: Of the matrices; the rest has none.
        betas: Of AdamW.

    Raises:
        ValueError: it is no model, or has no matrices in `layers`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(
                "MuonWithAdamW takes the model, MuonWithAdamW(model, lr=...), but got parameters, which do not say "
                'where they belong. Give the Trainer optimizer_cls_and_kwargs=(MuonWithAdamW, {"model": model, ...}).'
            )
        trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
        matrices = [weight for name, weight in trained if "layers." in name and weight.ndim == 2]
        others = [weight for name, weight in trained if not ("layers." in name and weight.ndim == 2)]
        if not matrices:
            raise ValueError(f"{type(model).__name__} trains no weight matrices in layers; use AdamW (muon=False).")
        muon = Muon(matrices, lr=lr, weight_decay=weight_decay)
        adamw = torch.optim.AdamW([{"params": others}], lr=lr, weight_decay=0.0, betas=betas)
        self.parts = (muon, adamw)
        super().__init__(muon.param_groups + adamw.param_groups, {})
        # What groups have that are added later.
        self.defaults = adamw.defaults

    def __getstate__(self) -> dict[str, Any]:
        """What copies have, too."""
        return super().__getstate__() | {"parts": self.parts}

    @torch.no_grad()
    def step(self, closure=None):
        """One step of each part."""
        loss = _loss_of(closure)
        # Groups and state are this optimizer's, so that to others it is one.
        for part in self.parts:
            part.param_groups = [group for group in self.param_groups if _is_of_muon(group) == isinstance(part, Muon)]
            part.state = self.state
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            ValueError: if another optimizer gave it.
        """
        if [*map(_is_of_muon, state_dict.get("param_groups", ()))] != [*map(_is_of_muon, self.param_groups)]:
            raise ValueError(
                "This state is not of Muon with AdamW, but of another optimizer. Resume with the optimizer the run "
                "began with (muon of ReformerTrainingArguments)."
            )
        super().load_state_dict(state_dict)


def _is_of_muon(group: dict[str, Any]) -> bool:
    return "ns_steps" in group


def _loss_of(closure):
    """What an optimizer's closure gives, with gradients; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
