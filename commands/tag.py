"""
Train a model that finds and labels parts of texts, or gives every word a tag, and put it to new texts.

    hf-reformer tag --data reports.jsonl --output_dir runs/reports          # text, and spans: start, end and label
    hf-reformer tag --data train.conll --validation_data dev.conll          # a word and its tag in a line
    hf-reformer tag --model_name_or_path runs/reports --predict new.txt     # writes new_predictions.jsonl

Texts with spans, or words with tags, are json, jsonl or parquet; words with tags CoNLL files, too. New texts are also
csv, FASTA and lines of txt. Long texts are read in windows of the context. Every option of the Trainer works.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import (
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    EvalPrediction,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file

from ..modeling.modeling_reformer import ReformerForTokenClassification
from ..training.recipe import ModelRecipe
from ..training.row_batches import check_length
from ..training.tables import other_columns, read_table, texts_of, write_table
from ..training.tagged_texts import (
    COLUMN_FILES,
    OUTSIDE,
    TaggedDataArguments,
    TaggedSides,
    TaggedTexts,
    are_of_spans,
    kind_of,
    read_tagged,
    spans_of,
    tagged_rows_of,
    tagged_texts_of,
    units_of,
)
from ..training.tagging import (
    baselines,
    draw_labels,
    figures_by_label,
    find_tags,
    rows_of,
    tag_figures,
    tags_at,
    windows_of,
)
from ..training.task_run import Measure, TaskRows
from ..training.task_trainer import TaskRunArguments, TaskTrainer, said
from .command_line import parse_groups
from .task_command import Figures, Prepared, Report, Task, load_trained, run_command, run_task
from .task_models import TaskModelArguments, existing_config, load_config, load_tokenizer
from .training_process import run_and_end


# Labels that the card names.
MOST_NAMED = 50
# In a trained model's folder.
UNITS = "units.json"
USAGE = """from transformers import pipeline

tagger = pipeline("token-classification", model="{name}", aggregation_strategy="simple")
print(tagger("A text."))"""


@dataclass
class TagRunArguments(TaskRunArguments):
    """A run's arguments. Every token has a label to learn from, so that a larger rate than that of texts is better."""

    learning_rate: float = field(default=1e-2, metadata={"help": "Peak learning rate."})
    output_dir: str = field(default="runs/tag", metadata={"help": "Where checkpoints and the model go."})


class Tag(Task):
    """Labelled parts of texts, or a tag for each word."""

    classes = ReformerForTokenClassification, AutoModelForTokenClassification
    objective, pipeline, main_figure = "tags", "token-classification", "f1"
    baseline_is = "logistic regression on neighbouring words"

    def read(self) -> TaggedSides:
        """Texts, their units and tags."""
        return read_tagged(self.data_arguments)

    def prepare(self, model_arguments: TaskModelArguments, recipe: ModelRecipe, sides: TaggedSides) -> Prepared:
        """Texts longer than the context become several windows."""
        if getattr(existing_config(model_arguments), "is_decoder", False):
            raise ValueError(
                f"{model_arguments.model_name_or_path} is causal: at the first letter of a word it has not read the "
                "word. Name a model that reads both ways, such as one of hf-reformer train --objective masked."
            )
        tokenizer = load_tokenizer(model_arguments)
        train = windows_of(sides.train, tokenizer, sys.maxsize)
        lengths = [len(window.ids) for window in train]
        context_length = model_arguments.context_for(lengths, existing_config(model_arguments))
        config = load_config(model_arguments, recipe, tokenizer, context_length, sides.names)
        check_length(context_length, config)
        tokenizer.model_max_length = context_length
        if max(lengths) > context_length:
            train = windows_of(sides.train, tokenizer, context_length)
        held_out = windows_of(sides.held_out, tokenizer, context_length)
        shared = sum(len(window.columns) - len(set(window.columns)) for window in train)
        if shared:
            print(
                f"{shared:,} units begin inside of a token of another, whose label they go on with; bytes are finer",
                flush=True,
            )
        self.held_out_windows = held_out
        self.measured_windows = held_out if sides.test is None else windows_of(sides.test, tokenizer, context_length)
        rows = TaskRows(
            rows_of(train, sides.train, sides.names),
            rows_of(held_out, sides.held_out, sides.names),
            sides,
            [len(window.ids) for window in train],
        )
        return Prepared(tokenizer, config, rows)

    def baselines(self, sides: TaggedSides) -> Figures:
        """Logistic regression on neighbours, and the most frequent tag of each word."""
        return baselines(sides)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable:
        """Pads tokens and labels."""
        return DataCollatorForTokenClassification(tokenizer)

    def measure(self, sides: TaggedSides) -> Measure:
        """The figures of the report: of units, by their first token."""

        def compute(evaluation: EvalPrediction) -> dict[str, float]:
            found = np.maximum(np.asarray(evaluation.predictions), 0)
            tags = tags_at(self.held_out_windows, found.tolist(), sides.held_out, sides.names)
            return tag_figures(sides.held_out.tags, tags, sides.has_spans)

        shown = ("f1", "precision", "recall") if sides.has_spans else ("accuracy", "macro_f1")
        return Measure(shown, compute, lambda logits, labels: logits.argmax(-1))

    def report(self, trainer: TaskTrainer, sides: TaggedSides) -> Report:
        """Figures, predictions.jsonl of the texts that the figures are of, and of spans labels.png."""
        folder, measured, tokenizer = Path(trainer.args.output_dir), sides.measured, trainer.processing_class
        windows, quiet = self.measured_windows, bool(trainer.args.disable_tqdm)
        how = {"pad_token_id": tokenizer.pad_token_id, "quiet": quiet}
        tags, chances = find_tags(trainer.model, windows, measured, sides.names, **how)
        write_table(folder / "predictions.jsonl", _columns(measured, tags, chances, sides.has_spans, measured.tags))
        # Texts to predict are cut as those for training.
        (folder / UNITS).write_text(json.dumps({"units": sides.train.kind}) + "\n", encoding="utf-8")
        files = ["predictions.jsonl"]
        if sides.has_spans:
            draw_labels(folder / "labels.png", figures_by_label(measured.tags, tags))
            files.append("labels.png")
        figures = tag_figures(measured.tags, tags, sides.has_spans)
        return Report(figures, _card_facts(sides, len(windows)), files)


def tag(
    model_arguments: TaskModelArguments,
    recipe: ModelRecipe,
    data_arguments: TaggedDataArguments,
    training_arguments: TagRunArguments,
) -> Figures:
    """Train, evaluate and save, as `run_task` says."""
    return run_task(Tag(data_arguments), model_arguments, recipe, training_arguments)


def _columns(
    texts: TaggedTexts,
    tags: Sequence[Sequence[str]],
    chances: Sequence[Sequence[float]],
    has_spans: bool,
    given: Sequence[Sequence[str]] | None = None,
) -> dict[str, list[Any]]:
    """A row for each text: what was found in it, and what is right if that is known."""
    columns: dict[str, list[Any]] = {"row": [row + 1 for row in texts.rows]}
    if not has_spans:
        columns["tokens"] = [texts.words(place) for place in range(len(texts))]
        columns["predicted"] = [list(found) for found in tags]
        return columns | ({} if given is None else {"tags": [list(right) for right in given]})
    columns["text"] = list(texts.texts)
    columns["predicted"] = [_spans(*each) for each in zip(texts.texts, tags, texts.units, chances, strict=True)]
    if given is not None:
        columns["spans"] = [_spans(*each) for each in zip(texts.texts, given, texts.units, strict=True)]
    return columns


def _spans(text, tags, units, chances=None) -> list[dict[str, Any]]:
    """Spans as records; the chance is that of the first unit."""
    chance_at = {} if chances is None else {start: chance for (start, _), chance in zip(units, chances, strict=True)}
    return [
        {**span._asdict(), "text": text[span.start : span.end]}
        | ({} if chances is None else {"probability": round(chance_at[span.start], 4)})
        for span in spans_of(tags, units)
    ]


def _card_facts(sides: TaggedSides, num_windows: int) -> dict[str, Any]:
    """What the card says of tags."""
    which = "held-out" if sides.test is None else "test"
    names = [name.removeprefix("B-") for name in sides.names if not (sides.has_spans and name[:2] in ("O", "I-"))]
    labels = ", ".join(f"`{label}`" for label in names[:MOST_NAMED])
    more = f" and {len(names) - MOST_NAMED} others" if len(names) > MOST_NAMED else ""
    measured = (
        "F1, precision and recall of spans; one is right if both ends and the label are (nervaluate, strict)"
        if sides.has_spans
        else "Accuracy of words, and F1 averaged over tags (each counts alike)"
    )
    return {
        "objective": f"finds parts of texts, of {len(names)} kinds" if sides.has_spans else "gives every word a tag",
        "labels": f"\nLabels: {labels}{more}.\n",
        "longer": "longer ones are read in windows",
        "usage": USAGE,
        "measured_on": (
            f"{measured}, of the {len(sides.measured):,} {which} texts, read in {num_windows:,} windows. Units are "
            f"{sides.train.kind}, and a unit has the tag of its first token, as `hf-reformer tag --predict` gives it; "
            "the pipeline above asks each token by itself. The baselines were fitted to the same training texts."
        ),
        "pictures": ("\n![F1 of each label](labels.png)\n" if sides.has_spans else "") + "\n![Curve](curve.png)\n",
    }


def predict(
    model_arguments: TaskModelArguments, data_arguments: TaggedDataArguments, training_arguments: TagRunArguments
) -> Path:
    """
    Find and label parts of the texts of a file with a trained model; writes a record for each text.

    Raises:
        ValueError: No model is named, it has no tags, or the file has no texts.
    """
    source = data_arguments.predict or ""
    model, tokenizer = load_trained(
        model_arguments,
        "ForTokenClassification",
        "tag",
        AutoModelForTokenClassification,
        source,
        training_arguments.device,
    )
    texts, others, has_tags = _read_new(data_arguments, source, _kind_of(model_arguments))
    windows = windows_of(texts, tokenizer, tokenizer.model_max_length)
    of_number = {int(number): str(name) for number, name in (model.config.id2label or {}).items()}
    names = [of_number[number] for number in range(len(of_number))]
    spans = are_of_spans(iter(names))
    tags, chances = find_tags(
        model,
        windows,
        texts,
        names,
        pad_token_id=tokenizer.pad_token_id,
        quiet=bool(training_arguments.disable_tqdm),
    )
    columns = _columns(texts, tags, chances, spans, texts.tags if has_tags else None)
    write_table(data_arguments.predictions, others | columns)
    print(f"{data_arguments.predictions}: {len(texts):,} texts, read in {len(windows):,} windows")
    if has_tags:
        print(said(tag_figures(texts.tags, tags, spans)))
    return data_arguments.predictions


def _read_new(
    arguments: TaggedDataArguments, source: str, kind: str | None
) -> tuple[TaggedTexts, dict[str, list[Any]], bool]:
    """Texts to predict, the other columns of their file, and whether it says what is right."""
    if Path(source).suffix.lower() in COLUMN_FILES:
        return tagged_texts_of(source, arguments), {}, True
    table = read_table(source)
    names = table.column_names
    own = (arguments.text_column, arguments.spans_column, arguments.tokens_column, arguments.tags_column)
    has_words = arguments.tokens_column in names and arguments.spans_column not in names
    has_tags = arguments.tags_column in names if has_words else arguments.spans_column in names
    if has_words and not has_tags:
        words = [[OUTSIDE] * len(row) for row in table[arguments.tokens_column][:]]
        table = table.add_column(arguments.tags_column, words)
    if has_words or has_tags:
        texts = tagged_rows_of(table, source, arguments, kind)
    else:
        found, rows = texts_of(table, arguments.text_column, source, drop=arguments.drop_incomplete)
        kind = kind or kind_of(found)
        units = units_of(found, kind)
        texts = TaggedTexts(found, units, [[OUTSIDE] * len(each) for each in units], rows, kind)
    return texts, other_columns(table, texts.rows, [*own, "row", "predicted"]), has_tags


def _kind_of(model_arguments: TaskModelArguments) -> str | None:
    """What the texts were cut into that the model was trained on, if its folder says so."""
    found = cached_file(str(model_arguments.model_name_or_path), UNITS, _raise_exceptions_for_missing_entries=False)
    return None if found is None else json.loads(Path(found).read_text(encoding="utf-8"))["units"]


def parse_arguments(
    argv: list[str],
) -> tuple[TaskModelArguments, ModelRecipe, TaggedDataArguments, TagRunArguments]:
    """Arguments from the command line, or from the one JSON or YAML file named there."""
    return parse_groups(argv, TaskModelArguments, ModelRecipe, TaggedDataArguments, TagRunArguments, of=__doc__)


def main(argv: list[str] | None = None) -> None:
    """Train or tag as the command line says; a mistake ends the program with its message."""
    run_command("tag", argv, parse_arguments, tag, predict)


def run_process(argv: list[str] | None = None) -> None:
    """`main` as all that this process does; its exit code says whether a signal ended it."""
    run_and_end(main, argv)


if __name__ == "__main__":
    run_process()
