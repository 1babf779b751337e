"""What the commands share: parsers of arguments, and settings of a config by name."""

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, HfArgumentParser, PreTrainedConfig, PreTrainedTokenizerBase

from ..configuration.configuration_reformer import ReformerConfig
from ..modeling.packed_rows import alignment_of
from ..tokenization.tokenization_reformer_byte import ReformerByteTokenizer
from ..training.recipe import ModelRecipe, recipe_config
from ..training.row_batches import existing


def make_parser(*groups: type, description: str | None) -> Any:
    """
    A parser with an argument for each field of the dataclasses.

    Args:
        groups: The dataclasses.
        description: Docstring of a command, of which the first line is said.
    """
    # Their types are an alias of Any, which no type is.
    parser: Any = HfArgumentParser
    return parser(groups, description=(description or "").strip().splitlines()[0])


def parse_groups(argv: list[str], *groups: type, of: str | None) -> Any:
    """
    An object of each dataclass, from the command line or from the one JSON or YAML file named there.

    Args:
        argv: The command line.
        groups: The dataclasses.
        of: Docstring of the command.

    Raises:
        ValueError: There is no such option.
    """
    parser = make_parser(*groups, description=of)
    of_file = parse_file(parser, argv)
    if of_file is not None:
        return of_file
    *found, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        options = [option for action in parser._actions for option in action.option_strings]
        near = get_close_matches(unknown[0].partition("=")[0], options, n=1)
        hint = f" Did you mean {near[0]}?" if near else " --help lists all."
        raise ValueError(f"There is no option {unknown[0]}.{hint}")
    return tuple(found)


def parse_file(parser: HfArgumentParser, argv: list[str], allow_extra_keys: bool = False) -> tuple | None:
    """What the one JSON or YAML file says that a command line names; None if it names none."""
    if len(argv) == 1 and argv[0].endswith(".json"):
        return parser.parse_json_file(argv[0], allow_extra_keys=allow_extra_keys)
    if len(argv) == 1 and argv[0].endswith((".yaml", ".yml")):
        return parser.parse_yaml_file(argv[0], allow_extra_keys=allow_extra_keys)
    return None


@dataclass(kw_only=True)
class RowArguments:
    """How the texts of a file are read, and where the model runs."""

    text_column: str = field(default="text", metadata={"help": "The column of the texts."})
    drop_incomplete: bool = field(
        default=False, metadata={"help": "Leave out rows without text, instead of refusing them."}
    )
    quiet: bool = field(default=False, metadata={"help": "Show no bar."})
    device: str = field(
        default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "Where it runs."}
    )


@contextmanager
def mistakes_end(command: str) -> Iterator[None]:
    """
    A mistake in what was given ends the program with its message.

    Raises:
        SystemExit: There was one.
    """
    try:
        yield
    except (MemoryError, OSError, StrictDataclassError, ValueError) as error:
        sys.exit(f"hf-reformer {command}: {str(error) or type(error).__name__}")


def usable_device(name: str) -> torch.device:
    """
    The device of this name.

    Raises:
        ValueError: There is none, or PyTorch cannot use it here.
    """
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device is {name!r}, which cannot be used here: {reason} Try cpu.") from error


def refuse_recipe(recipe: ModelRecipe) -> None:
    """
    Raises:
        ValueError: Something of the recipe was chosen, though an existing model is named.
    """
    usual = vars(ModelRecipe())
    chosen = [f"--{name}" for name, value in vars(recipe).items() if value != usual[name]]
    if chosen:
        raise ValueError(
            f"{', '.join(chosen)}: this is for new models, and --model_name_or_path names one that exists. Leave it "
            "out, or change a setting that may change by --set name=value."
        )


def config_of(
    name: str | None,
    settings: dict[str, Any],
    recipe: ModelRecipe,
    context_length: int,
    tokenizer: PreTrainedTokenizerBase,
    **sides: bool,
) -> PreTrainedConfig:
    """
    The config of an existing model, or of a new one by the recipe.

    Args:
        name: Folder or Hub name of the existing one; None for a new one.
        settings: Of the config, from `parse_settings`.
        sides: `is_decoder` or `is_encoder_decoder`, as `recipe_config` takes them.

    Raises:
        ValueError: A setting is none of the existing model, or the recipe was changed beside it.
    """
    if name is None:
        return recipe_config(context_length, tokenizer=tokenizer, **sides, **vars(recipe) | settings)
    refuse_recipe(recipe)
    config, unknown = AutoConfig.from_pretrained(name, return_unused_kwargs=True, **settings)
    if unknown:
        raise ValueError(f"--set names {', '.join(unknown)}, which {type(config).__name__} does not have.")
    return config


def named_tokenizer(name: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or a Hub name; without one, bytes."""
    return AutoTokenizer.from_pretrained(existing(name)) if name else ReformerByteTokenizer()


def alignment_in_windows(config: PreTrainedConfig, packing: bool) -> int:
    """
    Where documents begin that a model with this config keeps apart.

    Raises:
        ValueError: It does not.
    """
    if not packing:
        return 1
    if config.model_type != ReformerConfig.model_type:
        raise ValueError(
            f"packing is True, but {type(config).__name__} is of no Reformer, and who keeps the documents of a window "
            "apart is not known of others. Leave packing out."
        )
    return alignment_of(config)


def parse_settings(texts: Iterable[str], of: type = ReformerConfig) -> dict[str, Any]:
    """
    Settings from `name=value` each, where the value is JSON, Python's word for it, or a string.

    Args:
        of: The dataclass that has them.

    Raises:
        ValueError: there is no such setting, or no `=`.
    """
    known = {setting.name for setting in fields(of)}
    return dict(_parse_setting(text, known, of.__name__) for text in texts)


def _parse_setting(text, known, owner):
    name, equals, value = text.partition("=")
    if not equals or name not in known:
        raise ValueError(f"--set takes settings of {owner.removesuffix('Arguments')} as name=value, but got {text!r}.")
    constants = {"True": True, "False": False, "None": None}
    if value in constants:
        return name, constants[value]
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
