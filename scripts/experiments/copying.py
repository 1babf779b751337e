"""
Copying by content: what followed the like before tells what comes next, with and without values of the successor.

    python -m scripts.run_experiment copying                    # seeds 0, 1, 2
    python -m scripts.run_experiment copying --report

A random word of 21 to 63 of 64 symbols is repeated up to a length of 128. The period is another one in each sequence,
so positions do not help. Loss and accuracy count the tokens from the second one of the first repetition on, those that
an earlier token tells. One symbol alone does not always tell which is next, because a word has some of its symbols
several times. The models are a local layer and one of LSH or dense attention, with `lsh_value_shift` or without.

Fixed beforehand: 700 steps of 16 sequences, seeds 0, 1 and 2 for first weights, data and rotations, Muon with AdamW,
warm-up over 5% of the steps and a cosine to 0. The rate of each contender is that of 5e-3, 1e-2, 2e-2 and 4e-2 whose
run of 200 steps, with a seed of its own and a schedule that fits, has the highest accuracy averaged over its steps.
Accuracy is measured every 10 steps on 32 sequences and in the end on 128, the same for all.

A run is one file in docs/experiments/copying, and one that is there is not repeated. A run takes a minute; one that is
killed starts over.
"""

from typing import Any

import torch
from transformers import get_cosine_schedule_with_warmup

from hf_reformer.training import MuonWithAdamW

from .synthetic import IGNORED, Task, first_steps, markdown, parse_arguments, percent, run_and_report, runs_of


LENGTH = 128
NUM_SYMBOLS = 64
CHUNK_LENGTH = 16
BUCKETS_PER_CHUNK = 2
# Above every length: attention is dense, with shared queries and keys.
DENSE = {"full_attention_threshold": 2**20}
SHIFTED = {"lsh_value_shift": 1}
ROUNDS_8 = {"num_hashes": 8}
LABELS = {
    "dense-separate": "dense, separate Q and K",
    "dense-shared": "dense, shared QK",
    "dense-shared-shifted": "dense, shared QK, shifted",
    "lsh-2": "LSH-2",
    "lsh-2-shifted": "LSH-2, shifted",
    "local": "local",
}
LEVELS = (0.5, 0.8, 0.9, 0.95, 0.99)


def draw_sequences(batch_size: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Words of random periods repeated over `[B, L]`, and as labels the tokens whose like has been there."""
    periods = torch.randint(length // 6, length // 2, (batch_size, 1), generator=generator)
    words = torch.randint(0, NUM_SYMBOLS, (batch_size, length), generator=generator)
    places = torch.arange(length).expand(batch_size, -1)
    tokens = words.gather(1, places % periods)
    return tokens, tokens.masked_fill(places <= periods, IGNORED)


def optimize(model, learning_rate: float, steps: int):
    """The recipe's optimizer and schedule."""
    optimizer = MuonWithAdamW(model, lr=learning_rate, weight_decay=0.1, betas=(0.9, 0.98))
    return optimizer, get_cosine_schedule_with_warmup(optimizer, round(0.05 * steps), steps)


TASK = Task(
    name="copying",
    draw=draw_sequences,
    optimize=optimize,
    model={
        "is_decoder": True,
        "use_cache": False,
        "attn_layers": ["local", "lsh"],
        "hidden_size": 64,
        "feed_forward_size": 128,
        "hidden_act": "gelu",
        "num_attention_heads": 4,
        "attention_head_size": 16,
        "vocab_size": NUM_SYMBOLS,
        "pad_token_id": None,
        "axial_norm_std": 0.02,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": CHUNK_LENGTH,
        "num_hashes": 2,
        "circular_look_around": False,
        "hidden_dropout_prob": 0.0,
        "local_attention_probs_dropout_prob": 0.0,
        "reversible": False,
    },
    model_of_length=lambda length: {
        "max_position_embeddings": length,
        "num_buckets": BUCKETS_PER_CHUNK * length // CHUNK_LENGTH,
    },
    contenders={
        "dense-separate": {"attn_layers": ["local", "full"]},
        "dense-shared": DENSE,
        "dense-shared-shifted": DENSE | SHIFTED,
        "lsh-2": {},
        "lsh-2-shifted": SHIFTED,
        "local": {"attn_layers": ["local", "local"]},
        "lsh-8": ROUNDS_8,
        "lsh-8-shifted": ROUNDS_8 | SHIFTED,
    },
    labels=LABELS,
    evaluations={
        "dense-separate": (),
        "dense-shared": (),
        "dense-shared-shifted": (),
        "lsh-2": ("lsh-8", "dense-shared"),
        "lsh-2-shifted": ("lsh-8-shifted", "dense-shared-shifted"),
        "local": (),
    },
    learning_rates=(5e-3, 1e-2, 2e-2, 4e-2),
    steps={LENGTH: 700},
    grid_steps=200,
    every=10,
    batch_size=16,
    few=32,
    many=128,
)


def tables(runs: list[dict[str, Any]]) -> str:
    """Steps to each level of accuracy, seed by seed, and what there is in the end."""
    reached = [["second layer", "learning rate", *(f"{100 * level:.0f}%" for level in LEVELS)]]
    final = [["second layer", "accuracy", "evaluated with 8 rounds", "evaluated dense", "CPU seconds"]]
    for name, label in LABELS.items():
        chosen = runs_of(runs, name, LENGTH)
        if not chosen:
            continue
        rate = f"{chosen[0]['settings']['learning_rate']:g}"
        reached.append([label, rate, *(first_steps(chosen, level) for level in LEVELS)])
        names = [name, *TASK.evaluations[name]]
        shares = [percent([run["evaluated"][other] for run in chosen]) for other in names]
        seconds = sum(run["cpu_seconds"] for run in chosen) / len(chosen)
        final.append([label, *shares, *[""] * (3 - len(shares)), f"{seconds:.0f}"])
    return f"{markdown(*reached)}\n\n{markdown(*final)}"


def main(argv: list[str] | None = None) -> None:
    """Make the runs that are missing; tables and curves."""
    run_and_report(TASK, parse_arguments(__doc__, TASK, argv), tables)
