"""
Copy and reverse: 768 random symbols are read, and written from the last one to the first.

    python -m scripts.run_experiment copy_reverse                    # seeds 0, 1, 2
    python -m scripts.run_experiment copy_reverse --report

Symbols are drawn anew for each step from a vocabulary of 256, of which two are not symbols. The task is that of issue
90 of lucidrains/reformer-pytorch, where the loss of its `ReformerEncDec` stayed at 2.08 nats with 8 symbols
(`--num_symbols`), which is their entropy: nothing was learnt of where to look, while that of trax's model went to
about 0. Beside it stands `ReformerForConditionalGeneration`.

Attention to 768 tokens begins as their mean, which tells next to nothing of one of them. So runs begin with windows:
128 neighbours at a random place, at their own positions, then 256, then 384, always 3,072 symbols a step, and for the
last 40% of the steps all 768 (`--whole` has nothing else from the first step).

Both have two layers a side, hidden size 128, two heads of 64, feed-forward 512 and a vector for each position. Ours
begin as sines; those of reformer-pytorch stay sines (`fixed_position_emb`), and it has 4 hash rounds in buckets of 64.
`full` is the same with dense attention, as its author advised in issue 69.

Fixed beforehand: 2,000 steps, seeds 0, 1 and 2, warm-up over 5% of the steps and a cosine to 0, loss of each symbol on
16 held-out sequences every 100 steps and on 64 in the end, the same for all. The optimizer is Muon with AdamW, which
has the matrices in the layers of either. The rate of each contender is that of 5e-4, 1e-3, 2e-3, 5e-3 and 1e-2 whose
run of 500 steps, with a seed of its own and a schedule that fits, ends with the lowest loss; docs/experiments.md says
where it was chosen otherwise. Ours stores activations, which is faster and changes no number (tests/test_seq2seq.py).

A run is one file in docs/experiments/copy_reverse, and one that is there is not repeated; one that is stopped goes on.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from torch import nn

from hf_reformer import ReformerConfig, ReformerForConditionalGeneration

from .resumable import ResumableTraining, experiment_parser, file_name
from .synthetic import GRID_SEED, HELD_OUT_SEED, RESULTS, markdown


LENGTH, VOCABULARY, FIRST_SYMBOL, NUM_SYMBOLS = 768, 256, 2, 254
START = 1
HIDDEN_SIZE, NUM_HEADS, HEAD_SIZE, NUM_LAYERS = 128, 2, 64, 2
CHUNK_LENGTH = 64
# Lengths of windows, each from a share of the steps on, and symbols of a step.
WINDOWS, SYMBOLS_OF_STEP = ((128, 0.0), (256, 0.3), (384, 0.45), (LENGTH, 0.6)), 3072
NUM_STEPS, EVAL_EVERY, FEW, MANY = 2000, 100, 16, 64
GRID_STEPS, LEARNING_RATES = 500, (5e-4, 1e-3, 2e-3, 5e-3, 1e-2)
# What is asked for, in nats of a symbol.
GOAL = 0.05
# The largest value of the sines, beside words of a standard deviation of 0.02.
SINES = 0.1


def sines(length: int, size: int) -> torch.Tensor:
    """Vectors of positions (Vaswani et al. 2017, section 3.5), `[length, size]`."""
    angles = torch.arange(length)[:, None] * torch.exp(-math.log(10_000) * torch.arange(0, size, 2) / size)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def ours() -> nn.Module:
    """An encoder and a decoder, each of a local and an LSH layer."""
    model = ReformerForConditionalGeneration(
        ReformerConfig(
            is_encoder_decoder=True,
            attn_layers=["local", "lsh"],
            vocab_size=VOCABULARY,
            pad_token_id=0,
            decoder_start_token_id=START,
            hidden_size=HIDDEN_SIZE,
            num_attention_heads=NUM_HEADS,
            attention_head_size=HEAD_SIZE,
            feed_forward_size=4 * HIDDEN_SIZE,
            hidden_act="gelu",
            hidden_dropout_prob=0.0,
            local_attention_probs_dropout_prob=0.0,
            position_embedding_type="learned",
            max_position_embeddings=LENGTH,
            local_attn_chunk_length=CHUNK_LENGTH // 2,
            lsh_attn_chunk_length=CHUNK_LENGTH,
            num_buckets=LENGTH // CHUNK_LENGTH // 2,
            circular_look_around=False,
            attend_across_buckets=False,
            lsh_sliding_window=True,
            combine_streams="mean",
            tie_word_embeddings=True,
            reversible=False,
            use_cache=False,
        )
    )
    for side in (model.reformer.encoder, model.reformer.decoder):
        for weight in side.get_position_embeddings().parameters():
            weight.data = SINES * sines(*weight.shape)
    return model


class SinesOf(nn.Module):
    """
    reformer-pytorch's positions, which count from 0 there.

    Attributes:
        positions: Those of the next call, `[B, L]`.
    """

    positions: torch.Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("table", sines(LENGTH, HIDDEN_SIZE))

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """`[B, L, hidden_size]`."""
        return self.table[self.positions]


class ReformerPytorch(nn.Module):
    """reformer-pytorch's encoder and decoder of the same size."""

    def __init__(self, **changes):
        super().__init__()
        # An experiment's own need.
        from reformer_pytorch import ReformerEncDec

        settings = {
            "num_tokens": VOCABULARY,
            "depth": NUM_LAYERS,
            "max_seq_len": LENGTH,
            "heads": NUM_HEADS,
            "dim_head": HEAD_SIZE,
            "bucket_size": CHUNK_LENGTH,
            "n_hashes": 4,
            "ff_chunks": 1,
            "fixed_position_emb": True,
            # Ours computes nothing anew in the backward pass, either.
            "reverse_thres": 2 * LENGTH,
        }
        sides = {f"{side}_{name}": value for side in ("enc", "dec") for name, value in (settings | changes).items()}
        self.both = ReformerEncDec(HIDDEN_SIZE, **sides)
        self.sides = [side.net for side in (self.both.enc, self.both.dec)]
        for side in self.sides:
            side.pos_emb = SinesOf()
        self.device = torch.device("cpu")

    def forward(self, input_ids, decoder_input_ids, position_ids, decoder_position_ids) -> torch.Tensor:
        """Logits `[B, L, V]`."""
        for side, positions in zip(self.sides, (position_ids, decoder_position_ids), strict=True):
            side.pos_emb.positions = positions
        return self.both(input_ids, decoder_input_ids)


CONTENDERS: dict[str, Callable[[], nn.Module]] = {
    "hf_reformer": ours,
    "reformer-pytorch": ReformerPytorch,
    "reformer-pytorch, full": lambda: ReformerPytorch(use_full_attn=True),
}


@dataclass(frozen=True)
class CopyRun:
    """One training; see `resumable.Run`."""

    contender: str
    seed: int
    learning_rate: float
    num_steps: int = NUM_STEPS
    eval_every: int = EVAL_EVERY
    num_symbols: int = NUM_SYMBOLS
    whole: bool = False

    @property
    def name(self) -> str:
        """A file's name."""
        words = ["copy_reverse", self.contender, f"{self.num_steps}", f"lr{self.learning_rate:g}", f"seed{self.seed}"]
        words += [] if self.num_symbols == NUM_SYMBOLS else [f"{self.num_symbols}symbols"]
        words += ["whole"] if self.whole else []
        return file_name(*words)


def draw(length: int, num_symbols: int, generator: torch.Generator) -> torch.Tensor:
    """Sources, `[SYMBOLS_OF_STEP / length, length]`."""
    shape = SYMBOLS_OF_STEP // length, length
    return torch.randint(FIRST_SYMBOL, FIRST_SYMBOL + num_symbols, shape, generator=generator)


class CopyTraining(ResumableTraining):
    """A model that learns to write what it reads from the last symbol to the first."""

    run: CopyRun

    def make_model(self) -> nn.Module:
        return CONTENDERS[self.run.contender]()

    def batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        generator, run = torch.Generator().manual_seed(self.run.seed), self.run
        for step in count():
            length = LENGTH if run.whole else [each for each, share in WINDOWS if step >= share * run.num_steps][-1]
            sources = draw(length, run.num_symbols, generator)
            middle = torch.randint(LENGTH, (len(sources), 1), generator=generator)
            # Those that would reach beyond an end stand at it, so that ends are seen as often as the rest.
            yield sources, (middle - length // 2).clamp(0, LENGTH - length)

    def loss(self, model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        source, first = batch
        target = source.flip(1)
        inputs = nn.functional.pad(target[:, :-1], (1, 0), value=START)
        positions = first + torch.arange(source.shape[1])
        output = model(
            input_ids=source,
            decoder_input_ids=inputs,
            position_ids=LENGTH - 1 - positions.flip(1),
            decoder_position_ids=positions,
        )
        logits = output if isinstance(output, torch.Tensor) else output.logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())

    @torch.no_grad()
    def held_out(self, model: nn.Module, num_sequences: int) -> float:
        """Loss of a symbol, nats, on so many whole held-out sequences."""
        generator, losses = torch.Generator().manual_seed(HELD_OUT_SEED), []
        for _ in range(num_sequences * LENGTH // SYMBOLS_OF_STEP):
            sources = draw(LENGTH, self.run.num_symbols, generator)
            losses.append(self.loss(model, (sources, sources.new_zeros(len(sources), 1))).item())
        return statistics.mean(losses)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"loss": self.held_out(model, FEW)}

    def measure(self, model: nn.Module) -> dict[str, Any]:
        model.eval()
        return {"loss": self.held_out(model, MANY)}


def choose_learning_rate(contender: str, results: Path, changes: dict[str, Any]) -> float:
    """The rate of the grid whose short run ends with the lowest loss."""
    losses = {}
    for rate in LEARNING_RATES:
        run = CopyRun(contender, GRID_SEED, rate, GRID_STEPS, **changes)
        losses[rate] = CopyTraining(run, results / "grid")()["loss"]
    return min(losses, key=losses.get)


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Loss, when the goal was reached, and what it took."""
    rows = [["", "weights", "learning rate", "loss, seed by seed", f"steps to {GOAL:g}", "CPU seconds"]]
    for name, records in runs.items():
        reached = [
            next((f"{point['step']:,}" for point in record["evaluations"] if point["loss"] < GOAL), "-")
            for record in records
        ]
        rows.append(
            [
                name,
                f"{records[0]['parameters']:,}",
                ", ".join(sorted({f"{record['run']['learning_rate']:g}" for record in records})),
                ", ".join(f"{record['loss']:.4f}" for record in records),
                ", ".join(reached),
                f"{statistics.mean(record['cpu_seconds'] for record in records):,.0f}",
            ]
        )
    return markdown(*rows)


def draw_losses(path: Path, runs: dict[str, list[dict[str, Any]]]) -> None:
    """The held-out loss over the steps, a line for each run."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for number, (name, records) in enumerate(runs.items()):
        for place, record in enumerate(records):
            points = [(point["step"], point["loss"]) for point in record["evaluations"]]
            axes.plot(*zip(*points, strict=True), color=f"C{number}", label=None if place else name)
    for number in sorted({record["run"]["num_symbols"] for records in runs.values() for record in records}):
        axes.axhline(math.log(number), color="gray", linestyle="--", linewidth=0.8, label=f"{number} symbols, guessed")
    axes.axhline(GOAL, color="gray", linestyle=":", linewidth=0.8, label=f"{GOAL:g}")
    axes.set(xlabel="steps", ylabel="held-out loss of a symbol, nats", yscale="log")
    axes.grid(alpha=0.2)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def read_records(results: Path) -> dict[str, list[dict[str, Any]]]:
    """The results in a folder by contender, by seed; those that chose learning rates left out."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in results.glob("*.json")]
    records.sort(key=lambda record: record["run"]["seed"])
    runs = {name: [record for record in records if record["run"]["contender"] == name] for name in CONTENDERS}
    return {name: found for name, found in runs.items() if found}


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Arguments from the command line."""
    parser = experiment_parser(__doc__, CONTENDERS, RESULTS / "copy_reverse")
    parser.add_argument("--learning_rate", type=float, help="for all contenders, instead of the chosen ones")
    parser.add_argument(
        "--num_symbols", type=int, default=NUM_SYMBOLS, help="of the 254 there can be; give --results a folder, too"
    )
    parser.add_argument("--whole", action="store_true", help="no windows; give --results a folder, too")
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help="(default %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Run what is asked for and not there yet, seed by seed; print the table and draw the figure."""
    arguments = parse_arguments(argv)
    torch.set_num_threads(arguments.threads)
    if not arguments.report:
        names, given = arguments.only or list(CONTENDERS), arguments.learning_rate
        changes = {"num_symbols": arguments.num_symbols, "whole": arguments.whole}
        rates = {name: given or choose_learning_rate(name, arguments.results, changes) for name in names}
        for seed in arguments.seeds:
            for name, rate in rates.items():
                run = CopyRun(name, seed, rate, arguments.steps, **changes)
                CopyTraining(run, arguments.results)()
    runs = read_records(arguments.results)
    if not runs:
        raise SystemExit(f"There are no results in {arguments.results}.")
    print(table(runs))
    draw_losses(arguments.results.with_suffix(".png"), runs)
