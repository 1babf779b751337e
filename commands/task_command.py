"""Training on labels, whatever the task: reading, baselines, masked pretraining, training and reporting in order."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from datasets import disable_progress_bars
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ..configuration.configuration_reformer import ReformerConfig
from ..training.masked_pretraining import find_task_checkpoint, pretrain
from ..training.packing import TextPacker
from ..training.recipe import ModelRecipe
from ..training.row_batches import NO_BOUND, check_length, existing, longest_input
from ..training.run_checkpoints import RunArguments, saving
from ..training.run_trainer import check_strategy, whole_model
from ..training.task_report import figures_table, write_card, write_task_curve, write_task_log
from ..training.task_run import Measure, TaskRows, describe_task_run, train_task
from ..training.task_trainer import TaskTrainer, said
from .command_line import alignment_in_windows, mistakes_end
from .task_models import TaskModelArguments, load_model, load_tokenizer


Figures = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Prepared:
    """What a run is made of: the tokenizer, which knows how much of a text is read, the config and the rows."""

    tokenizer: PreTrainedTokenizerBase
    config: PreTrainedConfig
    rows: TaskRows


@dataclass(frozen=True)
class Report:
    """
    What a task says of a finished run.

    Attributes:
        figures: Those of the model.
        facts: For the card, beside those of every run.
        files: What it has written.
    """

    figures: dict[str, float]
    facts: dict[str, Any]
    files: Sequence[str]


class Task(ABC):
    """
    What is a task's own.

    Attributes:
        classes: The Reformer of the task, and the Auto class.
        objective: A name for what is learnt.
        pipeline: Of transformers, that the trained model works in.
        main_figure: The one that is drawn.
        baseline_is: What stands beside, for the message while it is fitted.
        packs: Whether texts may share a row.
        identity: What decides the course of a run besides model, text and arguments; `prepare` may set it.
    """

    classes: tuple[type[PreTrainedModel], Any]
    objective: str
    pipeline: str
    main_figure: str
    baseline_is: str
    packs: bool = True

    def __init__(self, data_arguments: Any):
        self.data_arguments = data_arguments
        self.identity: dict[str, Any] = {}

    @abstractmethod
    def read(self) -> Any:
        """The sides: texts for training, held out, and perhaps a test."""

    @abstractmethod
    def prepare(self, model_arguments: TaskModelArguments, recipe: ModelRecipe, sides: Any) -> Prepared:
        """Tokenizer, config and rows; a ValueError where they do not fit."""

    def adapt(self, model: PreTrainedModel) -> None:
        """Tell a model, before it is trained, what it shall say of itself; a task may keep it for its collator."""
        self.model = model

    @abstractmethod
    def baselines(self, sides: Any) -> Figures:
        """Figures of what takes no Reformer, the best first."""

    @abstractmethod
    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable:
        """Makes a batch of rows."""

    @abstractmethod
    def measure(self, sides: Any) -> Measure:
        """How an evaluation in training is made figures."""

    @abstractmethod
    def report(self, trainer: TaskTrainer, sides: Any) -> Report:
        """Measure the final weights on `sides.measured`, and write pictures and predictions."""


def run_task(
    task: Task, model_arguments: TaskModelArguments, recipe: ModelRecipe, training_arguments: RunArguments
) -> Figures:
    """
    Train, evaluate and save; returns the figures of `this model` and of the baselines on texts held out.

    The output folder then holds the model (safetensors), its tokenizer, README.md (the model card), curve.png,
    training_log.json, and what the task writes.

    Raises:
        ValueError: Something given is wrong, or training diverged.
        Interrupted: SIGTERM or Ctrl-C came; the last step is saved.
    """
    check_strategy(training_arguments)
    checkpoint = find_task_checkpoint(training_arguments, after_pretraining=model_arguments.pretrain_steps > 0)
    if training_arguments.disable_tqdm or training_arguments.process_index > 0:
        disable_progress_bars()
    with training_arguments.main_process_first(desc="reading the texts"):
        sides = task.read()
    prepared = task.prepare(model_arguments, recipe, sides)
    figures: Figures = {}
    if training_arguments.process_index == 0:
        if task.data_arguments.baseline:
            print(f"fitting {task.baseline_is}, to stand beside; --baseline False leaves it out", flush=True)
            figures = task.baselines(sides)
        describe(task.data_arguments, sides, figures)
    pretrained = None
    if model_arguments.pretrain_steps:
        config, ids = cast(ReformerConfig, prepared.config), prepared.rows.train["input_ids"][:]
        stage = model_arguments.masked_stage
        pretrained = pretrain(config, prepared.tokenizer, ids, training_arguments, stage, sides.train.digest)
    set_seed(training_arguments.seed)
    called = next(iter(figures), "")
    model = load_model(task.classes, model_arguments, prepared.config, prepared.tokenizer, pretrained)
    task.adapt(model)
    trainer = train_task(
        model,
        prepared.tokenizer,
        task.collator(prepared.tokenizer),
        prepared.rows,
        replace(task.measure(sides), beside=(figures.get(called), called)),
        training_arguments,
        {
            "objective": task.objective,
            "pretrain_steps": model_arguments.pretrain_steps,
            "context_length": prepared.tokenizer.model_max_length,
            "packing": model_arguments.packing,
        }
        | task.identity,
        checkpoint,
        packer_of(task, prepared) if model_arguments.packing else None,
    )
    with saving(training_arguments.output_dir):
        trainer.save_model()
        trainer.save_state()
        if trainer.is_world_process_zero():
            figures = write_report(task, trainer, sides, figures, model_arguments)
    if training_arguments.push_to_hub:
        trainer.push_to_hub()
    return figures


def packer_of(task: Task, prepared: Prepared) -> TextPacker:
    """
    What puts several texts into a row.

    Raises:
        ValueError: The task or the model does not keep texts apart that share a row.
    """
    if not task.packs:
        raise ValueError(
            "packing is True, but an answer is looked for in a whole row, so texts cannot share one. Leave it out."
        )
    alignment = alignment_in_windows(prepared.config, packing=True)
    return TextPacker(prepared.tokenizer.model_max_length, alignment, prepared.tokenizer.pad_token_id or 0)


def describe(data_arguments: Any, sides: Any, figures: Figures) -> None:
    """Say what is trained on what, and what it stands beside."""
    print(f"text: {data_arguments.source}; {sides.how}")
    for name in ("train", "held_out", "test"):
        side = getattr(sides, name)
        if side is not None:
            print(f"{name.replace('_', '-')}: {side.describe()}")
    for name, values in figures.items():
        print(f"{name}: {said(values)}", flush=True)


def write_report(
    task: Task, trainer: TaskTrainer, sides: Any, beside: Figures, model_arguments: TaskModelArguments
) -> Figures:
    """Measure the final weights, and write card, pictures, predictions and log into the output folder."""
    folder, data_arguments = Path(trainer.args.output_dir), task.data_arguments
    start = model_arguments.model_name_or_path or "random"
    if model_arguments.pretrain_steps:
        start = f"{model_arguments.pretrain_steps:,} steps of filling in hidden tokens of the training texts"
    with whole_model(trainer):
        found = task.report(trainer, sides)
        described = describe_task_run(trainer, trainer.processing_class.model_max_length, start)
    figures = {"this model": found.figures} | beside
    main = task.main_figure if task.main_figure in found.figures else next(iter(found.figures))
    write_task_curve(
        folder / "curve.png",
        trainer.state.log_history,
        main,
        {name: values[main] for name, values in beside.items() if main in values},
        found.figures[main],
    )
    write_task_log(
        folder / "training_log.json",
        trainer,
        figures,
        model_arguments=vars(model_arguments),
        data_arguments=vars(data_arguments),
    )
    facts = described | {
        "pipeline_tag": task.pipeline,
        "source": data_arguments.source,
        "split": sides.how[0].upper() + sides.how[1:],
        "train": sides.train.describe(),
        "held_out": sides.held_out.describe(),
        "test": "" if sides.test is None else f"- Test: {sides.test.describe()}.\n",
    }
    facts |= found.facts
    facts["usage"] = facts["usage"].format(name=facts["name"])
    if trainer.args.load_best_model_at_end and sides.test is None:
        facts["measured_on"] += " The weights were chosen on them."
    write_card(folder / "README.md", facts, figures)
    print(f"\n{figures_table(figures)}\n\n{folder}: model, README.md, {', '.join(found.files)}", flush=True)
    return figures


def load_trained(
    model_arguments: TaskModelArguments,
    architecture: str,
    command: str,
    auto_class: Any,
    source: str,
    device: Any,
    tokenizer_of: Callable[[TaskModelArguments], PreTrainedTokenizerBase] = load_tokenizer,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    The trained model that new texts are put to, and its tokenizer, which knows how much of a text is read.

    Args:
        architecture: What the name of its class holds, such as ForTokenClassification.
        command: The one that trains such models.
        source: What it is put to.
        tokenizer_of: Loads the tokenizer.

    Raises:
        ValueError: No model is named, or it is of another kind.
    """
    name = model_arguments.model_name_or_path
    if name is None:
        raise ValueError(f"predict is {source}, but no model: name a trained one with --model_name_or_path.")
    architectures = AutoConfig.from_pretrained(existing(name)).architectures or ["no model"]
    if architecture not in architectures[0]:
        raise ValueError(
            f"{name} is {architectures[0]}, which cannot do this. Name a folder that hf-reformer {command} trained."
        )
    tokenizer = tokenizer_of(model_arguments)
    model = auto_class.from_pretrained(name).to(device)
    if model_arguments.context_length is not None:
        check_length(model_arguments.context_length, model.config)
        tokenizer.model_max_length = model_arguments.context_length
    elif tokenizer.model_max_length > NO_BOUND and longest_input(model.config) is not None:
        tokenizer.model_max_length = longest_input(model.config)
    return model, tokenizer


def run_command(command: str, argv: list[str] | None, parse: Callable, train: Callable, predict: Callable) -> None:
    """
    Train or predict as the command line says; a mistake ends the program with its message.

    Args:
        command: The name that is typed.
        parse: Makes arguments of the command line: of the model, the recipe, the data and the run.
        train: Takes all of them.
        predict: Takes all but the recipe; runs where the data say what to predict.
    """
    with mistakes_end(command):
        train_or_predict(train, predict, *parse(sys.argv[1:] if argv is None else argv))


def train_or_predict(
    train: Callable,
    predict: Callable,
    model_arguments: TaskModelArguments,
    recipe: ModelRecipe,
    data_arguments: Any,
    training_arguments: Any,
) -> None:
    """`predict`, which takes all but the recipe, where the data say what to predict; else `train`."""
    if data_arguments.predict:
        predict(model_arguments, data_arguments, training_arguments)
    else:
        train(model_arguments, recipe, data_arguments, training_arguments)
