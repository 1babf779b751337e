"""
What the experiments on classification share: masked pretraining, fine-tuning, learning rates, a table and a figure.

A contender is trained twice on a task: "pretrained", first to fill in tokens that were hidden in the training
examples, then on their labels (arXiv 2310.02980); and "random", on labels from random weights, for as many steps as
both stages together. Models have 4 layers of width 128, 0.8 to 0.9 million weights, and look both ways.

Fixed beforehand: 500 steps of each stage, so 1,000 from random weights; Muon with AdamW, warm-up over 5% of a stage
and a cosine to 0; 15% of the tokens hidden, each behind the mask token; seeds 0, 1 and 2 for first weights, rotations
and the order of examples. The rate of each contender and stage is that of 1e-3, 3e-3 and 1e-2 whose run of 120 steps
with seed 0 ends with the lowest loss on 200 validation examples. The test is of the model after the last step.

A run is a file in docs/experiments, and one that is there is not repeated. Pretrained weights are in runs/experiments;
where they are gone and a run needs them, the masked training is done again.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_reformer import ReformerConfig, ReformerForMaskedLM, ReformerForSequenceClassification
from hf_reformer.training import recipe_config

from . import resumable
from .resumable import ResumableTraining, experiment_parser, write_json
from .synthetic import IGNORED, RESULTS, markdown, percent


CONTENDERS = {"local": ["local"] * 4, "local+lsh": ["local", "lsh"] * 2, "local+full": ["local", "full"] * 2}
SIZE = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "attention_head_size": 32,
    "feed_forward_size": 512,
    "reversible": False,
}
PADDING, MASK = 0, 1
HIDDEN_SHARE = 0.15
# Batches that are filled from one random set of examples, sorted by length, so that little is padded.
POOLED = 16
GRID_SEED, HIDING_SEED = 0, 10**9
BASELINES = "baselines.json"
STARTS = ("pretrained", "random")


@dataclass(frozen=True)
class Examples:
    """Token ids of each example, from 2 on, and the labels, `[N]`."""

    tokens: list[np.ndarray]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def lengths(self) -> np.ndarray:
        """`[N]`."""
        return np.array([len(tokens) for tokens in self.tokens])

    def batch(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """Padded ids `[B, L]`, with a mask where there is padding."""
        longest = self.lengths[rows].max()
        ids = np.full((len(rows), longest), PADDING)
        for place, row in enumerate(rows):
            ids[place, : self.lengths[row]] = self.tokens[row]
        ids = torch.from_numpy(ids)
        is_real = ids != PADDING
        return {"input_ids": ids} if is_real.all() else {"input_ids": ids, "attention_mask": is_real.long()}


@dataclass(frozen=True)
class Splits:
    """Training, validation and test, without an example in common."""

    train: Examples
    validation: Examples
    test: Examples

    @cached_property
    def description(self) -> dict[str, Any]:
        """Sizes and lengths, and a digest that other examples do not have."""
        digest, sizes = hashlib.sha256(), {}
        for name in ("train", "validation", "test"):
            examples = getattr(self, name)
            for tokens in examples.tokens:
                digest.update(len(tokens).to_bytes(4, "big") + tokens.astype(np.uint16).tobytes())
            digest.update(examples.labels.astype(np.uint8).tobytes())
            sizes[name] = len(examples)
        lengths = self.train.lengths
        return {
            "digest": digest.hexdigest()[:16],
            "examples": sizes,
            "tokens": {"least": int(lengths.min()), "mean": float(lengths.mean()), "most": int(lengths.max())},
        }


@dataclass(frozen=True)
class Task:
    """
    What is classified, by which models, and for how long.

    Args:
        read: Makes the examples.
        baselines: Test accuracy of what takes no Reformer.
        published: Test accuracy of others, by name.
        num_labels, vocab_size, context_length: Of the examples.
        mean_pooled: Whether the head reads the mean of all tokens, or the first token.
        pretraining_steps, tuning_steps: Of the two stages; from random weights it takes their sum.
        learning_rates: The grid; `grid_steps` of each of its runs.
        watched: Validation examples that are looked at in training.
        model: Further settings of `recipe_config`.
    """

    name: str
    title: str
    read: Callable[[], Splits]
    baselines: Callable[[Splits], dict[str, float]]
    num_labels: int
    vocab_size: int
    context_length: int
    mean_pooled: bool
    batch_size: int
    published: dict[str, float] = field(default_factory=dict)
    pretraining_steps: int = 500
    tuning_steps: int = 500
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    grid_steps: int = 120
    eval_every: int = 100
    watched: int = 200
    model: dict[str, Any] = field(default_factory=lambda: SIZE)

    def config(self, contender: str) -> ReformerConfig:
        """Of a new model."""
        return recipe_config(
            self.context_length,
            is_decoder=False,
            attn_layers=CONTENDERS[contender],
            vocab_size=self.vocab_size,
            pad_token_id=PADDING,
            eos_token_id=None,
            num_labels=self.num_labels,
            **self.model,
        )


@dataclass(frozen=True)
class StageRun:
    """
    One training of one stage: "masked", then "pretrained" on labels; or "random", on labels from the beginning.

    Attributes:
        base: Steps and learning rate of the masked training before, if there was one.
        is_trial: Whether it only chooses a learning rate.
    """

    task: str
    contender: str
    stage: str
    seed: int
    learning_rate: float
    num_steps: int
    eval_every: int
    batch_size: int
    base: tuple[int, float] | None = None
    is_trial: bool = False

    @property
    def name(self) -> str:
        """A file's name."""
        base = "after_{}_lr{:g}_".format(*self.base) if self.base else ""
        kind = self.contender.replace("+", "-")
        return f"{kind}_{self.stage}_{base}{self.num_steps}_lr{self.learning_rate:g}_seed{self.seed}"


class MeanPooledClassifier(ReformerForSequenceClassification):
    """The same model, whose head reads the mean of the real tokens' vectors, so that no place counts more."""

    def forward(self, input_ids, attention_mask=None, labels=None) -> SequenceClassifierOutput:
        vectors = self.reformer(input_ids, attention_mask=attention_mask).last_hidden_state
        is_real = (input_ids != self.config.pad_token_id)[..., None]
        logits = self.classifier((vectors * is_real).sum(1) / is_real.sum(1))
        return SequenceClassifierOutput(loss=None if labels is None else cross_entropy(logits, labels), logits=logits)


def order_of_batches(lengths: np.ndarray, batch_size: int, seed: int) -> Iterator[np.ndarray]:
    """Rows of examples of about one length; all of them in random order, again and again."""
    generator = np.random.default_rng(seed)
    while True:
        order = generator.permutation(len(lengths))
        for begin in range(0, len(order), POOLED * batch_size):
            rows = order[begin : begin + POOLED * batch_size]
            rows = rows[np.argsort(lengths[rows], kind="stable")]
            batches = np.split(rows, range(batch_size, len(rows), batch_size))
            yield from (batches[place] for place in generator.permutation(len(batches)))


def in_order_of_length(examples: Examples, batch_size: int) -> list[np.ndarray]:
    """Rows of all examples in batches."""
    rows = np.argsort(examples.lengths, kind="stable")
    return np.split(rows, range(batch_size, len(rows), batch_size))


def hide(inputs: dict[str, torch.Tensor], seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Inputs with 15% of their tokens behind the mask token, at least one; and labels, which count those alone."""
    ids = inputs["input_ids"]
    chances = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)).masked_fill(ids == PADDING, 1.0)
    hidden = chances <= chances.min().clamp(min=HIDDEN_SHARE)
    return inputs | {"input_ids": ids.masked_fill(hidden, MASK)}, ids.masked_fill(~hidden, IGNORED)


class StageTraining(ResumableTraining):
    """
    What both kinds of stages share.

    Args:
        task: What is learned.
        run: Its stage.
        splits: The examples.
        results: Folder for the records; those of trials are in its folder `grid`.
    """

    def __init__(self, task: Task, run: StageRun, splits: Splits, results: Path):
        super().__init__(run, results / "grid" if run.is_trial else results)
        self.task, self.splits = task, splits
        self.watched = Examples(splits.validation.tokens[: task.watched], splits.validation.labels[: task.watched])

    @property
    def checkpoint(self) -> Path:
        return resumable.CHECKPOINTS / f"{self.run.task}_{self.run.name}.pt"

    @property
    def settings(self) -> dict[str, Any]:
        """What else decides the result."""
        task = self.task
        return {
            "model": task.model | {"attn_layers": CONTENDERS[self.run.contender]},
            "mean_pooled": task.mean_pooled,
            "batch_size": self.run.batch_size,
            "data": self.splits.description["digest"],
        }

    def __call__(self) -> dict[str, Any]:
        """
        The record of the run, from its file if it is there.

        Raises:
            ValueError: the file is of a run with other settings.
        """
        record = super().__call__()
        if record["settings"] != self.settings:
            raise ValueError(
                f"{self.path} is of a run with the settings {record['settings']}, not {self.settings}. Give another "
                "--results, or delete the file."
            )
        return record

    def batches(self) -> Iterator[tuple[int, np.ndarray]]:
        """Number of the step, and rows."""
        return enumerate(order_of_batches(self.splits.train.lengths, self.run.batch_size, self.run.seed))

    def loss(self, model: nn.Module, batch: tuple[int, np.ndarray]) -> torch.Tensor:
        step, rows = batch
        inputs, labels = self.inputs_and_labels(self.splits.train, rows, self.run.seed * 10**6 + step)
        return model(**inputs, labels=labels).loss

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return self.score(model, self.watched)

    def measure(self, model: nn.Module) -> dict[str, Any]:
        return {"settings": self.settings}

    @abstractmethod
    def inputs_and_labels(self, examples: Examples, rows: np.ndarray, seed: int) -> tuple[dict, torch.Tensor]:
        """What the model takes, and what it should say; the seed is of what is hidden."""

    @torch.no_grad()
    def score(self, model: nn.Module, examples: Examples) -> dict[str, float]:
        """Mean loss, in nats, and accuracy."""
        losses, hits = [], []
        for number, rows in enumerate(in_order_of_length(examples, self.run.batch_size)):
            inputs, labels = self.inputs_and_labels(examples, rows, HIDING_SEED + number)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
                logits = model(**inputs).logits
            counts = labels != IGNORED
            logits, labels = logits[counts].float(), labels[counts]
            losses.append(cross_entropy(logits, labels, reduction="none"))
            hits.append(logits.argmax(-1) == labels)
        return {"loss": torch.cat(losses).mean().item(), "accuracy": torch.cat(hits).double().mean().item()}


class MaskedTraining(StageTraining):
    """Fills in hidden tokens; the model is kept for what follows."""

    @property
    def folder(self) -> Path:
        """Of the trained model."""
        return self.checkpoint.with_suffix("")

    def inputs_and_labels(self, examples: Examples, rows: np.ndarray, seed: int) -> tuple[dict, torch.Tensor]:
        return hide(examples.batch(rows), seed)

    def make_model(self) -> nn.Module:
        return ReformerForMaskedLM(self.task.config(self.run.contender))

    def measure(self, model: nn.Module) -> dict[str, Any]:
        if not self.run.is_trial:
            aside = self.folder.with_name(f"{self.folder.name}_{os.getpid()}")
            model.save_pretrained(aside)
            shutil.rmtree(self.folder, ignore_errors=True)
            aside.rename(self.folder)
        return super().measure(model)

    def weights(self) -> Path:
        """The folder; where only the record is left, it is trained again."""
        if not self.folder.is_dir():
            self.path.unlink(missing_ok=True)
        self()
        return self.folder


class LabelTraining(StageTraining):
    """
    Learns labels.

    Args:
        base: The masked training that it goes on from; random weights without one.
    """

    def __init__(self, task: Task, run: StageRun, splits: Splits, results: Path, base: MaskedTraining | None = None):
        super().__init__(task, run, splits, results)
        self.base = base

    def inputs_and_labels(self, examples: Examples, rows: np.ndarray, seed: int) -> tuple[dict, torch.Tensor]:
        return examples.batch(rows), torch.from_numpy(examples.labels[rows]).long()

    def make_model(self) -> nn.Module:
        model_class = MeanPooledClassifier if self.task.mean_pooled else ReformerForSequenceClassification
        if self.base is None:
            return model_class(self.task.config(self.run.contender))
        folder = self.base.weights()
        # The base may have been trained just now.
        torch.manual_seed(self.run.seed)
        return model_class.from_pretrained(folder)

    def measure(self, model: nn.Module) -> dict[str, Any]:
        record = super().measure(model)
        if not self.run.is_trial:
            record |= {name: self.score(model, getattr(self.splits, name)) for name in ("validation", "test")}
        return record


class Experiment:
    """
    All trainings of a task.

    Args:
        task: What is learned.
        results: Folder for the records.
    """

    def __init__(self, task: Task, results: Path):
        self.task, self.results, self.splits = task, results, task.read()

    def training(
        self, contender: str, stage: str, seed: int, learning_rate: float | None = None, is_trial: bool = False
    ) -> StageTraining:
        """One stage, with the chosen learning rate unless one is given."""
        task = self.task
        steps = {"masked": task.pretraining_steps, "pretrained": task.tuning_steps}
        num_steps = task.grid_steps if is_trial else steps.get(stage, sum(steps.values()))
        run = StageRun(
            task=task.name,
            contender=contender,
            stage=stage,
            seed=seed,
            learning_rate=learning_rate or self.learning_rate(contender, stage),
            num_steps=num_steps,
            eval_every=min(task.eval_every, num_steps),
            batch_size=task.batch_size,
            is_trial=is_trial,
        )
        if stage == "masked":
            return MaskedTraining(task, run, self.splits, self.results)
        base = self.training(contender, "masked", seed) if stage == "pretrained" else None
        if base is not None:
            run = replace(run, base=(base.run.num_steps, base.run.learning_rate))
        return LabelTraining(task, run, self.splits, self.results, base)

    def learning_rate(self, contender: str, stage: str) -> float:
        """Of the grid, the one with the lowest loss on validation examples at the end of its short run."""
        losses = {}
        for rate in self.task.learning_rates:
            trial = self.training(contender, stage, GRID_SEED, rate, is_trial=True)()
            losses[rate] = trial["evaluations"][-1]["loss"]
        return min(losses, key=losses.get)

    def describe(self) -> None:
        """Write what the examples are, and how good it is to guess."""
        path = self.results / BASELINES
        if not path.is_file():
            write_json(path, {"examples": self.splits.description, "baselines": self.task.baselines(self.splits)})


def parse_arguments(description: str, task: Task, argv: list[str] | None) -> argparse.Namespace:
    """Arguments from the command line."""
    parser = experiment_parser(description, CONTENDERS, RESULTS / task.name)
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=STARTS, help="(default both)")
    return parser.parse_args(argv)


def run_and_report(task: Task, arguments: argparse.Namespace) -> None:
    """Run what is asked for and not there yet; print the table and draw the figure."""
    torch.set_num_threads(arguments.threads)
    if not arguments.report:
        experiment = Experiment(task, arguments.results)
        experiment.describe()
        for seed in arguments.seeds:
            for contender in arguments.only or CONTENDERS:
                for start in arguments.starts:
                    experiment.training(contender, start, seed)()
    records = read_records(arguments.results)
    if not records:
        raise SystemExit(f"There are no results in {arguments.results}.")
    others = json.loads((arguments.results / BASELINES).read_text(encoding="utf-8"))["baselines"] | task.published
    print(table(records, others))
    draw(arguments.results.with_suffix(".png"), task, records, others)


def read_records(folder: Path) -> dict[tuple[str, str], list[dict]]:
    """All records but those of trials, by contender and stage, in the order of their seeds."""
    paths = sorted(path for path in folder.glob("*.json") if path.name != BASELINES)
    records = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    found = {}
    for contender in CONTENDERS:
        for stage in ("masked", *STARTS):
            runs = [row for row in records if (row["run"]["contender"], row["run"]["stage"]) == (contender, stage)]
            if runs:
                found[contender, stage] = sorted(runs, key=lambda row: row["run"]["seed"])
    return found


def table(records: dict[tuple[str, str], list[dict]], others: dict[str, float]) -> str:
    """Two tables of markdown: test accuracy, with that of others below; and what masked training came to."""
    head = ["layers", "begun with", "seeds", "learning rate", "test accuracy, %", "CPU seconds a step"]
    accuracies, masked = [head], [[*head[:1], *head[2:4], "bits a hidden token", "hidden tokens found, %", head[-1]]]
    for (contender, stage), runs in records.items():
        rates, seconds = f"{runs[0]['run']['learning_rate']:g}", mean(run["cpu_seconds"] / run["step"] for run in runs)
        line = [contender, str(len(runs)), rates]
        if stage == "masked":
            last = [run["evaluations"][-1] for run in runs]
            bits = mean(row["loss"] for row in last) / math.log(2)
            masked.append([*line, f"{bits:.3f}", percent([row["accuracy"] for row in last]), f"{seconds:.2f}"])
        else:
            begun = "weights pretrained by masking" if stage == "pretrained" else "random weights"
            found = percent([run["test"]["accuracy"] for run in runs])
            accuracies.append([contender, begun, *line[1:], found, f"{seconds:.2f}"])
    accuracies += [[name, "", "", "", f"{100 * share:.1f}", ""] for name, share in others.items()]
    return f"{markdown(*accuracies)}\n\n{markdown(*masked)}"


def draw(path: Path, task: Task, records: dict[tuple[str, str], list[dict]], others: dict[str, float]) -> None:
    """Validation accuracy over all steps, those of masked training first; and test accuracy of each seed."""
    figure, (curves, bars) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained", width_ratios=(3, 2))
    places = []
    for (contender, stage), runs in records.items():
        if stage == "masked":
            continue
        color = f"C{list(CONTENDERS).index(contender)}"
        style = "-" if stage == "pretrained" else "--"
        before = runs[0]["run"]["base"][0] if stage == "pretrained" else 0
        steps = [before + row["step"] for row in runs[0]["evaluations"]]
        shares = [[100 * row["accuracy"] for row in run["evaluations"]] for run in runs]
        curves.plot(steps, np.mean(shares, axis=0), style, color=color, label=f"{contender}, {stage}")
        curves.fill_between(steps, np.min(shares, axis=0), np.max(shares, axis=0), color=color, alpha=0.1, linewidth=0)
        final = [100 * run["test"]["accuracy"] for run in runs]
        bars.bar(len(places), mean(final), color=color, alpha=0.8 if stage == "pretrained" else 0.4)
        bars.scatter([len(places)] * len(final), final, color="black", s=10, zorder=3)
        places.append(f"{contender}\n{stage}")
    curves.set(xlabel="steps, of masked training, too", ylabel="accuracy, %", title=f"{task.title}: validation")
    curves.legend(fontsize=8)
    bars.set_title("Test: mean of the seeds, and each")
    bars.set_xticks(range(len(places)), places, fontsize=7)
    for number, (name, share) in enumerate(others.items()):
        color = "black" if name in task.published else "gray"
        bars.axhline(100 * share, color=color, linestyle=(0, (number + 1, 2)), linewidth=1, label=name)
    bars.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    for axes in (curves, bars):
        axes.grid(alpha=0.2)
    figure.savefig(path, dpi=150)
    plt.close(figure)
