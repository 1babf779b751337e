"""
Does context help? (docs/experiments.md)

Models with rotary positions, so without a longest input, are trained on windows of 4,096 and of 16,384 bytes of the
standard library's source, as many bytes in both cases as 3,000 windows of 4,096 hold, and evaluated on held-out text
up to 65,536 bytes: bits per byte by position, and of a passage that is read again a number of bytes later. The rates
are those that the grid of `twins` has chosen.
"""

import argparse
import json
from pathlib import Path

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

from hf_reformer.training.context_gain import bits_of_tokens
from hf_reformer.training.corpus import Corpus

from .resumable import ROOT, experiment_parser
from .text_models import CONTENDERS
from .text_training import TextRun, Training


# The rate of each: what the grid of the twins chose, in 200 steps at 4,096 bytes.
LEARNING_RATES = {"local": 1e-2, "full": 1e-2, "lsh": 2e-2, "lsh, successors": 4e-2}
CHOSEN = tuple(LEARNING_RATES)
TRAINED_BYTES, CONTEXT_LENGTHS, NUM_EVALUATIONS = 3000 * 4096, (4096, 16384), 12
# Ends of the ranges of positions.
RANGES = (1024, 4096, 16384, 65536)
# Bytes from the beginning of a passage to its beginning again; what stands before the first; what its bits leave out,
# until it can be known again.
DISTANCES, PASSAGE, BEFORE, LEFT_OUT, NUM_PASSAGES = (256, 1024, 4096, 16384, 60000), 256, 512, 16, 8
RESULTS = ROOT / "docs" / "experiments" / "context"


def bits_by_position(model: nn.Module, text: torch.Tensor, bf16: bool, ends: tuple[int, ...]) -> dict[str, float]:
    """Mean bits per byte in each range of positions, up to each of `ends`, of all whole windows in `text`."""
    windows = text[: len(text) // ends[-1] * ends[-1]].view(-1, ends[-1]).to(model.device)
    bits = torch.cat([bits_of_tokens(model, window[None], bf16).cpu() for window in windows]).numpy()
    starts = (0, *ends[:-1])
    # The first byte of a window is not predicted.
    return {
        f"{start}-{end}": float(bits[:, max(0, start - 1) : end - 1].mean())
        for start, end in zip(starts, ends, strict=True)
    }


def bits_of_repetition(model: nn.Module, text: torch.Tensor, distance: int, bf16: bool) -> dict[str, float]:
    """Mean bits per byte of passages when they are read first, and again `distance` bytes later."""
    bits = []
    for start in np.linspace(0, len(text) - BEFORE - distance, NUM_PASSAGES).astype(int):
        window = text[start : start + BEFORE + distance]
        passage = window[BEFORE : BEFORE + PASSAGE]
        costs = bits_of_tokens(model, torch.cat([window, passage])[None], bf16)[0]
        first, again = BEFORE + LEFT_OUT - 1, BEFORE + distance + LEFT_OUT - 1
        length = PASSAGE - LEFT_OUT
        bits.append((costs[first : first + length].mean().item(), costs[again : again + length].mean().item()))
    first, again = np.mean(bits, axis=0)
    return {"first": float(first), "again": float(again)}


def held_out_text(corpus: Corpus) -> torch.Tensor:
    """The bytes of all held-out windows as tokens, `[L]`."""
    text = torch.tensor(np.frombuffer(corpus.held_out.text, dtype=np.uint8).astype(np.int64))
    return text + corpus.held_out.dataset[0]["input_ids"][0].item() - corpus.held_out.text[0]


def measure(model: nn.Module, corpus: Corpus, bf16: bool) -> dict[str, dict]:
    """What a trained model gets out of context."""
    model.eval()
    text = held_out_text(corpus)
    return {
        "positions": bits_by_position(model, text, bf16, RANGES),
        "repetition": {str(distance): bits_of_repetition(model, text, distance, bf16) for distance in DISTANCES},
    }


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Arguments from the command line."""
    parser = experiment_parser(__doc__, CHOSEN, RESULTS)
    parser.add_argument("--context_lengths", type=int, nargs="+", default=CONTEXT_LENGTHS, help="(default both)")
    parser.add_argument("--text_path", help="another text: a file or a folder")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Run what is asked for and not there yet; print the table and draw the figure."""
    arguments = parse_arguments(argv)
    torch.set_num_threads(arguments.threads)
    for seed in [] if arguments.report else arguments.seeds:
        for context_length in arguments.context_lengths:
            for contender in arguments.only or CHOSEN:
                num_steps = TRAINED_BYTES // context_length
                run = TextRun(
                    contender=contender,
                    seed=seed,
                    learning_rate=LEARNING_RATES[contender],
                    num_steps=num_steps,
                    context_length=context_length,
                    eval_every=num_steps // NUM_EVALUATIONS,
                    text_path=arguments.text_path,
                )
                Training(run, CONTENDERS[contender], arguments.results, measure)()
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(arguments.results.glob("*.json"))]
    if records:
        print(table(records))
        draw(arguments.results.with_suffix(".png"), records)


def _by_run(records):
    runs = {}
    for record in records:
        runs.setdefault((record["run"]["contender"], record["run"]["context_length"]), []).append(record)
    return runs


def table(records: list[dict]) -> str:
    """Two tables of markdown, of positions and of repetitions; means of all seeds."""
    lines = ["| layers | trained at | seeds | " + " | ".join(f"to {end:,}" for end in RANGES) + " |"]
    lines.append("|---|---|---|" + "---|" * len(RANGES))
    for (name, length), runs in _by_run(records).items():
        means = np.mean([list(run["positions"].values()) for run in runs], axis=0)
        lines.append(f"| {name} | {length:,} | {len(runs)} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")
    lines += [
        "",
        "| layers | trained at | first | " + " | ".join(f"{distance:,} later" for distance in DISTANCES) + " |",
    ]
    lines.append("|---|---|---|" + "---|" * len(DISTANCES))
    for (name, length), runs in _by_run(records).items():
        first, again = (
            np.mean([[row[which] for row in run["repetition"].values()] for run in runs], axis=0)
            for which in ("first", "again")
        )
        lines.append(
            f"| {name} | {length:,} | {first.mean():.3f} | " + " | ".join(f"{mean:.3f}" for mean in again) + " |"
        )
    return "\n".join(lines)


def draw(path: Path, records: list[dict]) -> None:
    """Bits per byte by position, and of a passage read again as a share of those when it was read first."""
    figure, (positions, repetition) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for ((name, length), runs), color in zip(_by_run(records).items(), plt.get_cmap("tab10").colors, strict=False):
        label = f"{name}, trained at {length:,}"
        bits = np.mean([list(run["positions"].values()) for run in runs], axis=0)
        positions.plot([f"to {end // 1024}K" for end in RANGES], bits, marker="o", color=color, label=label)
        shares = [[row["again"] / row["first"] for row in run["repetition"].values()] for run in runs]
        repetition.plot(DISTANCES, np.mean(shares, axis=0), marker="o", color=color, label=label)
    positions.set(xlabel="position in the text", ylabel="held-out bits per byte", title="What more context brings")
    repetition.axhline(1 / 3, color="gray", linestyle="--", linewidth=0.8)
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
