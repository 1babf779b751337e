"""
Serve a model to clients of OpenAI's API: transformers' own server, with this package's classes.

    hf-reformer serve runs/demo --port 8000
    hf-reformer serve exported --chat_template chat.jinja --do_sample

POST /v1/completions, /v1/chat/completions and /v1/responses, GET /v1/models and /health. docs/inference.md says more.
"""

import argparse
import enum
import inspect
import sys
from importlib import import_module
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from transformers import CompileConfig
from transformers.cli.serve import Serve
from transformers.cli.serving import model_manager

from ..tokenization.tokenization_reformer_byte import CHAT_TEMPLATE
from .causal_models import check_model, first_line


# What the server stands on. A missing one is an error that names it.
for package in ("fastapi", "openai", "pydantic", "uvicorn", "accelerate"):
    import_module(package)


def server_options() -> dict[str, inspect.Parameter]:
    """The options of `transformers serve`, but for its model and those that it hides."""
    parameters = inspect.signature(Serve).parameters
    return {
        name: parameter
        for name, parameter in parameters.items()
        if name != "force_model" and not parameter.annotation.__metadata__[0].hidden
    }


def add_option(group: Any, name: str, parameter: inspect.Parameter) -> None:
    """Give a parser an option of the server, with dashes or underscores in its name."""
    kind, option = get_args(parameter.annotation)
    [kind] = [member for member in get_args(kind) or (kind,) if member is not NoneType]
    how: dict[str, Any] = {"type": kind}
    if kind is bool:
        how = {"action": argparse.BooleanOptionalAction}
    elif issubclass(kind, enum.Enum):
        how = {"choices": [member.value for member in kind]}
    names = dict.fromkeys([f"--{name.replace('_', '-')}", f"--{name}"])
    group.add_argument(*names, default=parameter.default, help=(option.help or "").replace("%", "%%"), **how)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("model", help="folder of a saved causal model, or a name on the Hub")
    parser.add_argument(
        "--chat-template",
        "--chat_template",
        type=Path,
        help="file with a Jinja template for chats, instead of the tokenizer's",
    )
    parser.add_argument(
        "--do-sample",
        "--do_sample",
        action="store_true",
        help="draw tokens where a request has no temperature of 0, also if generation_config.json does not say so",
    )
    group = parser.add_argument_group("options of transformers' server")
    for name, parameter in server_options().items():
        add_option(group, name, parameter)
    return parser.parse_args(argv)


def check_options(arguments: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: An option that a Reformer has no use for, or a template that is not there.
    """
    chosen = [name for name in vars(arguments) if name.startswith("cb_") and getattr(arguments, name) is not None]
    if arguments.continuous_batching or chosen:
        raise ValueError(
            f"{', '.join(f'--{name}' for name in chosen or ['continuous_batching'])} is not possible: the pages of "
            "continuous batching hold keys and values, but a Reformer keeps queries, values and the order of buckets. "
            "Leave it out; requests are then served one after the other."
        )
    if arguments.chat_template is not None and not arguments.chat_template.is_file():
        raise ValueError(f"There is no file {arguments.chat_template}; check --chat_template.")


def manager_class(arguments: argparse.Namespace) -> type:
    """What loads models for the server, and adds what the command line says."""

    class ModelManager(model_manager.ModelManager):
        def _load_processor(self, *args: Any, **kwargs: Any) -> Any:
            tokenizer = super()._load_processor(*args, **kwargs)
            if arguments.chat_template is not None:
                tokenizer.chat_template = arguments.chat_template.read_text(encoding="utf-8")
            elif not tokenizer.chat_template:
                tokenizer.chat_template = CHAT_TEMPLATE
            return tokenizer

        def _load_model(self, *args: Any, **kwargs: Any) -> Any:
            model = super()._load_model(*args, **kwargs)
            if arguments.do_sample:
                model.generation_config.do_sample = True
            if arguments.compile:
                # The server's own way is a static cache, which a Reformer has not.
                model.generation_config.compile_config = CompileConfig(dynamic=True)
            return model

    return ModelManager


def serve(arguments: argparse.Namespace) -> None:
    """Load the model and answer requests until the process is stopped."""
    options = {name: getattr(arguments, name) for name in server_options()} | {"compile": False}
    # The server looks its class up there when it starts.
    module: Any = model_manager
    theirs = module.ModelManager
    module.ModelManager = manager_class(arguments)
    try:
        Serve(force_model=arguments.model, **options)
    finally:
        module.ModelManager = theirs


def main(argv: list[str] | None = None) -> None:
    """Serve; a mistake in the arguments ends the program with its message."""
    arguments = parse_arguments(argv)
    try:
        check_options(arguments)
        check_model(arguments.model)
        serve(arguments)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"hf-reformer serve: {first_line(error)}")
    except KeyboardInterrupt:
        sys.exit(130)
