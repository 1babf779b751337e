"""
How exactly the reversible stack inverts itself, what its gradients are worth, and what exact mode costs.

    python -m scripts.figures.exactness
    python -m scripts.figures.exactness --speed

The first measures errors by depth, of the input that backward recovers for the first layer, and of all gradients
against float64. The second times training steps; nothing else should run meanwhile. Both write what they measure to
docs/exactness.json, the first a chart to docs/exactness.png.
"""

import argparse
import json
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from unittest.mock import patch

import matplotlib


matplotlib.use("Agg")

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from tqdm import tqdm

from hf_reformer import ReformerConfig, ReformerForCausalLM
from hf_reformer.modeling.layers import reversible
from hf_reformer.training.provenance import machine, versions


DOCS = Path(__file__).parents[2] / "docs"
DEPTHS = (6, 12, 24, 48, 96)
LENGTH, HIDDEN, VOCAB = 128, 64, 320
WEIGHTS = {"initial weights": 0.02, "weights of unit gain": HIDDEN**-0.5}
AUTOCAST = {"float32": None, "bfloat16 autocast": torch.bfloat16}
FLOOR = 1e-10  # where the chart draws an error of zero

Gradients = dict[str, torch.Tensor]


def build_model(depth: int, *, seed: int = 0, **settings: object) -> ReformerForCausalLM:
    """A causal model with local and LSH layers in turn, in training, without dropout."""
    torch.manual_seed(seed)
    config = ReformerConfig(
        attn_layers=["local", "lsh"] * (depth // 2),
        circular_look_around=False,
        hidden_dropout_prob=0.0,
        local_attention_probs_dropout_prob=0.0,
        vocab_size=VOCAB,
        **settings,
    )
    return ReformerForCausalLM(config).train()


def run(depth: int, *, precision: str = "float32", dtype: torch.dtype = torch.float32, **settings: object) -> tuple:
    """Gradients of one step, and how far off the recovered input of the first layer is (None if none is recovered)."""
    model = build_model(
        depth,
        hidden_size=HIDDEN,
        axial_pos_embds_dim=(16, 48),
        num_attention_heads=2,
        attention_head_size=32,
        feed_forward_size=4 * HIDDEN,
        local_attn_chunk_length=32,
        # A rounding error that moves a token to another bucket, or a ReLU to its other side, would drown all others.
        full_attention_threshold=LENGTH,
        hidden_act="gelu",
        **settings,
    ).to(dtype)
    ids, inputs = torch.randint(3, VOCAB, (2, LENGTH)), []
    first, narrowed = model.reformer.encoder.layers[0].attention, reversible.narrowed

    def read_and_narrow(stream, module):
        if module is first:
            inputs.append(stream.detach().clone())
        return narrowed(stream, module)

    autocast = AUTOCAST[precision]
    with patch.object(reversible, "narrowed", read_and_narrow):
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            loss = model(ids, labels=ids).loss
        loss.backward()
    gradients = {name: weight.grad.double() for name, weight in model.named_parameters()}
    error = ((inputs[1] - inputs[0]).norm() / inputs[0].norm()).item() if len(inputs) > 1 else None
    return gradients, error


def relative_error(actual: Gradients, expected: Gradients) -> float:
    """Of all gradients together."""
    difference = sum((actual[name] - gradient).pow(2).sum() for name, gradient in expected.items())
    return (difference / sum(gradient.pow(2).sum() for gradient in expected.values())).sqrt().item()


def measure_errors() -> list[dict]:
    """A row for each kind of weights, depth, precision, and without and with exact mode."""
    rows = []
    progress = tqdm([(weights, depth) for weights in WEIGHTS for depth in DEPTHS], desc="errors", unit="stack")
    for weights, depth in progress:
        settings = {"initializer_range": WEIGHTS[weights]}
        exact, _ = run(depth, dtype=torch.float64, reversible=False, **settings)
        for precision in AUTOCAST:
            for exact_inversion in (False, True):
                settings |= {"precision": precision, "exact_inversion": exact_inversion}
                ordinary, _ = run(depth, reversible=False, **settings)
                reversible, input_error = run(depth, **settings)
                rows.append(
                    {
                        "weights": weights,
                        "depth": depth,
                        "precision": precision,
                        "exact_inversion": exact_inversion,
                        "input": input_error,
                        "gradients, reversible": relative_error(reversible, exact),
                        "gradients, ordinary autograd": relative_error(ordinary, exact),
                        "gradients, reversible against ordinary autograd": relative_error(reversible, ordinary),
                    }
                )
    return rows


def table(rows: list[dict]) -> str:
    """The rows of `measure_errors`, to print."""
    lines = [f"{'':60}{'input':>12}{'reversible':>12}{'ordinary':>12}{'difference':>12}"]
    for row in rows:
        name = f"{row['weights']}, {row['depth']:>2} layers, {row['precision']}"
        name += ", exact" if row["exact_inversion"] else ""
        figures = [value for key, value in row.items() if key == "input" or key.startswith("gradients")]
        lines.append(f"{name:<60}" + "".join(f"{value:>12.1e}" for value in figures))
    return "\n".join(lines)


SHAPE = {"layers": 4, "hidden_size": 256, "length": 4096, "batch": 1, "num_hashes": 2}


def timed_step(model: ReformerForCausalLM, ids: torch.Tensor, precision: str) -> float:
    """Seconds of a forward and a backward pass."""
    autocast = AUTOCAST[precision]
    start = time.perf_counter()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        loss = model(ids, labels=ids).loss
    loss.backward()
    model.zero_grad()
    return time.perf_counter() - start


def measure_speed(repeats: int) -> dict[str, dict[str, float]]:
    """Seconds per step without and with exact mode, measured in turn: median, least and most."""
    models = {
        exact_inversion: build_model(
            SHAPE["layers"],
            hidden_size=SHAPE["hidden_size"],
            num_attention_heads=4,
            feed_forward_size=4 * SHAPE["hidden_size"],
            num_buckets=[8, 16],
            num_hashes=SHAPE["num_hashes"],
            exact_inversion=exact_inversion,
        )
        for exact_inversion in (False, True)
    }
    ids = torch.randint(3, VOCAB, (SHAPE["batch"], SHAPE["length"]))
    cases = [(precision, exact_inversion) for precision in AUTOCAST for exact_inversion in models]
    seconds = {case: [] for case in cases}
    # The first round warms up.
    for round_ in tqdm(range(repeats + 1), desc="speed", unit="round"):
        for precision, exact_inversion in cases:
            taken = timed_step(models[exact_inversion], ids, precision)
            if round_:
                seconds[precision, exact_inversion].append(taken)
    return {
        f"{precision}, {'exact' if exact_inversion else 'not exact'}": {
            "median": round(median(taken), 4),
            "least": round(min(taken), 4),
            "most": round(max(taken), 4),
        }
        for (precision, exact_inversion), taken in seconds.items()
    }


def draw_lines(axes: Axes, rows: list[dict], key: str, styles: Iterable[tuple]) -> None:
    """One line per style: precision, exact mode or not, color, line style, marker, label."""
    for precision, exact_inversion, color, line, marker, label in styles:
        chosen = [row for row in rows if (row["precision"], row["exact_inversion"]) == (precision, exact_inversion)]
        values = [max(row[key], FLOOR) for row in chosen]
        depths = [row["depth"] for row in chosen]
        axes.plot(depths, values, color=color, linestyle=line, marker=marker, label=label, markersize=5)


def draw(rows: list[dict], path: Path) -> None:
    """Errors by depth: of the recovered input, and of the gradients for both kinds of weights."""
    figure, panels = plt.subplots(1, 3, figsize=(14, 4.6), layout="constrained", sharex=True)
    colors = {"float32": "tab:blue", "bfloat16 autocast": "tab:orange"}
    by_weights = {weights: [row for row in rows if row["weights"] == weights] for weights in WEIGHTS}
    inputs = [
        (precision, exact, color, "-" if exact else "--", "o" if exact else "x", precision + ", exact" * exact)
        for precision, color in colors.items()
        for exact in (False, True)
    ]
    draw_lines(panels[0], by_weights["weights of unit gain"], "input", inputs)
    panels[0].axhline(FLOOR, color="gray", linewidth=0.8)
    panels[0].annotate("0: the same bits", (DEPTHS[0], FLOOR * 1.4), color="gray")
    panels[0].set_title("input of the first layer as recovered,\nweights of unit gain", fontsize=11)
    for axes, (weights, chosen) in zip(panels[1:], by_weights.items(), strict=True):
        for name, line, marker in (("ordinary autograd", "-", "o"), ("reversible", "--", "x")):
            styles = [
                (precision, exact, color, line, marker, f"{precision}{', exact' * exact}, {name}")
                for precision, exact, color in (
                    ("float32", False, "tab:blue"),
                    ("float32", True, "tab:cyan"),
                    ("bfloat16 autocast", False, "tab:orange"),
                    ("bfloat16 autocast", True, "tab:red"),
                )
            ]
            draw_lines(axes, chosen, f"gradients, {name}", styles)
        axes.set_title(f"gradients against float64,\n{weights}", fontsize=11)
    for axes in panels:
        axes.set(xscale="log", yscale="log", xlabel="layers", ylabel="relative error")
        axes.set_xticks(DEPTHS, map(str, DEPTHS))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8, loc="center", bbox_to_anchor=(0.5, 0.25))
    panels[1].legend(fontsize=7, loc="center", bbox_to_anchor=(0.5, 0.32))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Measure errors, or speed, and write them down."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--speed", action="store_true", help="time steps instead of measuring errors")
    parser.add_argument("--repeats", type=int, default=9, help="timed steps of each kind (default %(default)s)")
    parser.add_argument("--output_dir", type=Path, default=DOCS, help="where the files go (default %(default)s)")
    arguments = parser.parse_args(argv)
    path = arguments.output_dir / "exactness.json"
    measured = json.loads(path.read_text()) if path.is_file() else {}
    print(machine(), versions())
    if arguments.speed:
        measured["speed"] = {"shape": SHAPE, **machine(), **versions(), "seconds": measure_speed(arguments.repeats)}
        print(json.dumps(measured["speed"], indent=2))
    else:
        shape = {"hidden_size": HIDDEN, "length": LENGTH, "batch": 2}
        measured["errors"] = {"shape": shape, **machine(), **versions(), "rows": measure_errors()}
        print(table(measured["errors"]["rows"]))
        draw(measured["errors"]["rows"], path.with_suffix(".png"))
    path.write_text(json.dumps(measured, indent=2) + "\n")


if __name__ == "__main__":
    main()
