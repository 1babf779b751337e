"""The part of a task's run that does not know the task: a Trainer, which run it is, and training until it ends."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

from .run_checkpoints import RunArguments
from .run_identity import Sides, check_same_run, identify_run
from .run_report import describe_run, layers_of
from .run_trainer import run_training
from .task_trainer import SayFigures, TaskTrainer
from .time_left import SayTimeLeft


@dataclass(frozen=True)
class TaskRows:
    """
    What a Trainer is given, and where it is from.

    Attributes:
        train, held_out: Rows with `input_ids` and labels.
        sides: What they are from, for the identity of the run.
        lengths: Tokens of the rows for training.
    """

    train: Dataset
    held_out: Dataset
    sides: Sides
    lengths: Sequence[int]


@dataclass(frozen=True)
class Measure:
    """
    How an evaluation is made figures.

    Attributes:
        names: Of the figures.
        compute: Makes them of an evaluation.
        reduce: What of the logits is kept for that.
        beside: The figures of a baseline, and what it is called.
    """

    names: Sequence[str]
    compute: Callable[[EvalPrediction], dict[str, float]]
    reduce: Callable[[Any, Any], Any]
    beside: tuple[dict[str, float] | None, str] = (None, "")


def train_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    collator: Callable,
    rows: TaskRows,
    measure: Measure,
    arguments: RunArguments,
    objective: dict[str, Any],
    checkpoint: str | None,
    packer: Callable | None = None,
) -> TaskTrainer:
    """
    Train, from the checkpoint on if there is one.

    Args:
        collator: Makes a batch of rows.
        objective: What decides the course of the run besides model, text and arguments.
        packer: Makes a batch of rows for training instead, several texts in a row.

    Raises:
        ValueError: The checkpoint is of another run, or training diverged.
        Interrupted: SIGTERM or Ctrl-C came; the last step is saved.
    """
    trainer = TaskTrainer(
        model=model,
        args=arguments,
        data_collator=collator,
        train_dataset=rows.train,
        eval_dataset=rows.held_out,
        processing_class=tokenizer,
        compute_metrics=measure.compute,
        preprocess_logits_for_metrics=measure.reduce,
        callbacks=[SayTimeLeft(len(rows.held_out)), SayFigures(measure.names, *measure.beside)],
        lengths=rows.lengths,
        packer=packer,
    )
    trainer.run = identify_run(trainer, rows.sides, objective)
    if checkpoint is not None:
        check_same_run(checkpoint, trainer.run, accept_changes=arguments.accept_changes)
    if trainer.is_world_process_zero():
        print(
            f"model: {type(model).__name__}, {model.num_parameters():,} parameters, layers {layers_of(model.config)}",
            flush=True,
        )
    run_training(trainer, arguments, checkpoint, goes_on="--resume_from_checkpoint last goes on")
    return trainer


def describe_task_run(trainer: TaskTrainer, context_length: int, start: str) -> dict[str, Any]:
    """What a model card says of a run, whatever the task."""
    facts, args = describe_run(trainer, context_length, start), trainer.args
    seconds = next(
        (row["train_runtime"] for row in reversed(trainer.state.log_history) if "train_runtime" in row), None
    )
    return facts | {
        "layers": facts["layers"] or "as its class has it",
        "rows_per_step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "time": "" if seconds is None else f"The last part of the training took {seconds:,.0f} s.",
    }
