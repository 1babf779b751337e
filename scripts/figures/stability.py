"""
Does training stay stable in bfloat16? A six-layer model on real text, in float32 and under autocast, several seeds.

    python -m scripts.figures.stability
    python -m scripts.figures.stability --steps 100 --seeds 2 --output_dir runs/stability

A seed decides the first weights, the order of the text and the rotations, the same for every variant, so variants are
compared seed by seed. Writes stability.json after each run and at last draws stability.png, in docs/ by default. A run
that is in the file already is not repeated.
"""

import argparse
import json
import math
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from datasets import disable_progress_bars
from transformers import PrinterCallback, TrainerCallback, set_seed

from hf_reformer import ReformerByteTokenizer, ReformerForCausalLM
from hf_reformer.training import bits_per_byte, recipe_config
from hf_reformer.training.bits_trainer import BitsPerByteTrainer, collate_causal
from hf_reformer.training.corpus import Corpus, DataArguments, build_corpus
from hf_reformer.training.provenance import machine, versions
from hf_reformer.training.run_checkpoints import RunArguments


DOCS = Path(__file__).parents[2] / "docs"
CONTEXT_LENGTH = 512
HELD_OUT_WINDOWS = 128
MODEL = {
    "attn_layers": ["local", "lsh"] * 3,
    "hidden_size": 128,
    "num_attention_heads": 2,
    "attention_head_size": 64,
    "feed_forward_size": 512,
}
BASELINE = "float32"
# Name of the variant: whether it trains under bfloat16 autocast, and what it changes in the config.
VARIANTS = {
    BASELINE: (False, {}),
    "float32, no exact inversion": (False, {"exact_inversion": False}),
    "bfloat16": (True, {}),
    "bfloat16, no exact inversion": (True, {"exact_inversion": False}),
    "bfloat16, ordinary autograd": (True, {"reversible": False}),
}
# The loss curve is kept as means over this many equal parts of the run; the last of ten parts is the final loss.
POINTS, LAST_PART = 50, 0.1


class Progress(TrainerCallback):
    """Prints the loss ten times in a run."""

    def __init__(self, name: str):
        self.name = name

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs and state.global_step % math.ceil(state.max_steps / 10) == 0:
            print(f"{self.name}: step {state.global_step}, loss {logs['loss']:.3f} nats", flush=True)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps of a run (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each variant (default %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="runs side by side, one thread each (default 2)")
    parser.add_argument("--output_dir", type=Path, default=DOCS, help="where the results go (default docs/)")
    return parser.parse_args(argv)


@cache
def read_corpus() -> Corpus:
    """The text, once for each process."""
    disable_progress_bars()
    arguments = DataArguments(context_length=CONTEXT_LENGTH, max_held_out_windows=HELD_OUT_WINDOWS)
    return build_corpus(arguments, ReformerByteTokenizer())


def make_trainer(variant: str, seed: int, steps: int) -> BitsPerByteTrainer:
    """The recipe's Trainer with a new model of this variant."""
    bf16, changes = VARIANTS[variant]
    corpus, tokenizer = read_corpus(), ReformerByteTokenizer()
    set_seed(seed)
    config = recipe_config(CONTEXT_LENGTH, tokenizer=tokenizer, **MODEL | changes)
    trainer = BitsPerByteTrainer(
        model=ReformerForCausalLM(config),
        args=RunArguments(
            output_dir="runs/stability",
            max_steps=steps,
            seed=seed,
            bf16=bf16,
            use_cpu=True,
            logging_steps=1,
            # The Trainer would replace a NaN in its log by the mean of the losses before.
            logging_nan_inf_filter=False,
            eval_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
            report_to="none",
        ),
        data_collator=collate_causal,
        train_dataset=corpus.train.dataset,
        eval_dataset=corpus.held_out.dataset,
        callbacks=[Progress(f"{variant}, seed {seed}")],
        tokens_per_byte=corpus.held_out.causal_tokens_per_byte,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def measure(variant: str, seed: int, steps: int) -> dict:
    """Train and evaluate once; losses in bits per byte."""
    trainer = make_trainer(variant, seed, steps)
    start, cpu_start = time.monotonic(), time.process_time()
    trainer.train()
    seconds, cpu_seconds = time.monotonic() - start, time.process_time() - cpu_start
    log = [row for row in trainer.state.log_history if "loss" in row]
    losses = [bits_per_byte(row["loss"], read_corpus().train.causal_tokens_per_byte) for row in log]
    norms = [row["grad_norm"] for row in log]
    return {
        "variant": variant,
        "seed": seed,
        "not_finite": sum(not math.isfinite(number) for number in [*losses, *norms]),
        "held_out": trainer.evaluate()["eval_bits_per_byte"],
        "final_loss": float(np.mean(losses[-math.ceil(LAST_PART * steps) :])),
        "largest_loss": float(np.max(losses)),
        "losses": [float(np.mean(part)) for part in np.array_split(losses, min(POINTS, steps))],
        "grad_norm_quantiles": dict(zip(["median", "0.99", "max"], np.quantile(norms, [0.5, 0.99, 1]), strict=True)),
        "grad_norms": [float(np.mean(part)) for part in np.array_split(norms, min(POINTS, steps))],
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
    }


def read_results(path: Path, settings: dict) -> list[dict]:
    """
    The runs that are already there.

    Raises:
        ValueError: if they were made with other settings.
    """
    if not path.is_file():
        return []
    results = json.loads(path.read_text())
    if results["settings"] != settings:
        raise ValueError(
            f"{path} holds runs with the settings {results['settings']}, not {settings}. Give another --output_dir, "
            "or delete the file."
        )
    return results["runs"]


def write_results(path: Path, settings: dict, runs: list[dict]) -> None:
    """Write what there is so far."""
    order = list(VARIANTS)
    runs.sort(key=lambda run: (order.index(run["variant"]), run["seed"]))
    results = {"settings": settings, "versions": versions(), "machine": {**machine(), "threads": 1}, "runs": runs}
    path.write_text(json.dumps(results, indent=1) + "\n")


def by_seed(runs: list[dict], variant: str, figure: str) -> dict[int, np.ndarray]:
    """A figure of each run of a variant."""
    return {run["seed"]: np.array(run[figure]) for run in runs if run["variant"] == variant}


def differences(runs: list[dict], variant: str, figure: str) -> list[np.ndarray]:
    """A figure of each run of a variant, less the baseline's with the same seed; nothing for the baseline itself."""
    baseline = by_seed(runs, BASELINE, figure) if variant != BASELINE else {}
    return [value - baseline[seed] for seed, value in by_seed(runs, variant, figure).items() if seed in baseline]


def draw(path: Path, runs: list[dict], steps: int) -> None:
    """The loss curves, and how far they are from the baseline of the same seed; bands from seed to seed."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for number, variant in enumerate(VARIANTS):
        style = {"color": f"C{number}", "label": variant}
        draw_band(left, list(by_seed(runs, variant, "losses").values()), steps, **style)
        draw_band(right, differences(runs, variant, "losses"), steps, **style)
    right.axhline(0, color="gray", linewidth=0.8)
    left.set_ylabel("training loss, bits per byte")
    right.set_ylabel(f"difference to {BASELINE} with the same seed")
    for axes in (left, right):
        axes.set_xlabel("steps")
        axes.grid(alpha=0.2)
        axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_band(axes: plt.Axes, curves: list[np.ndarray], steps: int, *, color: str, label: str) -> None:
    """The mean of curves over all steps as a line, from the smallest to the largest as a band."""
    if not curves:
        return
    curves = np.stack(curves)
    middles = (np.arange(curves.shape[1]) + 0.5) * steps / curves.shape[1]
    axes.plot(middles, curves.mean(axis=0), color=color, linewidth=1.2, label=label)
    axes.fill_between(middles, curves.min(axis=0), curves.max(axis=0), color=color, alpha=0.15, linewidth=0)


def table(runs: list[dict]) -> str:
    """A line for each variant: mean and standard deviation over the seeds, then the same of the paired differences."""
    columns = ["held-out", "difference", "final loss", "difference", "grad norm", "NaN", "CPU seconds"]
    lines = [["bits per byte", *columns]]
    for variant in VARIANTS:
        chosen = [run for run in runs if run["variant"] == variant]
        if not chosen:
            continue
        line = [variant]
        for figure in ("held_out", "final_loss"):
            line += [spread([run[figure] for run in chosen]), spread(differences(runs, variant, figure), signed=True)]
        line += [
            f"{np.mean([run['grad_norm_quantiles']['median'] for run in chosen]):.2f}",
            str(sum(run["not_finite"] for run in chosen)),
            f"{np.mean([run['cpu_seconds'] for run in chosen]):.0f}",
        ]
        lines.append(line)
    return "\n".join(" | ".join([f"{line[0]:<28}", *(f"{cell:>16}" for cell in line[1:])]) for line in lines)


def spread(values: list[float], signed: bool = False) -> str:
    """Mean and, from two values on, standard deviation."""
    if not values:
        return ""
    mean = f"{np.mean(values):{'+' if signed else ''}.4f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.4f}"


def main(argv: list[str] | None = None) -> None:
    """Make the runs that are missing, then draw them and print the table."""
    arguments = parse_arguments(argv)
    settings = {"steps": arguments.steps, "context_length": CONTEXT_LENGTH, **MODEL}
    path = arguments.output_dir / "stability.json"
    runs = read_results(path, settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    done = {(run["variant"], run["seed"]) for run in runs}
    missing = [
        (variant, seed) for seed in range(arguments.seeds) for variant in VARIANTS if (variant, seed) not in done
    ]
    with ProcessPoolExecutor(
        arguments.processes, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)
    ) as processes:
        jobs = [processes.submit(measure, variant, seed, arguments.steps) for variant, seed in missing]
        for number, job in enumerate(as_completed(jobs), start=1):
            runs.append(job.result())
            write_results(path, settings, runs)
            print(f"=== {number} of {len(jobs)} runs\n{table(runs)}", flush=True)
    draw(path.with_suffix(".png"), runs, arguments.steps)
    print(f"\n{table(runs)}\n{versions()}\n{machine()}")


if __name__ == "__main__":
    main()
