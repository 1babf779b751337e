"""What a trained model gets out of a text, also of one that is longer than those it was trained on."""

import hashlib
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from hf_reformer.training.context_gain import TOKENS_AT_A_TIME, bits_of_tokens
from hf_reformer.training.recipe import num_buckets

from .text_models import with_config
from .text_training import TextRun, read_corpus, tokens_of


# Lengths of windows, and ends of the ranges of positions in the longest.
LENGTHS = (1024, 4096, 16384, 65536)
# Bytes from the beginning of a passage to its beginning again; its length; what stands before the first; what its bits
# leave out, until it can be known again.
DISTANCES, PASSAGE, BEFORE, LEFT_OUT = (256, 1024, 2048, 4096, 16384, 60000), 256, 512, 16
# Passages at each distance: at most so many, and not fewer than the least where they would read more bytes than that.
MOST_PASSAGES, LEAST_PASSAGES, PASSAGE_BYTES = 32, 8, 2**18
# How LSH layers read: with the rounds and the buckets of training; with more rounds; with so many buckets per chunk
# of the text. With windows a token sees as many keys of its bucket as a chunk holds, so on average they reach back as
# many chunks as there are buckets.
# How full layers read: as trained; with YaRN (arXiv 2309.00071), which rescales rotary positions for longer texts.
AS_TRAINED = "as trained"
OF_LSH: dict[str, dict[str, int]] = {
    AS_TRAINED: {},
    "4 rounds": {"num_hashes": 4},
    "2 buckets per chunk": {"buckets_per_chunk": 2},
    "8 buckets per chunk": {"buckets_per_chunk": 8},
    "8 buckets per chunk, 4 rounds": {"buckets_per_chunk": 8, "num_hashes": 4},
}
RESCALED = "YaRN"
WAYS = (*OF_LSH, RESCALED)
# A threshold above all lengths.
DENSE = 2**20


def reader(model: PreTrainedModel, way: str, length: int) -> PreTrainedModel:
    """A model that reads a text of this length in one of `WAYS`; whoever is dense reads all of it densely."""
    settings: dict = dict(OF_LSH.get(way, {}))
    trained_length = model.config.max_position_embeddings
    if way == RESCALED and length > trained_length:
        scale = {"factor": length / trained_length, "original_max_position_embeddings": trained_length}
        settings["rope_parameters"] = model.config.rope_parameters | {"rope_type": "yarn"} | scale
    if getattr(model.config, "full_attention_threshold", None):
        settings["full_attention_threshold"] = DENSE
    if per_chunk := settings.pop("buckets_per_chunk", None):
        settings["num_buckets"] = num_buckets(length, model.config.lsh_attn_chunk_length, per_chunk)
    return with_config(model, **settings) if settings else model


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


@cache
def held_out_text(run: TextRun) -> torch.Tensor:
    """All held-out windows of the longest length, file after file as they were cut: token ids, `[T]`."""
    corpus = read_corpus(replace(run, context_length=LENGTHS[-1], eval_windows=None))
    return tokens_of(corpus.held_out).flatten()


def measure(model: PreTrainedModel, way: str, text: torch.Tensor) -> dict[str, dict | str]:
    """
    Bits per byte of the same text in windows of each length, by position, and of passages that are read again.

    Args:
        model: In evaluation mode.
        way: How it reads.
        text: Token ids, `[T]`, whole windows of the longest length.

    Returns:
        `windows`, `positions` and `repetition`; the way; and a digest of the text.
    """
    bits = {length: bits_of_windows(reader(model, way, length), text, length) for length in LENGTHS}
    return {
        "way": way,
        "windows": {str(length): float(costs.mean()) for length, costs in bits.items()},
        "positions": bits_of_positions(bits[LENGTHS[-1]], LENGTHS),
        "repetition": {
            str(distance): bits_of_repetition(reader(model, way, BEFORE + distance + PASSAGE), text, distance)
            for distance in DISTANCES
        },
        "text": hashlib.sha256(text.numpy().tobytes()).hexdigest()[:16],
    }
