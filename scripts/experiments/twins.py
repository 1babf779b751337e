"""
Twins on text (docs/experiments.md): what LSH layers add to local ones, beside dense attention that has the same idea.

    python -m scripts.run_experiment twins                   # seeds 0, 1, 2
    python -m scripts.run_experiment twins --report
    python -m scripts.run_experiment twins --docstrings_of torch --results docs/experiments/twins_on_docstrings

Fixed beforehand: every contender has the size of `text_models` and is trained on windows of 4,096 bytes of the
standard library's source for 3,000 steps, with the learning rate of 5e-3, 1e-2, 2e-2 and 4e-2 that was best for it
after 200 steps with seed 0. With more rounds or buckets it is the rate of one round. Seeds 0, 1 and 2. The trained
models are those that `context` and `switches` measure, too.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import mean

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch

from .docstrings import write_docstrings
from .resumable import ROOT, experiment_parser
from .text_models import CONTENDERS
from .text_training import TextRun, Training
from .value_variants import learned_mix


NUM_STEPS, CONTEXT_LENGTH, EVAL_EVERY = 3000, 4096, 250
GRID, GRID_STEPS = (5e-3, 1e-2, 2e-2, 4e-2), 200
# What runs without --only.
TWINS = (
    "local",
    "lsh",
    "lsh, successors",
    "lsh, successors, 2 rounds",
    "lsh, successors, 4 rounds",
    "full",
    "dense, shared, successors",
    "dense, separate, successors",
    "llama",
)
# Who has no grid of its own, and whose rate it takes.
RATE_OF = dict.fromkeys(
    (
        "lsh, successors, 2 rounds",
        "lsh, successors, 4 rounds",
        "lsh, successors, 2 buckets per chunk",
        "lsh, successors, 8 buckets per chunk",
    ),
    "lsh, successors",
)
RESULTS = ROOT / "docs" / "experiments" / "twins"


def add_settings(parser: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    """What decides the course of the trainings. Returns the group of those that name the text."""
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help="(default %(default)s)")
    parser.add_argument("--grid_steps", type=int, default=GRID_STEPS, help="(default %(default)s)")
    parser.add_argument("--context_length", type=int, default=CONTEXT_LENGTH, help="(default %(default)s)")
    parser.add_argument("--eval_every", type=int, default=EVAL_EVERY, help="steps (default %(default)s)")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--text_path", help="another text: a file or a folder")
    return text


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Arguments from the command line."""
    parser = experiment_parser(__doc__, CONTENDERS, RESULTS)
    add_settings(parser).add_argument("--docstrings_of", metavar="PACKAGE", help="another text: that of a package")
    arguments = parser.parse_args(argv)
    return argparse.Namespace(**vars(arguments), twins=arguments.results)


def parser_of_measurement(description: str, names: Iterable[str], results: Path) -> argparse.ArgumentParser:
    """For an experiment that measures trained twins: how these are trained, and where their records are."""
    parser = experiment_parser(description, names, results)
    add_settings(parser)
    parser.add_argument("--twins", type=Path, default=RESULTS, help="their folder (default docs/experiments/twins)")
    return parser


def training(
    arguments: argparse.Namespace, contender: str, seed: int, learning_rate: float, num_steps: int
) -> Training:
    """One run."""
    run = TextRun(
        contender=contender,
        seed=seed,
        learning_rate=learning_rate,
        num_steps=num_steps,
        context_length=arguments.context_length,
        eval_every=min(arguments.eval_every, num_steps),
        text_path=arguments.text_path,
    )
    return Training(run, CONTENDERS[contender], arguments.twins, learned_mix)


def twin(arguments: argparse.Namespace, contender: str, seed: int) -> Training:
    """A whole run, at the rate that the grid has chosen."""
    return training(arguments, contender, seed, best_learning_rate(arguments, contender), arguments.steps)


def best_learning_rate(arguments: argparse.Namespace, contender: str) -> float:
    """Of the grid, the one with the fewest bits after the short runs."""
    contender = RATE_OF.get(contender, contender)
    records = {rate: training(arguments, contender, 0, rate, arguments.grid_steps)() for rate in GRID}
    return min(records, key=lambda rate: records[rate]["evaluations"][-1]["bits_per_byte"])


def read_records(folder: Path, num_steps: int, grid_steps: int = GRID_STEPS) -> dict[str, list[dict]]:
    """
    The records of whole runs, by contender, in the order of their seeds.

    Runs at a rate that the grid does not choose, because it has grown since, are left out.
    """
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    grids, records = defaultdict(dict), defaultdict(list)
    for record in found:
        run = record["run"]
        if run["num_steps"] == grid_steps and run["seed"] == 0:
            grids[run["contender"]][run["learning_rate"]] = record["evaluations"][-1]["bits_per_byte"]
    for record in found:
        name, rate = (record["run"][key] for key in ("contender", "learning_rate"))
        grid = grids[RATE_OF.get(name, name)]
        if record["run"]["num_steps"] == num_steps and (not grid or rate == min(grid, key=grid.get)):
            records[name].append(record)
    return {name: records[name] for name in CONTENDERS if name in records}


def spread(values: list[float]) -> str:
    """The mean of all seeds, with the smallest and the largest."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def table(records: dict[str, list[dict]]) -> str:
    """
    A line of markdown for each contender: after the last step, the mean of all seeds and their spread.

    Seconds are those of the fastest run, because seeds may have been run on machines that differ.
    """
    lines = [
        "| layers | seeds | learning rate | bits per byte | first / last quarter of the context "
        "| repeated from afar | CPU seconds a step, the least |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, runs in records.items():
        last = [run["evaluations"][-1] for run in runs]
        far = [row["repeated"] for row in last]
        quarters = [mean(row["quarters"][part] for row in last) for part in (0, -1)]
        lines.append(
            f"| {name} | {len(runs)} | {runs[0]['run']['learning_rate']:g} | "
            f"{spread([row['bits_per_byte'] for row in last])} | {quarters[0]:.3f} / {quarters[1]:.3f} | "
            f"{'' if None in far else spread(far)} | "
            f"{min(run['cpu_seconds'] / run['step'] for run in runs):.2f} |"
        )
    return "\n".join(lines)


def draw(path: Path, records: dict[str, list[dict]]) -> None:
    """Held-out bits per byte against steps, and seconds of one core in the fastest run: mean of seeds and spread."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
    for (name, runs), color in zip(records.items(), plt.get_cmap("tab20").colors, strict=False):
        bits = [[row["bits_per_byte"] for row in run["evaluations"]] for run in runs]
        low, high, middle = (list(map(best, zip(*bits, strict=True))) for best in (min, max, mean))
        seconds = min((_seconds(run) for run in runs), key=lambda of_run: of_run[-1])
        steps = [row["step"] for row in runs[0]["evaluations"]]
        for axes, across in zip(panels, (steps, seconds), strict=True):
            axes.plot(across, middle, color=color, label=name)
            axes.fill_between(across, low, high, color=color, alpha=0.2, linewidth=0)
    panels[0].set(xlabel="steps", ylabel="held-out bits per byte", title="At equal steps")
    panels[1].set(xlabel="CPU seconds of training", title="At equal time")
    panels[1].legend()
    for axes in panels:
        axes.grid(alpha=0.2)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _seconds(record):
    return [row["cpu_seconds"] for row in record["evaluations"]]


def main(argv: list[str]) -> None:
    """Run what is asked for and not there yet; print the table and draw the figure."""
    arguments = parse_arguments(argv)
    torch.set_num_threads(arguments.threads)
    if arguments.docstrings_of:
        arguments.text_path = str(write_docstrings(arguments.docstrings_of))
    if not arguments.report:
        for seed in arguments.seeds:
            for contender in arguments.only or TWINS:
                twin(arguments, contender, seed)()
    records = read_records(arguments.results, arguments.steps, arguments.grid_steps)
    if records:
        print(table(records))
        draw(arguments.results.with_suffix(".png"), records)
