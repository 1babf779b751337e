"""
Make a model of this package from the weights of another implementation.

    hf-reformer convert trax --weights model.pkl.gz --set num_hashes=2 --output_dir converted
    hf-reformer convert reformer-pytorch --weights model.pt --set dim=512 depth=6 ... --output_dir converted
    hf-reformer convert dense --weights gpt2 --set attn_layers='["full", "lsh"]' --output_dir converted

`--set` takes settings as name=value: of `ReformerConfig`, for reformer-pytorch what `ReformerLM(...)` was given.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..modeling.conversion.dense_weights import TYING, convert_dense
from ..modeling.conversion.reformer_pytorch_weights import ReformerLMArguments, convert_reformer_pytorch
from ..modeling.conversion.trax_weights import convert_trax
from .command_line import mistakes_end, parse_settings


def from_dense(weights: str, tie: str, settings: list[str]) -> PreTrainedModel:
    """A Reformer from the dense model of this name."""
    return convert_dense(
        AutoModelForCausalLM.from_pretrained(weights, dtype="auto"), tie=tie, **parse_settings(settings)
    )


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments from the command line."""
    description, _, rest = (__doc__ or "").strip().partition("\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", choices=("trax", "reformer-pytorch", "dense"), help="whose weights these are")
    parser.add_argument(
        "--weights",
        required=True,
        help="file, or of a dense model a folder or a name on the Hub; nothing in it is run",
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings; the value is JSON")
    parser.add_argument(
        "--tie", choices=tuple(TYING), default="mean", help="of query and key, for LSH layers of a dense model"
    )
    parser.add_argument("--tokenizer", help="folder, or a name on the Hub; that of a dense model by default")
    return parser.parse_args(argv)


def find_tokenizer(arguments: argparse.Namespace) -> PreTrainedTokenizerBase | None:
    """The tokenizer that is named, or that of a dense model; None without one."""
    if arguments.tokenizer is None and arguments.source != "dense":
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer or arguments.weights)
    except (OSError, ValueError):
        if arguments.tokenizer is not None:
            raise
        return None
    # Where there is none, transformers makes an empty one.
    return tokenizer if len(tokenizer) > 1 else None


def convert(arguments: argparse.Namespace) -> None:
    """
    Convert and save, with a tokenizer if there is one.

    Raises:
        ValueError: The weights have no counterpart, the settings do not fit, or the folder holds something.
    """
    folder = arguments.output_dir
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} holds something already; give a new folder.")
    model, tokenizer = CONVERSIONS[arguments.source](arguments), find_tokenizer(arguments)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside it, so that what is interrupted leaves no half of a model there.
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as aside:
        model.save_pretrained(aside)
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)
        folder.mkdir(exist_ok=True)
        for file in Path(aside).iterdir():
            file.replace(folder / file.name)
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(
        f"{folder}: {type(model).__name__} with {size:.1f} million parameters, layers {list(model.config.attn_layers)}"
    )
    if tokenizer is None:
        print("It has no tokenizer; --tokenizer puts one beside it.")


CONVERSIONS: dict[str, Any] = {
    "trax": lambda given: convert_trax(given.weights, **parse_settings(given.set)),
    "reformer-pytorch": lambda given: convert_reformer_pytorch(
        given.weights, **parse_settings(given.set, ReformerLMArguments)
    ),
    "dense": lambda given: from_dense(given.weights, given.tie, given.set),
}


def main(argv: list[str] | None = None) -> None:
    """Convert; a mistake in the arguments ends the program with its message."""
    arguments = parse_arguments(argv)
    with mistakes_end("convert"):
        convert(arguments)
