"""
Switches of LSH attention, after training: quality, cost and recall (docs/experiments.md).

    python -m scripts.run_experiment switches                      # seeds 0, 1, 2
    python -m scripts.run_experiment switches --lengths            # the time of a step instead, 256 to 16,384 tokens
    python -m scripts.run_experiment switches --report

The models are those of `twins`, trained for 3,000 steps. The same weights are evaluated with other switches, one
changed at a time: held-out bits per byte, CPU seconds of the evaluation, for which the variants take turns window by
window, and recall of the keys that dense attention with shared queries and keys attends to. For recall all variants
are given the queries of the model as it was trained.

Fixed beforehand: seeds 0, 1 and 2, 24 held-out windows, of which 2 for recall. What is measured is one file for each
model in docs/experiments/switches, and not repeated; times of steps are files in step_time below it, one for each
length.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import mean

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from transformers import PreTrainedModel

from hf_reformer.training.context_gain import bits_of_tokens
from hf_reformer.training.corpus import Corpus
from hf_reformer.training.recipe import num_buckets

from . import step_time, twins
from .recall import recalls
from .resumable import ROOT
from .synthetic import markdown
from .text_models import with_config
from .text_training import measure_once, tokens_of


CHOSEN = ("lsh", "lsh, successors", "dense, shared, successors")
RECALL_WINDOWS = 2
RESULTS = ROOT / "docs" / "experiments" / "switches"

CHUNKS = {"lsh_sliding_window": False}
ACROSS = CHUNKS | {"attend_across_buckets": True}
STOCK = ACROSS | {"circular_look_around": True}
ONCE = {"allow_duplicate_attention": False, "num_hashes": 4}
# What all variants have but for what they change: what the LSH contenders are trained with.
BASE = {
    "num_hashes": 1,
    "buckets_per_chunk": 0.5,
    "lsh_attn_chunk_length": 64,
    "lsh_num_chunks_before": 1,
    "lsh_sliding_window": True,
    "attend_across_buckets": False,
    "circular_look_around": False,
    "allow_duplicate_attention": True,
    "full_attention_threshold": None,
}
WINDOWS = "windows"
# What is evaluated: a name, and what it changes.
VARIANTS = {
    WINDOWS: {},
    **{f"{rounds} rounds": {"num_hashes": rounds} for rounds in (2, 4, 8, 16)},
    **{f"{number} buckets per chunk": {"buckets_per_chunk": number} for number in (0.25, 1, 2, 4)},
    **{f"chunks of {length}": {"lsh_attn_chunk_length": length} for length in (32, 128, 256)},
    "2 chunks before": {"lsh_num_chunks_before": 2},
    "4 rounds, a key counts once": ONCE,
    "chunks, own bucket only": CHUNKS,
    "chunks": ACROSS,
    "chunks on a circle": STOCK,
    "stock: chunks on a circle, 2 buckets per chunk": STOCK | {"buckets_per_chunk": 2},
    "paper: chunks, own bucket only, 4 rounds, a key counts once": CHUNKS | ONCE,
    "the first 1,024 bytes exact": {"full_attention_threshold": 1024},
    "dense": {"full_attention_threshold": twins.CONTEXT_LENGTH},
}
# For the figure: what is varied, and a variant for each value.
CURVES = {
    "hash rounds": {1: WINDOWS, **{rounds: f"{rounds} rounds" for rounds in (2, 4, 8, 16)}},
    "buckets per chunk": {
        0.25: "0.25 buckets per chunk",
        0.5: WINDOWS,
        **{number: f"{number} buckets per chunk" for number in (1, 2, 4)},
    },
    "chunk length": {32: "chunks of 32", 64: WINDOWS, 128: "chunks of 128", 256: "chunks of 256"},
}
RECALLS = ("weight", "top 1", "top 8")


def with_settings(model: PreTrainedModel, changes: dict) -> PreTrainedModel:
    """A model with the same weights, the settings of `BASE`, and changes of these."""
    settings = BASE | changes
    length, per_chunk = model.config.max_position_embeddings, settings.pop("buckets_per_chunk")
    settings["num_buckets"] = num_buckets(length, settings["lsh_attn_chunk_length"], per_chunk)
    return with_config(model, **settings)


def quality(models: dict[str, PreTrainedModel], corpus: Corpus, bf16: bool) -> dict[str, dict[str, float]]:
    """Held-out bits per byte and CPU seconds of each model, window by window in turn."""
    windows = tokens_of(corpus.held_out)
    bits, seconds = (dict.fromkeys(models, 0.0) for _ in range(2))
    for model in models.values():
        bits_of_tokens(model, windows[:1], bf16)
    for window in windows:
        for name, model in models.items():
            begun = time.process_time()
            costs = bits_of_tokens(model, window[None], bf16)
            seconds[name] += time.process_time() - begun
            bits[name] += costs.double().sum().item()
    num_bytes = int(corpus.held_out.token_bytes[:, 1:].sum())
    return {name: {"bits_per_byte": bits[name] / num_bytes, "cpu_seconds": seconds[name]} for name in models}


def measure(model: PreTrainedModel, corpus: Corpus, bf16: bool) -> dict[str, dict]:
    """What each variant makes of a trained model's weights."""
    model.eval()
    measured = quality({name: with_settings(model, changes) for name, changes in VARIANTS.items()}, corpus, bf16)
    in_place = {
        name: with_settings(model, changes | {"lsh_value_shift": 0})
        for name, changes in VARIANTS.items()
        # Neither what is met nor how dense attention weighs it depends on these.
        if changes != ONCE and name != "dense"
    }
    few = tokens_of(corpus.held_out)[:: max(1, len(corpus.held_out.dataset) // RECALL_WINDOWS)][:RECALL_WINDOWS]
    shares = recalls(model, in_place, few)
    for name in in_place:
        measured[name]["recall"] = shares.pop(name)
    return {"variants": measured, "baselines": shares}


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Arguments from the command line."""
    parser = twins.parser_of_measurement(__doc__, CHOSEN, RESULTS)
    parser.add_argument("--lengths", type=int, nargs="*", help="time a step at these lengths (default 256 to 16384)")
    return parser.parse_args(argv)


def measure_models(arguments: argparse.Namespace) -> None:
    """All that is missing, seed by seed."""
    for seed in arguments.seeds:
        for contender in arguments.only or CHOSEN:
            twin = twins.twin(arguments, contender, seed)
            measure_once(twin, arguments.results / twin.path.name, measure)


def main(argv: list[str]) -> None:
    """Run what is asked for and not there yet; print the tables and draw the figures."""
    arguments = parse_arguments(argv)
    torch.set_num_threads(arguments.threads)
    if arguments.lengths is not None:
        step_time.run(arguments.lengths or step_time.LENGTHS, arguments.results / "step_time")
    elif not arguments.report:
        measure_models(arguments)
    runs = read_runs(arguments.results)
    if runs:
        print(tables(runs))
        draw(arguments.results.with_suffix(".png"), runs)
    step_time.report(
        arguments.results / "step_time", arguments.results.with_name(f"{arguments.results.name}_step_time.png")
    )


def read_runs(folder: Path) -> dict[str, list[dict]]:
    """The records by contender."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    by_contender = {name: [run for run in records if run["run"]["contender"] == name] for name in CHOSEN}
    return {name: runs for name, runs in by_contender.items() if runs}


def recall_of(run: dict, variant: str, which: str) -> float | None:
    """Recall of a variant, the mean over the LSH layers."""
    shares = run["baselines"].get(variant) or run["variants"][variant].get("recall")
    return None if shares is None else mean(shares[which])


def tables(runs: dict[str, list[dict]]) -> str:
    """A table of markdown for each contender, with the mean of all seeds."""
    parts = []
    for name, records in runs.items():
        rows = [["evaluated with", "bits per byte", "CPU seconds a window", *(f"recall, {key}" for key in RECALLS)]]
        for variant in (*VARIANTS, *records[0]["baselines"]):
            of_all = [record["variants"][variant] for record in records if variant in VARIANTS]
            num_windows = records[0]["run"]["eval_windows"]
            shares = [[recall_of(record, variant, which) for record in records] for which in RECALLS]
            rows.append(
                [
                    variant,
                    twins.spread([row["bits_per_byte"] for row in of_all]) if of_all else "",
                    f"{mean(row['cpu_seconds'] for row in of_all) / num_windows:.3f}" if of_all else "",
                    *("" if None in values else f"{100 * mean(values):.1f}%" for values in shares),
                ]
            )
        parts.append(f"Trained as: {name}; seeds: {len(records)}\n\n{markdown(*rows)}")
    return "\n\n".join(parts)


def draw(path: Path, runs: dict[str, list[dict]]) -> None:
    """Bits per byte and recall against rounds, buckets and chunk length; dense attention as a broken line."""
    figure, panels = plt.subplots(2, len(CURVES), figsize=(13, 8), sharey="row", sharex="col", layout="constrained")
    for (of_bits, of_recall), (what, curve) in zip(panels.T, CURVES.items(), strict=True):
        for color, (name, records) in zip(plt.get_cmap("tab10").colors, runs.items(), strict=False):
            values = list(curve)
            bits = [[run["variants"][variant]["bits_per_byte"] for run in records] for variant in curve.values()]
            of_bits.plot(values, list(map(mean, bits)), marker="o", color=color, label=f"trained as {name}")
            of_bits.fill_between(values, *(list(map(edge, bits)) for edge in (min, max)), color=color, alpha=0.2)
            dense = mean(run["variants"]["dense"]["bits_per_byte"] for run in records)
            of_bits.axhline(dense, color=color, linestyle="--", linewidth=0.8)
            for which, line in zip(RECALLS, ("-", ":", "--"), strict=True):
                shares = [mean(recall_of(run, variant, which) for run in records) for variant in curve.values()]
                of_recall.plot(values, shares, line, marker=".", color=color, label=f"{name}, {which}")
        of_recall.set_xscale("log", base=2)
        of_recall.set_xticks(values, [f"{value:g}" for value in values])
        of_recall.set(xlabel=what, ylim=(0, 1))
    panels[0, 0].set_ylabel("held-out bits per byte")
    panels[1, 0].set_ylabel("recall of dense attention's keys")
    for axes in panels[:, -1]:
        axes.legend(fontsize=7)
    for axes in panels.flat:
        axes.grid(alpha=0.2)
    figure.savefig(path, dpi=150)
    plt.close(figure)
