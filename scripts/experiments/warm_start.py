"""
How far the weights of a dense model carry a Reformer (docs/conversions.md): training after `convert_dense`.

    python -m scripts.run_experiment warm_start            # seeds 0, 1, 2
    python -m scripts.run_experiment warm_start --report

Fixed beforehand: a Llama of four layers, hidden size 128, is trained on windows of 1,024 bytes of the standard
library's source for 1,500 steps with a learning rate of 1e-2. Its weights begin Reformers of four layers, `full` ones
and `local` and `lsh` ones in turn, which are then trained for 750 steps, half as many; the same models with random
weights are trained as long. Each of these has the rate of 5e-3, 1e-2 and 2e-2 that was best for it after 200 steps
with seed 0; the rule by which queries and keys are tied was chosen in the same way. Asked for: after how many steps,
measured every 50, a model predicts as well as the Llama.
"""

import json
from pathlib import Path
from statistics import mean

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel

from hf_reformer import ReformerForCausalLM, convert_dense
from hf_reformer.training.corpus import Corpus

from .resumable import CHECKPOINTS, ROOT, experiment_parser
from .text_models import llama
from .text_training import TextRun, Training, evaluate


CONTEXT_LENGTH, DENSE_STEPS, DENSE_RATE = 1024, 1500, 1e-2
NUM_STEPS, GRID_STEPS, EVAL_EVERY = 750, 200, 50
GRID = (5e-3, 1e-2, 2e-2)
# Of the attention of full and local layers.
DROPOUT = 0.05
DENSE = "llama"
RULES = ("mean", "query", "key", "symmetric", "mean, rotary")
FULL, SPARSE = "full", "local and lsh"
LAYERS = {FULL: ["full"] * 4, SPARSE: ["local", "lsh"] * 2}
RESULTS = ROOT / "docs" / "experiments" / "warm_start"
# What is trained, by name: its layers, and where its weights come from.
CONTENDERS = {f"{layers}, {start}": (layers, start) for layers in LAYERS for start in ("converted", "random")}


def dense_folder(seed: int) -> Path:
    """Where the dense model of a seed is."""
    return CHECKPOINTS / f"warm_start_{DENSE}_{seed}"


def converted(seed: int, layers: str, rule: str) -> ReformerForCausalLM:
    """The Reformer that begins with the weights of the dense model."""
    tie, _, rotary = rule.partition(", ")
    settings = {"local_attn_chunk_length": 32, "local_attention_probs_dropout_prob": DROPOUT, "reversible": False}
    settings["lsh_rotary"] = "after_hashing" if rotary else False
    dense = LlamaForCausalLM.from_pretrained(dense_folder(seed))
    return convert_dense(dense, LAYERS[layers], tie, **settings)


def make_model(seed: int, layers: str, start: str, rule: str) -> nn.Module:
    """A contender before its first step."""
    model = converted(seed, layers, rule)
    if start == "converted":
        return model
    torch.manual_seed(seed)
    return ReformerForCausalLM(model.config)


def run_of(contender: str, seed: int, learning_rate: float, num_steps: int) -> TextRun:
    """A training with what is fixed for all."""
    return TextRun(
        contender=contender,
        seed=seed,
        learning_rate=learning_rate,
        num_steps=num_steps,
        context_length=CONTEXT_LENGTH,
        eval_every=EVAL_EVERY,
    )


def train_dense(seed: int, results: Path) -> dict:
    """The record of the dense model, which is saved for the others."""

    def save(model: PreTrainedModel, *_) -> dict:
        model.save_pretrained(dense_folder(seed))
        return {}

    run = run_of(DENSE, seed, DENSE_RATE, DENSE_STEPS)
    if not dense_folder(seed).is_dir():
        # Its weights are not with the results: made anew.
        (results / f"{run.name}.json").unlink(missing_ok=True)
    return Training(run, lambda length: llama(length, num_hidden_layers=4), results, save)()


def train(contender: str, rule: str, run: TextRun, results: Path) -> dict:
    """The record of a Reformer, with what it predicts before its first step."""
    layers, start = CONTENDERS[contender]

    def before(_model: nn.Module, corpus: Corpus, bf16: bool) -> dict:
        return {"before": evaluate(make_model(run.seed, layers, start, rule), corpus, bf16)["bits_per_byte"]}

    return Training(run, lambda _: make_model(run.seed, layers, start, rule), results, before)()


def last(record: dict) -> float:
    """Held-out bits per byte at the end."""
    return record["evaluations"][-1]["bits_per_byte"]


def choose(contender: str, results: Path) -> tuple[str, float]:
    """The rule of tying, for converted LSH layers, and the learning rate that are best after short runs."""
    layers, start = CONTENDERS[contender]
    rules = RULES if (layers, start) == (SPARSE, "converted") else RULES[:1]
    tried = {}
    for rule in rules:
        for rate in GRID:
            run = run_of(f"{contender}, {rule}" if len(rules) > 1 else contender, 0, rate, GRID_STEPS)
            tried[rule, rate] = last(train(contender, rule, run, results))
    return min(tried, key=lambda pair: tried[pair])


def read_records(folder: Path) -> list[dict]:
    """All records."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def won_back(record: dict, goal: float) -> int | None:
    """The first step at which held-out bits per byte are no more than the dense model's; None for none."""
    return next((row["step"] for row in record["evaluations"] if row["bits_per_byte"] <= goal), None)


def table(records: list[dict]) -> str:
    """A line of markdown for each contender, all seeds."""
    dense = {run["run"]["seed"]: last(run) for run in records if run["run"]["contender"] == DENSE}
    lines = [
        "| model | learning rate | before | after 100 | 250 | 500 | 750 steps | as good as the Llama after |",
        "|---|---|---|---|---|---|---|---|",
        f"| the Llama, {DENSE_STEPS:,} steps | {DENSE_RATE:g} | | | | | {_all([*dense.values()])} | |",
    ]
    for contender in CONTENDERS:
        runs = [r for r in records if r["run"]["contender"] == contender and r["run"]["num_steps"] == NUM_STEPS]
        if not runs:
            continue
        at = {step: [_at(run, step) for run in runs] for step in (100, 250, 500, 750)}
        steps = [won_back(run, dense[run["run"]["seed"]]) for run in runs]
        lines.append(
            f"| {contender} | {runs[0]['run']['learning_rate']:g} | {_all([run['before'] for run in runs])} | "
            + " | ".join(_all(values) for values in at.values())
            + f" | {', '.join('-' if step is None else str(step) for step in steps)} |"
        )
    return "\n".join(lines)


def table_of_rules(records: list[dict]) -> str:
    """A line of markdown for each rule: after the short runs of seed 0."""
    lines = [
        f"| rule | before | after {GRID_STEPS} steps, at {', '.join(f'{rate:g}' for rate in GRID)} |",
        "|---|---|---|",
    ]
    for rule in RULES:
        name = f"{SPARSE}, converted, {rule}"
        runs = {run["run"]["learning_rate"]: run for run in records if run["run"]["contender"] == name}
        if runs:
            values = ", ".join(f"{last(runs[rate]):.3f}" for rate in GRID if rate in runs)
            lines.append(f"| {rule} | {next(iter(runs.values()))['before']:.3f} | {values} |")
    return "\n".join(lines)


def _at(record, step):
    return next(row["bits_per_byte"] for row in record["evaluations"] if row["step"] == step)


def _all(values):
    return f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else f"{values[0]:.3f}"


def draw(path: Path, records: list[dict]) -> None:
    """Held-out bits per byte against steps, the mean of all seeds and their spread, with the Llama's as a line."""
    figure, axes = plt.subplots(figsize=(7, 4.4), layout="constrained")
    goals = [last(run) for run in records if run["run"]["contender"] == DENSE]
    axes.axhline(mean(goals), color="black", linestyle="--", label=f"the Llama after {DENSE_STEPS:,} steps")
    for contender, (layers, start) in CONTENDERS.items():
        runs = [r for r in records if r["run"]["contender"] == contender and r["run"]["num_steps"] == NUM_STEPS]
        if not runs:
            continue
        steps = [0, *(row["step"] for row in runs[0]["evaluations"])]
        bits = [[run["before"], *(row["bits_per_byte"] for row in run["evaluations"])] for run in runs]
        low, high, middle = (list(map(best, zip(*bits, strict=True))) for best in (min, max, mean))
        color = {FULL: "tab:blue", SPARSE: "tab:orange"}[layers]
        axes.plot(steps, middle, color=color, linestyle="-" if start == "converted" else ":", label=contender)
        axes.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
    axes.set(xlabel="steps", ylabel="held-out bits per byte", title="Reformers that begin with a Llama's weights")
    axes.set_ylim(top=5)
    axes.legend()
    axes.grid(alpha=0.2)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str]) -> None:
    """Run what is asked for and not there yet; print the tables and draw the figure."""
    parser = experiment_parser(__doc__, CONTENDERS, RESULTS)
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help="of each Reformer (default %(default)s)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    if not arguments.report:
        for seed in arguments.seeds:
            train_dense(seed, arguments.results)
            for contender in arguments.only or CONTENDERS:
                rule, rate = choose(contender, arguments.results)
                train(contender, rule, run_of(contender, seed, rate, arguments.steps), arguments.results)
    records = read_records(arguments.results)
    if records:
        print(f"{table(records)}\n\n{table_of_rules(records)}")
        draw(arguments.results.with_suffix(".png"), records)
