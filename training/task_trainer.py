"""The Trainer of tasks with labels: texts of about one length in a batch, an evaluation's figures in a line."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.data import Sampler
from tqdm.auto import tqdm
from transformers import TrainerCallback

from .run_checkpoints import RunArguments
from .run_trainer import RunTrainer


# Batches that are filled from one random set of texts, sorted by length, so that little is padded.
POOLED = 16


@dataclass
class TaskRunArguments(RunArguments):
    """A run's arguments with what learning labels changes in them."""

    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Texts per device and step."})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "Texts per device in evaluation."})
    num_train_epochs: float = field(default=4.0, metadata={"help": "Passes over the training texts."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints that are kept."})
    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available, metadata={"help": "Pin memory of batches, for a GPU."}
    )


class LengthSampler(Sampler[int]):
    """
    All rows in a random order in which those of a batch are of about one length; another in each epoch.

    Args:
        lengths: Of the rows.
        batch_size: Rows in a step.
        seed: Of the order, which depends on nothing else but the epoch, so that a run goes on in it.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed, self.epoch = np.asarray(lengths), batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """The Trainer says which epoch begins."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng((self.seed, self.epoch))
        order = generator.permutation(len(self.lengths))
        batches = []
        for begin in range(0, len(order), POOLED * self.batch_size):
            rows = order[begin : begin + POOLED * self.batch_size]
            rows = rows[np.argsort(self.lengths[rows], kind="stable")]
            batches += np.split(rows, range(self.batch_size, len(rows), self.batch_size))
        # The one that is not full comes last, because batches are counted off from the beginning.
        full = [batch for batch in batches if len(batch) == self.batch_size]
        for place in generator.permutation(len(full)):
            yield from full[place].tolist()
        for batch in batches:
            if len(batch) < self.batch_size:
                yield from batch.tolist()


class TaskTrainer(RunTrainer):
    """
    A RunTrainer for rows of ragged length.

    Args:
        lengths: Of the training rows.
        packer: Makes a batch of rows for training, in the place of the collator; evaluation pads.
    """

    args: RunArguments

    def __init__(self, *given, lengths: Sequence[int], packer: Callable | None = None, **kwargs):
        super().__init__(*given, **kwargs)
        self.lengths, self.packer = lengths, packer

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """As the Trainer's, with the packer if there is one."""
        collator = self.data_collator
        self.data_collator = self.packer or collator
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator

    def _get_train_sampler(self, train_dataset=None) -> torch.utils.data.Sampler:
        args = self.args
        in_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return LengthSampler(self.lengths, in_step, args.seed if args.data_seed is None else args.data_seed)


class SayFigures(TrainerCallback):
    """
    Prints the figures of each evaluation beside those of a baseline, on the main process.

    Args:
        names: Of the figures.
        beside: Figures of the same names, to stand beside.
        called: What these are of.
    """

    def __init__(self, names: Sequence[str], beside: dict[str, float] | None = None, called: str = ""):
        self.names = names
        self.beside = f" ({called}: {said(beside)})" if beside else ""

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if state.is_world_process_zero and f"eval_{self.names[0]}" in metrics:
            figures = {name: metrics[f"eval_{name}"] for name in self.names}
            tqdm.write(f"step {state.global_step}: held-out {said(figures)}{self.beside}")


def said(figures: dict[str, float]) -> str:
    """Figures in a line."""
    return ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in figures.items())
