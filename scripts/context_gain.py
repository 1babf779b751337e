"""
What a causal model gets out of its context: bits per byte of the same held-out text in windows of several lengths.

    python scripts/context_gain.py --model runs/demo
    python scripts/context_gain.py --model runs/mine --text_path my_texts/ --lengths 1024 16384

With LSH layers the same without their attention, too. Writes context.json and context.png into the model's folder.
"""

import argparse
import json
import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from corpus import DataArguments, build_corpus
from report import machine, versions
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import hf_reformer  # noqa: F401 - registers the classes
from hf_reformer.training import multiplies_in_bfloat16, without_attention


LENGTHS = (256, 1024, 4096, 16384, 65536)
# Of the longest length; the text that all lengths read.
NUM_WINDOWS = 2
# Short windows are read several at a time.
TOKENS_AT_A_TIME = 4096


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a causal model, with its tokenizer")
    parser.add_argument("--text_path", help="the text it was trained on (default: Python's standard library)")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default %(default)s)")
    return parser.parse_args(argv)


def bits_of_tokens(model: nn.Module, ids: torch.Tensor, bf16: bool) -> torch.Tensor:
    """What each token but the first costs in bits, `[B, L - 1]`, of windows `[B, L]`."""
    with torch.no_grad(), torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
        logits = model(input_ids=ids, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].float().mT, ids[:, 1:], reduction="none") / math.log(2)


def bits_by_half(model: nn.Module, tokens: torch.Tensor, token_bytes: torch.Tensor) -> dict[str, float]:
    """Bits per byte of windows `[N, L]`, whose tokens stand for so many bytes: of all, and of their halves."""
    bf16 = multiplies_in_bfloat16(tokens.device)
    rows = max(1, TOKENS_AT_A_TIME // tokens.shape[1])
    bits = torch.cat([bits_of_tokens(model, windows, bf16) for windows in tokens.split(rows)]).sum(0)
    # Nothing predicts the first token.
    widths, middle = token_bytes[:, 1:].sum(0), tokens.shape[1] // 2 - 1
    parts = {"all": slice(None), "first": slice(middle), "second": slice(middle, None)}
    return {name: (bits[part].sum() / widths[part].sum()).item() for name, part in parts.items()}


def measure(model: PreTrainedModel, tokenizer, data: DataArguments, lengths: tuple[int, ...]) -> dict[str, list[dict]]:
    """
    Bits per byte of the same held-out text in windows of each length that the model takes.

    Returns:
        Rows of "with LSH layers" and of "LSH attention off", or of "the model" that has none: a row for each length,
        with bits per byte of all, and of the first and the second half of the windows.

    Raises:
        ValueError: a length does not divide the longest.
    """
    if any(max(lengths) % length for length in lengths):
        raise ValueError(f"All lengths must divide the longest, so that they read the same text, but got {lengths}.")
    held_out = build_corpus(replace(data, context_length=max(lengths)), tokenizer).held_out.evenly_spaced(NUM_WINDOWS)
    text = torch.stack([torch.as_tensor(row).long() for row in held_out.dataset["input_ids"]])
    widths = torch.as_tensor(held_out.token_bytes).float()
    has_lsh = "lsh" in getattr(model.config, "attn_layers", ())
    contexts = {"with LSH layers" if has_lsh else "the model": nullcontext}
    if has_lsh:
        contexts["LSH attention off"] = partial(without_attention, model)
    longest = getattr(model.config, "max_sequence_length", None) or math.inf
    rows = {name: [] for name in contexts}
    for name, context in contexts.items():
        for length in tqdm([length for length in sorted(lengths) if length <= longest], desc=name):
            with context():
                bits = bits_by_half(model, *(part.view(-1, length) for part in (text, widths)))
            rows[name].append({"length": length, **bits})
    return rows


def table(rows: dict[str, list[dict]]) -> str:
    """Lines for a person."""
    lines = [
        f"  {'context':>9}  " + "  ".join(f"{name:>17}" for name in rows) + "   first / second half of the context"
    ]
    for row, *others in zip(*rows.values(), strict=True):
        figures = "  ".join(f"{figure['all']:17.3f}" for figure in (row, *others))
        lines.append(f"  {row['length']:>9,}  {figures}   {row['first']:.3f} / {row['second']:.3f}")
    return "\n".join(lines)


def draw(path: Path, rows: dict[str, list[dict]], trained_length: int) -> None:
    """Bits per byte against the length of the windows."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for (name, points), color in zip(rows.items(), ("tab:orange", "tab:gray"), strict=False):
        lengths, bits = ([point[key] for point in points] for key in ("length", "all"))
        axes.plot(lengths, bits, marker="o", color=color, label=name)
    axes.axvline(trained_length, color="gray", linestyle="--", linewidth=0.8)
    place = {"xycoords": ("data", "axes fraction"), "xytext": (-4, 0), "textcoords": "offset points", "color": "gray"}
    axes.annotate("training context", (trained_length, 0.5), ha="right", va="center", rotation=90, **place)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.set(xlabel="bytes of context", ylabel="held-out bits per byte", ylim=(0, None))
    axes.grid(alpha=0.2)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def report(folder: str, data: DataArguments, lengths: tuple[int, ...] = LENGTHS) -> None:
    """Measure the model in a folder, print the table, and leave the figures there."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    rows = measure(model, tokenizer, data, lengths)
    print("\nheld-out bits per byte, the same text in windows of several lengths")
    print(table(rows), flush=True)
    stored = {"rows": rows, "machine": machine(), "versions": versions()}
    (Path(folder) / "context.json").write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    draw(Path(folder) / "context.png", rows, model.config.max_position_embeddings)


def main(argv: list[str] | None = None) -> None:
    """Measure a model from the command line."""
    arguments = parse_arguments(argv)
    torch.set_num_threads(arguments.threads)
    report(arguments.model, DataArguments(text_path=arguments.text_path), tuple(arguments.lengths))


if __name__ == "__main__":
    main()
