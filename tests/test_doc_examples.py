"""What README and docs/ show is typed here: Python runs, commands go through their own parsers, the first ones run."""

import importlib
import importlib.util
import re
import shlex
import sys
from contextlib import nullcontext

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from doc_pages import (
    PAGES,
    ROOT,
    blocks_of,
    commands_in,
    commands_in_prose,
    commands_of,
    copied,
    make_hub_cache,
    make_user_folder,
)
from torch.distributed.run import get_args_parser

from hf_reformer.commands import entry_point
from hf_reformer.commands.command_line import make_parser
from scripts.maintain.integrations.serving import running_server
from scripts.run_experiment import NAMES


# Numbers that take too long here, and what stands for them. Each must be on its page.
SMALLER = {
    "docs/how_to/train.md": {"context, tokenizer = 4096": "context, tokenizer = 64", "max_steps=1000": "max_steps=2"},
    "docs/how_to/generate.md": {
        "max_new_tokens=500": "max_new_tokens=5",
        "prefill_chunk_size=1024": "prefill_chunk_size=512",
    },
    "docs/how_to/pack.md": {"4096": "256"},
    "docs/how_to/seq2seq.md": {"4096": "64, hidden_size=16", "max_steps=1000": "max_steps=2"},
    "docs/how_to/memory.md": {"4096": "512"},
    "docs/memory.md": {"65536": "512"},
    "docs/inference.md": {"max_tokens=100": "max_tokens=5", "max_new_tokens=500": "max_new_tokens=5"},
    "docs/recipe.md": {"16384, hidden_size=512": "512, hidden_size=64"},
}
# Pages that go on from what another page has in its first block.
BEGINS_WITH = {"docs/inference.md": "docs/how_to/generate.md"}
# Packages that the tests do without: blocks that import them are only compiled where they are missing.
OPTIONAL = ("bitsandbytes", "sentence_transformers", "torchao")
OPTIONAL_NAMES = {"BitsAndBytesConfig": "bitsandbytes", "TorchAoConfig": "torchao"}
# What a command parses its arguments with where it has no function of its own for it.
GROUPS = {
    "embed": ("EmbeddingArguments",),
    "evaluate": ("EvaluationArguments", "TextArguments"),
    "score": ("ScoreArguments",),
}
WITH_PYTHON = [page for page in PAGES if blocks_of(page, "python")]
WITH_COMMANDS = [page for page in PAGES if commands_of(page) or commands_in_prose(page)]
# The commands of these pages run, one after the other, with these changes.
FIRST_STEPS = {
    "--context_length 4096 --max_steps 300": "--context_length 64 --max_steps 2 --hidden_size 16",
    "--lengths 1024 4096 16384": "--lengths 16 64 --num_windows 1",
    "--do_sample": "--max_new_tokens 5 --do_sample",
}


@pytest.fixture(scope="module")
def user_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    make_user_folder(folder)
    make_hub_cache(folder / "hub")
    return folder


@pytest.fixture
def at_home(user_folder, tmp_path, monkeypatch):
    """The current folder is a user's, with texts and models, and the Hub's cache holds a small model."""
    home = copied(user_folder, tmp_path / "home")
    monkeypatch.chdir(home)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "hub"))
    return home


def made_smaller(page, text):
    for written, small in SMALLER.get(page, {}).items():
        text = text.replace(written, small)
    return text


def packages_missing(code):
    named = {package for name, package in OPTIONAL_NAMES.items() if name in code}
    named |= {package for package in OPTIONAL if re.search(rf"^\s*(import|from) {package}\b", code, re.MULTILINE)}
    return sorted(package for package in named if importlib.util.find_spec(package) is None)


def run_blocks(page, server=None):
    """Run the Python of a page, in one namespace."""
    blocks = blocks_of(page, "python")
    if page in BEGINS_WITH:
        blocks = blocks_of(BEGINS_WITH[page], "python")[:1] + blocks
    namespace = {"__name__": "__main__"}
    for block in blocks:
        code = made_smaller(block.page, made_smaller(page, block.text))
        if server is not None:
            code = code.replace("http://localhost:8000", server)
        compiled = compile("\n" * (block.line - 1) + code, block.page, "exec")
        if not packages_missing(code):
            exec(compiled, namespace)


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python_of_a_page_runs(page, at_home):
    needs_server = any("localhost:8000" in block.text for block in blocks_of(page, "python"))
    start = ["-m", "hf_reformer", "serve", "runs/mine"]
    with running_server(*start) if needs_server else nullcontext() as server:
        run_blocks(page, server)


def test_what_is_made_smaller_is_there():
    texts = {page: "\n".join(block.text for block in blocks_of(page, "python")) for page in SMALLER}
    assert {page: [old for old in SMALLER[page] if old not in text] for page, text in texts.items()} == {
        page: [] for page in SMALLER
    }


def test_code_stands_between_backticks():
    """Indented code, and code without its language, would not be tested."""
    looks_like_code = re.compile(r"^ {4}(from \w|import \w|python -m|hf-reformer |pip install|make )", re.MULTILINE)
    in_no_language = re.compile(r"^(from \w|import \w|python -m|hf-reformer |accelerate |torchrun )", re.MULTILINE)
    found = []
    for page in PAGES:
        prose = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        found += [page for _ in looks_like_code.finditer(prose)]
        found += [f"{page}:{block.line}" for block in blocks_of(page, "") if in_no_language.search(block.text)]
        found += [f"{page}:{b.line}" for b in blocks_of(page) if b.language not in ("", "bash", "python", "json")]
    assert found == []


# Commands


def parse_hf_reformer(name="", *arguments):
    if name not in entry_point.COMMANDS:
        raise ValueError(f"{name!r} is no command of hf-reformer; it has {', '.join(entry_point.COMMANDS)}.")
    if "--help" in arguments:
        return
    module = importlib.import_module(f"hf_reformer.commands.{entry_point.COMMANDS[name][0].partition(':')[0]}")
    if hasattr(module, "parse_arguments"):
        module.parse_arguments(list(arguments))
    else:
        groups = [getattr(module, group) for group in GROUPS[name]]
        make_parser(*groups, description=module.__doc__).parse_args_into_dataclasses(list(arguments))


def parse_module(name, *arguments):
    """`python -m name arguments`."""
    if name == "scripts.run_experiment":
        return parse_experiment(*arguments)
    if name == "hf_reformer":
        program, *rest = arguments
        return parse_hf_reformer(*rest) if program == "hf-reformer" else None
    if name == "pytest":
        return None
    module = importlib.import_module(name)
    if name.startswith("hf_reformer.commands."):
        if "--bf16" in arguments and not torch.cuda.is_available():
            # The Trainer looks for a GPU at once.
            arguments = [*arguments, "--use_cpu", "True"]
        return parse_hf_reformer(name.rpartition(".")[2], *arguments)
    if not torch.cuda.is_available():
        # Benchmarks look for the device at once.
        arguments = ["cpu" if argument == "cuda" else argument for argument in arguments]
    if hasattr(module, "parse_arguments"):
        return module.parse_arguments(list(arguments))
    raise ValueError(f"{name} has no `parse_arguments`, so nobody knows whether {arguments} are right.")


def parse_experiment(name, *arguments):
    if name not in NAMES:
        raise ValueError(f"{name!r} is no experiment; there are {', '.join(NAMES)}.")
    module = importlib.import_module(f"scripts.experiments.{name}")
    # Those on synthetic tasks share a parser.
    task = [module.__doc__, module.TASK] if hasattr(module, "TASK") else []
    module.parse_arguments(*task, list(arguments))


def parse_pip(verb, what):
    extras = re.fullmatch(r"\.(?:\[(\w+)\])?", what)
    if verb != "install" or not extras or (extras[1] and f'"{extras[1]}": ' not in (ROOT / "setup.py").read_text()):
        raise ValueError(f"pip {verb} {what}: install the package, with an extra of setup.py.")


def parse_make(*arguments):
    targets = [word for word in arguments if "=" not in word]
    known = re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    variables = {word.partition("=")[0] for word in arguments if "=" in word}
    if not set(targets) <= set(known) or not variables <= {
        "CONTRACT",
        "INTEGRATIONS",
        "PYTHON",
        "TESTS",
        "TORCH",
        "WITH",
    }:
        raise ValueError(f"make {' '.join(arguments)}: the Makefile has {', '.join(known)}.")


def parse_accelerate(verb, *arguments):
    if verb == "merge-weights":
        return
    if verb != "launch":
        raise ValueError(f"accelerate {verb} is not known here.")
    parsed = launch_command_parser().parse_args(list(arguments))
    if parsed.config_file is not None and not (ROOT / parsed.config_file).is_file():
        raise ValueError(f"There is no {parsed.config_file}.")
    parse_module(parsed.training_script, *parsed.training_script_args)


def parse_torchrun(*arguments):
    parsed = get_args_parser().parse_args(list(arguments))
    importlib.import_module(parsed.training_script)


def parse_script(path, *arguments):
    if not (ROOT / path).is_file():
        raise ValueError(f"There is no {path}.")


PARSERS = {
    "accelerate": parse_accelerate,
    "bash": parse_script,
    "hf-reformer": parse_hf_reformer,
    "make": parse_make,
    "pip": parse_pip,
    "torchrun": parse_torchrun,
}


def parse(command):
    """
    Hand the arguments to the parser of the program.

    Raises:
        ValueError, SystemExit: They are wrong.
    """
    words = shlex.split(command.rpartition("|")[2])
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        del words[0]
    if words[:2] == ["python", "-m"]:
        return parse_module(*words[2:])
    # Placeholders of the running text.
    if "..." in words:
        words = words[: words.index("...")]
    return PARSERS[words[0]](*words[1:])


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_COMMANDS)
def test_commands_of_a_page_are_right(page, at_home, capsys):
    wrong, in_prose = [], commands_in_prose(page)
    for command in commands_of(page) + in_prose:
        try:
            parse(command)
        except (ImportError, KeyError, SystemExit, TypeError, ValueError) as error:
            said = capsys.readouterr().err
            # Running text may name one option and leave out the rest.
            if command not in in_prose or "the following arguments are required" not in said:
                wrong.append(f"{command}: {error!r} {said[-300:]}")
    assert wrong == []


def test_a_wrong_command_is_found(at_home):
    wrong = [
        "hf-reformer trane --text_path my_texts",
        "hf-reformer train --text_pat my_texts/ --nonsense 1",
        "hf-reformer memory --length many",
        "python -m scripts.nowhere",
        "make nothing",
        "pip install '.[nothing]'",
    ]
    for command in wrong:
        with pytest.raises((ImportError, SystemExit, ValueError)):
            parse(command)


def test_a_wrong_block_is_found(at_home, monkeypatch):
    monkeypatch.setattr("doc_pages.ROOT", at_home)
    (at_home / "page.md").write_text(
        "A page.\n\n```python\nimport hf_reformer\n```\n\n```python\nhf_reformer.nothing\n```\n"
    )
    with pytest.raises(AttributeError, match="nothing"):
        run_blocks("page.md")


@pytest.mark.slow
def test_the_first_ten_minutes(at_home, monkeypatch, capsys):
    """What getting_started.md tells a newcomer to type, typed."""
    page = "docs/getting_started.md"
    commands = [command for block in blocks_of(page, "bash") for command in commands_in(block.text)]
    for written, small in FIRST_STEPS.items():
        assert any(written in command for command in commands), written
        commands = [command.replace(written, small) for command in commands]
    typed = [shlex.split(command)[1:] for command in commands if command.startswith("hf-reformer")]
    # What these name by default ends the process.
    in_process = {name: (f"{name}:main", "") for name in ("classify", "train")}
    monkeypatch.setattr(entry_point, "COMMANDS", entry_point.COMMANDS | in_process)
    for arguments in typed:
        monkeypatch.setattr(sys, "argv", ["hf-reformer", *arguments])
        entry_point.main()
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("bits per byte", "lzma", "import os"))
    assert (at_home / "exported" / "README.md").is_file()
    assert {"train", "evaluate", "generate", "export"} <= {arguments[0] for arguments in typed}
