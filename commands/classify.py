"""
Train a classifier of texts on your own labels, measure it beside TF-IDF with logistic regression, and label new texts.

    hf-reformer classify --data reviews.csv --text_column text --label_column label --output_dir runs/reviews
    hf-reformer classify --data folder_of_folders --pretrain_steps 1000 --output_dir runs/parts
    hf-reformer classify --model_name_or_path runs/reviews --predict new.csv

Texts are csv, tsv, json, jsonl, parquet, or a folder that has a folder of text files for each label; to label, FASTA
and lines of txt as well. A part of them is held out. Every option of the Trainer works.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from ..configuration.configuration_reformer import ReformerConfig
from ..modeling.modeling_reformer import ReformerForSequenceClassification
from ..training.classification_figures import baselines, classification_figures, draw_confusion
from ..training.labelled_texts import LabelledDataArguments, LabelledSides, LabelledTexts, read_labelled
from ..training.masked_pretraining import find_task_checkpoint, pretrain
from ..training.recipe import ModelRecipe
from ..training.row_batches import NO_BOUND, check_length, cut_long, encode, longest_input, through_model
from ..training.run_checkpoints import saving
from ..training.run_trainer import check_strategy
from ..training.tables import check_writable, column_of, excerpt, read_table, texts_of, write_table
from ..training.task_report import figures_table, write_card, write_task_curve, write_task_log
from ..training.task_run import Measure, TaskRows, describe_task_run, train_task
from ..training.task_trainer import TaskRunArguments, TaskTrainer, said
from .command_line import mistakes_end, parse_groups
from .task_models import TaskModelArguments, existing_config, load_config, load_model, load_tokenizer
from .training_process import run_and_end


FIGURES = ("accuracy", "macro_f1")
CLASSES = (ReformerForSequenceClassification, AutoModelForSequenceClassification)
# Characters of a text beside its prediction, and labels that the card names.
EXCERPT, MOST_NAMED = 200, 50
USAGE = """classifier = pipeline("text-classification", model="{name}")
print(classifier("A text.", truncation=True))"""


@dataclass
class ClassifyArguments(LabelledDataArguments):
    """The texts and their labels; or texts that a trained model shall label."""

    baseline: bool = field(
        default=True, metadata={"help": "Fit TF-IDF with logistic regression to the same texts, to stand beside."}
    )
    predict: str | None = field(
        default=None, metadata={"help": "A file of texts to label with --model_name_or_path, instead of training."}
    )
    predictions_path: str | None = field(
        default=None, metadata={"help": "Where labels go: csv, jsonl or parquet; by default beside the file."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.predict and self.data:
            raise ValueError(
                f"Both data ({self.data}) and predict ({self.predict}) were given: train first, then label."
            )
        if self.predictions_path is not None:
            check_writable(self.predictions_path)


@dataclass
class ClassifyRunArguments(TaskRunArguments):
    """A run's arguments."""

    output_dir: str = field(default="runs/classify", metadata={"help": "Where checkpoints and the model go."})


def classify(
    model_arguments: TaskModelArguments,
    recipe: ModelRecipe,
    data_arguments: ClassifyArguments,
    training_arguments: ClassifyRunArguments,
) -> dict[str, dict[str, float]]:
    """
    Train, evaluate and save; returns the figures of `this model` and of the baselines on texts held out.

    The output folder then holds the model (safetensors), its tokenizer, README.md (the model card), curve.png,
    confusion.png, predictions.csv (of the texts that the figures are of) and training_log.json.

    Raises:
        ValueError: Something given is wrong, or training diverged.
        Interrupted: SIGTERM or Ctrl-C came; the last step is saved.
    """
    check_strategy(training_arguments)
    checkpoint = find_task_checkpoint(training_arguments, after_pretraining=model_arguments.pretrain_steps > 0)
    if training_arguments.disable_tqdm or training_arguments.process_index > 0:
        disable_progress_bars()
    with training_arguments.main_process_first(desc="reading the texts"):
        sides = read_labelled(data_arguments)
    tokenizer, config, rows = prepare(model_arguments, recipe, sides)
    figures: dict[str, dict[str, float]] = {}
    if training_arguments.process_index == 0:
        if data_arguments.baseline:
            print(
                "fitting TF-IDF with logistic regression, to stand beside; --baseline False leaves it out", flush=True
            )
            figures = baselines(sides.train, sides.measured)
        describe(data_arguments, sides, figures)
    pretrained = None
    if model_arguments.pretrain_steps:
        ids = rows.train["input_ids"][:]
        stage = model_arguments.masked_stage
        pretrained = pretrain(
            cast(ReformerConfig, config), tokenizer, ids, training_arguments, stage, sides.train.digest
        )
    set_seed(training_arguments.seed)
    trainer = train_task(
        load_model(CLASSES, model_arguments, config, tokenizer, pretrained),
        tokenizer,
        DataCollatorWithPadding(tokenizer),
        rows,
        measure_labels(sides.names, figures),
        training_arguments,
        {"objective": "labels", "pretrain_steps": model_arguments.pretrain_steps},
        checkpoint,
    )
    with saving(training_arguments.output_dir):
        trainer.save_model()
        trainer.save_state()
        if trainer.is_world_process_zero():
            figures = report(trainer, sides, figures, model_arguments, data_arguments)
    if training_arguments.push_to_hub:
        trainer.push_to_hub()
    return figures


def prepare(
    model_arguments: TaskModelArguments, recipe: ModelRecipe, sides: LabelledSides
) -> tuple[PreTrainedTokenizerBase, PreTrainedConfig, TaskRows]:
    """
    The tokenizer, which cuts what is longer than the context, the config and the rows for the Trainer.

    Raises:
        ValueError: The context is longer than the model's table of positions, or settings are unknown.
    """
    tokenizer = load_tokenizer(model_arguments)
    whole = encode(sides.train.texts, tokenizer, None)[0]
    lengths = [len(ids) for ids in whole]
    existing = existing_config(model_arguments)
    context_length = model_arguments.context_for(lengths, existing)
    config = load_config(model_arguments, recipe, tokenizer, context_length, sides.names)
    check_length(context_length, config)
    tokenizer.model_max_length = context_length
    train = _rows(sides.train, cut_long(sides.train.texts, whole, tokenizer, context_length), tokenizer, sides.names)
    encoded = encode(sides.held_out.texts, tokenizer, context_length)
    held_out = _rows(sides.held_out, encoded, tokenizer, sides.names)
    return tokenizer, config, TaskRows(train, held_out, sides, [min(length, context_length) for length in lengths])


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


def measure_labels(names: Sequence[str], beside: dict[str, dict[str, float]]) -> Measure:
    """Accuracy and macro F1 of an evaluation, beside the first of the baselines."""

    def compute(evaluation: EvalPrediction) -> dict[str, float]:
        given, found = np.asarray(evaluation.label_ids), np.asarray(evaluation.predictions)
        labels, predicted = ([names[place] for place in part.tolist()] for part in (given, found))
        return classification_figures(labels, predicted)

    called = next(iter(beside), "")
    return Measure(FIGURES, compute, lambda logits, labels: logits.argmax(-1), (beside.get(called), called))


def describe(data_arguments: ClassifyArguments, sides: LabelledSides, figures: dict[str, dict[str, float]]) -> None:
    """Say what is trained on what, and what it stands beside."""
    print(f"text: {data_arguments.source}; {sides.how}")
    for name in ("train", "held_out", "test"):
        side = getattr(sides, name)
        if side is not None:
            print(f"{name.replace('_', '-')}: {side.describe()}")
    for name, values in figures.items():
        print(f"{name}: {said(values)}", flush=True)


def report(
    trainer: TaskTrainer,
    sides: LabelledSides,
    beside: dict[str, dict[str, float]],
    model_arguments: TaskModelArguments,
    data_arguments: ClassifyArguments,
) -> dict[str, dict[str, float]]:
    """Measure the final weights, and write card, pictures, predictions and log into the output folder."""
    folder, measured = Path(trainer.args.output_dir), sides.measured
    quiet = bool(trainer.args.disable_tqdm)
    chances, num_cut = predict_chances(trainer.model, trainer.processing_class, measured.texts, quiet=quiet)
    predicted = [sides.names[place] for place in chances.argmax(-1).tolist()]
    figures = {"this model": classification_figures(measured.labels, predicted)} | beside
    columns: dict[str, Sequence[Any]] = {
        "row": [row + 1 for row in measured.rows],
        "label": measured.labels,
        "predicted": predicted,
        "probability": [round(chance, 4) for chance in chances.amax(-1).tolist()],
        "text": [excerpt(text, EXCERPT) for text in measured.texts],
    }
    write_table(folder / "predictions.csv", columns)
    draw_confusion(folder / "confusion.png", measured.labels, predicted, sides.names)
    write_task_curve(
        folder / "curve.png",
        trainer.state.log_history,
        "accuracy",
        {name: values["accuracy"] for name, values in beside.items()},
        figures["this model"]["accuracy"],
    )
    write_task_log(
        folder / "training_log.json",
        trainer,
        figures,
        model_arguments=vars(model_arguments),
        data_arguments=vars(data_arguments),
    )
    write_card(folder / "README.md", card_facts(trainer, sides, model_arguments, data_arguments, num_cut), figures)
    print(f"\n{figures_table(figures)}\n\n{folder}: model, README.md, confusion.png, predictions.csv", flush=True)
    return figures


def card_facts(
    trainer: TaskTrainer,
    sides: LabelledSides,
    model_arguments: TaskModelArguments,
    data_arguments: ClassifyArguments,
    num_cut: int,
) -> dict[str, Any]:
    """What the card says besides figures."""
    context_length = trainer.processing_class.model_max_length
    start = model_arguments.model_name_or_path or "random"
    if model_arguments.pretrain_steps:
        start = f"{model_arguments.pretrain_steps:,} steps of filling in hidden tokens of the training texts"
    which = "held-out" if sides.test is None else "test"
    chosen = " The weights were chosen on them." if trainer.args.load_best_model_at_end and sides.test is None else ""
    labels = ", ".join(f"`{label}`" for label in sides.names[:MOST_NAMED])
    more = f" and {len(sides.names) - MOST_NAMED} others" if len(sides.names) > MOST_NAMED else ""
    facts = describe_task_run(trainer, context_length, start)
    return facts | {
        "pipeline_tag": "text-classification",
        "objective": f"tells {len(sides.names)} labels of texts apart",
        "labels": f"\nLabels: {labels}{more}.\n",
        "usage": USAGE.format(name=facts["name"]),
        "measured_on": (
            f"Accuracy, and F1 averaged over labels (each counts alike), of the {len(sides.measured):,} {which} "
            f"texts, {num_cut:,} of which were cut.{chosen} The baselines were fitted to the same training texts, "
            "whole."
        ),
        "pictures": "\n![What is taken for what](confusion.png)\n\n![Curve](curve.png)\n",
        "source": data_arguments.source,
        "split": sides.how[0].upper() + sides.how[1:],
        "train": sides.train.describe(),
        "held_out": sides.held_out.describe(),
        "test": "" if sides.test is None else f"- Test: {sides.test.describe()}.\n",
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
    model_arguments: TaskModelArguments, data_arguments: ClassifyArguments, training_arguments: ClassifyRunArguments
) -> Path:
    """
    Label the texts of a file with a trained model; writes its columns with `predicted` and `probability`.

    Where the file has labels, too, their figures are printed.

    Raises:
        ValueError: No model is named, it is none with labels, or the file has no texts.
    """
    name, source = model_arguments.model_name_or_path, data_arguments.predict or ""
    if name is None:
        raise ValueError(f"predict is {source}, but no model: name a trained one with --model_name_or_path.")
    architectures = AutoConfig.from_pretrained(name).architectures or ["no model"]
    if "ForSequenceClassification" not in architectures[0]:
        raise ValueError(
            f"{name} is {architectures[0]}, which gives no labels to texts. Name a folder that hf-reformer classify "
            "has trained."
        )
    target = data_arguments.predictions_path or Path(source).with_name(f"{Path(source).stem}_predictions.csv")
    table = read_table(source)
    texts, rows = texts_of(table, data_arguments.text_column, source, drop=data_arguments.drop_incomplete)
    tokenizer = load_tokenizer(model_arguments)
    model = AutoModelForSequenceClassification.from_pretrained(name).to(training_arguments.device)
    if model_arguments.context_length is not None:
        check_length(model_arguments.context_length, model.config)
        tokenizer.model_max_length = model_arguments.context_length
    elif tokenizer.model_max_length > NO_BOUND and longest_input(model.config) is not None:
        tokenizer.model_max_length = longest_input(model.config)
    chances, num_cut = predict_chances(model, tokenizer, texts, quiet=bool(training_arguments.disable_tqdm))
    predicted = [model.config.id2label[place] for place in chances.argmax(-1).tolist()]
    columns = {column: column_of(table, column, "", source) for column in table.column_names}
    columns = {column: [values[row] for row in rows] for column, values in columns.items()}
    columns |= {"predicted": predicted, "probability": [round(chance, 4) for chance in chances.amax(-1).tolist()]}
    write_table(target, columns)
    cut = f", {num_cut:,} of them cut at {tokenizer.model_max_length:,} tokens" if num_cut else ""
    print(f"{target}: {len(texts):,} texts labelled{cut}")
    if set(map(str, columns.get(data_arguments.label_column, [None]))) <= set(model.config.label2id):
        print(said(classification_figures(list(map(str, columns[data_arguments.label_column])), predicted)))
    return Path(target)


def parse_arguments(
    argv: list[str],
) -> tuple[TaskModelArguments, ModelRecipe, ClassifyArguments, ClassifyRunArguments]:
    """Arguments from the command line, or from the one JSON or YAML file named there."""
    return parse_groups(argv, TaskModelArguments, ModelRecipe, ClassifyArguments, ClassifyRunArguments, of=__doc__)


def main(argv: list[str] | None = None) -> None:
    """Train or label as the command line says; a mistake ends the program with its message."""
    with mistakes_end("classify"):
        model_arguments, recipe, data_arguments, training_arguments = parse_arguments(
            sys.argv[1:] if argv is None else argv
        )
        if data_arguments.predict:
            predict(model_arguments, data_arguments, training_arguments)
        else:
            classify(model_arguments, recipe, data_arguments, training_arguments)


def run_process(argv: list[str] | None = None) -> None:
    """`main` as all that this process does; its exit code says whether a signal ended it."""
    run_and_end(main, argv)


if __name__ == "__main__":
    run_process()
