"""The Trainer's arguments with the recipe's defaults."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from .muon import MuonWithAdamW


@dataclass
class ReformerTrainingArguments(TrainingArguments):
    """
    TrainingArguments with the recipe's defaults; every other argument is the Trainer's own.

    The learning rate is Muon's. A Trainer gets that optimizer by
    `optimizer_cls_and_kwargs=arguments.optimizer_cls_and_kwargs(model)`; without it, it takes `optim`.
    """

    muon: bool = field(
        default=True,
        metadata={"help": "Muon for the matrices of the layers and AdamW for the rest, instead of optim."},
    )
    optim: str = field(default="adamw_torch", metadata={"help": "Optimizer, one of transformers' OptimizerNames."})
    learning_rate: float = field(default=1e-2, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate after warm-up."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps of warm-up, or below 1 their share of all."})
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay of the matrices."})
    adam_beta2: float = field(default=0.98, metadata={"help": "Decay of AdamW's second moment."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm."})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Windows per device and step."})
    per_device_eval_batch_size: int = field(default=1, metadata={"help": "Windows per device in evaluation."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the training windows."})
    logging_steps: float = field(default=0.02, metadata={"help": "Steps between logs, or below 1 their share of all."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate: no, steps, epoch."})
    eval_steps: float = field(default=0.1, metadata={"help": "Steps between evaluations, or below 1 their share."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Look for parameters without a gradient in each step; a Reformer has none."}
    )

    def __post_init__(self):
        super().__post_init__()
        at_least_one = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
        for name in at_least_one:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if not 0 <= self.learning_rate < math.inf:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be a number from 0 on.")

    def optimizer_cls_and_kwargs(self, model: nn.Module) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
        """The Trainer's argument of this name: Muon with AdamW for `model`, or None if `muon` is off."""
        if not self.muon:
            return None
        return MuonWithAdamW, {
            "model": model,
            "lr": self.learning_rate,
            "weight_decay": self.weight_decay,
            "betas": (self.adam_beta1, self.adam_beta2),
        }
