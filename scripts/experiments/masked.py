"""
Both neighbours of the matching token: what values of successors may mean in both directions (docs/experiments.md).

    python -m scripts.run_experiment masked                  # seeds 0, 1, 2
    python -m scripts.run_experiment masked --report

Models of the size of `text_models`, but that attention looks ahead, too, learn to fill in masked bytes of windows of
4,096 bytes of the standard library's source. In each window every byte is replaced by the mask with a probability of
15%, drawn anew in each step, and the loss counts the masked ones. In one of the models a key of the LSH layers
carries a mix of the values before and after it and of its own, learned per head (`value_variants.BothNeighbours`).

Fixed beforehand: 2,000 steps of one window, seeds 0, 1 and 2, the learning rate of 5e-3, 1e-2, 2e-2 and 4e-2 that was
best after 200 steps with another seed. Evaluation masks the same bytes of 24 held-out windows for all. A run is one
file in docs/experiments/masked, those of the rates in grid below it, and one that is there is not repeated.
"""

import argparse
import json
import math
from pathlib import Path
from statistics import mean

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from torch import nn

from hf_reformer.training.corpus import Corpus

from .resumable import ROOT, experiment_parser
from .synthetic import HELD_OUT_SEED, IGNORED, markdown
from .text_models import MASK_ID, MASKED
from .text_training import TextRun, Training, repeated, tokens_of
from .twins import GRID, GRID_STEPS, spread
from .value_variants import learned_mix


SHARE_MASKED = 0.15
NUM_STEPS, CONTEXT_LENGTH, EVAL_EVERY = 2000, 4096, 250
GRID_SEED = 1000
RESULTS = ROOT / "docs" / "experiments" / "masked"


def mask_some(ids: torch.Tensor, generator: torch.Generator | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows `[B, L]` with masks, and as labels what they hide, `IGNORED` elsewhere."""
    is_masked = torch.rand(ids.shape, generator=generator) < SHARE_MASKED
    return ids.masked_fill(is_masked, MASK_ID), ids.masked_fill(~is_masked, IGNORED)


@torch.no_grad()
def bits_of_masked(model: nn.Module, corpus: Corpus, bf16: bool) -> dict[str, float | None]:
    """Held-out bits per masked byte: of all, and of those after bytes that stood together far before."""
    model.eval()
    generator = torch.Generator().manual_seed(HELD_OUT_SEED)
    bits, far = [], []
    for window in tokens_of(corpus.held_out):
        ids, labels = mask_some(window[None], generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(input_ids=ids).logits
        is_masked = (labels != IGNORED)[0]
        bits.append(nn.functional.cross_entropy(logits[0, is_masked].float(), window[is_masked], reduction="none"))
        far.append(torch.from_numpy(repeated(window.int().numpy()))[is_masked])
    bits, far = torch.cat(bits) / math.log(2), torch.cat(far)
    return {"bits_per_masked_byte": bits.mean().item(), "repeated": bits[far].mean().item() if far.any() else None}


class MaskedTraining(Training):
    """Training on masked windows."""

    def loss(self, model: nn.Module, batch: int) -> torch.Tensor:
        ids, labels = mask_some(self.window(batch))
        return model(input_ids=ids, labels=labels).loss

    def evaluate(self, model: nn.Module) -> dict[str, float | None]:
        return bits_of_masked(model, self.corpus, self.bf16)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Arguments from the command line."""
    parser = experiment_parser(__doc__, MASKED, RESULTS)
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help="(default %(default)s)")
    parser.add_argument("--grid_steps", type=int, default=GRID_STEPS, help="(default %(default)s)")
    parser.add_argument("--context_length", type=int, default=CONTEXT_LENGTH, help="(default %(default)s)")
    parser.add_argument("--eval_windows", type=int, default=24, help="held-out windows (default %(default)s)")
    parser.add_argument("--text_path", help="another text: a file or a folder")
    return parser.parse_args(argv)


def training(
    arguments: argparse.Namespace, contender: str, seed: int, learning_rate: float, num_steps: int, results: Path
) -> MaskedTraining:
    """One run."""
    run = TextRun(
        # Its checkpoint is not that of the causal model with this name.
        contender=f"masked, {contender}",
        seed=seed,
        learning_rate=learning_rate,
        num_steps=num_steps,
        context_length=arguments.context_length,
        eval_every=min(EVAL_EVERY, num_steps),
        eval_windows=arguments.eval_windows,
        text_path=arguments.text_path,
    )
    return MaskedTraining(run, MASKED[contender], results, learned_mix)


def best_learning_rate(arguments: argparse.Namespace, contender: str) -> float:
    """Of the grid, the one with the fewest bits after the short runs."""
    how_long, where = arguments.grid_steps, arguments.results / "grid"
    records = {rate: training(arguments, contender, GRID_SEED, rate, how_long, where)() for rate in GRID}
    return min(records, key=lambda rate: records[rate]["evaluations"][-1]["bits_per_masked_byte"])


def main(argv: list[str]) -> None:
    """Run what is asked for and not there yet; print the table and draw the figure."""
    arguments = parse_arguments(argv)
    torch.set_num_threads(arguments.threads)
    for seed in [] if arguments.report else arguments.seeds:
        for contender in arguments.only or MASKED:
            rate = best_learning_rate(arguments, contender)
            training(arguments, contender, seed, rate, arguments.steps, arguments.results)()
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(arguments.results.glob("*.json"))]
    runs = {name: [record for record in records if record["run"]["contender"] == f"masked, {name}"] for name in MASKED}
    runs = {name: of_it for name, of_it in runs.items() if of_it}
    if runs:
        print(table(runs))
        draw(arguments.results.with_suffix(".png"), runs)


def table(runs: dict[str, list[dict]]) -> str:
    """A line of markdown for each contender: after the last step, the mean of all seeds and their spread."""
    rows = [["layers", "seeds", "bits per masked byte", "after what is repeated from afar", "CPU seconds a step"]]
    for name, records in runs.items():
        last = [record["evaluations"][-1] for record in records]
        far = [row["repeated"] for row in last]
        rows.append(
            [
                name,
                str(len(records)),
                spread([row["bits_per_masked_byte"] for row in last]),
                "" if None in far else spread(far),
                f"{mean(record['cpu_seconds'] / record['step'] for record in records):.2f}",
            ]
        )
    return markdown(*rows)


def draw(path: Path, runs: dict[str, list[dict]]) -> None:
    """Held-out bits per masked byte against steps, the mean of all seeds and their spread."""
    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    for (name, records), color in zip(runs.items(), plt.get_cmap("tab10").colors, strict=False):
        bits = [[row["bits_per_masked_byte"] for row in record["evaluations"]] for record in records]
        low, high, middle = (list(map(best, zip(*bits, strict=True))) for best in (min, max, mean))
        steps = [row["step"] for row in records[0]["evaluations"]]
        axes.plot(steps, middle, color=color, label=name)
        axes.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
    axes.set(xlabel="steps", ylabel="held-out bits per masked byte")
    axes.legend()
    axes.grid(alpha=0.2)
    figure.savefig(path, dpi=150)
    plt.close(figure)
