"""
Train a model that reads a text and writes another, and have it write: `hf-reformer train --objective seq2seq`.

    hf-reformer train --objective seq2seq --data pairs.csv --output_dir runs/pairs
    hf-reformer train --objective seq2seq --data code.jsonl --source_column body --target_column docstring
    hf-reformer train --objective seq2seq --model_name_or_path runs/pairs --predict new.csv    # new_predictions.jsonl

Rows have a source and a target; csv, tsv, json, jsonl or parquet. Every option of the Trainer works.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..modeling.seq2seq import ReformerForConditionalGeneration
from ..training.pair_rows import (
    BITS,
    EXACT,
    PairRows,
    baselines_of_pairs,
    bits_of,
    bits_per_target_byte,
    evenly_spaced,
    nats_of_targets,
    rows_of_pairs,
    written,
)
from ..training.pairs import PairDataArguments, Pairs, PairSides, pairs_of, read_pairs
from ..training.recipe import ModelRecipe
from ..training.row_batches import check_length, longest_input
from ..training.tables import excerpt, write_table
from ..training.task_run import Measure, TaskRows
from ..training.task_trainer import TaskRunArguments, TaskTrainer
from .command_line import config_of, named_tokenizer, parse_groups, parse_settings
from .task_command import Figures, Prepared, Report, Task, load_trained, run_task, train_or_predict
from .task_models import LONGEST_BY_DEFAULT, TaskModelArguments, existing_config


OBJECTIVE = "seq2seq"
# Characters of a source beside what was written for it.
EXCERPT = 200
USAGE = """from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

model, tokenizer = (kind.from_pretrained("{name}") for kind in (AutoModelForSeq2SeqLM, AutoTokenizer))
inputs = tokenizer("A text to read.", return_tensors="pt")
ids = model.generate(**inputs)
print(tokenizer.decode(ids[0], skip_special_tokens=True))"""


@dataclass
class PairModelArguments(TaskModelArguments):
    """What learns to write: a new model, or an existing one."""

    objective: str = field(
        default=OBJECTIVE, metadata={"help": "Write a text for another.", "choices": ["causal", "masked", OBJECTIVE]}
    )
    source_length: int | None = field(
        default=None,
        metadata={
            "help": "Tokens that are read of a source; by default those of the longest for training, at most "
            f"{LONGEST_BY_DEFAULT}."
        },
    )
    target_length: int | None = field(
        default=None, metadata={"help": "Tokens of a target with its end of text; the same by default."}
    )
    # What tasks with labels have beside these.
    context_length: int | None = field(default=None, init=False)
    pretrain_steps: int = field(default=0, init=False)
    pretrain_learning_rate: float = field(default=0.0, init=False)
    mlm_probability: float = field(default=0.15, init=False)
    packing: bool = field(default=False, init=False)

    def __post_init__(self):
        super().__post_init__()
        for name, least in (("source_length", 1), ("target_length", 2)):
            given = getattr(self, name)
            if given is not None and given < least:
                raise ValueError(f"{name} is {given}; it must be at least {least}.")


@dataclass
class PairRunArguments(TaskRunArguments):
    """A run's arguments."""

    output_dir: str = field(default="runs/seq2seq", metadata={"help": "Where checkpoints and the model go."})
    learning_rate: float = field(default=1e-2, metadata={"help": "Peak learning rate."})


class WriteTargets(Task):
    """Texts that are written for others."""

    classes = ReformerForConditionalGeneration, AutoModelForSeq2SeqLM
    objective, pipeline, main_figure = OBJECTIVE, "text2text-generation", BITS
    baseline_is = "TF-IDF"
    packs = False

    data_arguments: PairDataArguments

    def read(self) -> PairSides:
        """Sources and targets."""
        return read_pairs(self.data_arguments)

    def prepare(self, model_arguments: TaskModelArguments, recipe: ModelRecipe, sides: PairSides) -> Prepared:
        """Sources and targets are cut to their lengths, which is said."""
        tokenizer, config = load_tokenizer(model_arguments), existing_config(model_arguments)
        train = rows_of_pairs(sides.train, tokenizer, None, None)
        self.source_length = _length(model_arguments, "source_length", train.sources, config)
        self.target_length = _length(model_arguments, "target_length", train.targets, config)
        longest = max(self.source_length, self.target_length)
        config = load_config(model_arguments, recipe, tokenizer, longest)
        check_length(self.source_length, config, "source_length")
        check_length(self.target_length, config, "target_length")
        tokenizer.model_max_length = self.source_length
        sides_by_name = {"training": sides.train, "held-out": sides.held_out, "test": sides.test}
        rows = {name: self._rows(name, side, tokenizer) for name, side in sides_by_name.items() if side is not None}
        self.held_out, self.measured = rows["held-out"], rows.get("test", rows["held-out"])
        self.places = evenly_spaced(len(self.measured), self.data_arguments.exact_examples)
        self.identity = {"source_length": self.source_length, "target_length": self.target_length}
        train = rows["training"]
        return Prepared(tokenizer, config, TaskRows(train.dataset, self.held_out.dataset, sides, train.lengths))

    def _rows(self, name: str, pairs: Pairs, tokenizer: PreTrainedTokenizerBase) -> PairRows:
        rows = rows_of_pairs(pairs, tokenizer, self.source_length, self.target_length)
        if rows.cut_sources or rows.cut_targets:
            print(
                f"{name}: {rows.cut_sources:,} of {len(rows):,} sources are longer than {self.source_length:,} tokens "
                f"and {rows.cut_targets:,} targets than {self.target_length:,}; they are cut there. --source_length "
                "and --target_length say where.",
                flush=True,
            )
        return rows

    def adapt(self, model: PreTrainedModel) -> None:
        """What it writes is as long as the targets by default."""
        super().adapt(model)
        generation_config: Any = model.generation_config
        generation_config.max_new_tokens = self.target_length

    def baselines(self, sides: PairSides) -> Figures:
        """What the targets cost without their sources, and the target of the most similar source."""
        measured = sides.measured
        return baselines_of_pairs(
            sides.train, measured, evenly_spaced(len(measured), self.data_arguments.exact_examples)
        )

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable:
        """Pads sources and labels, and has the model shift the labels: a smoother takes them away from it."""
        return DataCollatorForSeq2Seq(tokenizer, self.model)

    def measure(self, sides: PairSides) -> Measure:
        """Bits per byte of the held-out targets."""

        def compute(evaluation: EvalPrediction) -> dict[str, float]:
            return {BITS: bits_of(np.asarray(evaluation.predictions)[:, 0], self.held_out.num_bytes)}

        def reduce(logits: Any, labels: torch.Tensor) -> torch.Tensor:
            return nats_of_targets(logits[0] if isinstance(logits, tuple) else logits, labels)

        return Measure([BITS], compute, reduce)

    def report(self, trainer: TaskTrainer, sides: PairSides) -> Report:
        """Figures, and predictions.jsonl of the pairs whose targets were written."""
        folder, measured, tokenizer = Path(trainer.args.output_dir), sides.measured, trainer.processing_class
        quiet = bool(trainer.args.disable_tqdm)
        bits = bits_per_target_byte(trainer.model, self.measured, tokenizer.pad_token_id, quiet=quiet)
        sources = [self.measured.sources[place] for place in self.places]
        found = written(trainer.model, sources, tokenizer, self.target_length, quiet=quiet)
        exact = [ids == self.measured.whole[place] for ids, place in zip(found, self.places, strict=True)]
        chosen = measured.select(self.places)
        columns = _columns(chosen, tokenizer, found)
        columns |= {"source": [excerpt(source, EXCERPT) for source in chosen.sources], "target": chosen.targets}
        write_table(folder / "predictions.jsonl", columns | {EXACT: exact})
        figures = {BITS: bits, EXACT: sum(exact) / len(exact)}
        return Report(figures, self._card_facts(sides, len(exact)), ["predictions.jsonl"])

    def _card_facts(self, sides: PairSides, num_written: int) -> dict[str, Any]:
        """What the card says of written texts."""
        which = "held-out" if sides.test is None else "test"
        return {
            "objective": "reads a text and writes another",
            "labels": f"| tokens of a target | at most {self.target_length:,}, its end of text included |\n",
            "longer": "longer ones are cut",
            "usage": USAGE,
            "measured_on": (
                f"Bits per target byte: what the model spends, on average, on a byte of the {len(sides.measured):,} "
                f"{which} targets when it has read the source and what stands before; lower is better. Exact: the "
                f"share of {num_written:,} of these pairs, evenly spaced, whose target greedy `generate` writes byte "
                "by byte. `lzma` and order-2 know the targets only, the former by compression, the latter as the "
                "entropy of a byte behind two others."
            ),
            "pictures": "\n![Curve](curve.png)\n",
        }


def _length(
    arguments: TaskModelArguments, option: str, rows: Sequence[Sequence[int]], config: PreTrainedConfig | None
) -> int:
    """Tokens that are kept of each row."""
    given = getattr(arguments, option)
    if given is not None:
        return given
    longest = None if config is None else longest_input(config)
    return min(max(map(len, rows)), LONGEST_BY_DEFAULT, longest or LONGEST_BY_DEFAULT)


def load_tokenizer(arguments: TaskModelArguments) -> PreTrainedTokenizerBase:
    """The named tokenizer, the existing model's, or bytes; with what padding needs."""
    tokenizer = named_tokenizer(arguments.tokenizer_name or arguments.model_name_or_path)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return tokenizer


def load_config(
    arguments: TaskModelArguments, recipe: ModelRecipe, tokenizer: PreTrainedTokenizerBase, context_length: int
) -> PreTrainedConfig:
    """
    The config of the existing model, or of a new one.

    Raises:
        ValueError: The existing one has no encoder and decoder, `set` names what it does not have, or the recipe was
            changed beside it.
    """
    settings, name = parse_settings(arguments.set), arguments.model_name_or_path
    config = config_of(name, settings, recipe, context_length, tokenizer, is_encoder_decoder=True)
    if not config.is_encoder_decoder:
        kind = (config.architectures or [type(config).__name__])[0]
        raise ValueError(
            f"{name} is a {kind}, which has no encoder beside a decoder. Name a folder that hf-reformer train "
            "--objective seq2seq left, leave model_name_or_path out for a new model, or make one of two trained ones "
            "with ReformerForConditionalGeneration.from_encoder_decoder_pretrained(encoder, decoder) and save it."
        )
    return config


def train_pairs(
    model_arguments: PairModelArguments,
    recipe: ModelRecipe,
    data_arguments: PairDataArguments,
    training_arguments: PairRunArguments,
) -> Figures:
    """Train, evaluate and save, as `run_task` says."""
    return run_task(WriteTargets(data_arguments), model_arguments, recipe, training_arguments)


def _columns(pairs: Pairs, tokenizer: PreTrainedTokenizerBase, found: Sequence[Sequence[int]]) -> dict[str, list[Any]]:
    """A row for each pair: what was written."""
    return {
        "row": [row + 1 for row in pairs.rows],
        "predicted": [tokenizer.decode(list(ids), skip_special_tokens=True) for ids in found],
    }


def predict(
    model_arguments: PairModelArguments, data_arguments: PairDataArguments, training_arguments: PairRunArguments
) -> Path:
    """
    Write a target for each source of a file with a trained model.

    Raises:
        ValueError: No model is named, it writes nothing, or the file has no sources.
    """
    path = data_arguments.predict or ""
    model_arguments.context_length = model_arguments.source_length
    model, tokenizer = load_trained(
        model_arguments,
        "ForConditionalGeneration",
        "train --objective seq2seq",
        AutoModelForSeq2SeqLM,
        path,
        training_arguments.device,
        load_tokenizer,
    )
    pairs = pairs_of(path, data_arguments, with_targets=False)
    # By default as long as those that it was trained with.
    length = model_arguments.target_length or getattr(model.generation_config, "max_new_tokens", None)
    if length is None:
        raise ValueError(
            f"The generation_config.json of {model_arguments.model_name_or_path} does not say how long targets are. "
            "Say it with --target_length."
        )
    check_length(length, model.config, "target_length")
    rows = rows_of_pairs(pairs, tokenizer, tokenizer.model_max_length, length)
    found = written(model, rows.sources, tokenizer, length, quiet=bool(training_arguments.disable_tqdm))
    columns = pairs.others | {"source": pairs.sources} | _columns(pairs, tokenizer, found)
    known = [place for place, target in enumerate(pairs.targets) if target]
    said = ""
    if known:
        columns["target"] = pairs.targets
        exact = sum(found[place] == rows.whole[place] for place in known)
        said = f", {exact:,} of {len(known):,} exactly as the file has it"
    write_table(data_arguments.predictions, columns)
    print(f"{data_arguments.predictions}: {len(pairs):,} targets{said}")
    return data_arguments.predictions


def run(
    model_arguments: PairModelArguments,
    recipe: ModelRecipe,
    data_arguments: PairDataArguments,
    training_arguments: PairRunArguments,
) -> None:
    """Train, or write for what the data say."""
    train_or_predict(train_pairs, predict, model_arguments, recipe, data_arguments, training_arguments)


def parse_arguments(
    argv: list[str],
) -> tuple[PairModelArguments, ModelRecipe, PairDataArguments, PairRunArguments]:
    """Arguments from the command line, or from the one JSON or YAML file named there."""
    return parse_groups(argv, PairModelArguments, ModelRecipe, PairDataArguments, PairRunArguments, of=__doc__)
