"""The Trainer that measures in bits per byte."""

import math

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainerCallback

from .compression import bits_per_byte
from .packing import IGNORED
from .run_checkpoints import RunArguments
from .run_trainer import RunTrainer


class BitsPerByteTrainer(RunTrainer):
    """
    A RunTrainer whose evaluations also say `<prefix>_bits_per_byte`.

    An evaluation counts every row once, whatever batch and process it is in, and every predicted token as much.

    Args:
        tokens_per_byte: Predicted tokens per byte of the held-out text.
        predicts_next: Whether the model predicts the next token, or else each token that has a label.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: RunArguments,
        *,
        tokens_per_byte: float,
        predicts_next: bool = True,
        **kwargs,
    ):
        super().__init__(model, args, **kwargs)
        self.tokens_per_byte, self.predicts_next = tokens_per_byte, predicts_next

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
