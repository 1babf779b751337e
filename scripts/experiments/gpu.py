"""
What needs a GPU, in twelve minutes (docs/experiments.md).

    python -m scripts.run_experiment gpu --minutes 12
    python -m scripts.run_experiment gpu --tiny --minutes 1      # to see it run, on any machine
    python -m scripts.run_experiment gpu --report

1. The duplication task of the paper's size: length 1,024, hidden size 256, 600 steps of 4 sequences, Adam with a rate
   of 1e-3 for all; seed by seed, as many runs as a fifth of the time allows.
2. Twins at 8,192 bytes, hidden size 512, 6 layers, 4 windows in a step, the same seconds of training for each, a fifth
   of the time. Evaluation does not count, nor does a step before the first, which compiles kernels. The learning
   rate is 1e-2 for all, the recipe's, with a warm-up over 5% of the seconds and a cosine to 0.
3. Bits per byte of each twin by position, also beyond the length that it was trained at.

What is measured is a file at once, in
docs/experiments/gpu, and not repeated; what the time does not allow is named and left to the next call.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from torch import nn

from hf_reformer.training import multiplies_in_bfloat16
from hf_reformer.training.context_gain import bits_of_tokens
from hf_reformer.training.corpus import Corpus
from hf_reformer.training.provenance import machine, versions

from . import duplication
from .long_text import bits_of_positions, bits_of_windows
from .resumable import ROOT, file_name, make_optimizer, share_of_rate, take_step, write_json
from .synthetic import Run, Task, markdown, read_runs, run_once
from .text_models import SHIFTED, llama, reformer
from .text_training import TextRun, evaluate, order_of_windows, read_corpus, tokens_of


RESULTS = ROOT / "docs" / "experiments" / "gpu"
MINUTES = 12
# Of all the time; the rest is for reading the text, compiling, and evaluation.
DUPLICATION_SHARE, TWIN_SHARE = 0.2, 0.2
# What a twin takes in all, in units of its seconds of training: begun only if there is so much time.
WITH_EVALUATION = 1.2
DUPLICATION_RATE, TWIN_RATE = 1e-3, 1e-2
SEEDS = (0, 1, 2)
NUM_EVALUATIONS = 6


def make_twins(num_pairs: int, reformer_size: dict, llama_size: dict) -> dict[str, Callable[[int], nn.Module]]:
    """The models by name, for a context; of the Reformers, `num_pairs` times a local layer and another one."""
    return {
        "lsh, successors": lambda length: reformer(length, ["local", "lsh"] * num_pairs, **SHIFTED, **reformer_size),
        "full": lambda length: reformer(length, ["local", "full"] * num_pairs, **reformer_size),
        "llama": lambda length: llama(length, num_hidden_layers=2 * num_pairs, **llama_size),
    }


@dataclass(frozen=True)
class Plan:
    """
    How large everything is.

    Attributes:
        task: The duplication task, with one length.
        contenders: Who is trained on it.
        twins: Models by name, for a context.
        context_length, batch_size, eval_windows: Of the twins.
        ends: Of the ranges of positions.
    """

    task: Task
    contenders: tuple[str, ...]
    twins: dict[str, Callable[[int], nn.Module]]
    context_length: int
    batch_size: int
    eval_windows: int
    ends: tuple[int, ...]


WHOLE = Plan(
    task=replace(duplication.TASK, steps={1024: duplication.TASK.steps[1024]}),
    contenders=(*duplication.TRAINED, "dense-separate"),
    twins=make_twins(
        3,
        {"hidden_size": 512, "num_attention_heads": 8, "feed_forward_size": 2048},
        {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 1408},
    ),
    context_length=8192,
    batch_size=4,
    eval_windows=40,
    ends=(1024, 4096, 8192, 16384, 65536),
)
TINY = Plan(
    task=replace(duplication.TASK, steps={32: 4}, every=2, batch_size=2, few=2, many=2),
    contenders=("lsh-2",),
    twins=make_twins(
        1,
        {"hidden_size": 32, "num_attention_heads": 2, "attention_head_size": 16, "feed_forward_size": 32},
        {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32},
    ),
    context_length=256,
    batch_size=2,
    eval_windows=4,
    ends=(64, 256, 512),
)


def learn_duplication(plan: Plan, folder: Path, device: str, deadline: float) -> None:
    """All runs for which there is time, each a file."""
    [(length, num_steps)] = plan.task.steps.items()
    longest = 0.0
    for seed in SEEDS:
        for name in plan.contenders:
            path = folder / "duplication" / f"{name}-{length}-{seed}.json"
            begun = time.perf_counter()
            if not path.is_file() and begun + longest > deadline:
                print(f"There is no time for {path.stem}, nor for what comes after it.", flush=True)
                return
            run = Run(plan.task.name, name, length, seed, DUPLICATION_RATE, num_steps)
            run_once(plan.task, run, path, (name, *plan.task.evaluations[name]), device)
            longest = max(longest, time.perf_counter() - begun)


def train_for(model: nn.Module, corpus: Corpus, plan: Plan, seconds: float, seed: int, bf16: bool) -> dict:
    """Train for so many seconds; steps, and what was evaluated at even distances."""
    device = model.device
    windows, order = tokens_of(corpus.train).to(device), order_of_windows(len(corpus.train.dataset), seed)
    optimizer = make_optimizer(model, TWIN_RATE)
    compile_kernels(model, windows[: plan.batch_size], bf16)
    record = {"step": 0, "seconds": 0.0, "bytes": windows.numel(), "evaluations": []}
    for number in range(NUM_EVALUATIONS):
        model.train()
        before, begun = record["seconds"], time.perf_counter()
        while record["seconds"] < seconds * (number + 1) / NUM_EVALUATIONS:
            ids = windows[[next(order) for _ in range(plan.batch_size)]]
            rate = TWIN_RATE * share_of_rate(int(1000 * record["seconds"] / seconds), 1000)
            loss = take_step(model, optimizer, partial(loss_of, model, ids), rate, bf16)
            record["step"] += 1
            record["seconds"] = before + time.perf_counter() - begun
        wait_for(device)
        record["seconds"] = before + time.perf_counter() - begun
        measured = evaluate(model, corpus, bf16)
        record["evaluations"].append({"step": record["step"], "seconds": record["seconds"], "train": loss} | measured)
        print(f"{record['seconds']:.0f} s, step {record['step']}: {measured['bits_per_byte']:.3f} bits", flush=True)
    return record


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Of windows `[B, L]`, in nats."""
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def compile_kernels(model: nn.Module, ids: torch.Tensor, bf16: bool) -> None:
    """Gradients, which are thrown away, and logits."""
    model.train()
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
        loss_of(model, ids).backward()
    model.zero_grad()
    bits_of_tokens(model.eval(), ids[:1], bf16)
    wait_for(ids.device)


def wait_for(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def train_twins(plan: Plan, arguments: argparse.Namespace, deadline: float) -> None:
    """All twins for which there is time; a file after training, and again with the bits by position."""
    seconds = TWIN_SHARE * 60 * arguments.minutes
    bf16 = multiplies_in_bfloat16(arguments.device)
    run = TextRun(
        "", arguments.seed, TWIN_RATE, 0, plan.context_length, 0, plan.eval_windows, text_path=arguments.text_path
    )
    corpus = read_corpus(run)
    text = tokens_of(corpus.held_out).flatten()
    for name, make_model in plan.twins.items():
        stem = f"{name}-{plan.context_length}-{seconds:.0f}s-seed{arguments.seed}.json"
        path = arguments.results / file_name(stem)
        if path.is_file():
            continue
        if time.perf_counter() + WITH_EVALUATION * seconds > deadline:
            print(f"There is no time for {path.stem}.", flush=True)
            continue
        torch.manual_seed(arguments.seed)
        model = make_model(plan.context_length).to(arguments.device)
        record = {
            "contender": name,
            "seed": arguments.seed,
            "learning_rate": TWIN_RATE,
            "context_length": plan.context_length,
            "batch_size": plan.batch_size,
            "seconds_given": seconds,
            "bfloat16": bf16,
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "device": device_name(arguments.device),
            "machine": machine(),
            "versions": versions(),
        }
        record |= train_for(model, corpus, plan, seconds, arguments.seed, bf16)
        write_json(path, record)
        if len(text) >= plan.ends[-1]:
            bits = bits_of_windows(model.eval(), text.to(model.device), plan.ends[-1], bf16)
            write_json(path, record | {"positions": bits_of_positions(bits, plan.ends)})


def device_name(device: str) -> str:
    """What it calls itself."""
    return torch.cuda.get_device_name(device) if device == "cuda" else device


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Arguments from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time for everything (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the twins (default %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default=device, help="(default %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that everything runs")
    parser.add_argument("--text_path", help="another text than the standard library's source: a file or a folder")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder (docs/experiments/gpu)")
    parser.add_argument("--report", action="store_true", help="run nothing: print the tables and draw the figure")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Run what is not there yet and what the time allows; print the tables and draw the figure."""
    begun = time.perf_counter()
    arguments = parse_arguments(argv)
    if not arguments.report:
        plan, seconds = TINY if arguments.tiny else WHOLE, 60 * arguments.minutes
        learn_duplication(plan, arguments.results, arguments.device, begun + DUPLICATION_SHARE * seconds)
        train_twins(plan, arguments, begun + seconds)
    runs = read_runs(arguments.results / "duplication")
    if runs:
        print(duplication.tables(runs))
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(arguments.results.glob("*.json"))]
    if records:
        print(f"\n{table(records)}")
        draw(arguments.results.with_suffix(".png"), records)


def table(records: list[dict]) -> str:
    """What each twin has reached in its seconds, and its bits by position."""
    ends = next((list(record["positions"]) for record in records if "positions" in record), [])
    rows = [["layers", "seed", "seconds", "steps", "times through the text", "bits per byte", *ends]]
    for record in records:
        positions = record.get("positions", {})
        read = record["step"] * record["batch_size"] * record["context_length"]
        rows.append(
            [
                record["contender"],
                str(record["seed"]),
                f"{record['seconds']:.0f}",
                f"{record['step']:,}",
                f"{read / record['bytes']:.1f}",
                f"{record['evaluations'][-1]['bits_per_byte']:.3f}",
                *(f"{positions[end]:.3f}" if end in positions else "" for end in ends),
            ]
        )
    return markdown(*rows)


def draw(path: Path, records: list[dict]) -> None:
    """Held-out bits per byte against seconds of training, and by position."""
    figure, (over_time, by_position) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for record, color in zip(records, plt.get_cmap("tab10").colors, strict=False):
        label = f"{record['contender']}, seed {record['seed']}"
        rows = record["evaluations"]
        seconds, bits = ([row[key] for row in rows] for key in ("seconds", "bits_per_byte"))
        over_time.plot(seconds, bits, marker="o", color=color, label=label)
        positions = record.get("positions", {})
        ends = [f"to {int(name.partition('-')[2]):,}" for name in positions]
        by_position.plot(ends, list(positions.values()), marker="o", color=color)
    device, length = records[0]["device"], records[0]["context_length"]
    over_time.set(xlabel=f"seconds of training, {device}", ylabel="held-out bits per byte", title="At equal time")
    by_position.set(xlabel="position in the text", title=f"By position; trained at {length:,}")
    over_time.legend()
    for axes in (over_time, by_position):
        axes.grid(alpha=0.2)
    figure.savefig(path, dpi=150)
    plt.close(figure)
