"""What the experiments on made-up sequences share: training, accuracy, choice of learning rates, a file per run."""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch

from hf_reformer import ReformerConfig, ReformerForCausalLM
from hf_reformer.training.provenance import machine, versions

from .resumable import ROOT, experiment_parser, write_json


RESULTS = ROOT / "docs" / "experiments"
# What no loss and no accuracy counts.
IGNORED = -100
# Held-out sequences are the same for every run; no seed of a run is this one.
HELD_OUT_SEED = 10**6
# Learning rates are chosen with this seed, results come from others.
GRID_SEED = 1000
EVALUATED_TOGETHER = 16
MAX_GRAD_NORM = 1.0

Draw = Callable[[int, int, torch.Generator], tuple[torch.Tensor, torch.Tensor]]
Optimize = Callable[[torch.nn.Module, float, int], tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]]


@dataclass(frozen=True)
class Task:
    """
    Sequences, the models that learn them, and for how long.

    Args:
        draw: Batch size, length and generator to tokens `[B, L]` and labels `[B, L]`, `IGNORED` where nothing counts.
        optimize: Model, learning rate and steps to an optimizer and its schedule.
        model: Settings of every model; those of a length are in `model_of_length`.
        contenders: Name to the settings that tell its model from others; `labels` are their names for people.
        evaluations: Name of a contender to those whose attention its weights are evaluated with, too.
        steps: Length to steps of a run; `grid_steps` of one that chooses a learning rate, at the shortest length.
        every: Steps between measurements of accuracy, on `few` held-out sequences; the last one is on `many`.
    """

    name: str
    draw: Draw
    optimize: Optimize
    model: dict[str, Any]
    model_of_length: Callable[[int], dict[str, Any]]
    contenders: dict[str, dict[str, Any]]
    labels: dict[str, str]
    evaluations: dict[str, tuple[str, ...]]
    learning_rates: tuple[float, ...]
    steps: dict[int, int]
    grid_steps: int
    every: int
    batch_size: int
    few: int = 16
    many: int = 64


@dataclass(frozen=True)
class Run:
    """What decides the course of one run."""

    task: str
    contender: str
    length: int
    seed: int
    learning_rate: float
    steps: int


def model_settings(task: Task, contender: str, length: int) -> dict[str, Any]:
    """What a contender's model sets in its config."""
    return task.model | task.model_of_length(length) | task.contenders[contender]


def build_model(task: Task, contender: str, length: int) -> ReformerForCausalLM:
    """A new model with the attention of this contender."""
    return ReformerForCausalLM(ReformerConfig(**model_settings(task, contender, length)))


def accuracy(model: ReformerForCausalLM, tokens: torch.Tensor, labels: torch.Tensor) -> float:
    """The share of labels that get the highest score."""
    model.eval()
    with torch.no_grad():
        parts = tokens.to(model.device).split(EVALUATED_TOGETHER)
        predicted = torch.cat([model(part).logits[:, :-1].argmax(-1) for part in parts]).cpu()
    labels = labels[:, 1:]
    return (predicted == labels)[labels != IGNORED].double().mean().item()


def measure(task: Task, run: Run, evaluations: tuple[str, ...], device: str = "cpu") -> dict[str, Any]:
    """Train once; accuracy and loss over the steps, at last accuracy with each evaluation's attention; CPU seconds."""
    start = time.process_time()
    torch.manual_seed(run.seed)
    model = build_model(task, run.contender, run.length).to(device)
    optimizer, schedule = task.optimize(model, run.learning_rate, run.steps)
    data = torch.Generator().manual_seed(run.seed)
    held_out = task.draw(task.many, run.length, torch.Generator().manual_seed(HELD_OUT_SEED))
    few = [part[: task.few] for part in held_out]
    curve, losses = [], []
    for step in range(1, run.steps + 1):
        model.train()
        tokens, labels = (part.to(device) for part in task.draw(task.batch_size, run.length, data))
        loss = model(tokens, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % task.every == 0:
            loss = sum(losses[-task.every :]) / task.every
            curve.append({"step": step, "loss": round(loss, 4), "accuracy": round(accuracy(model, *few), 4)})
    evaluated = {}
    for name in evaluations:
        twin = build_model(task, name, run.length).to(device)
        twin.load_state_dict(model.state_dict())
        evaluated[name] = round(accuracy(twin, *held_out), 4)
    return {"curve": curve, "evaluated": evaluated, "cpu_seconds": round(time.process_time() - start, 1)}


def run_once(
    task: Task, run: Run, path: Path, evaluations: tuple[str, ...] = (), device: str = "cpu"
) -> dict[str, Any]:
    """
    What the file holds; if there is none, it is measured and written. A run that was killed has no file.

    Raises:
        ValueError: the file is of a run with other settings.
    """
    settings = asdict(run) | {
        "batch_size": task.batch_size,
        "every": task.every,
        "held_out": [task.few, task.many],
        "model": model_settings(task, run.contender, run.length),
    }
    if path.is_file():
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["settings"] != settings:
            raise ValueError(
                f"{path} is of a run with the settings {stored['settings']}, not {settings}. Give other --results, or "
                "delete the file."
            )
        return stored
    result = {
        "settings": settings,
        **measure(task, run, evaluations, device),
        "machine": machine(),
        "versions": versions(),
    }
    write_json(path, result)
    last = result["evaluated"] or result["curve"][-1:]
    print(f"{path.stem}: {last}, {result['cpu_seconds']} s", flush=True)
    return result


def choose_learning_rate(task: Task, contender: str, folder: Path) -> float:
    """The rate of the grid whose short run has the highest accuracy, averaged over its steps."""
    length = min(task.steps)
    areas = {}
    for rate in task.learning_rates:
        run = Run(task.name, contender, length, GRID_SEED, rate, task.grid_steps)
        curve = run_once(task, run, folder / "grid" / f"{contender}-{length}-{rate:g}.json")["curve"]
        areas[rate] = sum(point["accuracy"] for point in curve) / len(curve)
    return max(areas, key=areas.get)


def parse_arguments(description: str, task: Task, argv: list[str] | None) -> argparse.Namespace:
    """Arguments from the command line."""
    parser = experiment_parser(description, task.evaluations, RESULTS / task.name)
    lengths = list(task.steps)
    parser.add_argument("--lengths", type=int, nargs="+", choices=lengths, default=lengths[:1])
    parser.add_argument("--learning_rate", type=float, help="for all contenders, instead of the chosen ones")
    return parser.parse_args(argv)


def run_all(task: Task, arguments: argparse.Namespace) -> None:
    """Every run that was asked for, seed by seed, so that a run cut short leaves whole seeds."""
    torch.set_num_threads(arguments.threads)
    given, names = arguments.learning_rate, arguments.only or task.evaluations
    rates = {name: given or choose_learning_rate(task, name, arguments.results) for name in names}
    for length in arguments.lengths:
        for seed in arguments.seeds:
            for name, rate in rates.items():
                run = Run(task.name, name, length, seed, rate, task.steps[length])
                path = arguments.results / f"{name}-{length}-{seed}.json"
                run_once(task, run, path, (name, *task.evaluations[name]))


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """The results in a folder, those that chose learning rates left out, by seed."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    return sorted(runs, key=lambda run: run["settings"]["seed"])


def runs_of(runs: list[dict[str, Any]], contender: str, length: int) -> list[dict[str, Any]]:
    """Those of one contender and length."""
    return [run for run in runs if (run["settings"]["contender"], run["settings"]["length"]) == (contender, length)]


def percent(shares: list[float]) -> str:
    """Mean and, from two values on, standard deviation, in percent."""
    values = [100 * share for share in shares]
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def first_steps(runs: list[dict[str, Any]], level: float) -> str:
    """The first measurement of each run with an accuracy of at least `level`; a dash where there is none."""
    steps = [[point["step"] for point in run["curve"] if point["accuracy"] >= level] for run in runs]
    return ", ".join(str(reached[0]) if reached else "-" for reached in steps)


def markdown(*rows: list[str]) -> str:
    """A table; the first row is its head."""
    head, *rest = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rest])


def draw_curves(path: Path, task: Task, runs: list[dict[str, Any]]) -> None:
    """Accuracy over the steps, a panel for each length: the mean as a line, from least to most as a band."""
    lengths = [length for length in task.steps if any(run["settings"]["length"] == length for run in runs)]
    figure, panels = plt.subplots(
        1, len(lengths), figsize=(1 + 6 * len(lengths), 4.5), layout="constrained", sharey=True, squeeze=False
    )
    for axes, length in zip(panels[0], lengths, strict=True):
        for number, name in enumerate(task.evaluations):
            curves = [run["curve"] for run in runs_of(runs, name, length)]
            if not curves:
                continue
            steps = [point["step"] for point in curves[0]]
            shares = [[100 * point["accuracy"] for point in points] for points in zip(*curves, strict=True)]
            means, least, most = ([summary(values) for values in shares] for summary in (statistics.mean, min, max))
            axes.plot(steps, means, color=f"C{number}", label=task.labels[name])
            axes.fill_between(steps, least, most, color=f"C{number}", alpha=0.15, linewidth=0)
        axes.set_title(f"length {length:,}")
        axes.set_xlabel("steps")
        axes.grid(alpha=0.2)
        axes.legend()
    panels[0][0].set_ylabel("accuracy, %")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def run_and_report(task: Task, arguments: argparse.Namespace, tables: Callable[[list[dict[str, Any]]], str]) -> None:
    """Make the runs that are missing, unless only a report was asked for; print the tables and draw the curves."""
    if not arguments.report:
        run_all(task, arguments)
    runs = read_runs(arguments.results)
    if not runs:
        raise SystemExit(f"There are no results in {arguments.results}.")
    print(tables(runs))
    draw_curves(arguments.results.with_suffix(".png"), task, runs)
