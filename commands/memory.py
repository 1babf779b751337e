"""
Predict the memory of a training step, or of reading a text; show what takes it, and which setting would help.

    hf-reformer memory --length 65536 --batch_size 4 --attn_layers local lsh local lsh --hidden_size 512
    hf-reformer memory --model_name_or_path runs/demo --length 4096 --optimizer muon --set reversible=False
    hf-reformer memory --length 65536 --target_length 512 --measure
    hf-reformer memory --length 1048576 --mode forward --attn_layers local lsh --hidden_size 256

Nothing is allocated, except with --measure, which makes the step in a process of its own.
"""

import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, fields, replace
from functools import partial
from multiprocessing import get_context
from typing import cast

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from ..configuration.byte_sizes import bytes_of
from ..configuration.configuration_reformer import ReformerConfig
from ..modeling.memory.memory_estimate import MODES, MemoryEstimate, TensorGroup, TrainingSetup, estimate_memory
from ..modeling.memory.memory_measurement import Measurement, measure
from ..training.muon import MuonWithAdamW
from ..training.recipe import ModelRecipe, recipe_config
from .command_line import make_parser, parse_settings, refuse_recipe


MUON = partial(MuonWithAdamW, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.98))
STEPS = {"training": "a training step", "forward": "reading the text", "prefill": "reading the text into a cache"}
# A setting that saves less of the peak is not worth a line.
WORTH_NAMING = 0.01


@dataclass
class MemoryArguments:
    """Which step to predict."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or Hub name of a model; without it, a new one by the recipe."}
    )
    length: int = field(default=65536, metadata={"help": "Tokens in a row of the batch."})
    target_length: int | None = field(
        default=None,
        metadata={"help": "Tokens of a target: an encoder reads `length` tokens, a decoder writes these."},
    )
    batch_size: int = field(default=1, metadata={"help": "Rows in a batch."})
    mode: str = field(
        default="training",
        metadata={"help": "Train, or read without gradients, perhaps into a cache.", "choices": list(MODES)},
    )
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches in a step of the optimizer."})
    dtype: str = field(
        default="float32", metadata={"help": "Of the parameters.", "choices": ["float32", "bfloat16", "float16"]}
    )
    autocast: str = field(
        default="none", metadata={"help": "What autocast computes in.", "choices": ["none", "bfloat16", "float16"]}
    )
    optimizer: str = field(
        default="adamw", metadata={"help": "Which one.", "choices": ["adamw", "sgd", "muon", "none"]}
    )
    device: str = field(default="cpu", metadata={"help": "Where the step would run, cpu or cuda."})
    masked: bool = field(default=False, metadata={"help": "A new model is masked instead of causal."})
    vocab_size: int | None = field(default=None, metadata={"help": "Words of a new model; by default bytes."})
    set: list[str] = field(
        default_factory=list, metadata={"help": "Any other settings of the config, such as reversible=False."}
    )
    groups: int = field(default=12, metadata={"help": "How many of the largest groups of tensors to list."})
    measure: bool = field(default=False, metadata={"help": "Also make the step and measure it."})


def make_setup(arguments: MemoryArguments) -> TrainingSetup:
    """How the arguments say the model is trained."""
    return TrainingSetup(
        batch_size=arguments.batch_size,
        length=arguments.length,
        target_length=arguments.target_length,
        mode=arguments.mode,
        dtype=getattr(torch, arguments.dtype),
        autocast_dtype=None if arguments.autocast == "none" else getattr(torch, arguments.autocast),
        optimizer=MUON if arguments.optimizer == "muon" else arguments.optimizer,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        device=arguments.device,
    )


def make_config(arguments: MemoryArguments, recipe: ModelRecipe) -> ReformerConfig:
    """The config of the named model, or of a new one for rows of this length, with the settings of `--set`."""
    changes = parse_settings(arguments.set)
    if arguments.vocab_size is not None:
        changes["vocab_size"] = arguments.vocab_size
    if arguments.model_name_or_path is not None:
        refuse_recipe(recipe)
        config = AutoConfig.from_pretrained(arguments.model_name_or_path)
        if config.model_type != ReformerConfig.model_type:
            raise ValueError(
                f"{arguments.model_name_or_path} is a {config.model_type} by its config, and this predicts the memory "
                "of Reformers. Name one, or leave it out for a new model."
            )
        return changed(config, **changes)
    config = recipe_config(
        arguments.length,
        is_decoder=not arguments.masked,
        is_encoder_decoder=arguments.target_length is not None,
        **vars(recipe),
    )
    return changed(config, **changes)


def changed(config: ReformerConfig, **settings) -> ReformerConfig:
    """A copy of the config with some settings changed, checked as a new one is."""
    old = config.to_dict()
    # It follows from the kinds of layers.
    del old["num_hidden_layers"]
    return type(config).from_dict(old | settings)


def alternatives(config: ReformerConfig, setup: TrainingSetup) -> dict[str, tuple[ReformerConfig, TrainingSetup]]:
    """What could be given otherwise to save memory: the options, and what they do."""
    found = {}
    trains = setup.mode == "training"
    if not config.reversible and trains:
        found["--set reversible=True: recompute activations"] = changed(config, reversible=True), setup
    if config.reversible and trains and bytes_of("activation_memory", config.activation_memory):
        found["--set activation_memory=0: keep nothing, recompute all"] = changed(config, activation_memory=0), setup
    in_float32 = setup.dtype == torch.float32 and setup.autocast_dtype is None
    if config.exact_inversion is not False and in_float32 and trains:
        words = "--set exact_inversion=False: float32 streams, which deep stacks invert less exactly"
        found[words] = changed(config, exact_inversion=False), setup
    length = cast(int, setup.length)
    chunk = max(256, length // 64)
    for name in ("chunk_size_feed_forward", "chunk_size_lm_head"):
        if not 0 < getattr(config, name) <= chunk < length:
            found[f"--set {name}={chunk}: smaller pieces, the same numbers"] = changed(config, **{name: chunk}), setup
    if config.num_hashes > 1 and "lsh" in config.attn_layers:
        found["--set num_hashes=1: fewer rounds, which find less"] = changed(config, num_hashes=1), setup
    if setup.batch_size > 1 and trains:
        steps = setup.batch_size * setup.gradient_accumulation_steps
        words = f"--batch_size 1 --gradient_accumulation_steps {steps}: the same step, row by row"
        found[words] = config, replace(setup, batch_size=1, gradient_accumulation_steps=steps)
    if setup.dtype == torch.float32:
        if setup.autocast_dtype is None:
            found["--autocast bfloat16"] = config, replace(setup, autocast_dtype=torch.bfloat16)
        what = ": parameters, gradients and optimizer state, too" if trains else ""
        found[f"--dtype bfloat16{what}"] = (
            config,
            replace(setup, dtype=torch.bfloat16, autocast_dtype=None),
        )
    if setup.optimizer == "adamw" and trains:
        found["--optimizer muon: one number per weight of a matrix instead of two"] = (
            config,
            replace(setup, optimizer=MUON),
        )
        found["--optimizer sgd: no state"] = config, replace(setup, optimizer="sgd")
    return found


def estimate(config: ReformerConfig, setup: TrainingSetup) -> MemoryEstimate:
    """`estimate_memory` of a setup as a whole."""
    return estimate_memory(config, **{item.name: getattr(setup, item.name) for item in fields(setup)})


def measure_in_fresh_process(config: ReformerConfig, setup: TrainingSetup) -> Measurement:
    """The measured step; in a process that has allocated nothing before.

    Raises:
        MemoryError: there is not enough memory; the process may also have been killed for it.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(measure, config, setup).result()
        except BrokenProcessPool as error:
            raise MemoryError("The process that made the step was killed; most likely memory ran out.") from error


def mebibytes(nbytes: int) -> str:
    """In MiB, aligned."""
    return f"{nbytes / 2**20:10,.1f} MiB"


def describe(group: TensorGroup) -> str:
    """A group of tensors in words."""
    times = f"{group.count} x " if group.count > 1 else ""
    tensors = f"{list(group.shape)} {str(group.dtype).removeprefix('torch.')}"
    if group.purpose in ("activations", "optimizer step"):
        return f"{group.place or group.purpose}: {times}{group.name} {tensors}"
    return f"{group.purpose}{group.place and f', {group.place}'}: {times}{tensors}"


def print_estimate(predicted: MemoryEstimate, num_groups: int, mode: str) -> None:
    """The peak, its four parts, and the largest groups of tensors in it."""
    print(f"{mebibytes(predicted.peak)}  predicted peak of {STEPS[mode]}")
    for part in ("parameters", "gradients", "optimizer_state", "activations"):
        print(f"{mebibytes(getattr(predicted, part))}    {part.replace('_', ' ')}")
    print("\nWhat is in memory at the peak:")
    for group in predicted.groups[:num_groups]:
        print(f"{mebibytes(group.nbytes)}  {describe(group)}")
    rest = sum(group.nbytes for group in predicted.groups[num_groups:])
    print(f"{mebibytes(rest)}  everything else")


def print_alternatives(predicted: MemoryEstimate, config: ReformerConfig, setup: TrainingSetup) -> None:
    """Each change that would save memory, largest saving first."""
    peaks = {words: estimate(*step).peak for words, step in alternatives(config, setup).items()}
    helpful = {words: peak for words, peak in peaks.items() if peak < (1 - WORTH_NAMING) * predicted.peak}
    print("\nWhat would help, each by itself:" if helpful else "\nNone of the settings tried would help.")
    for words, peak in sorted(helpful.items(), key=lambda item: item[1]):
        print(f"{mebibytes(peak)}  ({peak / predicted.peak - 1:+.0%})  {words}")


def run(arguments: MemoryArguments, recipe: ModelRecipe) -> None:
    """Predict, explain, and measure if asked to."""
    setup, config = make_setup(arguments), make_config(arguments, recipe)
    predicted = estimate(config, setup)
    print_estimate(predicted, arguments.groups, setup.mode)
    if arguments.measure:
        measured = measure_in_fresh_process(config, setup)
        print(f"\n{mebibytes(measured.allocated)}  measured, allocated by PyTorch", end="")
        print(f" (predicted: {predicted.peak / measured.allocated - 1:+.1%})")
        if measured.resident is not None:
            print(f"{mebibytes(measured.resident)}  measured, resident memory that the process gained")
    print_alternatives(predicted, config, setup)


def parse_arguments(argv: list[str]) -> tuple[MemoryArguments, ModelRecipe]:
    """Arguments from the command line."""
    return _make_parser().parse_args_into_dataclasses(argv)


def _make_parser():
    return make_parser(MemoryArguments, ModelRecipe, description=__doc__)


def main(argv: list[str] | None = None) -> None:
    """Predict as the command line says; a mistake on it ends the program with a message."""
    try:
        run(*parse_arguments(sys.argv[1:] if argv is None else argv))
    except (MemoryError, OSError, StrictDataclassError, ValueError) as error:
        _make_parser().error(str(error))
