"""What a training run leaves behind for people: the loss curve, the model card, the log."""

import json
from functools import partial
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from transformers import PreTrainedConfig

from .compression import bits_per_byte
from .provenance import versions
from .run_trainer import RunTrainer


# Installed, the template lies beside the folders, as in a checkout.
TEMPLATE = Path(__file__).parent.parent / "model_card.md"

USAGE = {
    "text-generation": """generator = pipeline("text-generation", model="{name}")
print(generator("The", max_new_tokens=200)[0]["generated_text"])""",
    "fill-mask": """unmasker = pipeline("fill-mask", model="{name}")
print(unmasker(f"The{{unmasker.tokenizer.mask_token}}answer", top_k=3))""",
}


def write_curve(
    path: Path,
    log_history: list[dict[str, float]],
    *,
    tokens_per_step: float,
    train_tokens_per_byte: float,
    references: dict[str, float],
    unit: str,
) -> None:
    """Draw train loss and held-out bits per byte against tokens and steps, with a line for each reference figure."""
    train = [(row["step"], bits_per_byte(row["loss"], train_tokens_per_byte)) for row in log_history if "loss" in row]
    held_out = [(row["step"], row["eval_bits_per_byte"]) for row in log_history if "eval_bits_per_byte" in row]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    if train:
        axes.plot(*_against_tokens(train, tokens_per_step), color="tab:blue", linewidth=1, alpha=0.6, label="train")
    if held_out:
        axes.plot(
            *_against_tokens(held_out, tokens_per_step), color="tab:orange", marker="o", markersize=4, label="held-out"
        )
    for place, (name, value) in enumerate(references.items()):
        axes.axhline(value, color="gray", linestyle="--", linewidth=0.8)
        axes.annotate(
            f"{name} {value:.2f}",
            # Side by side, because two figures may lie close together.
            (0.99 - 0.2 * place, value),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            color="gray",
        )
    axes.set_xlabel("tokens")
    axes.set_ylabel(unit)
    steps_of, tokens_of = (partial(np.multiply, factor) for factor in (1 / tokens_per_step, tokens_per_step))
    axes.secondary_xaxis("top", functions=(steps_of, tokens_of)).set_xlabel("steps")
    axes.grid(alpha=0.2)
    axes.legend()
    figure.savefig(path, dpi=150)


def _against_tokens(points: list[tuple[float, float]], tokens_per_step: float) -> tuple[list[float], list[float]]:
    steps, values = zip(*points, strict=True)
    return [step * tokens_per_step for step in steps], list(values)


def write_model_card(path: Path, facts: dict[str, Any], figures: dict[str, float]) -> None:
    """
    Fill the template model_card.md.

    Args:
        path: where the card goes.
        facts: a value for every placeholder except those about the figures and the usage.
        figures: `model` first, then the reference figures, in bits per byte.
    """
    rows = [f"| | {facts['unit']} |", "|---|---|", f"| this model | **{figures['model']:.3f}** |"]
    rows += [f"| {name} | {value:.3f} |" for name, value in figures.items() if name != "model"]
    card = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        facts,
        figures="\n".join(rows),
        bits_per_byte=f"{figures['model']:.4f}",
        usage=USAGE[facts["pipeline_tag"]].format(name=facts["name"]),
        versions=", ".join(f"{name} {version}" for name, version in versions().items()),
    )
    path.write_text(card, encoding="utf-8")


def describe_run(trainer: RunTrainer, context_length: int, start: str) -> dict[str, Any]:
    """
    What a card says of a run, whatever was trained.

    Args:
        context_length: Tokens that are read at a time.
        start: Where the weights come from.
    """
    model, args, tokenizer = trainer.model, trainer.args.to_dict(), trainer.processing_class
    return {
        "name": Path(trainer.args.output_dir).resolve().name,
        "model_class": type(model).__name__,
        "parameters": f"{model.num_parameters():,}",
        "layers": layers_of(model.config, ", "),
        "context_length": f"{context_length:,}",
        "tokenizer_class": type(tokenizer).__name__,
        "vocab_size": f"{len(tokenizer):,}",
        "start": start,
        "steps": f"{trainer.state.global_step:,}",
        "optimizer": (
            "{optimizer}, peak learning rate {learning_rate}, schedule {lr_scheduler_type}, warm-up {warmup_steps}, "
            "weight decay {weight_decay}, gradient norm clipped at {max_grad_norm}"
        ).format(optimizer="Muon and AdamW" if args["muon"] else args["optim"], **args),
        "seed": args["seed"],
    }


def layers_of(config: PreTrainedConfig, between: str = " ") -> str:
    """The kinds of a model's layers, of both sides where it has two; nothing where its config does not say."""
    layers = between.join(getattr(config, "attn_layers", None) or [])
    decoder = getattr(config, "decoder_attn_layers", None)
    return f"{layers}; decoder: {between.join(decoder)}" if decoder else layers


def write_log(path: Path, **entries: Any) -> None:
    """Write what was asked for, measured and logged, as JSON."""
    path.write_text(json.dumps({**entries, "versions": versions()}, indent=2, default=str) + "\n", encoding="utf-8")
