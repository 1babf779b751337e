"""
Make starter/, the model that comes with the package, of the one that `make demo` has trained.

    make demo
    python -m scripts.maintain.starter --model runs/demo

The weights are stored in bfloat16, half the size, and load as float32. Held-out bits per byte of both are printed, so
that one sees what the rounding costs.
"""

import argparse
import json
import re
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_reformer.training import context_gain
from hf_reformer.training.corpus import TextArguments


ROOT = Path(__file__).parents[2]
TARGET = ROOT / "starter"
LENGTHS = (4096,)
NOTE = """
## Where this copy is from

It comes with the package `hf_reformer`: `from hf_reformer.starter import FOLDER`. `make demo` trained it in minutes on
the source files of Python's standard library, which are under the PSF License Agreement; the weights are a statistic
of them. They are stored in bfloat16 and load as float32. It is there to try things with, and writes text that looks
like Python and means nothing.
"""


def make_starter(folder: Path, target: Path) -> None:
    """
    Write a copy of a trained model with weights in bfloat16 that loads as float32.

    Args:
        folder: A trained causal model with its tokenizer and card.
        target: Where the copy goes; files of the same names are replaced.
    """
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = "float32"
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    card = (folder / "README.md").read_text(encoding="utf-8")
    # Pictures and log stay with the run.
    card = re.sub(r"!\[[^\]]*\]\([^)]*\)\n*", "", card)
    card = re.sub(rf'(^# |"){re.escape(folder.name)}("|$)', r"\1starter\2", card, flags=re.MULTILINE)
    (target / "README.md").write_text(card.rstrip() + "\n" + NOTE, encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Make the copy and measure it beside its original."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "runs" / "demo", help="(default %(default)s)")
    parser.add_argument("--target", type=Path, default=TARGET, help="(default %(default)s)")
    arguments = parser.parse_args(argv)
    make_starter(arguments.model, arguments.target)
    for folder in (arguments.model, arguments.target):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
        print(folder)
        context_gain.report(model, tokenizer, TextArguments(), arguments.model, lengths=LENGTHS)


if __name__ == "__main__":
    main()
