"""Trainings that can be stopped and gone on with: a file for each that is done, a checkpoint for each that is not."""

import argparse
import json
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from tqdm.auto import tqdm

from hf_reformer.training import MuonWithAdamW
from hf_reformer.training.provenance import machine, versions


ROOT = Path(__file__).parents[2]
CHECKPOINTS = ROOT / "runs" / "experiments"
WARM_UP = 0.05
WEIGHT_DECAY, BETAS, LARGEST_NORM = 0.1, (0.9, 0.98), 1.0


class Run(Protocol):
    """
    What decides the course of a training; a dataclass.

    Attributes:
        seed: Of weights, rotations and the order of examples.
        learning_rate: Its peak, after a warm-up of 5% of the steps; then it falls along a cosine to 0.
        num_steps: How many.
        eval_every: Steps between evaluations, which are checkpoints, too.
    """

    seed: int
    learning_rate: float
    num_steps: int
    eval_every: int

    @property
    def name(self) -> str:
        """A file's name."""


def file_name(*words: str) -> str:
    """Words, which may be names of contenders, as one word without commas and blanks."""
    return "_".join(words).replace(", ", "-").replace(" ", "_")


def share_of_rate(step: int, num_steps: int) -> float:
    """The learning rate of a step, counted from 0, in units of its peak."""
    warm_up = max(1, round(WARM_UP * num_steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return (1 + math.cos(math.pi * (step - warm_up) / max(1, num_steps - warm_up))) / 2


def experiment_parser(description: str, names: Iterable[str], results: Path) -> argparse.ArgumentParser:
    """A parser with the arguments of every experiment that compares contenders of these names."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(names), metavar="NAME", help="these contenders alone")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default %(default)s)")
    folder = results.relative_to(ROOT)
    parser.add_argument("--results", type=Path, default=results, help=f"folder (default {folder})")
    parser.add_argument("--report", action="store_true", help="run nothing: print the tables and draw the figures")
    return parser


def write_json(path: Path, content: dict) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}")
    aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    aside.replace(path)


def make_optimizer(model: nn.Module, learning_rate: float) -> MuonWithAdamW:
    """The optimizer of every contender."""
    return MuonWithAdamW(model, lr=learning_rate, weight_decay=WEIGHT_DECAY, betas=BETAS)


def take_step(
    model: nn.Module, optimizer: MuonWithAdamW, loss_of: Callable[[], torch.Tensor], learning_rate: float, bf16: bool
) -> float:
    """
    One step of the optimizer.

    Args:
        loss_of: What it makes smaller, in nats.

    Returns:
        The loss in bits.

    Raises:
        ValueError: it is no number.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        loss = loss_of()
    if not loss.isfinite():
        raise ValueError(f"the loss is {loss.item()}.")
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), LARGEST_NORM)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item() / math.log(2)


class ResumableTraining(ABC):
    """
    A run whose record is a file; what it trains on, and how it is measured, subclasses say.

    Args:
        run: What to do.
        results: Folder for the record.
    """

    def __init__(self, run: Run, results: Path):
        self.run, self.path = run, results / f"{run.name}.json"
        # In float32, so that runs of all machines can be put together.
        self.bf16 = False

    @property
    def checkpoint(self) -> Path:
        """Where a run that is not done is kept."""
        return CHECKPOINTS / f"{self.run.name}.pt"

    @abstractmethod
    def make_model(self) -> nn.Module:
        """The model before the first step; the seed is set."""

    @abstractmethod
    def batches(self) -> Iterator[Any]:
        """What each step takes, without end; a run that goes on passes over what it has had."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """What a step makes smaller, in nats."""

    @abstractmethod
    def evaluate(self, model: nn.Module) -> dict[str, Any]:
        """Measured every `eval_every` steps and after the last one."""

    def measure(self, model: nn.Module) -> dict[str, Any]:
        """What else is in the record, of the trained model."""
        return {}

    def __call__(self) -> dict[str, Any]:
        """The record of the run, from its file if it is there."""
        return json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else self.carry_out()

    def carry_out(self) -> dict[str, Any]:
        """Train and measure; the record takes the place of one that is there."""
        torch.manual_seed(self.run.seed)
        model = self.make_model()
        optimizer = make_optimizer(model, self.run.learning_rate)
        record = {"step": 0, "seconds": 0.0, "cpu_seconds": 0.0, "evaluations": []}
        if self.checkpoint.is_file():
            saved = torch.load(self.checkpoint, weights_only=False)
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            torch.set_rng_state(saved["random"])
            record = saved["record"]
        self._train(model, optimizer, record)
        record |= self.measure(model)
        record |= {
            "run": asdict(self.run),
            "bfloat16": self.bf16,
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "machine": machine(),
            "versions": versions(),
        }
        write_json(self.path, record)
        self.checkpoint.unlink(missing_ok=True)
        return record

    def _train(self, model, optimizer, record):
        run, batches = self.run, self.batches()
        for _ in range(record["step"]):
            next(batches)
        progress = tqdm(total=run.num_steps, initial=record["step"], desc=run.name, mininterval=10)
        while record["step"] < run.num_steps:
            begun, cpu_begun = time.perf_counter(), time.process_time()
            model.train()
            for _ in range(min(run.eval_every, run.num_steps - record["step"])):
                loss = self._step(model, optimizer, next(batches), record["step"])
                record["step"] += 1
                progress.update()
            record["seconds"] += time.perf_counter() - begun
            record["cpu_seconds"] += time.process_time() - cpu_begun
            model.eval()
            measured = self.evaluate(model)
            record["evaluations"].append(
                {key: record[key] for key in ("step", "seconds", "cpu_seconds")} | {"train": loss} | measured
            )
            shown = {name: f"{value:.3f}" for name, value in measured.items() if isinstance(value, float)}
            progress.set_postfix(shown, refresh=False)
            self._save(model, optimizer, record)
        progress.close()

    def _step(self, model, optimizer, batch, step):
        learning_rate = self.run.learning_rate * share_of_rate(step, self.run.num_steps)
        try:
            return take_step(model, optimizer, lambda: self.loss(model, batch), learning_rate, self.bf16)
        except ValueError as error:
            raise ValueError(f"{self.run.name}, step {step + 1}: {error}") from error

    def _save(self, model, optimizer, record):
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        aside = self.checkpoint.with_suffix(f".{os.getpid()}")
        torch.save(
            {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "random": torch.get_rng_state(),
                "record": record,
            },
            aside,
        )
        aside.replace(self.checkpoint)
