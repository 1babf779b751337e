"""A stage before a task: the model fills in what was hidden in the task's own training texts."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase, set_seed
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, sort_checkpoints

from ..configuration.configuration_reformer import ReformerConfig
from ..modeling.modeling_reformer import ReformerForMaskedLM
from .run_checkpoints import RunArguments, find_checkpoint, mark_whole, newest_whole, read_run, saving
from .run_identity import check_same_run, identify_run, refuse_other_run
from .run_trainer import run_training
from .task_trainer import TaskTrainer
from .time_left import SayTimeLeft


FOLDER = "pretrained"


class Digest(NamedTuple):
    """What a stage reads, by a short name."""

    digest: str


class StageSides(NamedTuple):
    """What the stage is trained on; nothing is held out."""

    train: Digest
    held_out: Digest


@dataclass(frozen=True)
class MaskedStage:
    """How long, at which peak learning rate, and with which share of the tokens hidden."""

    steps: int
    learning_rate: float
    mlm_probability: float


def find_task_checkpoint(arguments: RunArguments, *, after_pretraining: bool) -> str | None:
    """
    The checkpoint a task goes on from, as `find_checkpoint` says; none where it was stopped in the stage before.

    Raises:
        ValueError: There is none, or the output folder holds those of another run.
    """
    stage = Path(arguments.output_dir) / FOLDER
    if arguments.resume_from_checkpoint == "last" and after_pretraining and not sort_checkpoints(arguments.output_dir):
        if read_run(stage) or (stage.is_dir() and newest_whole(stage)):
            return None
    return find_checkpoint(arguments)


def pretrain(
    config: ReformerConfig,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[Sequence[int]],
    arguments: RunArguments,
    stage: MaskedStage,
    digest: str,
) -> Path:
    """
    Train a masked model on rows of tokens, or go on with that, or find it done.

    Args:
        config: Of the model that comes out.
        ids: The rows.
        arguments: Of the task's run; the stage's folder is in its output folder.
        digest: A short name of the texts.

    Returns:
        The folder with the model.

    Raises:
        ValueError: What is in the folder is of another run.
        Interrupted: SIGTERM or Ctrl-C came; the last step is saved.
    """
    own = _stage_arguments(arguments, stage)
    folder, resumes = Path(own.output_dir), own.resume_from_checkpoint is not None
    set_seed(own.seed)
    trainer = TaskTrainer(
        model=ReformerForMaskedLM(config),
        args=own,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=stage.mlm_probability),
        train_dataset=Dataset.from_dict({"input_ids": list(ids)}),
        processing_class=tokenizer,
        callbacks=[SayTimeLeft(0)],
        lengths=[len(row) for row in ids],
    )
    objective = {"objective": "masked", "mlm_probability": stage.mlm_probability, "pretrain_steps": stage.steps}
    trainer.run = identify_run(trainer, StageSides(Digest(digest), Digest("none")), objective)
    done = read_run(folder) if resumes else None
    if done is not None:
        refuse_other_run(folder, done, trainer.run, accept_changes=arguments.accept_changes)
        return folder
    checkpoint = newest_whole(folder) if resumes and folder.is_dir() else None
    if checkpoint is not None:
        check_same_run(checkpoint, trainer.run, accept_changes=arguments.accept_changes)
    hidden = f"{100 * stage.mlm_probability:g}% of the tokens of the training texts hidden"
    print(f"pretraining: {stage.steps:,} steps, {hidden}", flush=True)
    run_training(trainer, own, checkpoint, goes_on="--resume_from_checkpoint last goes on")
    with saving(folder):
        trainer.save_model()
        if trainer.is_world_process_zero():
            mark_whole(folder, trainer.run)
    arguments.distributed_state.wait_for_everyone()
    return folder


def _stage_arguments(arguments: RunArguments, own: MaskedStage) -> RunArguments:
    """A copy, not a new object, whose fields would be read a second time."""
    stage = copy.copy(arguments)
    stage.output_dir = str(Path(arguments.output_dir) / FOLDER)
    stage.max_steps, stage.learning_rate = own.steps, own.learning_rate
    stage.eval_strategy, stage.do_eval, stage.load_best_model_at_end = IntervalStrategy.NO, False, False
    stage.push_to_hub = False
    if stage.save_strategy == SaveStrategy.BEST:
        stage.save_strategy = SaveStrategy.STEPS
    if not arguments.resume_from_checkpoint:
        # Refuses what another run left, or deletes it if that was asked for.
        find_checkpoint(stage)
    elif arguments.resume_from_checkpoint != "last":
        # A checkpoint of the task says which stage came before it: the one in the folder.
        stage.resume_from_checkpoint = "last"
    return stage
