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

from transformers import AutoTokenizer, CompileConfig, PreTrainedConfig
from transformers.cli.serve import Serve
from transformers.cli.serving import model_manager
from transformers.utils.hub import cached_file

from ..tokenization.tokenization_reformer_byte import BASE_VOCAB_SIZE, CHAT_TEMPLATE


# What the server stands on. A missing one is an error that names it.
for package in ("fastapi", "openai", "pydantic", "uvicorn", "accelerate"):
    import_module(package)

ARCHITECTURES = ("ReformerForCausalLM", "ReformerModelWithLMHead")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "spiece.model")


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


def check_model(model: str) -> None:
    """
    Raises:
        ValueError: It is not there, no causal Reformer, or has no tokenizer that fits.
    """
    name, _, revision = (model, "", "") if Path(model).exists() else model.partition("@")
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        raise ValueError(f"The folder {model} has no config.json; name the folder of a saved model.")
    where = {"revision": revision} if revision else {}
    try:
        config, _ = PreTrainedConfig.get_config_dict(name, **where)
    except OSError as error:
        raise ValueError(f"{model} is no folder here, and not found on the Hub: {first_line(error)}") from error
    if config.get("model_type") != "reformer":
        raise ValueError(f"{model} is a {config.get('model_type')} by its config.json, no Reformer.")
    architecture = (config.get("architectures") or ["None"])[0]
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{model} is a {architecture} by its config.json, which continues no text; a server takes a "
            f"{' or a '.join(ARCHITECTURES)}."
        )
    check_tokenizer(model, name, config["vocab_size"], where)


def check_tokenizer(model: str, name: str, vocab_size: int, where: dict[str, str]) -> None:
    """
    Raises:
        ValueError: There is no tokenizer, or one with more tokens than the model.
    """
    files = [cached_file(name, file, _raise_exceptions_for_missing_entries=False, **where) for file in TOKENIZER_FILES]
    # A model of bytes needs no file.
    if not any(files) and vocab_size != BASE_VOCAB_SIZE:
        raise ValueError(
            f"{model} has no tokenizer ({', '.join(TOKENIZER_FILES)}), and with {vocab_size} tokens it is no model of "
            f"bytes, which has {BASE_VOCAB_SIZE}. Save the tokenizer beside the model: tokenizer.save_pretrained(...)."
        )
    tokens = len(AutoTokenizer.from_pretrained(name, **where))
    if tokens > vocab_size:
        raise ValueError(
            f"The tokenizer of {model} has {tokens} tokens, the model {vocab_size}. Save the one that it was trained "
            "with, or call model.resize_token_embeddings(len(tokenizer))."
        )


def first_line(error: Exception) -> str:
    """What an error says, as one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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
