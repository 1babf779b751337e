"""
Predict and measure the training steps listed here, and draw docs/memory.png.

    python -m scripts.figures.memory_report measure # docs/memory.json; half an hour on two cores; or the cases named
    python -m scripts.figures.memory_report table # the same as a Markdown table
    python -m scripts.figures.memory_report draw # docs/memory.png; a few minutes
"""

import json
import sys
from dataclasses import fields
from pathlib import Path

import matplotlib

from hf_reformer import estimate_memory
from hf_reformer.commands.memory import (
    changed,
    estimate,
    make_config,
    make_setup,
    measure_in_fresh_process,
    parse_arguments,
)
from hf_reformer.training.provenance import machine, versions


matplotlib.use("Agg")
from matplotlib import pyplot as plt


DOCS = Path(__file__).parents[2] / "docs"
FIGURES = DOCS / "memory.json"
WIDE = "--hidden_size 512 --num_attention_heads 8 --feed_forward_size 2048 --vocab_size 32000"
CHUNKED = "--chunk_size_feed_forward 1024 --chunk_size_lm_head 1024"
SIX, TWELVE, SIX_LOCAL = "local lsh " * 3, "local lsh " * 6, "local " * 6
LONG = f"{WIDE} {CHUNKED}"
INEXACT = "--set exact_inversion=False"

# Arguments of `hf-reformer memory`.
CASES = {
    "small": "--length 4096 --batch_size 4",
    "Muon, pieces": f"--length 8192 --batch_size 4 --optimizer muon {CHUNKED}",
    "LSH, 4 rounds, SGD": "--length 16384 --attn_layers lsh lsh --num_hashes 4 --optimizer sgd",
    "local, bfloat16 weights": "--length 8192 --batch_size 4 --dtype bfloat16 --chunk_size_lm_head 2048 "
    f"--attn_layers {SIX_LOCAL} {WIDE}",
    "full, masked, dropout": "--length 2048 --batch_size 4 --masked True --full_attention True --dropout 0.1 "
    "--gradient_accumulation_steps 8",
    "not reversible": "--length 8192 --set reversible=False --batch_size 2",
    "bfloat16 autocast, pieces": f"--length 32768 --attn_layers {SIX} --autocast bfloat16 {LONG}",
    "65,536 tokens, 6 layers, float32 streams": f"--length 65536 --attn_layers {SIX} {LONG} {INEXACT}",
    "65,536 tokens, 12 layers, float32 streams": f"--length 65536 --attn_layers {TWELVE} {LONG} {INEXACT}",
    "65,536 tokens, 6 layers": f"--length 65536 --attn_layers {SIX} {LONG}",
    "65,536 tokens, 12 layers": f"--length 65536 --attn_layers {TWELVE} {LONG}",
}


def measure_cases(names: list[str]) -> None:
    """Predict and measure the named cases, one after the other, and write the figures down."""
    old = json.loads(FIGURES.read_text(encoding="utf-8"))["cases"] if FIGURES.is_file() else {}
    figures = {"cases": {name: old[name] for name in CASES if name in old}}
    for name in names or CASES:
        setup, config = make_setup_and_config(CASES[name])
        predicted, measured = estimate(config, setup), measure_in_fresh_process(config, setup)
        figures["cases"][name] = {
            "command": f"hf-reformer memory --measure {' '.join(CASES[name].split())}",
            "predicted": {part.name: getattr(predicted, part.name) for part in fields(predicted)[:-1]},
            "allocated": measured.allocated,
            "resident": measured.resident,
            "machine": machine(),
            "versions": versions(),
        }
        FIGURES.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        print(f"{name}: predicted {predicted.peak:,}, measured {measured}", flush=True)


def make_setup_and_config(command: str):
    """What a command line of memory.py describes."""
    arguments, recipe = parse_arguments(command.split())
    return make_setup(arguments), make_config(arguments, recipe)


def print_table() -> None:
    """The measured cases as Markdown, in the order of `CASES`."""
    print("| case | predicted | allocated | resident |\n|---|---|---|---|")
    measured = json.loads(FIGURES.read_text(encoding="utf-8"))["cases"]
    for name, case in ((name, measured[name]) for name in CASES if name in measured):
        predicted, allocated, resident = case["predicted"]["peak"], case["allocated"], case["resident"]
        error = predicted / allocated - 1
        sizes = " | ".join(f"{size / 2**20:,.0f} MiB" for size in (allocated, resident))
        print(f"| {name} | {predicted / 2**20:,.0f} MiB ({error:+.1%}) | {sizes} |")


def draw() -> None:
    """Predicted activations over depth and over length."""
    setup, config = make_setup_and_config(f"--length 16384 --attn_layers local lsh {LONG}")
    figure, (over_depth, over_length) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    depths, lengths = [2, 4, 8, 16, 32], [2**power for power in range(10, 17)]
    for reversible, color in ((True, "#1f5fa8"), (False, "#b5451b")):
        label = "reversible" if reversible else "ordinary autograd"
        peaks = [
            estimate(changed(config, reversible=reversible, attn_layers=["local", "lsh"] * (depth // 2)), setup)
            for depth in depths
        ]
        over_depth.plot(depths, [peak.activations / 2**30 for peak in peaks], "o-", color=color, label=label)
        twelve = changed(make_setup_and_config(CASES["65,536 tokens, 12 layers"])[1], reversible=reversible)
        peaks = [estimate_memory(twelve, length=length) for length in lengths]
        over_length.plot(lengths, [peak.activations / 2**30 for peak in peaks], "o-", color=color, label=label)
    over_depth.set(title="16,384 tokens", xlabel="layers", ylabel="predicted activations, GiB", ylim=0)
    over_length.set(title="12 layers", xlabel="tokens", xscale="log", yscale="log")
    over_length.set_xticks(lengths, [f"{length // 1024}K" for length in lengths], minor=False)
    for axes in (over_depth, over_length):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(DOCS / "memory.png", dpi=110)


if __name__ == "__main__":
    command, *names = sys.argv[1:]
    {"measure": lambda: measure_cases(names), "table": print_table, "draw": draw}[command]()
