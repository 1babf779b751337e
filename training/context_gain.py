"""What a model gets out of its context: bits per byte of the same held-out text in windows of several lengths."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn
from tqdm.auto import tqdm
from transformers import DataCollatorForLanguageModeling, PreTrainedModel, PreTrainedTokenizerBase

from .bfloat16 import multiplies_in_bfloat16
from .contribution import without_attention
from .corpus import DataArguments, TextArguments, build_corpus
from .provenance import machine, versions


LENGTHS = (256, 1024, 4096, 16384, 65536)
# Of the longest length; the text that all lengths read.
NUM_WINDOWS = 2
# Short windows are read several at a time.
TOKENS_AT_A_TIME = 4096
# Which tokens are hidden from a masked model.
MASK_SEED = 0
IGNORED = -100


@dataclass(frozen=True)
class Reading:
    """
    Text as a model reads it; every tensor is `[N, L]`.

    Attributes:
        input_ids: What it is given.
        labels: What it has to predict, `IGNORED` elsewhere: every token, or those that are hidden from a masked model.
        token_bytes: Bytes of text that each token stands for.
        causal: Whether what precedes a token predicts it; then nothing predicts the first of a window.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    token_bytes: torch.Tensor
    causal: bool

    def to(self, device: torch.device) -> "Reading":
        """The same on another device."""
        return Reading(self.input_ids.to(device), self.labels.to(device), self.token_bytes.to(device), self.causal)

    def in_windows(self, length: int) -> "Reading":
        """The same text in windows of another length, which divides the present one."""
        ids, labels, widths = (part.view(-1, length) for part in (self.input_ids, self.labels, self.token_bytes))
        return Reading(ids, labels, widths, self.causal)


def bits_of_tokens(model: nn.Module, ids: torch.Tensor, bf16: bool) -> torch.Tensor:
    """What each token but the first costs a causal model in bits, `[B, L - 1]`, of windows `[B, L]`."""
    return _bits(_logits(model, ids, bf16, use_cache=False)[:, :-1], ids[:, 1:])


def _logits(model, ids, bf16, **options):
    with torch.no_grad(), torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
        return model(input_ids=ids, **options).logits


def _bits(logits, labels):
    nats = nn.functional.cross_entropy(logits.float().mT, labels, reduction="none", ignore_index=IGNORED)
    return nats / math.log(2)


def bits_of_text(model: nn.Module, reading: Reading) -> torch.Tensor:
    """What each token costs in bits, `[N, L]`; 0 where nothing is predicted."""
    bf16 = multiplies_in_bfloat16(reading.input_ids.device)
    rows = max(1, TOKENS_AT_A_TIME // reading.input_ids.shape[1])
    if reading.causal:
        windows = reading.input_ids.split(rows)
        return nn.functional.pad(torch.cat([bits_of_tokens(model, ids, bf16) for ids in windows]), (1, 0))
    pairs = zip(reading.input_ids.split(rows), reading.labels.split(rows), strict=True)
    return torch.cat([_bits(_logits(model, ids, bf16), labels) for ids, labels in pairs])


def bits_by_half(model: nn.Module, reading: Reading) -> dict[str, float]:
    """Bits per byte of all of the windows, and of their first and their second half."""
    bits, middle = bits_of_text(model, reading).sum(0), reading.input_ids.shape[1] // 2
    predicted = reading.labels != IGNORED
    if reading.causal:
        predicted[:, 0] = False
    widths = (reading.token_bytes * predicted).sum(0)
    parts = {"all": slice(None), "first": slice(middle), "second": slice(middle, None)}
    # A part in which nothing is predicted costs nothing.
    return {name: (bits[part].sum() / widths[part].sum().clamp(min=1)).item() for name, part in parts.items()}


def read_held_out(
    tokenizer: PreTrainedTokenizerBase, text: TextArguments, length: int, *, num_windows: int, mask_share: float | None
) -> Reading:
    """
    Held-out text, evenly spaced.

    Args:
        tokenizer: The model's.
        text: Where it comes from.
        length: Tokens in a window.
        num_windows: How many windows, or all if there are fewer.
        mask_share: Share of the tokens that is hidden from a masked model, None for a causal one.
    """
    held_out = build_corpus(DataArguments(**vars(text), context_length=length), tokenizer).held_out
    held_out = held_out.evenly_spaced(num_windows)
    ids = torch.stack([torch.as_tensor(row).long() for row in held_out.dataset["input_ids"]])
    widths = torch.as_tensor(held_out.token_bytes).float()
    if mask_share is None:
        return Reading(ids, ids, widths, causal=True)
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=mask_share, seed=MASK_SEED)
    batch = collate([{"input_ids": row} for row in ids])
    return Reading(batch["input_ids"], batch["labels"], widths, causal=False)


def measure(model: PreTrainedModel, reading: Reading, lengths: Sequence[int]) -> dict[str, list[dict[str, float]]]:
    """
    Bits per byte of the same text in windows of each length.

    Returns:
        Rows of "with LSH layers" and of "LSH attention off", or of "the model" that has none: a row for each length,
        with bits per byte of all, and of the first and the second half of the windows.

    Raises:
        ValueError: a length does not divide the longest.
    """
    if any(reading.input_ids.shape[1] % length for length in lengths):
        raise ValueError(
            f"lengths is {', '.join(map(str, lengths))}; each must divide the longest, so that all read the same text."
        )
    has_lsh = "lsh" in getattr(model.config, "attn_layers", ())
    contexts: dict[str, Callable] = {"with LSH layers" if has_lsh else "the model": nullcontext}
    if has_lsh:
        contexts["LSH attention off"] = partial(without_attention, model)
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in contexts}
    for name, context in contexts.items():
        for length in tqdm(sorted(lengths), desc=name):
            with context():
                rows[name].append({"length": length, **bits_by_half(model, reading.in_windows(length))})
    return rows


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    """Lines for a person."""
    lines = [
        f"  {'context':>9}  " + "  ".join(f"{name:>17}" for name in rows) + "   first / second half of the context"
    ]
    for row, *others in zip(*rows.values(), strict=True):
        figures = "  ".join(f"{figure['all']:17.3f}" for figure in (row, *others))
        lines.append(f"  {row['length']:>9,}  {figures}   {row['first']:.3f} / {row['second']:.3f}")
    return "\n".join(lines)


def draw(path: Path, rows: dict[str, list[dict[str, float]]], trained_length: int, unit: str) -> None:
    """Bits per byte against the length of the windows."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for (name, points), color in zip(rows.items(), ("tab:orange", "tab:gray"), strict=False):
        lengths, bits = ([point[key] for point in points] for key in ("length", "all"))
        axes.plot(lengths, bits, marker="o", color=color, label=name)
    axes.axvline(trained_length, color="gray", linestyle="--", linewidth=0.8)
    axes.annotate(
        "training context",
        (trained_length, 0.5),
        xycoords=("data", "axes fraction"),
        xytext=(-4, 0),
        textcoords="offset points",
        color="gray",
        rotation=90,
        ha="right",
        va="center",
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.set(xlabel="tokens of context", ylabel=f"held-out {unit}", ylim=(0, None))
    axes.grid(alpha=0.2)
    axes.legend()
    figure.savefig(path, dpi=150)


def report(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: TextArguments,
    folder: Path,
    *,
    lengths: Sequence[int] = LENGTHS,
    num_windows: int = NUM_WINDOWS,
    mask_share: float | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """
    Measure a model, print the table, and leave context.json and context.png in the folder.

    Args:
        model: In evaluation mode.
        tokenizer: The model's.
        text: Whose held-out part is read.
        folder: Where the figures go.
        lengths: Tokens in a window; each divides the longest.
        num_windows: How many windows of the longest length are read.
        mask_share: Share of the tokens that is hidden from a masked model, None for a causal one.
        settings: In what its config differs from the saved one, to say so in context.json.
    """
    longest = getattr(model.config, "max_sequence_length", None) or math.inf
    lengths = [length for length in lengths if length <= longest]
    if not lengths:
        raise ValueError(f"lengths: each is above the {longest} tokens that the model takes.")
    reading = read_held_out(tokenizer, text, max(lengths), num_windows=num_windows, mask_share=mask_share)
    reading = reading.to(model.device)
    rows, unit = measure(model, reading, lengths), "bits per byte" if reading.causal else "bits per masked byte"
    print(f"\nheld-out {unit}, the same text in windows of several lengths")
    print(table(rows), flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    stored = {"rows": rows, "unit": unit, "source": text.source, "settings": dict(settings or {})}
    stored |= {"machine": machine(), "versions": versions()}
    (folder / "context.json").write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    draw(folder / "context.png", rows, model.config.max_position_embeddings, unit)
