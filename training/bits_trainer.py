"""The Trainer that measures in bits per byte, keeps whole checkpoints, and stops when training diverges."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from .compression import bits_per_byte
from .packing import IGNORED
from .run_checkpoints import RUN_FILE, RunArguments, mark_whole, saving


class BitsPerByteTrainer(Trainer):
    """
    A Trainer with the optimizer of its arguments, whose evaluations also say `<prefix>_bits_per_byte`.

    It stops when the loss is no number, and its checkpoints say which run they are of once they are whole.

    An evaluation counts every row once, whatever batch and process it is in, and every predicted token as much.

    Args:
        tokens_per_byte: Predicted tokens per byte of the held-out text.
        predicts_next: Whether the model predicts the next token, or else each token that has a label.

    Attributes:
        run: What identifies the run.
    """

    model: PreTrainedModel
    args: RunArguments
    processing_class: PreTrainedTokenizerBase

    def __init__(
        self,
        model: PreTrainedModel,
        args: RunArguments,
        *,
        tokens_per_byte: float,
        predicts_next: bool = True,
        **kwargs,
    ):
        super().__init__(model, args, optimizer_cls_and_kwargs=args.optimizer_cls_and_kwargs(model), **kwargs)
        self.tokens_per_byte, self.predicts_next = tokens_per_byte, predicts_next
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

    def prediction_step(self, model, inputs, *args, **kwargs):
        """In the place of logits the nats of each row and of how many tokens they are, `[rows, 2]`."""
        inputs, rows = self._prepare_inputs(inputs), []
        for row in range(len(inputs["labels"])):
            of_row = {name: values[row : row + 1] for name, values in inputs.items()}
            predicted = of_row["labels"][:, 1:] if self.predicts_next else of_row["labels"]
            count = (predicted != IGNORED).sum()
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = self.compute_loss(model, of_row).float()
            rows.append(torch.stack([torch.where(count > 0, loss * count, 0), count]))
        return None, torch.stack(rows), None

    def evaluation_loop(
        self, dataloader, description: str, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        smoother, self.label_smoother = self.label_smoother, None
        try:
            output = super().evaluation_loop(dataloader, description, False, ignore_keys, metric_key_prefix)
        finally:
            self.label_smoother = smoother
        nats, count = np.asarray(output.predictions, np.float64).sum(axis=0)
        loss = nats / count if count else math.nan
        bits = bits_per_byte(loss, self.tokens_per_byte)
        names = (f"{metric_key_prefix}_loss", f"{metric_key_prefix}_bits_per_byte")
        return output._replace(metrics=(output.metrics or {}) | dict(zip(names, (loss, bits), strict=True)))

    def create_model_card(self, **kwargs):
        """Nothing: `save_report` writes the card, and the Trainer's draft would take its place."""


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


class CompareOnEvaluate(TrainerCallback):
    """Prints each evaluation beside the reference figures, on the main process."""

    def __init__(self, references: dict[str, float]):
        self.beside = ", ".join(f"{name} {value:.3f}" for name, value in references.items())

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if state.is_world_process_zero and "eval_bits_per_byte" in metrics:
            measured = f"step {state.global_step}: held-out {metrics['eval_bits_per_byte']:.3f} bits per byte"
            tqdm.write(f"{measured} ({self.beside})" if self.beside else measured)


def collate_causal(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """
    A batch of windows: every token is a label, end of text included.

    Where an `attention_mask` numbers documents, what fills a window up is none, nor is the first token of a document,
    because nothing in it predicts that.
    """
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    labels = batch["input_ids"].clone()
    if "attention_mask" in batch:
        numbers = batch["attention_mask"]
        before = torch.nn.functional.pad(numbers, (1, 0))[:, :-1]
        labels = labels.masked_fill((numbers == 0) | (numbers != before), IGNORED)
    return batch | {"labels": labels}
