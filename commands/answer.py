"""
Train a model that answers questions with a part of a text, and put it to new questions.

    hf-reformer answer --data questions.csv --answers_column answer --output_dir runs/manual
    hf-reformer answer --data train-v2.0.json --validation_data dev-v2.0.json          # SQuAD's format
    hf-reformer answer --model_name_or_path runs/manual --predict new.csv              # writes new_predictions.jsonl

Rows have a question, a context and the answer, which is a part of the context; csv, json, jsonl or parquet. A context
that is longer than what the model reads at once is read in windows that overlap. Every option of the Trainer works.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForQuestionAnswering,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
)

from ..modeling.modeling_reformer import ReformerForQuestionAnswering
from ..training.answering import (
    answer_figures,
    answers_at,
    baseline,
    find_answers,
    log_chances,
    num_cut,
    rows_of,
    windows_of,
)
from ..training.questions import Answer, QuestionDataArguments, Questions, QuestionSides, questions_of, read_questions
from ..training.recipe import ModelRecipe
from ..training.row_batches import check_length
from ..training.tables import excerpt, write_table
from ..training.task_run import Measure, TaskRows
from ..training.task_trainer import TaskRunArguments, TaskTrainer, said
from .command_line import parse_groups
from .task_command import Figures, Prepared, Report, Task, load_trained, run_command, run_task
from .task_models import TaskModelArguments, existing_config, load_config, load_tokenizer
from .training_process import run_and_end


FIGURES = ("exact_match", "f1")
# Characters of a context beside its answer.
EXCERPT = 200
# There is no pipeline for it in transformers 5.
USAGE = """from transformers import AutoModelForQuestionAnswering, AutoTokenizer

model, tokenizer = (kind.from_pretrained("{name}") for kind in (AutoModelForQuestionAnswering, AutoTokenizer))
inputs = tokenizer("A question?", "A text that has the answer.", return_tensors="pt")
output = model(**inputs)
start, end = output.start_logits.argmax(), output.end_logits.argmax()
print(tokenizer.decode(inputs["input_ids"][0, start : end + 1]))"""


@dataclass
class AnswerRunArguments(TaskRunArguments):
    """A run's arguments."""

    output_dir: str = field(default="runs/answer", metadata={"help": "Where checkpoints and the model go."})
    label_names: list[str] | None = field(
        default_factory=lambda: ["start_positions", "end_positions"], metadata={"help": "What rows are labelled with."}
    )


class AnswerQuestions(Task):
    """Answers that are parts of texts."""

    classes = ReformerForQuestionAnswering, AutoModelForQuestionAnswering
    objective, pipeline, main_figure = "answers", "question-answering", "f1"
    baseline_is = "TF-IDF"
    packs = False

    def read(self) -> QuestionSides:
        """Questions, contexts and answers."""
        return read_questions(self.data_arguments)

    def prepare(self, model_arguments: TaskModelArguments, recipe: ModelRecipe, sides: QuestionSides) -> Prepared:
        """Contexts longer than the model reads at once become several windows."""
        tokenizer = load_tokenizer(model_arguments)
        train = windows_of(sides.train, tokenizer, sys.maxsize)
        lengths = [len(window.ids) for window in train]
        context_length = model_arguments.context_for(lengths, existing_config(model_arguments))
        config = load_config(model_arguments, recipe, tokenizer, context_length)
        check_length(context_length, config)
        tokenizer.model_max_length = context_length
        if max(lengths) > context_length:
            train = windows_of(sides.train, tokenizer, context_length)
        held_out = windows_of(sides.held_out, tokenizer, context_length)
        self.measured_windows = held_out if sides.test is None else windows_of(sides.test, tokenizer, context_length)
        self.held_out_windows = held_out
        cut = num_cut(train, sides.train)
        if cut:
            print(
                f"{cut:,} questions for training have an answer that no window of {context_length:,} tokens holds "
                "whole, and learn that there is none; --context_length says how long windows are",
                flush=True,
            )
        rows = TaskRows(rows_of(train), rows_of(held_out), sides, [len(window.ids) for window in train])
        return Prepared(tokenizer, config, rows)

    def baselines(self, sides: QuestionSides) -> Figures:
        """The sentence most like the question."""
        return baseline(sides.measured)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable:
        """Pads rows."""
        return DataCollatorWithPadding(tokenizer)

    def measure(self, sides: QuestionSides) -> Measure:
        """The figures of the report."""

        def compute(evaluation: EvalPrediction) -> dict[str, float]:
            starts, ends = (np.asarray(side, dtype=np.float32) for side in evaluation.predictions)
            scores = [
                log_chances(np.stack([start, end], axis=-1)[: len(window.ids)])
                for window, start, end in zip(self.held_out_windows, starts, ends, strict=True)
            ]
            return answer_figures(sides.held_out, answers_at(self.held_out_windows, scores, sides.held_out)[0])

        def reduce(logits, labels) -> tuple[torch.Tensor, torch.Tensor]:
            return logits[0].float(), logits[1].float()

        return Measure(FIGURES, compute, reduce)

    def report(self, trainer: TaskTrainer, sides: QuestionSides) -> Report:
        """Figures, and predictions.jsonl of the questions that the figures are of."""
        folder, measured, tokenizer = Path(trainer.args.output_dir), sides.measured, trainer.processing_class
        windows, quiet = self.measured_windows, bool(trainer.args.disable_tqdm)
        how = {"pad_token_id": tokenizer.pad_token_id, "quiet": quiet}
        answers, chances = find_answers(trainer.model, windows, measured, **how)
        columns = _columns(measured, answers, chances)
        columns["answers"] = _right(measured)
        columns["context"] = [excerpt(context, EXCERPT) for context in measured.contexts]
        write_table(folder / "predictions.jsonl", columns)
        facts = _card_facts(sides, len(windows))
        return Report(answer_figures(measured, answers), facts, ["predictions.jsonl"])


def answer(
    model_arguments: TaskModelArguments,
    recipe: ModelRecipe,
    data_arguments: QuestionDataArguments,
    training_arguments: AnswerRunArguments,
) -> Figures:
    """Train, evaluate and save, as `run_task` says."""
    return run_task(AnswerQuestions(data_arguments), model_arguments, recipe, training_arguments)


def _columns(questions: Questions, answers: Sequence[Answer | None], chances: Sequence[float]) -> dict[str, list[Any]]:
    """A row for each question: what was found."""
    return {
        "row": [row + 1 for row in questions.rows],
        "question": list(questions.questions),
        "predicted": [None if found is None else found.text for found in answers],
        "start": [None if found is None else found.start for found in answers],
        "probability": [round(chance, 4) for chance in chances],
    }


def _right(questions: Questions) -> list[list[str]]:
    """The right answers to each question."""
    return [[one.text for one in right] for right in questions.answers]


def _card_facts(sides: QuestionSides, num_windows: int) -> dict[str, Any]:
    """What the card says of answers."""
    which = "held-out" if sides.test is None else "test"
    return {
        "objective": "answers questions with a part of a text",
        "labels": "",
        "longer": "longer ones are read in windows that overlap",
        "usage": USAGE,
        "measured_on": (
            f"Exact match and F1 of words (torchmetrics, SQuAD's rules), of the {len(sides.measured):,} {which} "
            f"questions, read in {num_windows:,} windows. The baseline answers with a whole sentence or line."
        ),
        "pictures": "\n![Curve](curve.png)\n",
    }


def predict(
    model_arguments: TaskModelArguments, data_arguments: QuestionDataArguments, training_arguments: AnswerRunArguments
) -> Path:
    """
    Answer the questions of a file with a trained model; writes a record for each.

    Raises:
        ValueError: No model is named, it answers no questions, or the file has none.
    """
    source = data_arguments.predict or ""
    model, tokenizer = load_trained(
        model_arguments,
        "ForQuestionAnswering",
        "answer",
        AutoModelForQuestionAnswering,
        source,
        training_arguments.device,
    )
    questions = questions_of(source, data_arguments, with_answers=False)
    windows = windows_of(questions, tokenizer, tokenizer.model_max_length)
    quiet = bool(training_arguments.disable_tqdm)
    answers, chances = find_answers(model, windows, questions, pad_token_id=tokenizer.pad_token_id, quiet=quiet)
    columns = _columns(questions, answers, chances) | {"context": questions.contexts}
    has_answers = any(questions.answers)
    if has_answers:
        columns["answers"] = _right(questions)
    write_table(data_arguments.predictions, questions.others | columns)
    without = sum(found is None for found in answers)
    print(f"{data_arguments.predictions}: {len(questions):,} questions, {without:,} without an answer")
    if has_answers:
        print(said(answer_figures(questions, answers)))
    return data_arguments.predictions


def parse_arguments(
    argv: list[str],
) -> tuple[TaskModelArguments, ModelRecipe, QuestionDataArguments, AnswerRunArguments]:
    """Arguments from the command line, or from the one JSON or YAML file named there."""
    return parse_groups(argv, TaskModelArguments, ModelRecipe, QuestionDataArguments, AnswerRunArguments, of=__doc__)


def main(argv: list[str] | None = None) -> None:
    """Train or answer as the command line says; a mistake ends the program with its message."""
    run_command("answer", argv, parse_arguments, answer, predict)


def run_process(argv: list[str] | None = None) -> None:
    """`main` as all that this process does; its exit code says whether a signal ended it."""
    run_and_end(main, argv)


if __name__ == "__main__":
    run_process()
