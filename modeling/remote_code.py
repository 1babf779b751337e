"""
A checkpoint with the code that computes it, for `trust_remote_code=True` where the package is not installed.

transformers loads such code from one folder of files that import each other by `from .name import`. Here files import
each other relatively, too, and no two have one name; so of each file only the lines of those imports are rewritten.
"""

import ast
import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec, resolve_name
from pathlib import Path
from typing import Any

from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import get_relative_imports

from ..configuration.beyond_stock import OWN_KIND
from .model_card import write_card


# The class that each of transformers' Auto classes makes for a Reformer.
AUTO_CLASSES = {
    "AutoModel": "ReformerModel",
    "AutoModelForCausalLM": "ReformerForCausalLM",
    "AutoModelForMaskedLM": "ReformerForMaskedLM",
    "AutoModelForMultipleChoice": "ReformerForMultipleChoice",
    "AutoModelForPreTraining": "ReformerForCausalLM",
    "AutoModelForQuestionAnswering": "ReformerForQuestionAnswering",
    "AutoModelForSeq2SeqLM": "ReformerForConditionalGeneration",
    "AutoModelForSequenceClassification": "ReformerForSequenceClassification",
    "AutoModelForTextEncoding": "ReformerModel",
    "AutoModelForTokenClassification": "ReformerForTokenClassification",
}
# The Auto class that loads each; of two the first.
AUTO_CLASS_OF = {ours: auto_class for auto_class, ours in reversed(AUTO_CLASSES.items())}
MODELS, SEQ2SEQ = "hf_reformer.modeling.modeling_reformer", "hf_reformer.modeling.seq2seq"
CONFIGURATION = "hf_reformer.configuration.configuration_reformer"
# The models that are not in the first file.
MODULE_OF = {"ReformerForConditionalGeneration": SEQ2SEQ}
TOKENIZATION, CHECKS = "hf_reformer.tokenization.tokenization_reformer_byte", "hf_reformer.modeling.self_check"
BYTE_TOKENIZER = "ReformerByteTokenizer"
# At the end of the config's file. transformers looks up what to make of a config by the name of its class, and would
# make its own Reformer of one that was loaded with trust and is given without.
OWN_NAME = """

ReformerConfigWithCode = ReformerConfig
ReformerConfig.__name__ = ReformerConfig.__qualname__ = "ReformerConfigWithCode"
"""
# What files of models do at their end, as importing the package does: calls of functions, with their modules.
ON_IMPORT = {"self_check": "check_installed_releases()", "remote_code": "register_classes(globals())"}


def export(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    code_repository: str | None = None,
    **metadata,
) -> None:
    """
    Save a model, its tokenizer and the code that computes it, for `trust_remote_code=True` without the package.

    Args:
        model: Any model of the package.
        tokenizer: Any tokenizer, or None.
        folder: Where the files go.
        code_repository: The repository on the Hub, such as `user/code`, that has the code already: another export,
            whose `.py` files then serve this one, too. A first download is then of a few files.
        **metadata: What the card says of it on the Hub, such as `license="mit"`, `language="en"`, `datasets=["a/b"]`.

    Example:

    >>> import hf_reformer
    >>> config = hf_reformer.ReformerConfig(attn_layers=["local", "lsh"], num_buckets=8)
    >>> model, tokenizer = hf_reformer.ReformerForMaskedLM(config), hf_reformer.ReformerByteTokenizer()
    >>> hf_reformer.export(model, tokenizer, folder)  # doctest: +SKIP
    """
    check_has_code(type(model), code_repository)
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    add_code(folder, code_repository)
    model_class = type(model).__name__
    name = Path(folder).resolve().name
    write_card(folder, model_class, name, AUTO_CLASS_OF[model_class], code_repository, **metadata)


def check_has_code(model_class: type, code_repository: str | None) -> None:
    """
    Raises:
        ValueError: The package has no code for the model, or code can be in no such repository.
    """
    if model_class.__module__ not in (MODELS, SEQ2SEQ):
        raise ValueError(
            f"{model_class.__name__} is of {model_class.__module__}, and what is exported is the code of {MODELS}. "
            "Load what came with code of its own by the package; save a subclass or an adapter by `save_pretrained`, "
            "or merge it into a model of the package first."
        )
    if code_repository is not None:
        validate_repo_id(code_repository)


def add_code(folder: str | Path, code_repository: str | None = None) -> None:
    """
    Make the checkpoint in a folder load with `trust_remote_code=True`.

    `config.json` and, if it is of the byte tokenizer, `tokenizer_config.json` then name the classes, and the kinds of
    layers in `config.json` begin with "hf_reformer.", so that transformers' own Reformer, which loads without trust,
    raises an error.

    Args:
        folder: As `save_pretrained` leaves it.
        code_repository: Where the code is, such as `user/code`, instead of in the folder.
    """
    folder = Path(folder)
    prefix = "" if code_repository is None else f"{code_repository}--"
    configuration, tokenization = (name.rpartition(".")[2] for name in (CONFIGURATION, TOKENIZATION))
    if (folder / "config.json").is_file():
        auto_map = {"AutoConfig": f"{prefix}{configuration}.ReformerConfig"}
        for auto_class, ours in AUTO_CLASSES.items():
            auto_map[auto_class] = f"{prefix}{MODULE_OF.get(ours, MODELS).rpartition('.')[2]}.{ours}"
        config = _read(folder / "config.json")
        kinds = [OWN_KIND + kind.removeprefix(OWN_KIND) for kind in config["attn_layers"]]
        _write(folder / "config.json", config | {"auto_map": auto_map, "attn_layers": kinds})
    settings = folder / "tokenizer_config.json"
    if settings.is_file() and (tokenizer := _read(settings)).get("tokenizer_class") == BYTE_TOKENIZER:
        classes = [f"{prefix}{tokenization}.{BYTE_TOKENIZER}", None]
        _write(settings, tokenizer | {"auto_map": {"AutoTokenizer": classes}})
    if code_repository is None:
        for name, text in code().items():
            (folder / name).write_text(text, encoding="utf-8")


def code() -> dict[str, str]:
    """The files of the config, the models and the byte tokenizer, with all that they import from the package."""
    files = flat_files([CONFIGURATION, MODELS, SEQ2SEQ, TOKENIZATION, CHECKS, __name__])
    files[f"{CONFIGURATION.rpartition('.')[2]}.py"] += OWN_NAME
    imports = [f"from .{module} import {call.partition('(')[0]}" for module, call in ON_IMPORT.items()]
    for module in (MODELS, SEQ2SEQ):
        files[f"{module.rpartition('.')[2]}.py"] += "\n".join(["", "", *imports, "", "", *ON_IMPORT.values(), ""])
    return files


def flat_files(modules: Sequence[str]) -> dict[str, str]:
    """
    Modules of the package, with all that they import from it, as files of one folder, by name.

    Raises:
        RuntimeError: Files cannot lie in one folder, or transformers would not find what they import.
    """
    files: dict[str, str] = {}
    found, waiting = set(), [*modules]
    while waiting:
        module = waiting.pop()
        if module in found:
            continue
        found.add(module)
        name = f"{module.rpartition('.')[2]}.py"
        if name in files:
            raise RuntimeError(f"Two files of the package are called {name}, and one folder cannot hold both.")
        files[name], imported = _flat(module)
        waiting += imported
    return files


def register_classes(classes: Mapping[str, Any]) -> None:
    """Let saving write the code beside a model, whichever Auto class has made it."""
    for auto_class, name in reversed(AUTO_CLASSES.items()):
        if name in classes:
            classes[name].register_for_auto_class(auto_class)


def _flat(module: str) -> tuple[str, list[str]]:
    """The source of a module with imports from beside it, and the modules that it imports from the package."""
    path = Path(_origin(module))
    text = path.read_text(encoding="utf-8")
    lines, imported = text.splitlines(keepends=True), []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.level:
            imported.append(resolve_name("." * node.level + (node.module or ""), module.rpartition(".")[0]))
            old = f"from {'.' * node.level}{node.module} import"
            flat = f"from .{imported[-1].rpartition('.')[2]} import"
            lines[node.lineno - 1] = lines[node.lineno - 1].replace(old, flat, 1)
    seen = {name.rpartition(".")[2] for name in get_relative_imports(str(path))}
    if seen != {name.rpartition(".")[2] for name in imported}:
        raise RuntimeError(f"transformers reads other imports in {path.name} than Python: {sorted(seen)}.")
    return "".join(lines), imported


def _origin(module: str) -> str:
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise RuntimeError(f"{module} has no file.")
    return spec.origin


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, settings: dict[str, Any]) -> None:
    path.write_text(json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
