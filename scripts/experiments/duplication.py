"""
The duplication task of the Reformer paper (Table 2): sequences 0w0w, a single layer, more and fewer hashing rounds.

    python -m scripts.run_experiment duplication                                       # length 256, seeds 0, 1, 2
    python -m scripts.run_experiment duplication --lengths 512 1024 --seeds 0
    python -m scripts.run_experiment duplication --report
    python -m scripts.run_experiment duplication --learning_rate 1e-3 --results docs/experiments/duplication_at_1e-3

Fixed beforehand: 400 steps of 4 sequences (600 at length 1,024), seeds 0, 1 and 2 for first weights, data and
rotations, Adam with betas 0.9 and 0.98, warm-up over 100 steps and a constant rate from there on. The rate of each
contender is that of 5e-4, 1e-3, 2e-3 and 4e-3 whose run of 250 steps at length 256, with a seed of its own, has the
highest accuracy averaged over its steps. Loss and accuracy count the second w. Accuracy is measured every 25 steps on
16 sequences and in the end on 32, the same for all.

A run is one file in docs/experiments/duplication, and one that is there is not repeated. A run takes a minute or a
few; one that is killed starts over.
"""

from typing import Any

import torch
from transformers import get_constant_schedule_with_warmup

from .synthetic import IGNORED, Task, first_steps, markdown, parse_arguments, percent, run_and_report, runs_of


NUM_SYMBOLS = 127
CHUNK_LENGTH = 16
BUCKETS_PER_CHUNK = 2
# Above every length: attention is dense, with shared queries and keys.
DENSE = {"full_attention_threshold": 2**20}
HASHED = {f"lsh-{rounds}": {"num_hashes": rounds} for rounds in (8, 4, 2, 1)}
SHARED = {"dense-shared": DENSE, **HASHED}
TRAINED = ("dense-shared", "lsh-4", "lsh-2", "lsh-1")
LABELS = {
    "dense-separate": "dense, separate Q and K",
    "dense-shared": "dense, shared QK",
    **{name: name.upper() for name in HASHED},
}

# Accuracy in percent at length 1,024, dense attention first, then LSH-8, 4, 2, 1. The paper: Kitaev, Kaiser, Levskaya,
# ICLR 2020, Table 2. The reproduction: ML Reproducibility Challenge 2020, OpenReview 3s8Y7dHYkN-, its Table 2
# (github.com/arampacha/reformer_fastai, nbs/10c).
PUBLISHED = {
    "paper": {
        "dense-shared": (100, 94.8, 92.5, 76.9, 52.5),
        "lsh-4": (0.8, 100, 99.9, 99.4, 91.9),
        "lsh-2": (0.8, 100, 99.9, 98.1, 86.8),
        "lsh-1": (0.8, 99.9, 99.6, 94.8, 77.9),
    },
    "reproduction": {
        "dense-shared": (100, 1.4, 1.9, 3.0, 4.6),
        "lsh-4": (46.5, 99.7, 99.8, 93.1, 77.6),
        "lsh-2": (75.9, 96.6, 97.5, 97.1, 86.1),
        "lsh-1": (70.7, 76.6, 79.7, 79.3, 56.1),
    },
}


def draw_sequences(batch_size: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences 0w0w, `[B, L]`, and as labels the second w."""
    words = torch.randint(1, NUM_SYMBOLS + 1, (batch_size, length // 2 - 1), generator=generator)
    half = torch.nn.functional.pad(words, (1, 0))
    labels = torch.full((batch_size, length), IGNORED)
    labels[:, length // 2 + 1 :] = words
    return torch.cat([half, half], dim=1), labels


def optimize(model, learning_rate: float, steps: int):
    """Adam with warm-up and a constant rate."""
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, betas=(0.9, 0.98))
    return optimizer, get_constant_schedule_with_warmup(optimizer, 100)


TASK = Task(
    name="duplication",
    draw=draw_sequences,
    optimize=optimize,
    model={
        "is_decoder": True,
        "use_cache": False,
        "hidden_size": 256,
        "feed_forward_size": 256,
        "num_attention_heads": 4,
        "attention_head_size": 64,
        "vocab_size": NUM_SYMBOLS + 1,
        # Axial vectors share parts between positions, and a single layer cannot undo that.
        "axial_pos_embds": False,
        "lsh_attn_chunk_length": CHUNK_LENGTH,
        "circular_look_around": False,
        "hidden_dropout_prob": 0.0,
        "local_attention_probs_dropout_prob": 0.0,
        "attn_layers": ["lsh"],
        "reversible": False,
    },
    model_of_length=lambda length: {
        "max_position_embeddings": length,
        "num_buckets": BUCKETS_PER_CHUNK * length // CHUNK_LENGTH,
    },
    contenders={"dense-separate": {"attn_layers": ["full"]}, **SHARED},
    evaluations={"dense-separate": ()} | {name: tuple(other for other in SHARED if other != name) for name in TRAINED},
    labels=LABELS,
    learning_rates=(5e-4, 1e-3, 2e-3, 4e-3),
    steps={256: 400, 512: 400, 1024: 600},
    grid_steps=250,
    every=25,
    batch_size=4,
    many=32,
)


def tables(runs: list[dict[str, Any]]) -> str:
    """Accuracy with each evaluation, beside what is published, and how soon each contender learns."""
    evaluated = [["trained with", "", "dense", *(LABELS[name] for name in HASHED)]]
    learned = [["trained with", "length", "learning rate", "seeds", "step with 99%", "CPU seconds"]]
    for name, label in LABELS.items():
        for length in TASK.steps:
            chosen = runs_of(runs, name, length)
            if not chosen:
                continue
            columns = SHARED if name in SHARED else [name, *HASHED]
            shares = [[run["evaluated"][column] for run in chosen if column in run["evaluated"]] for column in columns]
            evaluated.append([label, f"here, {length:,}", *(percent(values) if values else "" for values in shares)])
            seconds = sum(run["cpu_seconds"] for run in chosen) / len(chosen)
            rate = f"{chosen[0]['settings']['learning_rate']:g}"
            learned.append([label, f"{length:,}", rate, str(len(chosen)), first_steps(chosen, 0.99), f"{seconds:.0f}"])
        for source, rows in PUBLISHED.items():
            if name in rows:
                evaluated.append([label, f"{source}, 1,024", *map(str, rows[name])])
    return f"{markdown(*evaluated)}\n\n{markdown(*learned)}"


def main(argv: list[str] | None = None) -> None:
    """Make the runs that are missing; tables and curves."""
    run_and_report(TASK, parse_arguments(__doc__, TASK, argv), tables)
