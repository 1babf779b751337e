"""Transformers' own example scripts, unmodified, from a checkout of its repository."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from .launching import read_results, run_program
from .setting import Check, Setting, expect
from .texts import (
    write_choices,
    write_classification,
    write_pairs,
    write_questions,
    write_tagged_words,
    write_text,
)


TOOLS = ("transformers", "datasets", "evaluate", "accelerate")
STEPS = 3
TRAINING = (
    *("--do_train", "--do_eval", "--use_cpu", "--max_steps", STEPS, "--per_device_train_batch_size", 2),
    *("--per_device_eval_batch_size", 8, "--learning_rate", 1e-3, "--report_to", "none", "--save_strategy", "no"),
)
PREDICTION = ("--do_predict",)
LENGTH = 128


def run_example(
    script: str, kind: str, write: Callable[[Path], Path], file_name: str, options: tuple, setting: Setting
) -> dict[str, Any]:
    """Train, evaluate and, where the script can, predict with the saved model of a kind."""
    path, output_dir = write(setting.folder / file_name), setting.folder / "output"
    files = ("--train_file", path, "--validation_file", path)
    if "--do_predict" in options:
        files += ("--test_file", path)
    model = ("--model_name_or_path", getattr(setting, kind), "--output_dir", output_dir)
    run_program(setting.examples / script, *model, *files, *TRAINING, *options)
    figures = read_results(output_dir)
    expect("the losses are numbers", all(value == value for value in figures.values()))
    return figures


SCRIPTS = {
    "run_clm": ("language-modeling/run_clm.py", "causal", write_text, "text.txt", ("--block_size", LENGTH)),
    "run_mlm": ("language-modeling/run_mlm.py", "masked", write_text, "text.txt", ("--max_seq_length", LENGTH)),
    "run_mlm, lines": (
        *("language-modeling/run_mlm.py", "masked", write_text, "text.txt"),
        ("--max_seq_length", LENGTH, "--line_by_line"),
    ),
    "run_glue": (
        *("text-classification/run_glue.py", "masked", write_pairs, "pairs.csv"),
        ("--max_seq_length", LENGTH, *PREDICTION),
    ),
    "run_glue, causal": (
        *("text-classification/run_glue.py", "causal", write_pairs, "pairs.csv"),
        ("--max_seq_length", LENGTH, *PREDICTION),
    ),
    "run_classification": (
        *("text-classification/run_classification.py", "masked", write_classification, "sentences.csv"),
        ("--max_seq_length", LENGTH, "--text_column_names", "sentence", "--metric_name", "accuracy", *PREDICTION),
    ),
    "run_ner": (
        *("token-classification/run_ner.py", "masked", write_tagged_words, "words.json"),
        ("--max_seq_length", LENGTH, *PREDICTION),
    ),
    "run_qa": (
        *("question-answering/run_qa.py", "masked", write_questions, "questions.json"),
        ("--max_seq_length", LENGTH, "--doc_stride", 16, *PREDICTION),
    ),
    "run_swag": ("multiple-choice/run_swag.py", "masked", write_choices, "choices.csv", ("--max_seq_length", LENGTH)),
}
CHECKS: dict[str, Check] = {name: partial(run_example, *arguments) for name, arguments in SCRIPTS.items()}
FROM_SOURCE = set(CHECKS)
