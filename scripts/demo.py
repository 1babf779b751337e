"""
The whole way in a few minutes on a CPU: train, evaluate, save, load, generate.

A small causal model of bytes learns the source code of Python's standard library at a context of 4,096 bytes. Its bits
per byte on files it never saw stand beside what can be said about the same bytes without a model, and beside its own
with less context and with more.

    python scripts/demo.py
    python scripts/demo.py --steps 20 --output_dir runs/smoke

If it is stopped (Ctrl-C), it goes on from there when it is started again.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    pipeline,
    set_seed,
)
from transformers.trainer_utils import sort_checkpoints

from hf_reformer.commands.train import ModelArguments, train
from hf_reformer.training import ModelRecipe, context_gain, multiplies_in_bfloat16
from hf_reformer.training.corpus import DataArguments, TextArguments
from hf_reformer.training.run_checkpoints import RunArguments, newest_whole, read_run


# What the demo changes in the recipe, and nothing else: its context and how long it trains.
DEMO_CONTEXT_LENGTH = 4096
DEMO_TRAINING = {"max_steps": 1200, "eval_steps": 0.25, "save_strategy": "no"}
# On a CPU without bfloat16 a step takes up to six times as long.
DEMO_FLOAT32_TRAINING = {"max_steps": 240, "eval_steps": 0.5}
# Windows that the trained model then reads, beyond those of its training, too.
CONTEXT_LENGTHS = (256, 1024, 4096, 16384, 65536)
NEW_TOKENS = 400
PROMPT = '''"""Read and write settings files."""

import os
import sys


class SettingsReader:
    def __init__(self, path):
'''


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    steps = demo_training()["max_steps"]
    parser.add_argument("--steps", type=int, default=steps, help="training steps (default %(default)s)")
    parser.add_argument("--output_dir", default="runs/demo", help="where the model goes (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default %(default)s)")
    parser.add_argument("--full_attention", action="store_true", help="train the dense twin instead")
    return parser.parse_args(argv)


def demo_training() -> dict[str, object]:
    """How the demo trains on this CPU."""
    bf16 = multiplies_in_bfloat16("cpu")
    return DEMO_TRAINING | ({} if bf16 else DEMO_FLOAT32_TRAINING) | {"use_cpu": True, "bf16": bf16}


def training_arguments(**changes) -> RunArguments:
    """The same with `changes`."""
    return RunArguments(**demo_training() | changes)


def print_figures(figures: dict[str, float]) -> None:
    """The model's held-out bits per byte beside the reference figures."""
    print("\nbits per byte on the held-out files")
    for name, value in sorted(figures.items(), key=lambda item: item[1]):
        print(f"  {name:<18} {value:.3f}")


def load(folder: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that was saved, as anybody would load it, with its tokenizer."""
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def continue_prompt(folder: str) -> str:
    """What the saved model makes of the prompt."""
    model, tokenizer = load(folder)
    generator = pipeline(
        "text-generation",
        model=model,
        tokenizer=tokenizer,
        device="cpu",
    )
    set_seed(0)
    return generator(PROMPT, max_new_tokens=NEW_TOKENS, do_sample=True, temperature=0.7)[0]["generated_text"]


def delete_own_checkpoints(folder: str) -> None:
    """Delete the checkpoints of the run that was finished in this folder, and no others."""
    run = json.loads((Path(folder) / "training_log.json").read_text(encoding="utf-8"))["run"]
    for checkpoint in sort_checkpoints(folder):
        if read_run(checkpoint) == run:
            shutil.rmtree(checkpoint)


def main(argv: list[str] | None = None) -> None:
    """Run the demo."""
    arguments = parse_arguments(argv)
    start = time.monotonic()
    torch.set_num_threads(arguments.threads)
    stopped = newest_whole(arguments.output_dir)
    if stopped:
        print(f"going on from {stopped}")
    figures = train(
        ModelArguments(),
        ModelRecipe(full_attention=arguments.full_attention),
        DataArguments(context_length=DEMO_CONTEXT_LENGTH),
        training_arguments(
            max_steps=arguments.steps,
            output_dir=arguments.output_dir,
            resume_from_checkpoint="last" if stopped else None,
        ),
    )
    delete_own_checkpoints(arguments.output_dir)
    print_figures(figures)
    folder = Path(arguments.output_dir)
    context_gain.report(*load(folder), TextArguments(), folder, lengths=CONTEXT_LENGTHS)
    print(f"\nsaved in {arguments.output_dir}; loaded from there, it continues this prompt:\n")
    print(continue_prompt(arguments.output_dir))
    minutes, seconds = divmod(round(time.monotonic() - start), 60)
    print(f"\n{minutes} min {seconds} s in all")


if __name__ == "__main__":
    main()
