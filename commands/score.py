"""
Bits per byte of each text of a file by a causal model, as a table: the oddest cost most.

    hf-reformer score --model runs/logs --data today.log --output scores.csv
    hf-reformer score --model runs/mine --data documents.csv --text_column body --output scores.csv --show 20

A text is read by itself, behind an end of text; of txt and log files each line is one. A model of your own texts comes
from hf-reformer train; of short ones with --packing True, so that it has seen their beginnings by themselves.
"""

import sys
from dataclasses import dataclass, field

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..training.row_batches import check_length, existing, longest_input
from ..training.tables import check_writable, excerpt, read_table, texts_of, write_table
from ..training.text_scores import oddest, score_texts
from .command_line import RowArguments, make_parser, mistakes_end, usable_device


# Characters of a text beside its score.
EXCERPT = 80


@dataclass(kw_only=True)
class ScoreArguments(RowArguments):
    """Which texts are scored, by which model."""

    model: str = field(metadata={"help": "Folder of a saved causal model with its tokenizer, or a name on the Hub."})
    data: str = field(
        metadata={"help": "csv, tsv, json, jsonl, parquet, txt or log (a text a line), FASTA, or a folder."}
    )
    output: str = field(default="scores.csv", metadata={"help": "Where scores go: csv, jsonl or parquet."})
    context_length: int | None = field(
        default=None,
        metadata={"help": "Tokens that are read of a text; by default all, or as many as the model takes."},
    )
    show: int = field(default=5, metadata={"help": "How many of the oddest texts are printed."})

    def __post_init__(self):
        check_writable(self.output)
        if self.context_length is not None and self.context_length < 1:
            raise ValueError(f"context_length is {self.context_length}; it must be at least 1.")


def score(arguments: ScoreArguments) -> dict[str, list]:
    """
    Write the table, and print the oddest texts; returns its columns.

    Raises:
        ValueError: The model is none that predicts the next token, or the file has no such texts.
    """
    device = usable_device(arguments.device)
    config = AutoConfig.from_pretrained(existing(arguments.model))
    if getattr(config, "is_decoder", True) is False or any("MaskedLM" in name for name in config.architectures or ()):
        raise ValueError(
            f"{arguments.model} is {', '.join(config.architectures or ['no model'])}, which does not predict the next "
            "token. Name a causal model, such as hf-reformer train makes."
        )
    table = read_table(arguments.data)
    # An empty line of a log is no text, and no fault either.
    is_lines = arguments.data.endswith((".txt", ".log"))
    texts, rows = texts_of(table, arguments.text_column, arguments.data, drop=arguments.drop_incomplete or is_lines)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    length, longest = arguments.context_length, longest_input(config)
    if length is not None:
        check_length(length + 1, config)
    elif longest is not None:
        length = longest - 1
    model = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
    model.to(device)
    scores = score_texts(model, tokenizer, texts, context_length=length, quiet=arguments.quiet)
    columns = {"row": [row + 1 for row in rows], **scores, "text": [excerpt(text, EXCERPT) for text in texts]}
    columns |= {
        name: [round(value, 5) for value in columns[name]] for name in ("bits_per_byte", "mean_log_likelihood")
    }
    write_table(arguments.output, columns)
    bits = columns["bits_per_byte"]
    total = sum(value * count for value, count in zip(bits, columns["bytes"], strict=True)) / sum(columns["bytes"])
    print(f"{arguments.output}: {len(texts):,} texts, {total:.3f} bits per byte of all of them")
    for place in oddest(bits, arguments.show):
        print(f"row {columns['row'][place]:,}: {bits[place]:.3f} bits per byte: {columns['text'][place]}")
    return columns


def main(argv: list[str] | None = None) -> None:
    """Score as the command line says; a mistake ends the program with its message."""
    parser = make_parser(ScoreArguments, description=__doc__)
    with mistakes_end("score"):
        score(*parser.parse_args_into_dataclasses(sys.argv[1:] if argv is None else argv))
