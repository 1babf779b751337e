"""
Save a model with the code that computes it, for people who do not have the package.

    hf-reformer export --model runs/mine --output_dir exported
    hf-reformer export --model runs/mine --output_dir weights --code_repository user/code
"""

import argparse
import re
import shutil
import sys
from pathlib import Path

import transformers
from transformers import AutoConfig, AutoTokenizer

from ..modeling.remote_code import AUTO_CLASS_OF, export
from ..training.row_batches import existing
from .command_line import mistakes_end


# What published checkpoints name.
OTHER_NAMES = {"ReformerModelWithLMHead": "ReformerForCausalLM"}
METADATA = ("license", "language", "datasets")
# What `hf-reformer train` leaves beside a model for people.
REPORT = ("README.md", "loss_curve.png", "training_log.json")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a saved model, or a name on the Hub")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--code_repository", help="repository on the Hub that has the code, such as user/code, instead of the folder"
    )
    card = parser.add_argument_group("metadata of the card")
    card.add_argument("--license", help="such as mit")
    card.add_argument("--language", nargs="+", help="codes, such as en")
    card.add_argument("--datasets", nargs="+", help="names on the Hub")
    return parser.parse_args(argv)


def export_saved(arguments: argparse.Namespace) -> None:
    """
    Load what was saved, and save it with its code and the report beside it.

    Raises:
        ValueError: it is no Reformer with a class of the package, or the folder holds something.
    """
    if arguments.output_dir.exists() and any(arguments.output_dir.iterdir()):
        raise ValueError(f"{arguments.output_dir} holds something already; give a new folder.")
    architectures = AutoConfig.from_pretrained(existing(arguments.model)).architectures or ["None"]
    name = OTHER_NAMES.get(architectures[0], architectures[0])
    if name not in AUTO_CLASS_OF:
        raise ValueError(
            f"{arguments.model} is a {name} by its config.json; the package has {', '.join(sorted(AUTO_CLASS_OF))}."
        )
    model = getattr(transformers, AUTO_CLASS_OF[name]).from_pretrained(arguments.model, dtype="auto")
    try:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    except (ValueError, OSError) as error:
        print(f"without a tokenizer: {error}", file=sys.stderr)
        tokenizer = None
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    for file in (Path(arguments.model) / file for file in REPORT):
        if file.is_file():
            shutil.copy(file, arguments.output_dir)
    copy_pictures(Path(arguments.model), arguments.output_dir)
    metadata = {name: getattr(arguments, name) for name in METADATA if getattr(arguments, name) is not None}
    export(model, tokenizer, arguments.output_dir, arguments.code_repository, **metadata)
    print(f"{arguments.output_dir} loads with trust_remote_code=True; its README.md says how.")


def copy_pictures(source: Path, target: Path) -> None:
    """Those beside a card that it shows; and the name that its lines of Python load becomes that of the copy."""
    card = target / "README.md"
    if not card.is_file():
        return
    text = card.read_text(encoding="utf-8")
    for name in re.findall(r"!\[[^\]]*\]\(([\w.-]+)\)", text):
        if (source / name).is_file():
            shutil.copy(source / name, target)
    text = text.replace(f'model="{source.name}"', f'model="{target.name}"')
    card.write_text(
        text.replace(f'from_pretrained("{source.name}")', f'from_pretrained("{target.name}")'), encoding="utf-8"
    )


def main(argv: list[str] | None = None) -> None:
    """Export; a mistake in the arguments ends the program with its message."""
    arguments = parse_arguments(argv)
    with mistakes_end("export"):
        export_saved(arguments)
