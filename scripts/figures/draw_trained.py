"""
What the LSH layers of a trained model do, for docs/how_it_works.md: how full buckets are, and what rounds find.

    make demo                                         # trains runs/demo
    python -m scripts.figures.draw_trained --model runs/demo
    python -m scripts.figures.draw_trained --plot-only

Reads held-out windows of the text that the demo trained on. Writes how_it_works.json, and draws lsh_buckets.png and
lsh_recall.png from it, in docs/. Recall: of the keys to which dense attention with the same queries gives the largest
weights, the share that LSH attention meets.
"""

import argparse
import json
from pathlib import Path

import matplotlib


matplotlib.use("Agg")

import torch
from matplotlib import pyplot as plt
from transformers import AutoModelForCausalLM

from hf_reformer import ReformerByteTokenizer, ReformerConfig, hash_vectors
from hf_reformer.training.corpus import DataArguments, build_corpus
from hf_reformer.training.provenance import machine, versions

from ..experiments.recall import inputs_of_lsh_layers, lsh_layers, recalls


DOCS = Path(__file__).parents[2] / "docs"
RESULTS = DOCS / "how_it_works.json"
ROUNDS = (1, 2, 4, 8, 16)
COLORS = ("#1f5fa8", "#b5451b", "#4a7a2c")
WORDS = {
    "top 1": "the key with the largest dense weight",
    "top 8": "the 8 keys with the largest",
    "weight": "all dense weight",
}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--model", default="runs/demo", help="folder of a causal model (default %(default)s)")
    parser.add_argument("--length", type=int, default=4096, help="tokens in a window (default %(default)s)")
    parser.add_argument("--windows", type=int, default=2, help="held-out windows to read (default %(default)s)")
    parser.add_argument("--text_path", help="another text than the standard library of Python: a file or a folder")
    parser.add_argument("--plot-only", action="store_true", help="draw what how_it_works.json says")
    return parser.parse_args(argv)


@torch.no_grad()
def bucket_sizes(model: torch.nn.Module, ids: torch.Tensor) -> list[list[float]]:
    """For each LSH layer the tokens in its buckets, the fullest first, the mean over heads."""
    sizes = []
    for layer, hidden_states in zip(lsh_layers(model), inputs_of_lsh_layers(model, ids), strict=True):
        rotations = layer.draw_rotations(ids.shape[1], None, None, ids.device)
        vectors = layer.query_key(hidden_states).unflatten(-1, (layer.num_heads, -1))
        buckets = hash_vectors(vectors, rotations, layer.config.num_buckets)[0, :, 0]
        counts = torch.nn.functional.one_hot(buckets.long(), layer.config.num_buckets).sum(1)
        sizes.append(counts.sort(dim=1, descending=True).values.double().mean(0).tolist())
    return sizes


def with_rounds(model: torch.nn.Module, number: int) -> torch.nn.Module:
    """The same weights with another number of hash rounds, and values in their own places, as recall wants them."""
    changes = {"num_hashes": number, "lsh_value_shift": 0}
    twin = type(model)(ReformerConfig.from_dict(model.config.to_dict() | changes))
    twin.load_state_dict(model.state_dict(), assign=True)
    return twin.eval()


def measure(arguments: argparse.Namespace) -> dict:
    """Everything that is drawn."""
    model = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
    text = DataArguments(text_path=arguments.text_path, context_length=arguments.length)
    corpus = build_corpus(text, ReformerByteTokenizer())
    held_out = corpus.held_out.dataset.with_format("torch")
    chosen = range(0, len(held_out), max(1, len(held_out) // arguments.windows))[: arguments.windows]
    windows = torch.stack([held_out[number]["input_ids"] for number in chosen])
    found = recalls(model, {str(number): with_rounds(model, number) for number in ROUNDS}, windows)
    return {
        "settings": {"length": arguments.length, "windows": arguments.windows},
        "buckets": {"number": model.config.num_buckets, "sizes": bucket_sizes(model, windows[:1])},
        "recall": found,
        "machine": machine(),
        "versions": versions(),
    }


def draw_buckets(results: dict) -> None:
    """lsh_buckets.png."""
    number, length = results["buckets"]["number"], results["settings"]["length"]
    figure, ax = plt.subplots(figsize=(7.6, 3.9), layout="constrained")
    width = 0.8 / len(results["buckets"]["sizes"])
    for index, sizes in enumerate(results["buckets"]["sizes"]):
        places = [place + (index - 0.5) * width for place in range(1, number + 1)]
        ax.bar(places, sizes, width=width, color=COLORS[index], label=f"LSH layer {index + 1} of the model")
    ax.axhline(length / number, color="black", lw=1, ls="--", label="all buckets equally full")
    ax.set(xlabel="bucket, the fullest first", ylabel="tokens in it (mean of the heads)", xlim=(0.2, number + 1))
    ax.set_title(f"How full the {number} buckets are: {length:,} bytes of source code", fontsize=11)
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(DOCS / "lsh_buckets.png", dpi=110)


def draw_recall(results: dict) -> None:
    """lsh_recall.png."""
    layers = len(results["recall"][str(ROUNDS[0])]["weight"])
    figure, axes = plt.subplots(1, layers, figsize=(9.4, 4.2), sharey=True, squeeze=False, layout="constrained")
    for layer, ax in enumerate(axes[0]):
        for (which, words), color in zip(WORDS.items(), COLORS, strict=True):
            shares = [100 * results["recall"][str(number)][which][layer] for number in ROUNDS]
            ax.plot(ROUNDS, shares, "o-", color=color, label=words)
        ax.set_xscale("log", base=2)
        ax.set_xticks(ROUNDS, [str(number) for number in ROUNDS])
        ax.set(xlabel="hash rounds", ylim=(0, 102))
        ax.set_title(f"LSH layer {layer + 1} of the model", fontsize=11)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("% that LSH attention finds")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), frameon=False, ncols=3, loc="outside upper center")
    figure.savefig(DOCS / "lsh_recall.png", dpi=110)


def main(argv: list[str] | None = None) -> None:
    """Measure, if asked to, and draw."""
    arguments = parse_arguments(argv)
    if not arguments.plot_only:
        RESULTS.write_text(json.dumps(measure(arguments), indent=1) + "\n", encoding="utf-8")
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    draw_buckets(results)
    draw_recall(results)


if __name__ == "__main__":
    main()
