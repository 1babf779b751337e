"""
Measure a model in bits per byte on held-out text, in windows of several lengths: what does it get out of its context?

    hf-reformer evaluate --model runs/mine --text_path my_texts/
    hf-reformer evaluate --model runs/mine --dataset_name my_dataset --lengths 1024 16384 --num_windows 8
    hf-reformer evaluate --model runs/mine --text_path my_texts/ --set num_hashes=4 --output_dir runs/mine_4_rounds

The text is split as in training, so name the same text. With LSH layers the same is said of the model without their
attention, too. Writes context.json and context.png into the model's folder, or into --output_dir.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from ..training.context_gain import LENGTHS, NUM_WINDOWS, report
from ..training.corpus import TextArguments
from .command_line import make_parser, parse_settings, usable_device


@dataclass
class EvaluationArguments:
    """Which model is measured, and at which lengths."""

    model: str = field(metadata={"help": "Folder of a saved model with its tokenizer, or a name on the Hub."})
    lengths: list[int] = field(
        default_factory=lambda: list(LENGTHS), metadata={"help": "Tokens in a window; each divides the longest."}
    )
    num_windows: int = field(default=NUM_WINDOWS, metadata={"help": "How many windows of the longest length to read."})
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of tokens hidden from a masked model."})
    set: list[str] = field(
        default_factory=list,
        metadata={"help": "Other settings of the config than the model's, such as num_hashes=4."},
    )
    output_dir: str | None = field(default=None, metadata={"help": "Where the figures go; by default to the model."})
    device: str = field(
        default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "Where it runs."}
    )

    def __post_init__(self):
        if min(self.lengths) < 2 or self.num_windows < 1:
            raise ValueError(
                f"lengths is {self.lengths} and num_windows is {self.num_windows}; a window needs at least 2 tokens, "
                "and there must be at least one."
            )
        if not 0 < self.mlm_probability < 1:
            raise ValueError(f"mlm_probability is {self.mlm_probability}; it must lie between 0 and 1.")
        if self.output_dir is None and not Path(self.model).is_dir():
            raise ValueError(f"There is no folder {self.model}; for a model of the Hub, give an output_dir.")


def evaluate(arguments: EvaluationArguments, text: TextArguments) -> None:
    """Print the table and leave the figures."""
    device, settings = usable_device(arguments.device), parse_settings(arguments.set)
    # A model says by its class whether it predicts the next token or hidden ones.
    masked = any("MaskedLM" in name for name in AutoConfig.from_pretrained(arguments.model).architectures or ())
    auto_class = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    model = auto_class.from_pretrained(arguments.model, **settings).eval()
    model.to(device)
    report(
        model,
        AutoTokenizer.from_pretrained(arguments.model),
        text,
        Path(arguments.output_dir or arguments.model),
        lengths=arguments.lengths,
        num_windows=arguments.num_windows,
        mask_share=arguments.mlm_probability if masked else None,
        settings=settings,
    )


def main(argv: list[str] | None = None) -> None:
    """Measure as the command line says; a mistake on it ends the program with a message."""
    parser = make_parser(EvaluationArguments, TextArguments, description=__doc__)
    try:
        evaluate(*parser.parse_args_into_dataclasses(sys.argv[1:] if argv is None else argv))
    except (OSError, ValueError) as error:
        parser.error(str(error))
