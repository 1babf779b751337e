"""
Does context help? (docs/experiments.md)

Models with rotary positions, so without a longest input, are trained on windows of 4,096 and of 16,384 bytes of the
standard library's source, as many bytes in both cases as 3,000 windows of 4,096 hold, and evaluated on held-out text
up to 65,536 bytes: bits per byte by position, and of a passage that is read again a number of bytes later.

Those trained at 4,096 bytes are `twins`, which measures this as well; those trained at 16,384 are trained here, with
the rates that the grid of `twins` has chosen.
"""

import argparse
import json
from pathlib import Path

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch

from . import long_text, twins
from .resumable import ROOT, experiment_parser
from .text_models import CONTENDERS
from .text_training import TextRun, Training


TRAINED_BYTES, CONTEXT_LENGTH, NUM_EVALUATIONS = twins.NUM_STEPS * twins.CONTEXT_LENGTH, 16384, 12
RESULTS = ROOT / "docs" / "experiments" / "context"
# Of those trained at 4,096 bytes.
TWINS = twins.RESULTS


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Arguments from the command line."""
    return experiment_parser(__doc__, long_text.CHOSEN, RESULTS).parse_args(argv)


def main(argv: list[str]) -> None:
    """Run what is asked for and not there yet; print the tables and draw the figure."""
    arguments = parse_arguments(argv)
    torch.set_num_threads(arguments.threads)
    grid = twins.parse_arguments(["--results", str(TWINS)])
    for seed in [] if arguments.report else arguments.seeds:
        for contender in arguments.only or long_text.CHOSEN:
            run = TextRun(
                contender=contender,
                seed=seed,
                learning_rate=twins.best_learning_rate(grid, contender),
                num_steps=TRAINED_BYTES // CONTEXT_LENGTH,
                context_length=CONTEXT_LENGTH,
                eval_every=TRAINED_BYTES // CONTEXT_LENGTH // NUM_EVALUATIONS,
            )
            Training(run, CONTENDERS[contender], arguments.results, long_text.measure)()
    runs = read_records(arguments.results)
    if runs:
        print(table(runs))
        draw(arguments.results.with_suffix(".png"), runs)


def read_records(folder: Path) -> dict[tuple[str, int], list[dict]]:
    """Records by contender and by the length of the windows that it was trained on, the twins' length first."""
    runs = {
        (name, twins.CONTEXT_LENGTH): [record for record in records if "positions" in record]
        for name, records in twins.read_records(TWINS, twins.NUM_STEPS, twins.GRID_STEPS).items()
    }
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        runs.setdefault((record["run"]["contender"], record["run"]["context_length"]), []).append(record)
    keys = [(name, length) for length in (twins.CONTEXT_LENGTH, CONTEXT_LENGTH) for name in long_text.CHOSEN]
    return {key: runs[key] for key in keys if runs.get(key)}


def table(records: dict[tuple[str, int], list[dict]]) -> str:
    """Two tables of markdown, of positions and of repetitions: the mean of all seeds, and their spread."""
    ranges, distances = long_text.RANGES, long_text.DISTANCES
    lines = ["| layers | trained at | seeds | " + " | ".join(f"to {end:,}" for end in ranges) + " |"]
    lines.append("|---|---|---|" + "---|" * len(ranges))
    for (name, length), runs in records.items():
        cells = zip(*(run["positions"].values() for run in runs), strict=True)
        lines.append(f"| {name} | {length:,} | {len(runs)} | " + " | ".join(map(twins.spread, cells)) + " |")
    lines += ["", "| layers | trained at | first | " + " | ".join(f"{end:,} later" for end in distances) + " |"]
    lines.append("|---|---|---|" + "---|" * len(distances))
    for (name, length), runs in records.items():
        first = np.mean([[row["first"] for row in run["repetition"].values()] for run in runs])
        cells = zip(*([row["again"] for row in run["repetition"].values()] for run in runs), strict=True)
        lines.append(f"| {name} | {length:,} | {first:.3f} | " + " | ".join(map(twins.spread, cells)) + " |")
    return "\n".join(lines)


def draw(path: Path, records: dict[tuple[str, int], list[dict]]) -> None:
    """Bits per byte by position, and of a passage read again as a share of those when it was read first."""
    figure, (positions, repetition) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    colors = dict(zip(long_text.CHOSEN, plt.get_cmap("tab10").colors, strict=False))
    marks = [_mark(end) for end in long_text.RANGES]
    ranges = [f"{start}–{end}" for start, end in zip(["0", *marks], marks, strict=False)]
    for (name, length), runs in records.items():
        style = {"label": f"{name}, trained at {_mark(length)}", "color": colors[name], "marker": "o"}
        style["linestyle"] = "-" if length == twins.CONTEXT_LENGTH else "--"
        bits = [list(run["positions"].values()) for run in runs]
        shares = [[row["again"] / row["first"] for row in run["repetition"].values()] for run in runs]
        for axes, across, values in ((positions, ranges, bits), (repetition, long_text.DISTANCES, shares)):
            axes.plot(across, np.mean(values, axis=0), **style)
            axes.fill_between(across, np.min(values, axis=0), np.max(values, axis=0), color=colors[name], alpha=0.15)
    positions.set(
        xlabel="position in the text, bytes", ylabel="held-out bits per byte", title="What more context brings"
    )
    repetition.axhline(1 / 3, color="gray", linestyle=":", linewidth=0.8)
    repetition.set(
        xscale="log",
        ylim=(0, None),
        xlabel="bytes later",
        ylabel="bits of a passage read again, as a share",
        title="What is remembered",
    )
    repetition.legend(fontsize=8)
    for axes in (positions, repetition):
        axes.grid(alpha=0.2)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _mark(length):
    return f"{length // 1024}K" if length >= 1024 else str(length)
