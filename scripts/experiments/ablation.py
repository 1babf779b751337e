"""
What each choice of the recipe is worth: the demo's model with one choice changed at a time, trained for a few steps.

    python -m scripts.run_experiment ablation
    python -m scripts.run_experiment ablation --steps 100 --only recipe "AdamW instead of Muon"

Writes the held-out bits per byte of each run to docs/recipe_ablations.json and a chart to docs/recipe_ablations.png. A
run that the file already has for this number of steps is not repeated.
"""

import argparse
import json
import time
from dataclasses import fields
from pathlib import Path

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch

from hf_reformer.commands.train import ModelArguments, train
from hf_reformer.training import ModelRecipe
from hf_reformer.training.corpus import DataArguments
from hf_reformer.training.provenance import machine, versions

from ..demo import DEMO_CONTEXT_LENGTH, training_arguments


DOCS = Path(__file__).parents[2] / "docs"
HELD_OUT_WINDOWS = 24

# Name of the variant: what it changes in the model, and in the training.
VARIANTS = {
    "recipe": ({}, {}),
    "values not shifted": ({"lsh_value_shift": 0}, {}),
    "local layers only": ({"attn_layers": ["local"] * 4}, {}),
    "lsh layers only": ({"attn_layers": ["lsh"] * 4}, {}),
    "lsh before local": ({"attn_layers": ["lsh", "local"] * 2}, {}),
    "full instead of lsh": ({"attn_layers": ["local", "full"] * 2}, {}),
    "full attention in every layer": ({"full_attention": True}, {}),
    "lsh layers attend to all, values shifted": ({"full_attention_threshold": 2**20}, {}),
    "2 rounds": ({"num_hashes": 2}, {}),
    "4 rounds": ({"num_hashes": 4}, {}),
    "no windows": ({"lsh_sliding_window": False}, {}),
    "no windows, 2 buckets per chunk": ({"lsh_sliding_window": False, "buckets_per_chunk": 2}, {}),
    "1 bucket per chunk": ({"buckets_per_chunk": 1}, {}),
    "a quarter of a bucket per chunk": ({"buckets_per_chunk": 0.25}, {}),
    "lsh chunks of 32": ({"lsh_attn_chunk_length": 32}, {}),
    "lsh chunks of 128": ({"lsh_attn_chunk_length": 128}, {}),
    "local chunks of 16": ({"local_attn_chunk_length": 16}, {}),
    "local chunks of 64": ({"local_attn_chunk_length": 64}, {}),
    "local chunks of 128": ({"local_attn_chunk_length": 128}, {}),
    "rotary positions in lsh layers, too": ({"lsh_rotary": True}, {}),
    "axial positions, local chunks of 8": ({"position_embedding_type": "axial", "local_attn_chunk_length": 8}, {}),
    "axial positions": ({"position_embedding_type": "axial"}, {}),
    "no positions": ({"position_embedding_type": "none"}, {}),
    "mean of the two streams": ({"combine_streams": "mean"}, {}),
    "mean of the two streams, tied words": ({"combine_streams": "mean", "tie_word_embeddings": True}, {}),
    "a bias in the attention's output": ({"attention_output_bias": True}, {}),
    "gated feed-forward layers": ({"gated_feed_forward": True, "feed_forward_size": 683}, {}),
    "initializer_range 0.06": ({"initializer_range": 0.06}, {}),
    "AdamW instead of Muon": ({}, {"muon": False, "learning_rate": 2e-3}),
    "AdamW, initializer_range 0.06": ({"initializer_range": 0.06}, {"muon": False, "learning_rate": 2e-3}),
    "learning rate 5e-3": ({}, {"learning_rate": 5e-3}),
    "learning rate 2e-2": ({}, {"learning_rate": 2e-2}),
    "no warm-up": ({}, {"warmup_steps": 0}),
}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="steps of each run (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default %(default)s)")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the results (default docs)")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), metavar="NAME", help="run these variants alone")
    return parser.parse_args(argv)


def measure(name: str, steps: int) -> dict[str, float]:
    """Train one variant; held-out bits per byte, CPU seconds, and the reference figures."""
    model_changes, training_changes = VARIANTS[name]
    of_recipe = {setting.name for setting in fields(ModelRecipe)}
    others = [f"{key}={json.dumps(value)}" for key, value in model_changes.items() if key not in of_recipe]
    settings = {"max_steps": steps, "eval_strategy": "no", "output_dir": f"runs/ablations/{name}"}
    # A run that was stopped left a checkpoint, and starts over.
    settings["overwrite_output_dir"] = True
    start = time.process_time()
    figures = train(
        ModelArguments(set=others),
        ModelRecipe(**{key: value for key, value in model_changes.items() if key in of_recipe}),
        DataArguments(context_length=DEMO_CONTEXT_LENGTH, max_held_out_windows=HELD_OUT_WINDOWS),
        training_arguments(**settings | training_changes),
    )
    return {"steps": steps, "cpu_seconds": round(time.process_time() - start), **figures}


def draw(path: Path, measured: dict[str, dict[str, float]]) -> None:
    """A bar for each variant, best first, with the order-2 figure as a line."""
    rows = sorted(measured.items(), key=lambda item: -item[1]["model"])
    figure, axes = plt.subplots(figsize=(8, 0.34 * len(rows) + 1.2), layout="constrained")
    colors = ["tab:orange" if name == "recipe" else "tab:blue" for name, _ in rows]
    bars = axes.barh([name for name, _ in rows], [row["model"] for _, row in rows], color=colors)
    axes.bar_label(bars, fmt="%.3f", padding=3)
    order_2 = rows[0][1]["order-2"]
    axes.axvline(order_2, color="gray", linestyle="--", linewidth=0.8)
    place = {"xycoords": ("data", "axes fraction"), "va": "bottom"}
    axes.annotate(f"order-2 {order_2:.2f}", (order_2, 1), color="gray", **place)
    axes.set_xlabel(f"held-out bits per byte after {rows[0][1]['steps']} steps")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Run the variants that are not in the file yet, writing it after each."""
    arguments = parse_arguments(argv)
    torch.set_num_threads(arguments.threads)
    path = arguments.docs / "recipe_ablations.json"
    measured = json.loads(path.read_text())["runs"] if path.is_file() else {}
    measured = {name: row for name, row in measured.items() if row["steps"] == arguments.steps}
    for name in arguments.only or VARIANTS:
        if name in measured:
            continue
        print(f"\n=== {name}", flush=True)
        measured[name] = measure(name, arguments.steps)
        path.write_text(json.dumps({"runs": measured, "machine": machine(), "versions": versions()}, indent=2) + "\n")
        draw(path.with_suffix(".png"), measured)
    for name, row in sorted(measured.items(), key=lambda item: item[1]["model"]):
        print(f"{row['model']:.3f}  {row['cpu_seconds']:>4} s  {name}")
