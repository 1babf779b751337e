"""What the commands share: parsers of arguments, and settings of a config by name."""

import json
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from transformers import HfArgumentParser

from ..configuration.configuration_reformer import ReformerConfig


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


def parse_settings(texts: Iterable[str]) -> dict[str, object]:
    """
    Settings of `ReformerConfig` from `name=value` each, where the value is JSON, Python's word for it, or a string.

    Raises:
        ValueError: there is no such setting, or no `=`.
    """
    return dict(map(_parse_setting, texts))


def _parse_setting(text):
    name, equals, value = text.partition("=")
    if not equals or name not in {setting.name for setting in fields(ReformerConfig)}:
        raise ValueError(f"--set takes settings of ReformerConfig as name=value, but got {text!r}.")
    constants = {"True": True, "False": False, "None": None}
    if value in constants:
        return name, constants[value]
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
