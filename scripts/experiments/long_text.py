"""What a trained model gets out of a text, also of one that is longer than those it was trained on."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from hf_reformer.training.context_gain import TOKENS_AT_A_TIME, bits_of_tokens

from .switches import with_settings
from .text_training import TextRun, read_corpus, tokens_of


# Lengths of windows, and ends of the ranges of positions in the longest.
LENGTHS = (1024, 4096, 16384, 65536)
# Bytes from the beginning of a passage to its beginning again; its length; what stands before the first; what its bits
# leave out, until it can be known again.
DISTANCES, PASSAGE, BEFORE, LEFT_OUT = (256, 1024, 2048, 4096, 16384, 60000), 256, 512, 16
# Passages at each distance: at most so many, and not fewer than the least where they would read more bytes than that.
MOST_PASSAGES, LEAST_PASSAGES, PASSAGE_BYTES = 32, 8, 2**18
# Buckets of LSH layers: those of the training, or so many per chunk of the text that is read. With windows a token
# sees as many keys of its bucket as a chunk holds; so on average they reach back as many chunks as there are buckets.
AS_TRAINED = "as trained"
BUCKETS = {AS_TRAINED: None, "2 per chunk": 2.0, "8 per chunk": 8.0}
# A threshold above all lengths.
DENSE = 2**20

ModelOfLength = Callable[[int], PreTrainedModel]


def ways_to_read(model: PreTrainedModel) -> dict[str, ModelOfLength]:
    """A model for the length of a text, by what is done with the buckets; one way if it has no LSH attention."""
    config = model.config
    if "lsh" not in getattr(config, "attn_layers", ()):
        return {AS_TRAINED: lambda _: model}
    if config.full_attention_threshold:
        dense = with_settings(model, {"full_attention_threshold": DENSE})
        return {AS_TRAINED: lambda _: dense}

    def with_buckets(per_chunk: float | None, length: int) -> PreTrainedModel:
        return model if per_chunk is None else with_settings(model, {"buckets_per_chunk": per_chunk}, length)

    return {name: partial(with_buckets, per_chunk) for name, per_chunk in BUCKETS.items()}


def bits_of_windows(model: nn.Module, text: torch.Tensor, length: int, bf16: bool = False) -> np.ndarray:
    """What each byte costs, `[N, L - 1]`, of the whole windows of a length in `text`, `[T]`."""
    windows = text[: len(text) // length * length].view(-1, length).split(max(1, TOKENS_AT_A_TIME // length))
    return torch.cat([bits_of_tokens(model, rows, bf16).cpu() for rows in windows]).numpy()


def bits_of_positions(bits: np.ndarray, ends: tuple[int, ...]) -> dict[str, float]:
    """Means over the ranges of positions up to each of `ends`; the first byte of a window is not predicted."""
    return {
        f"{start}-{end}": float(bits[:, max(0, start - 1) : end - 1].mean())
        for start, end in zip((0, *ends), ends, strict=False)
    }


def bits_of_repetition(model: PreTrainedModel, text: torch.Tensor, distance: int) -> dict[str, float]:
    """
    Mean bits per byte of passages: read first, read again `distance` bytes later, and read there for the first time.

    For the last, "late", the text has other bytes where the passage would have stood before: those that follow it.
    """
    count = min(MOST_PASSAGES, max(LEAST_PASSAGES, PASSAGE_BYTES // distance))
    span = BEFORE + distance + PASSAGE
    first, later = slice(BEFORE + LEFT_OUT - 1, BEFORE + PASSAGE - 1), slice(LEFT_OUT - PASSAGE, None)
    bits: dict[str, list[float]] = {"first": [], "again": [], "late": []}
    for start in np.linspace(0, len(text) - span, count).astype(int):
        window = text[start : start + span]
        before, passage, following = window[:BEFORE], window[BEFORE : BEFORE + PASSAGE], window[BEFORE + PASSAGE :]
        known, unknown = (
            bits_of_tokens(model, torch.cat([*parts, passage])[None], bf16=False)[0]
            for parts in ((before, passage, following[: distance - PASSAGE]), (before, following[:distance]))
        )
        for name, costs in (("first", known[first]), ("again", known[later]), ("late", unknown[later])):
            bits[name].append(costs.mean().item())
    return {name: float(np.mean(costs)) for name, costs in bits.items()}


def held_out_text(run: TextRun) -> torch.Tensor:
    """All held-out windows of the longest length, file after file as they were cut: token ids, `[T]`."""
    corpus = read_corpus(replace(run, context_length=LENGTHS[-1], eval_windows=None))
    return tokens_of(corpus.held_out).flatten()


def measure(model: PreTrainedModel, text: torch.Tensor) -> dict[str, dict]:
    """
    Bits per byte of the same text in windows of each length, by position, and of passages that are read again.

    Args:
        model: In evaluation mode.
        text: Token ids, `[T]`, whole windows of the longest length.

    Returns:
        `windows`, `positions` and `repetition`, each by the ways to read; and a digest of the text.
    """
    measured: dict[str, dict] = {"windows": {}, "positions": {}, "repetition": {}}
    for way, model_of in ways_to_read(model).items():
        bits = {length: bits_of_windows(model_of(length), text, length) for length in LENGTHS}
        measured["windows"][way] = {str(length): float(costs.mean()) for length, costs in bits.items()}
        measured["positions"][way] = bits_of_positions(bits[LENGTHS[-1]], LENGTHS)
        measured["repetition"][way] = {
            str(distance): bits_of_repetition(model_of(BEFORE + distance + PASSAGE), text, distance)
            for distance in DISTANCES
        }
    return measured | {"text": hashlib.sha256(text.numpy().tobytes()).hexdigest()[:16]}
