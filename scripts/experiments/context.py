"""
Does context help? (docs/experiments.md)

    python -m scripts.run_experiment context                  # seeds 0, 1, 2
    python -m scripts.run_experiment context --report

Models without a longest input, trained on windows of 4,096 bytes of the standard library's source (those of `twins`)
and of 16,384 bytes (as many bytes in a quarter of the steps, with the same rates), read all of the held-out source:

1. in windows of 1,024 to 65,536 bytes, the same bytes each time;
2. by position in windows of 65,536, where each range of positions has other bytes;
3. passages of 256 bytes that come again 256 to 60,000 bytes later, and the same passages at the same place of the same
   text without the first copy.

LSH layers read as they were trained, with more rounds, and with more buckets where the text is longer; full layers as
they were trained, and with positions rescaled for longer texts. Nothing of this needs training. What is measured is a
file for each model and way to read in docs/experiments/context, and not repeated.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

from . import long_text, twins
from .long_text import AS_TRAINED, DISTANCES, LENGTHS, OF_LSH, RESCALED, WAYS
from .resumable import ROOT, file_name
from .synthetic import markdown
from .text_models import CONTENDERS
from .text_training import TextRun, Training, measure_once


CHOSEN = (
    "local",
    "lsh",
    "lsh, successors",
    "lsh, successors, 2 buckets per chunk",
    "lsh, successors, 8 buckets per chunk",
    "full",
    "dense, shared, successors",
)
# Trained on windows that are so many times as long.
LONGER, NUM_EVALUATIONS = 4, 12
# The ways to read that the figure shows.
MARKERS = {
    AS_TRAINED: "o",
    "4 rounds": "D",
    "8 buckets per chunk": "^",
    "8 buckets per chunk, 4 rounds": "v",
    RESCALED: "s",
}
# The rows of the table in model_card.md: a contender, and how it reads.
ON_THE_CARD = {
    "local": ("local", AS_TRAINED),
    "LSH, values of the successor, 1 round": ("lsh, successors", AS_TRAINED),
    "the same, 4 rounds in evaluation": ("lsh, successors", "4 rounds"),
    "full, rotary positions": ("full", AS_TRAINED),
    "the same, positions rescaled (YaRN)": ("full", RESCALED),
}
RESULTS = ROOT / "docs" / "experiments" / "context"


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Arguments from the command line."""
    parser = twins.parser_of_measurement(__doc__, CHOSEN, RESULTS)
    parser.add_argument("--short", action="store_true", help="only what was trained on the shorter windows")
    return parser.parse_args(argv)


def trained_on_longer(arguments: argparse.Namespace, contender: str, seed: int) -> Training:
    """A run on as many bytes as a twin's, in longer windows."""
    num_steps = arguments.steps // LONGER
    run = TextRun(
        contender=contender,
        seed=seed,
        learning_rate=twins.best_learning_rate(arguments, contender),
        num_steps=num_steps,
        context_length=LONGER * arguments.context_length,
        eval_every=max(1, num_steps // NUM_EVALUATIONS),
        text_path=arguments.text_path,
    )
    return Training(run, CONTENDERS[contender], arguments.results / "training")


def ways_of(contender: str) -> tuple[str, ...]:
    """How a contender reads."""
    if contender == "full":
        return AS_TRAINED, RESCALED
    return tuple(OF_LSH) if contender.startswith("lsh") else (AS_TRAINED,)


def measure(way: str, run: TextRun, model: nn.Module, *_) -> dict[str, dict | str]:
    """What a trained model makes of the text that was held out from its training."""
    return long_text.measure(model, way, long_text.held_out_text(run))


def path_of(training: Training, way: str, results: Path) -> Path:
    """Where that is."""
    words = [training.run.name] + ([] if way == AS_TRAINED else [way])
    return results / f"{file_name(*words)}.json"


def main(argv: list[str]) -> None:
    """Measure what is asked for and not there yet; print the tables and draw the figure."""
    arguments = parse_arguments(argv)
    torch.set_num_threads(arguments.threads)
    for seed in [] if arguments.report else arguments.seeds:
        for make_training in (twins.twin,) if arguments.short else (twins.twin, trained_on_longer):
            for contender in arguments.only or CHOSEN:
                training = make_training(arguments, contender, seed)
                for way in ways_of(contender):
                    path = path_of(training, way, arguments.results)
                    measure_once(training, path, partial(measure, way, training.run))
    records = read_records(arguments.results)
    if records:
        print(f"{tables(records)}\n\nFor model_card.md:\n\n{card_table(records)}")
        draw(arguments.results.with_suffix(".png"), records)


# A contender, the length that it was trained at, and how it reads.
Key = tuple[str, int, str]


def read_records(folder: Path) -> dict[Key, list[dict]]:
    """What was measured, the shorter windows of the training first."""
    found: dict[Key, list[dict]] = {}
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        run = record["run"]
        found.setdefault((run["contender"], run["context_length"], record["way"]), []).append(record)
    for records in found.values():
        records.sort(key=lambda record: record["run"]["seed"])
    names, ways = list(CHOSEN), list(WAYS)
    return {key: found[key] for key in sorted(found, key=lambda of: (of[1], names.index(of[0]), ways.index(of[2])))}


def tables(records: dict[Key, list[dict]]) -> str:
    """Three tables of markdown: windows, positions and repetitions; the mean of all seeds, and their spread."""
    head = ["layers", "trained at", "read", "seeds"]
    windows = [[*head, *(f"{length:,}" for length in LENGTHS)]]
    positions = [[*head, *(f"to {end:,}" for end in LENGTHS)]]
    repetition = [[*head, "first", *(f"{distance:,} later" for distance in DISTANCES)]]
    for (name, length, way), runs in records.items():
        begin = [
            name,
            f"{length:,}",
            way if len(ways_of(name)) > 1 else "",
            ", ".join(str(run["run"]["seed"]) for run in runs),
        ]
        for rows, part in ((windows, "windows"), (positions, "positions")):
            values = zip(*(run[part].values() for run in runs), strict=True)
            rows.append([*begin, *map(twins.spread, values)])
        cells = [[run["repetition"][str(distance)] for run in runs] for distance in DISTANCES]
        first = np.mean([row["first"] for of_runs in cells for row in of_runs])
        # Again, and without the first copy.
        pairs = [[np.mean([row[which] for row in of_runs]) for which in ("again", "late")] for of_runs in cells]
        repetition.append([*begin, f"{first:.3f}", *(f"{again:.3f} / {late:.3f}" for again, late in pairs)])
    return "\n\n".join(markdown(*rows) for rows in (windows, positions, repetition))


def card_table(records: dict[Key, list[dict]]) -> str:
    """What a model card says of such models: bits per byte in windows of the training's length, and of the longest."""
    lengths, trained_length = LENGTHS[1::2], min(length for _, length, _ in records)
    rows = [["second layer", *(f"windows of {length:,}" for length in lengths)]]
    for label, (name, way) in ON_THE_CARD.items():
        runs = records.get((name, trained_length, way), [])
        bits = zip(*([run["windows"][str(length)] for length in lengths] for run in runs), strict=True)
        rows += [[label, *map(twins.spread, bits)]] if runs else []
    return markdown(*rows)


def draw(path: Path, records: dict[Key, list[dict]]) -> None:
    """Bits per byte by the length of the windows; bits of a passage read again, as a share of those without a copy."""
    figure, (windows, repetition) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    colors = dict(zip(CHOSEN, plt.get_cmap("tab10").colors, strict=False))
    shortest = min(length for _, length, _ in records)
    for (name, length, way), runs in records.items():
        # The others are in the tables only.
        if "buckets per chunk" in name or way not in MARKERS:
            continue
        style = {
            "color": colors[name],
            "marker": MARKERS[way],
            "linestyle": "-" if length == shortest else "--",
            "label": f"{name}, trained at {_mark(length)}" + ("" if way == AS_TRAINED else f", read with {way}"),
        }
        shares = [[row["again"] / row["late"] for row in run["repetition"].values()] for run in runs]
        bits = [list(run["windows"].values()) for run in runs]
        for axes, across, values in ((windows, LENGTHS, bits), (repetition, DISTANCES, shares)):
            axes.plot(across, np.mean(values, axis=0), **style)
            axes.fill_between(across, np.min(values, axis=0), np.max(values, axis=0), color=colors[name], alpha=0.15)
    windows.set(xlabel="bytes in a window", ylabel="held-out bits per byte", title="The same text, with more context")
    repetition.set(
        xlabel="bytes from a passage to its copy",
        ylabel="bits of the copy, as a share of those without it",
        title="What is remembered",
        ylim=(0, None),
    )
    for axes, across in ((windows, LENGTHS), (repetition, DISTANCES)):
        axes.set_xscale("log", base=2)
        axes.set_xticks(across, list(map(_mark, across)))
        axes.grid(alpha=0.2)
    windows.legend(fontsize=7)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _mark(length):
    return f"{length:,}" if length % 1024 else f"{length // 1024}K"
