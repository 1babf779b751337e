"""Settings of a config on the command line, by name."""

import json
from collections.abc import Iterable
from dataclasses import fields

from hf_reformer import ReformerConfig


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
