"""
A vector for each text of a file, from any model of the package: the mean of its tokens' vectors.

    hf-reformer embed --model runs/reviews --data reviews.csv --output vectors.npy
    hf-reformer embed --model runs/masked --data genes.fasta --output vectors.parquet --normalize True
    hf-reformer embed --model runs/reviews --save_sentence_transformer runs/encoder

A vector has `config.output_size` numbers, which is what every head reads: twice the hidden size where the two streams
go out side by side, as in the recipe. The folder loads in sentence-transformers after `import hf_reformer`.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from ..training.embedding import OUTPUTS, embed_texts, load_encoder, save_sentence_transformer, write_vectors
from ..training.tables import check_writable, column_of, read_table, texts_of
from .command_line import RowArguments, make_parser, mistakes_end, usable_device


@dataclass(kw_only=True)
class EmbeddingArguments(RowArguments):
    """Which texts become vectors, by which model."""

    model: str = field(metadata={"help": "Folder of a saved model with its tokenizer, or a name on the Hub."})
    data: str | None = field(
        default=None, metadata={"help": "csv, tsv, json, jsonl, parquet, txt (a text a line), FASTA, or a folder."}
    )
    output: str | None = field(
        default=None, metadata={"help": "Where vectors go: .npy, or .parquet with the other columns of the file."}
    )
    save_sentence_transformer: str | None = field(
        default=None, metadata={"help": "A folder to write that sentence-transformers loads."}
    )
    normalize: bool = field(default=False, metadata={"help": "Make each vector's length 1."})
    context_length: int | None = field(
        default=None, metadata={"help": "Tokens that are read of a text; by default as many as in training."}
    )

    def __post_init__(self):
        if self.data is None and self.save_sentence_transformer is None:
            raise ValueError("Give data with output, or save_sentence_transformer; otherwise there is nothing to do.")
        if (self.data is None) != (self.output is None):
            raise ValueError(
                f"data is {self.data} and output is {self.output}; give both: what to read, and where vectors go."
            )
        if self.output is not None:
            check_writable(self.output, OUTPUTS)


def embed(arguments: EmbeddingArguments) -> None:
    """
    Write what is asked for.

    Raises:
        ValueError: The file has no such texts, or the folder holds something.
    """
    model, tokenizer = load_encoder(arguments.model, usable_device(arguments.device), arguments.context_length)
    if arguments.save_sentence_transformer is not None:
        folder = Path(arguments.save_sentence_transformer)
        save_sentence_transformer(folder, model, tokenizer, normalize=arguments.normalize)
        print(f"{folder}: import hf_reformer; SentenceTransformer({str(folder)!r}).encode(texts)")
    if arguments.data is None or arguments.output is None:
        return
    table = read_table(arguments.data)
    texts, rows = texts_of(table, arguments.text_column, arguments.data, drop=arguments.drop_incomplete)
    vectors, num_cut = embed_texts(model, tokenizer, texts, normalize=arguments.normalize, quiet=arguments.quiet)
    others = [name for name in table.column_names if name not in (arguments.text_column, "row", "vector")]
    columns = {name: column_of(table, name, "", arguments.data) for name in others}
    extra = {name: [values[row] for row in rows] for name, values in columns.items()}
    write_vectors(Path(arguments.output), vectors, rows, extra)
    cut = f", {num_cut:,} texts cut at {tokenizer.model_max_length:,} tokens" if num_cut else ""
    print(f"{arguments.output}: {len(vectors):,} vectors of {vectors.shape[1]:,} numbers{cut}")


def main(argv: list[str] | None = None) -> None:
    """Embed as the command line says; a mistake ends the program with its message."""
    parser = make_parser(EmbeddingArguments, description=__doc__)
    with mistakes_end("embed"):
        embed(*parser.parse_args_into_dataclasses(sys.argv[1:] if argv is None else argv))
