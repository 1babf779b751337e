"""
Train a classifier of texts on your own labels, measure it beside TF-IDF with logistic regression, and label new texts.

    hf-reformer classify --data reviews.csv --text_column text --label_column label --output_dir runs/reviews
    hf-reformer classify --data folder_of_folders --pretrain_steps 1000 --output_dir runs/parts
    hf-reformer classify --model_name_or_path runs/reviews --predict new.csv

Texts are csv, tsv, json, jsonl, parquet, or a folder that has a folder of text files for each label; to label, FASTA
and lines of txt as well. A part of them is held out. Every option of the Trainer works.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..modeling.modeling_reformer import ReformerForSequenceClassification
from ..training.classification_figures import baselines, classification_figures, draw_confusion
from ..training.labelled_texts import LabelledDataArguments, LabelledSides, LabelledTexts, read_labelled
from ..training.recipe import ModelRecipe
from ..training.row_batches import check_length, cut_long, encode, through_model
from ..training.tables import column_of, excerpt, read_table, texts_of, write_table
from ..training.task_run import Measure, TaskRows
from ..training.task_trainer import TaskRunArguments, TaskTrainer, said
from .command_line import parse_groups
from .task_command import Figures, Prepared, Report, Task, load_trained, run_command, run_task
from .task_models import TaskModelArguments, existing_config, load_config, load_tokenizer
from .training_process import run_and_end


FIGURES = ("accuracy", "macro_f1")
# Characters of a text beside its prediction, and labels that the card names.
EXCERPT, MOST_NAMED = 200, 50
USAGE = """from transformers import pipeline

classifier = pipeline("text-classification", model="{name}")
print(classifier("A text.", truncation=True))"""


@dataclass
class ClassifyRunArguments(TaskRunArguments):
    """A run's arguments."""

    output_dir: str = field(default="runs/classify", metadata={"help": "Where checkpoints and the model go."})


class Classify(Task):
    """Labels of texts."""

    classes = ReformerForSequenceClassification, AutoModelForSequenceClassification
    objective, pipeline, main_figure = "labels", "text-classification", "accuracy"
    baseline_is = "TF-IDF with logistic regression"

    def read(self) -> LabelledSides:
        """Texts and their labels."""
        return read_labelled(self.data_arguments)

    def prepare(self, model_arguments: TaskModelArguments, recipe: ModelRecipe, sides: LabelledSides) -> Prepared:
        """The tokenizer cuts what is longer than the context."""
        tokenizer = load_tokenizer(model_arguments)
        whole = encode(sides.train.texts, tokenizer, None)[0]
        lengths = [len(ids) for ids in whole]
        context_length = model_arguments.context_for(lengths, existing_config(model_arguments))
        config = load_config(model_arguments, recipe, tokenizer, context_length, sides.names)
        check_length(context_length, config)
        tokenizer.model_max_length = context_length
        cut = cut_long(sides.train.texts, whole, tokenizer, context_length)
        train = _rows(sides.train, cut, tokenizer, sides.names)
        encoded = encode(sides.held_out.texts, tokenizer, context_length)
        held_out = _rows(sides.held_out, encoded, tokenizer, sides.names)
        rows = TaskRows(train, held_out, sides, [min(length, context_length) for length in lengths])
        return Prepared(tokenizer, config, rows)

    def baselines(self, sides: LabelledSides) -> Figures:
        """Logistic regression on TF-IDF, and the most frequent label."""
        return baselines(sides.train, sides.measured)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable:
        """Pads texts."""
        return DataCollatorWithPadding(tokenizer)

    def measure(self, sides: LabelledSides) -> Measure:
        """Accuracy and macro F1."""
        names = sides.names

        def compute(evaluation: EvalPrediction) -> dict[str, float]:
            given, found = np.asarray(evaluation.label_ids), np.asarray(evaluation.predictions)
            labels, predicted = ([names[place] for place in part.tolist()] for part in (given, found))
            return classification_figures(labels, predicted)

        return Measure(FIGURES, compute, lambda logits, labels: logits.argmax(-1))

    def report(self, trainer: TaskTrainer, sides: LabelledSides) -> Report:
        """Figures, confusion.png and predictions.csv, of the texts that the figures are of."""
        folder, measured = Path(trainer.args.output_dir), sides.measured
        quiet = bool(trainer.args.disable_tqdm)
        chances, num_cut = predict_chances(trainer.model, trainer.processing_class, measured.texts, quiet=quiet)
        predicted = [sides.names[place] for place in chances.argmax(-1).tolist()]
        columns: dict[str, Sequence[Any]] = {
            "row": [row + 1 for row in measured.rows],
            "label": measured.labels,
            "predicted": predicted,
            "probability": [round(chance, 4) for chance in chances.amax(-1).tolist()],
            "text": [excerpt(text, EXCERPT) for text in measured.texts],
        }
        write_table(folder / "predictions.csv", columns)
        draw_confusion(folder / "confusion.png", measured.labels, predicted, sides.names)
        figures = classification_figures(measured.labels, predicted)
        return Report(figures, _card_facts(sides, num_cut), ("confusion.png", "predictions.csv"))


def classify(
    model_arguments: TaskModelArguments,
    recipe: ModelRecipe,
    data_arguments: LabelledDataArguments,
    training_arguments: ClassifyRunArguments,
) -> Figures:
    """Train, evaluate and save, as `run_task` says."""
    return run_task(Classify(data_arguments), model_arguments, recipe, training_arguments)


def _rows(
    side: LabelledTexts,
    encoded: tuple[list[list[int]], int],
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
) -> Dataset:
    """`input_ids` and `labels`; says how many texts are cut."""
    ids, num_cut = encoded
    if num_cut:
        print(
            f"{num_cut:,} of {len(side):,} texts are longer than {tokenizer.model_max_length:,} tokens and are cut "
            "there; --context_length says where.",
            flush=True,
        )
    places = {name: place for place, name in enumerate(names)}
    return Dataset.from_dict({"input_ids": ids, "labels": [places[label] for label in side.labels]})


def _card_facts(sides: LabelledSides, num_cut: int) -> dict[str, Any]:
    """What the card says of labels."""
    which = "held-out" if sides.test is None else "test"
    labels = ", ".join(f"`{label}`" for label in sides.names[:MOST_NAMED])
    more = f" and {len(sides.names) - MOST_NAMED} others" if len(sides.names) > MOST_NAMED else ""
    return {
        "objective": f"tells {len(sides.names)} labels of texts apart",
        "labels": f"\nLabels: {labels}{more}.\n",
        "longer": "longer ones were cut",
        "usage": USAGE,
        "measured_on": (
            f"Accuracy, and F1 averaged over labels (each counts alike), of the {len(sides.measured):,} {which} "
            f"texts, {num_cut:,} of which were cut. The baselines were fitted to the same training texts, whole."
        ),
        "pictures": "\n![What is taken for what](confusion.png)\n\n![Curve](curve.png)\n",
    }


def predict_chances(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    quiet: bool = False,
) -> tuple[torch.Tensor, int]:
    """The chance of each label, `[N, num_labels]`, and how many texts were cut at the tokenizer's longest."""
    ids, num_cut = encode(texts, tokenizer, tokenizer.model_max_length)
    chances = through_model(
        model,
        ids,
        lambda model, batch: model(**batch).logits.float().softmax(-1),
        pad_token_id=tokenizer.pad_token_id,
        description="labelling",
        quiet=quiet,
    )
    return chances, num_cut


def predict(
    model_arguments: TaskModelArguments,
    data_arguments: LabelledDataArguments,
    training_arguments: ClassifyRunArguments,
) -> Path:
    """
    Label the texts of a file with a trained model; writes its columns with `predicted` and `probability`.

    Where the file has labels, too, their figures are printed.

    Raises:
        ValueError: No model is named, it is none with labels, or the file has no texts.
    """
    source = data_arguments.predict or ""
    model, tokenizer = load_trained(
        model_arguments,
        "ForSequenceClassification",
        "classify",
        AutoModelForSequenceClassification,
        source,
        training_arguments.device,
    )
    target = data_arguments.predictions
    table = read_table(source)
    texts, rows = texts_of(table, data_arguments.text_column, source, drop=data_arguments.drop_incomplete)
    chances, num_cut = predict_chances(model, tokenizer, texts, quiet=bool(training_arguments.disable_tqdm))
    names = model.config.id2label or {}
    predicted = [str(names[place]) for place in chances.argmax(-1).tolist()]
    columns = {column: column_of(table, column, "", source) for column in table.column_names}
    columns = {column: [values[row] for row in rows] for column, values in columns.items()}
    columns |= {"predicted": predicted, "probability": [round(chance, 4) for chance in chances.amax(-1).tolist()]}
    write_table(target, columns)
    cut = f", {num_cut:,} of them cut at {tokenizer.model_max_length:,} tokens" if num_cut else ""
    print(f"{target}: {len(texts):,} texts labelled{cut}")
    if set(map(str, columns.get(data_arguments.label_column, [None]))) <= set(map(str, names.values())):
        print(said(classification_figures(list(map(str, columns[data_arguments.label_column])), predicted)))
    return target


def parse_arguments(
    argv: list[str],
) -> tuple[TaskModelArguments, ModelRecipe, LabelledDataArguments, ClassifyRunArguments]:
    """Arguments from the command line, or from the one JSON or YAML file named there."""
    return parse_groups(argv, TaskModelArguments, ModelRecipe, LabelledDataArguments, ClassifyRunArguments, of=__doc__)


def main(argv: list[str] | None = None) -> None:
    """Train or label as the command line says; a mistake ends the program with its message."""
    run_command("classify", argv, parse_arguments, classify, predict)


def run_process(argv: list[str] | None = None) -> None:
    """`main` as all that this process does; its exit code says whether a signal ended it."""
    run_and_end(main, argv)


if __name__ == "__main__":
    run_process()
