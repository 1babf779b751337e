"""What a trained model gets out of a text that is longer than those it was trained on."""

import numpy as np
import torch
from torch import nn

from hf_reformer.training.context_gain import bits_of_tokens
from hf_reformer.training.corpus import Corpus


# Who is measured: models whose attention is the same at every length.
CHOSEN = ("local", "full", "lsh", "lsh, successors")
# Ends of the ranges of positions.
RANGES = (1024, 4096, 16384, 65536)
# Bytes from the beginning of a passage to its beginning again; what stands before the first; what its bits leave out,
# until it can be known again.
DISTANCES, PASSAGE, BEFORE, LEFT_OUT, NUM_PASSAGES = (256, 1024, 4096, 16384, 60000), 256, 512, 16, 8


def bits_by_position(model: nn.Module, text: torch.Tensor, bf16: bool, ends: tuple[int, ...]) -> dict[str, float]:
    """Mean bits per byte in each range of positions, up to each of `ends`, of all whole windows in `text`."""
    windows = text[: len(text) // ends[-1] * ends[-1]].view(-1, ends[-1]).to(model.device)
    bits = torch.cat([bits_of_tokens(model, window[None], bf16).cpu() for window in windows]).numpy()
    starts = (0, *ends[:-1])
    # The first byte of a window is not predicted.
    return {
        f"{start}-{end}": float(bits[:, max(0, start - 1) : end - 1].mean())
        for start, end in zip(starts, ends, strict=True)
    }


def bits_of_repetition(model: nn.Module, text: torch.Tensor, distance: int, bf16: bool) -> dict[str, float]:
    """Mean bits per byte of passages when they are read first, and again `distance` bytes later."""
    bits = []
    for start in np.linspace(0, len(text) - BEFORE - distance, NUM_PASSAGES).astype(int):
        window = text[start : start + BEFORE + distance]
        passage = window[BEFORE : BEFORE + PASSAGE]
        costs = bits_of_tokens(model, torch.cat([window, passage])[None], bf16)[0]
        first, again = BEFORE + LEFT_OUT - 1, BEFORE + distance + LEFT_OUT - 1
        length = PASSAGE - LEFT_OUT
        bits.append((costs[first : first + length].mean().item(), costs[again : again + length].mean().item()))
    first, again = np.mean(bits, axis=0)
    return {"first": float(first), "again": float(again)}


def held_out_text(corpus: Corpus) -> torch.Tensor:
    """The bytes of all held-out windows as tokens, `[L]`."""
    text = torch.tensor(np.frombuffer(corpus.held_out.text, dtype=np.uint8).astype(np.int64))
    return text + corpus.held_out.dataset[0]["input_ids"][0].item() - corpus.held_out.text[0]


def measure(model: nn.Module, corpus: Corpus, bf16: bool) -> dict[str, dict]:
    """Bits per byte by position, and of passages that are read again at each distance."""
    model.eval()
    text = held_out_text(corpus)
    return {
        "positions": bits_by_position(model, text, bf16, RANGES),
        "repetition": {str(distance): bits_of_repetition(model, text, distance, bf16) for distance in DISTANCES},
    }
