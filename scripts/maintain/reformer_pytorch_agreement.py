"""
How near converted models of reformer-pytorch are to their originals: the table of docs/conversions.md.

    python -m scripts.maintain.reformer_pytorch_agreement

Both hash with the same rotations, so that buckets are the same and what is left is arithmetic.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from hf_reformer import convert_reformer_pytorch
from hf_reformer.modeling.layers.lsh_attention import LSHSelfAttention
from hf_reformer.training.provenance import machine, versions


RESULTS = Path(__file__).parents[2] / "docs" / "conversions_reformer_pytorch.json"
SIZES = {
    "num_tokens": 256,
    "dim": 256,
    "depth": 4,
    "max_seq_len": 2048,
    "heads": 4,
    "dim_head": 64,
    "bucket_size": 64,
    "causal": True,
}
# What differs from the defaults of `ReformerLM`.
CASES: dict[str, dict[str, Any]] = {
    "rotary positions, which are the default": {},
    "both directions": {"causal": False},
    "one round": {"n_hashes": 1},
    "full attention": {"use_full_attn": True},
    "full attention, positions": {"use_full_attn": True, "absolute_position_emb": True},
    "full attention up to a length": {"full_attn_thres": 128, "absolute_position_emb": True},
    "absolute positions": {"absolute_position_emb": True},
    "fixed positions": {"fixed_position_emb": True},
    "axial positions": {"axial_position_emb": True},
    "narrow embeddings": {"emb_dim": 24, "absolute_position_emb": True},
    "tied head": {"weight_tie_embedding": True},
    "narrow embeddings, tied head": {"emb_dim": 24, "weight_tie_embedding": True},
    "shared layers": {"weight_tie": True},
    "one value head": {"one_value_head": True},
    "gate": {"ff_glu": True},
    "another activation": {"ff_activation": nn.ReLU, "ff_mult": 2},
}


def rotations(head_size: int, num_hashes: int, num_buckets: int) -> torch.Tensor:
    """`[head_size, num_hashes, num_buckets / 2]`, float64; the same for all heads and layers."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(head_size, num_hashes, num_buckets // 2, generator=generator, dtype=torch.float64)


def _hash_theirs(self, n_buckets, vecs, key_namespace=None, fetch=False, set_cache=True):
    drawn = rotations(vecs.shape[-1], self.n_hashes, n_buckets)
    # In float64, so that no precision of the layers changes a bucket more than it has to.
    turned = torch.einsum("btf,fhi->bhti", vecs.double(), drawn)
    buckets = torch.cat([turned, -turned], dim=-1).argmax(-1)
    return (buckets + torch.arange(self.n_hashes)[:, None] * n_buckets).flatten(1)


def _hash_ours(self, vectors, rotations, num_buckets, implementation):
    turned = torch.einsum("blhd,hdri->bhrli", vectors.double(), rotations)
    return torch.cat([turned, -turned], dim=-1).argmax(-1)


def _draw_ours(self, length, circle_length, num_hashes, device, cache=None):
    if self.threshold.covers(length, circle_length):
        return None
    drawn = rotations(self.head_size, self.config.num_hashes, self.config.num_buckets)
    if self.config.lsh_rotary:
        # Numbers that are turned together stand side by side there, half a head apart here.
        drawn = torch.cat([drawn[0::2], drawn[1::2]])
    return drawn.expand(self.num_heads, -1, -1, -1)


@contextmanager
def same_buckets() -> Iterator[None]:
    """Both packages hash with `rotations`."""
    with (
        patch("reformer_pytorch.reformer_pytorch.LSHAttention.hash_vectors", _hash_theirs),
        patch.object(LSHSelfAttention, "draw_rotations", _draw_ours),
        patch.object(LSHSelfAttention, "_hash", _hash_ours),
    ):
        yield


def make_theirs(arguments: dict[str, Any]) -> nn.Module:
    """A `ReformerLM` of random weights."""
    from reformer_pytorch import ReformerLM

    torch.manual_seed(0)
    return ReformerLM(**arguments).eval()


@torch.no_grad()
def compare(case: str, dtype: torch.dtype) -> dict[str, float]:
    """How far logits are apart, relative to their norm, and how many of the largest are the same."""
    arguments = SIZES | CASES[case]
    theirs = make_theirs(arguments).to(dtype)
    ours = convert_reformer_pytorch(theirs.state_dict(), **arguments)
    ids = torch.randint(arguments["num_tokens"], (1, arguments["max_seq_len"]))
    with same_buckets():
        expected, actual = theirs(ids), ours(ids).logits
    return {
        "off": float((actual - expected).norm() / expected.norm()),
        "same_largest": float((actual.argmax(-1) == expected.argmax(-1)).float().mean()),
    }


def table(results: dict[str, Any]) -> str:
    """Lines of markdown."""
    lines = ["| `ReformerLM` with | float64 | float32 | same next token, float32 |", "|---|---|---|---|"]
    for case, found in results["cases"].items():
        off = " | ".join(f"{found[name]['off']:.1e}" for name in ("float64", "float32"))
        lines.append(f"| {case} | {off} | {found['float32']['same_largest']:.2%} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Compare, write the results, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--table", action="store_true", help="compute nothing: print the table")
    if not parser.parse_args(argv).table:
        cases = {}
        for case in CASES:
            cases[case] = {
                str(dtype).removeprefix("torch."): compare(case, dtype) for dtype in (torch.float64, torch.float32)
            }
            print(case, cases[case], flush=True)
        results = {"machine": machine(), "versions": versions(), "sizes": SIZES, "cases": cases}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(json.loads(RESULTS.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
