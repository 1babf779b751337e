"""
From a function to its docstring: an encoder and a decoder, beside a decoder that reads the function first.

    python -m scripts.run_experiment docstring_pairs                    # seeds 0, 1, 2
    python -m scripts.run_experiment docstring_pairs --report

A source is a function of the running Python's standard library without its docstring, at most 1,024 bytes; the target
is the docstring, its indentation removed, at most 256. Files are on one side each, a tenth held out by a hash of their
names. Both models read bytes and have the recipe's layers; the twin reads `source <sep> target`, has as many weights
within 2% by a wider feed-forward, and only its targets count. Rows, bits per target byte and exact examples are those
of `hf-reformer train --objective seq2seq`.

Fixed beforehand: as many steps of 8 pairs as take the first contender 900 seconds of one CPU thread, and each other
contender its own number that takes as long, by the cost of 20 steps measured before; seeds 0, 1 and 2 for weights,
rotations and the order of pairs; Muon with AdamW, warm-up over 5% of the steps and a cosine to 0. The rate of each
contender is that of 3e-3 and 1e-2 whose run of a fifth of the steps, with a seed of its own, ends with fewer bits.
Measured are 200 held-out pairs, evenly spaced, and all at the end; 64 targets are written.

A run is one file in docs/experiments/docstring_pairs, and one that is there is not repeated; one that is stopped goes
on.
"""

import argparse
import ast
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import DataCollatorForSeq2Seq

from hf_reformer import ReformerByteTokenizer, ReformerForCausalLM, ReformerForConditionalGeneration
from hf_reformer.training import recipe_config
from hf_reformer.training.corpus import read_standard_library, split_documents
from hf_reformer.training.pair_rows import (
    PairRows,
    before_end,
    bits_of,
    bits_per_target_byte,
    evenly_spaced,
    nats_of_targets,
    rows_of_pairs,
    written,
)
from hf_reformer.training.pairs import Pairs
from hf_reformer.training.row_batches import in_batches

from .resumable import ResumableTraining, experiment_parser, file_name, make_optimizer, take_step, write_json
from .synthetic import GRID_SEED, IGNORED, RESULTS, markdown


SOURCE_LENGTH, TARGET_LENGTH = 1024, 257
HELD_OUT_FRACTION, MEASURED, WRITTEN = 0.1, 200, 64
BATCH_SIZE, BUDGET, EVALUATIONS = 8, 900.0, 10
LEARNING_RATES, GRID_SHARE, TIMED_STEPS = (3e-3, 1e-2), 0.2, 20
SIZE = {"hidden_size": 128, "num_attention_heads": 2, "feed_forward_size": 512, "reversible": False}
LAYERS = ["local", "lsh"]
# Of the twin, so that it has as many weights.
TWIN_FEED_FORWARD = 736
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
# Behind the byte tokenizer's 258 tokens.
SEPARATOR = 258


def pairs_in(source: str) -> list[tuple[str, str]]:
    """Functions without their docstrings, and the docstrings, of a module's source."""
    lines, found = source.splitlines(keepends=True), []
    for node in ast.walk(ast.parse(source)):
        docstring = ast.get_docstring(node) if isinstance(node, FUNCTION) else None
        # One that is all there is of a function, or stands behind something in its line, leaves nothing to read.
        if not docstring or len(node.body) < 2 or node.body[1].lineno == node.body[0].end_lineno:
            continue
        first, last = node.body[0].lineno - 1, node.body[0].end_lineno
        if node.lineno <= first:
            found.append(("".join(lines[node.lineno - 1 : first] + lines[last : node.end_lineno]), docstring))
    return found


def pairs_of(documents: Dataset) -> Pairs:
    """The pairs of files that are not too long, each source once."""
    found: dict[str, str] = {}
    for text in documents["text"]:
        for source, target in pairs_in(text):
            if len(source.encode()) <= SOURCE_LENGTH and len(target.encode()) < TARGET_LENGTH:
                found.setdefault(source, target)
    return Pairs(list(found), list(found.values()), list(range(len(found))))


@cache
def read_sides() -> tuple[Pairs, Pairs]:
    """Pairs for training, and those held out without what training has, too."""
    train, held_out = map(pairs_of, split_documents(read_standard_library(), HELD_OUT_FRACTION))
    known = set(train.sources)
    return train, held_out.select([place for place, source in enumerate(held_out.sources) if source not in known])


def both_sides(**changes) -> ReformerForConditionalGeneration:
    """An encoder and a decoder of two layers each."""
    return ReformerForConditionalGeneration(
        recipe_config(SOURCE_LENGTH, is_encoder_decoder=True, attn_layers=LAYERS, **SIZE | changes)
    )


def decoder_alone() -> ReformerForCausalLM:
    """A decoder of four layers."""
    changes = {"attn_layers": 2 * LAYERS, "feed_forward_size": TWIN_FEED_FORWARD, "vocab_size": SEPARATOR + 1}
    return ReformerForCausalLM(recipe_config(SOURCE_LENGTH + TARGET_LENGTH, **SIZE | changes))


CONTENDERS: dict[str, Callable[[], nn.Module]] = {
    "encoder and decoder": both_sides,
    "the same, mean of streams, tied words": lambda: both_sides(combine_streams="mean", tie_word_embeddings=True),
    "decoder alone": decoder_alone,
}


def joined(
    rows: PairRows, places: list[int], *, with_targets: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Rows of a decoder alone, each source with a separator.

    Args:
        with_targets: Targets stand behind, and padding behind them; otherwise padding stands in front.

    Returns:
        Tokens, labels and attention mask, `[B, L]` each.
    """
    parts = [([*rows.sources[place], SEPARATOR], rows.targets[place] if with_targets else []) for place in places]
    shape = len(places), max(len(source) + len(target) for source, target in parts)
    ids, labels, mask = torch.zeros(shape).long(), torch.full(shape, IGNORED), torch.zeros(shape).long()
    for row, (source, target) in enumerate(parts):
        length = len(source) + len(target)
        here = slice(0, length) if with_targets else slice(shape[1] - length, None)
        ids[row, here], mask[row, here] = torch.tensor(source + target), 1
        labels[row, len(source) : length] = torch.tensor(target).long()
    return ids, labels, mask


@dataclass(frozen=True)
class PairRun:
    """One training; see `resumable.Run`."""

    contender: str
    seed: int
    learning_rate: float
    num_steps: int
    eval_every: int

    @property
    def name(self) -> str:
        """A file's name."""
        words = ["docstring_pairs", self.contender, f"lr{self.learning_rate:g}", f"seed{self.seed}"]
        return file_name(*words, f"{self.num_steps}")


class PairTraining(ResumableTraining):
    """A model that learns to write docstrings."""

    run: PairRun

    def __init__(self, run: PairRun, results: Path):
        super().__init__(run, results)
        self.tokenizer = ReformerByteTokenizer()
        train, held_out = read_sides()
        self.train, self.held_out = (
            rows_of_pairs(side, self.tokenizer, SOURCE_LENGTH, TARGET_LENGTH) for side in (train, held_out)
        )
        few = held_out.select(evenly_spaced(len(held_out), MEASURED))
        self.few = rows_of_pairs(few, self.tokenizer, SOURCE_LENGTH, TARGET_LENGTH)
        self.collate = DataCollatorForSeq2Seq(self.tokenizer)

    def make_model(self) -> nn.Module:
        return CONTENDERS[self.run.contender]()

    def batches(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.run.seed)
        while True:
            order = torch.randperm(len(self.train), generator=generator).tolist()
            # Sixteen batches are sorted by length together, so that little is padded.
            for begin in range(0, len(order) - 16 * BATCH_SIZE + 1, 16 * BATCH_SIZE):
                pool = sorted(order[begin : begin + 16 * BATCH_SIZE], key=lambda place: self.train.lengths[place])
                for batch in torch.randperm(16, generator=generator).tolist():
                    yield pool[batch * BATCH_SIZE : (batch + 1) * BATCH_SIZE]

    def loss(self, model: nn.Module, batch: list[int]) -> torch.Tensor:
        if isinstance(model, ReformerForCausalLM):
            ids, labels, mask = joined(self.train, batch, with_targets=True)
            return model(ids, attention_mask=mask, labels=labels, use_cache=False).loss
        rows = [{"input_ids": self.train.sources[place], "labels": self.train.targets[place]} for place in batch]
        return model(**self.collate(rows), use_cache=False).loss

    @torch.no_grad()
    def bits(self, model: nn.Module, rows: PairRows) -> float:
        """Bits per target byte."""
        if not isinstance(model, ReformerForCausalLM):
            return bits_per_target_byte(model, rows, self.tokenizer.pad_token_id, quiet=True)
        nats = []
        for places in in_batches(rows.lengths):
            ids, labels, mask = joined(rows, places, with_targets=True)
            logits = model(ids, attention_mask=mask, use_cache=False).logits
            nats.append(nats_of_targets(logits[:, :-1], labels[:, 1:])[:, 0].numpy())
        return bits_of(np.concatenate(nats), rows.num_bytes)

    @torch.no_grad()
    def write(self, model: nn.Module, rows: PairRows) -> list[list[int]]:
        """What the model writes for each source, always with the likeliest token."""
        if not isinstance(model, ReformerForCausalLM):
            return written(model, rows.sources, self.tokenizer, TARGET_LENGTH, quiet=True)
        end, found = self.tokenizer.eos_token_id, [[] for _ in rows.sources]
        for places in in_batches(rows.lengths):
            ids, _, mask = joined(rows, places, with_targets=False)
            how = {"do_sample": False, "eos_token_id": end, "pad_token_id": end, "max_new_tokens": TARGET_LENGTH}
            outputs = model.generate(ids, attention_mask=mask, **how)[:, ids.shape[1] :].tolist()
            for place, output in zip(places, outputs, strict=True):
                found[place] = before_end(output, end)
        return found

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"bits_per_target_byte": self.bits(model, self.few)}

    def measure(self, model: nn.Module) -> dict[str, Any]:
        model.eval()
        held_out = read_sides()[1]
        places = evenly_spaced(len(held_out), WRITTEN)
        rows = rows_of_pairs(held_out.select(places), self.tokenizer, SOURCE_LENGTH, TARGET_LENGTH)
        found = self.write(model, rows)
        exact = [ids == whole for ids, whole in zip(found, rows.whole, strict=True)]
        return {
            "bits_per_target_byte": self.bits(model, self.held_out),
            "exact": sum(exact) / len(exact),
            "num_written": len(exact),
            "num_pairs": {"train": len(self.train), "held_out": len(self.held_out)},
            "digest": read_sides()[0].digest,
            "written": [
                {"target": held_out.targets[place], "predicted": self.tokenizer.decode(ids)}
                for place, ids in list(zip(places, found, strict=True))[:8]
            ],
        }


def seconds_of_step(contender: str, results: Path) -> float:
    """CPU seconds of a step, measured once and then read from a file."""
    path = results / "grid" / f"step_{contender.replace(', ', '-').replace(' ', '_')}.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))["cpu_seconds"]
    training = PairTraining(PairRun(contender, GRID_SEED, LEARNING_RATES[0], TIMED_STEPS, TIMED_STEPS), results)
    torch.manual_seed(GRID_SEED)
    model, batches = training.make_model(), training.batches()
    optimizer, begun = make_optimizer(model, LEARNING_RATES[0]), 0.0
    for step in range(TIMED_STEPS + 1):
        batch = next(batches)
        take_step(model, optimizer, lambda batch=batch: training.loss(model, batch), LEARNING_RATES[0], bf16=False)
        # The first one is not like the others.
        begun = begun if step else time.process_time()
    seconds = (time.process_time() - begun) / TIMED_STEPS
    write_json(path, {"cpu_seconds": seconds, "steps": TIMED_STEPS})
    return seconds


def run_of(contender: str, seed: int, rate: float, seconds: float, results: Path) -> PairRun:
    """As many steps as take so many CPU seconds."""
    steps = max(EVALUATIONS, round(seconds / seconds_of_step(contender, results)))
    return PairRun(contender, seed, rate, steps, -(-steps // EVALUATIONS))


def choose_learning_rate(contender: str, seconds: float, results: Path) -> float:
    """The rate of the grid whose short run ends with the fewest bits."""
    bits = {}
    for rate in LEARNING_RATES:
        run = run_of(contender, GRID_SEED, rate, GRID_SHARE * seconds, results)
        bits[rate] = PairTraining(run, results / "grid")()["bits_per_target_byte"]
    return min(bits, key=bits.get)


def table(records: list[dict[str, Any]]) -> str:
    """Bits and exact examples of each contender, seed by seed."""
    rows = [["", "weights", "learning rate", "steps", "CPU seconds", "bits per target byte", "exact"]]
    for name in CONTENDERS:
        found = [record for record in records if record["run"]["contender"] == name]
        if found:
            runs = [record["run"] for record in found]
            rows.append(
                [
                    name,
                    f"{found[0]['parameters']:,}",
                    ", ".join(sorted({f"{run['learning_rate']:g}" for run in runs})),
                    ", ".join(sorted({f"{run['num_steps']:,}" for run in runs})),
                    f"{statistics.mean(record['cpu_seconds'] for record in found):,.0f}",
                    ", ".join(f"{record['bits_per_target_byte']:.3f}" for record in found),
                    ", ".join(f"{record['exact']:.3f}" for record in found),
                ]
            )
    return markdown(*rows)


def read_records(results: Path) -> list[dict[str, Any]]:
    """The results in a folder, by seed; those that chose learning rates left out."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in results.glob("*.json")]
    return sorted(records, key=lambda record: record["run"]["seed"])


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Arguments from the command line."""
    parser = experiment_parser(__doc__, CONTENDERS, RESULTS / "docstring_pairs")
    parser.add_argument("--learning_rate", type=float, help="for all contenders, instead of the chosen ones")
    parser.add_argument("--seconds", type=float, default=BUDGET, help="CPU time of a run (default %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Run what is asked for and not there yet, seed by seed; print the table."""
    arguments = parse_arguments(argv)
    torch.set_num_threads(arguments.threads)
    results, seconds = arguments.results, arguments.seconds
    if not arguments.report:
        names, given = arguments.only or list(CONTENDERS), arguments.learning_rate
        rates = {name: given or choose_learning_rate(name, seconds, results) for name in names}
        for seed in arguments.seeds:
            for name, rate in rates.items():
                PairTraining(run_of(name, seed, rate, seconds, results), results)()
    records = read_records(results)
    if not records:
        raise SystemExit(f"There are no results in {results}.")
    print(table(records))
