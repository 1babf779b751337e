"""
The cost of reading a long text in pieces, as `prefill_chunk_size` does, against one forward pass.

    python -m scripts.bench.benchmark_prefill              # 16,384 tokens in pieces of 4,096; writes docs/prefill.json
    python -m scripts.bench.benchmark_prefill --length 65536 --piece 8192 --turns 5

Two LSH layers with a cache and one thread, with windows and with chunks, 1 and 4 rounds. Each turn reads once in every
way; CPU seconds, the least to the most. That windows read the same in pieces is checked first.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch

from hf_reformer.training.provenance import machine, versions

from .benchmark_generation import DOCS, TOLERANCE, OwnReformer, Shape
from .timing import clocked


ROUNDS = (1, 4)
SETTINGS: dict[str, dict] = {"windows": {}, "chunks": {"lsh_sliding_window": False}}


def last_logits(reader: OwnReformer) -> torch.Tensor:
    """Of the token behind the text."""
    reader.read()
    reader.position = reader.shape.context
    return reader.step()


def measure(shape: Shape, piece: int, turns: int) -> list[dict]:
    """
    A row for each setting and number of rounds.

    Raises:
        ValueError: Windows do not read the same in pieces.
    """
    rows = []
    for name, changes in SETTINGS.items():
        for rounds in ROUNDS:
            readers = [OwnReformer(shape, rounds, each, **changes) for each in (shape.context, piece)]
            whole, parts = map(last_logits, readers)
            error = ((parts - whole).norm() / whole.norm()).item()
            # Chunks of a text that is not yet whole are cut in other places.
            if name == "windows" and not error <= TOLERANCE:
                raise ValueError(f"{name}, {rounds} rounds: logits are {error:.1e} apart, so nothing is timed.")
            seconds = [[clocked(reader.read, "cpu").cpu for reader in readers] for _ in range(turns)]
            at_once, in_pieces = (sorted(each) for each in zip(*seconds, strict=True))
            rows.append({"setting": name, "rounds": rounds, "at_once_s": at_once, "in_pieces_s": in_pieces})
            print(line_of(rows[-1]), flush=True)
    return rows


def line_of(row: dict) -> str:
    """A line of the table."""
    at_once, in_pieces = row["at_once_s"], row["in_pieces_s"]
    times = " | ".join(f"{each[0]:.2f} to {each[-1]:.2f}" for each in (at_once, in_pieces))
    return f"| {row['setting']} | {row['rounds']} | {times} | {in_pieces[0] / at_once[0]:.2f} |"


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=16384, help="tokens (default %(default)s)")
    parser.add_argument("--piece", type=int, default=4096, help="tokens at a time (default %(default)s)")
    parser.add_argument("--turns", type=int, default=3, help="(default %(default)s)")
    parser.add_argument("--hidden_size", type=int, default=512, help="(default %(default)s)")
    parser.add_argument("--out", type=Path, default=DOCS / "prefill.json", help="(default %(default)s)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    size = arguments.hidden_size
    shape = Shape(arguments.length, 1, hidden_size=size, num_layers=2, feed_forward_size=4 * size)
    print("| | rounds | at once, s | in pieces, s | times |\n|---|---|---|---|---|")
    rows = measure(shape, arguments.piece, arguments.turns)
    figures = {"machine": machine(), "versions": versions(), "shape": asdict(shape), "piece": arguments.piece}
    arguments.out.write_text(json.dumps(figures | {"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
