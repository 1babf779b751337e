"""The Trainer of every command that trains: the recipe's optimizer, whole checkpoints, and a stop when it diverges."""

import math
import os
import shutil
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_utils import rotate_checkpoints

from .bfloat16 import multiplies_in_bfloat16
from .interruptions import Interrupted, StopOnSignal
from .run_checkpoints import RUN_FILE, RunArguments, checkpoints_in_the_way, mark_whole, newest_whole, saving


class RunTrainer(Trainer):
    """
    A Trainer with the optimizer of its arguments.

    It stops when the loss is no number, and its checkpoints say which run they are of once they are whole.

    Attributes:
        run: What identifies the run.
    """

    model: PreTrainedModel
    args: RunArguments
    processing_class: PreTrainedTokenizerBase

    def __init__(self, model: PreTrainedModel, args: RunArguments, **kwargs):
        super().__init__(model, args, optimizer_cls_and_kwargs=args.optimizer_cls_and_kwargs(model), **kwargs)
        self.run: dict[str, Any] = {}

    def _run_epoch(self, *args, **kwargs) -> None:
        # The Trainer looks at the number of steps after a step only.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        # With the filter, which is on by default, the Trainer itself looks at every loss, and hides it if it is none.
        if self.args.logging_nan_inf_filter and not torch.isfinite(loss):
            check_finite(loss.item(), f"The loss of step {self.state.global_step + 1}", self.args.learning_rate)
        return loss

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """As the Trainer's. It draws random numbers for its loader, and training goes on as if it had not."""
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args, **kwargs) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with saving(folder):
            if self.args.should_save:
                (folder / RUN_FILE).unlink(missing_ok=True)
            # None of the older ones is deleted before this one is whole.
            limit, self.args.save_total_limit = self.args.save_total_limit, None
            try:
                super()._save_checkpoint(*args, **kwargs)
            finally:
                self.args.save_total_limit = limit
            self.args.distributed_state.wait_for_everyone()
            if self.args.should_save:
                mark_whole(folder, self.run)
                rotate_checkpoints(self.args.output_dir, limit, self.state.best_model_checkpoint, use_mtime=True)

    def create_model_card(self, **kwargs):
        """Nothing: the command writes the card, and the Trainer's draft would take its place."""


@contextmanager
def whole_model(trainer: RunTrainer) -> Iterator[None]:
    """
    Within it `trainer.model` is one that this process can use alone.

    Where weights are sharded (FSDP, ZeRO-3), every process must take part in whatever a model computes; so it is the
    one that has been saved.
    """
    model = trainer.model
    if not trainer.is_fsdp_enabled and not any(map(_is_shard, model.parameters())):
        yield
        return
    deepspeed = trainer.accelerator.state.deepspeed_plugin
    if deepspeed is not None:
        # Otherwise transformers would shard what it loads.
        unset_hf_deepspeed_config()
    trainer.model = type(model).from_pretrained(trainer.args.output_dir, device_map=trainer.args.device)
    try:
        yield
    finally:
        trainer.model = model
        if deepspeed is not None:
            deepspeed.set_deepspeed_weakref()


def _is_shard(parameter):
    return hasattr(parameter, "ds_id") or hasattr(parameter, "full_tensor")


def check_finite(value: float, name: str, learning_rate: float) -> None:
    """
    Raises:
        ValueError: the value is NaN or infinite.
    """
    if not math.isfinite(value):
        raise ValueError(
            f"{name} is {value}: training has diverged. Try a lower learning_rate (it is {learning_rate:g}), a longer "
            "warm-up (warmup_steps) or a lower max_grad_norm; a checkpoint from before may still be good."
        )


def check_strategy(arguments: RunArguments) -> None:
    """Refuse what `accelerate launch` may ask for and cannot have."""
    if arguments.muon and arguments.deepspeed_plugin is not None:
        raise ValueError(
            "muon is True, but DeepSpeed flattens the matrices that Muon works on. Train with AdamW (--muon False and "
            "a learning_rate to match), or shard with FSDP instead (docs/distributed.md)."
        )
    if arguments.bf16 and not multiplies_in_bfloat16(arguments.device):
        warnings.warn(
            f"bf16 is True, but this device ({arguments.device.type}) has no instructions for it; float32 is faster.",
            stacklevel=2,
        )
    on_cpu = arguments.distributed_state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU)
    if on_cpu and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise ValueError(
            "accelerate shards with FSDP on accelerators only, and here it would train without. Use GPUs, or DDP "
            "(docs/distributed.md)."
        )


def run_training(
    trainer: RunTrainer,
    arguments: RunArguments,
    checkpoint: str | None,
    *,
    goes_on: str = "the same command with --resume_from_checkpoint last goes on",
) -> None:
    """
    Train, from the checkpoint on if there is one.

    Args:
        goes_on: What goes on from the last step of a run that a signal ends.

    Raises:
        Interrupted: SIGTERM or Ctrl-C came; the last step is saved.
    """
    if trainer.is_world_process_zero():
        for other in checkpoints_in_the_way(arguments):
            shutil.rmtree(other)
    with StopOnSignal() as stop:
        trainer.add_callback(stop)
        trainer.train(resume_from_checkpoint=checkpoint)
    if not stop.number:
        return
    if trainer.is_world_process_zero():
        print(
            f"{signal.Signals(stop.number).name}: stopped after step {trainer.state.global_step}, saved in "
            f"{newest_whole(arguments.output_dir)}, from which {goes_on}.",
            flush=True,
        )
    raise Interrupted(stop.number)
