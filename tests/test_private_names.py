"""What the package uses of torch and transformers that is private there: an upgrade that removes it fails here."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel


ROOT = Path(__file__).parents[1]
FILES = [
    path
    for folder in ("hf_reformer", "configuration", "modeling", "tokenization", "training")
    for path in sorted(ROOT.glob(f"{folder}/**/*.py"))
]
LIBRARIES = ("torch", "transformers")
# `softmax_kernels` looks for these itself, and does without where one is missing.
GUARDED = "torch.ops.aten."
NAMES = {
    "torch._C._are_functorch_transforms_active",
    "torch._C._autograd._get_sequence_nr",
    "torch._C._current_autograd_node",
    "torch._C._functorch.get_unwrapped",
    "torch._C._functorch.is_batchedtensor",
    "torch._C._functorch.is_functorch_wrapped_tensor",
    "torch._assert_async",
    "torch._dynamo.decorators.skip",
    "torch._dynamo.maybe_mark_dynamic",
    "torch.nn.modules.module._has_any_global_hook",
    "torch._subclasses.fake_tensor.FakeTensor",
    "torch._subclasses.fake_tensor.FakeTensorMode",
    "torch.utils._python_dispatch.TorchDispatchMode",
    "torch.utils._python_dispatch._disable_current_modes",
    "torch.utils._pytree.tree_leaves",
}
# What our classes define that transformers calls, or reads, by a private name of its classes.
HOOKS = {
    PreTrainedModel: {
        "_get_name",
        "_init_added_lm_head_bias_with_mean",
        "_init_weights",
        "_keys_to_ignore_on_load_unexpected",
        "_load_pretrained_model",
        "_no_split_modules",
        "_resize_token_embeddings",
        "_set_gradient_checkpointing",
        "_skip_keys_device_placement",
        "_supports_sdpa",
        "_tied_weights_keys",
        "_upload_modified_files",
    },
    GenerationMixin: {
        "_prefill",
        "_prepare_cache_for_generation",
        "_prepare_position_ids_for_generation",
        "_valid_auto_compile_criteria",
    },
    PreTrainedConfig: {"_upload_modified_files"},
}


def is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def dotted(node: ast.AST) -> str | None:
    """`a.b.c` as a string, if it is nothing but names."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return before and f"{before}.{node.attr}"
    return None


def private_names(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            found.add(dotted(node))
    found = {name for name in found if name and name.split(".")[0] in LIBRARIES and is_private(name)}
    # Not the parts of a longer name.
    return {name for name in found if not any(other.startswith(f"{name}.") for other in found)}


def find(name: str):
    """What a dotted name stands for."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise AttributeError(name)


def our_classes() -> set[type]:
    modules = [importlib.import_module(module_of(path)) for path in FILES]
    return {
        member
        for module in modules
        for member in vars(module).values()
        if inspect.isclass(member) and member.__module__.startswith("hf_reformer.")
    }


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "hf_reformer" else ("hf_reformer", *parts)
    return ".".join(part for part in parts if part != "__init__")


def test_every_private_name_in_use_is_listed():
    used = set().union(*(private_names(ast.parse(path.read_text(encoding="utf-8"))) for path in FILES))
    assert {name for name in used if not name.startswith(GUARDED)} == NAMES


@pytest.mark.parametrize("name", sorted(NAMES))
def test_private_names_exist(name):
    find(name)


@pytest.mark.parametrize("base", HOOKS)
def test_private_hooks_are_listed_and_exist(base):
    classes = our_classes()
    ours = {name for one in classes if issubclass(one, base) or "Mixin" in one.__name__ for name in vars(one)}
    hooks = {name for name in ours if is_private(name)}
    # Of private names that only we have nobody asks.
    assert {name for name in hooks if hasattr(base, name)} == HOOKS[base]


def test_what_is_private_is_found():
    source = "from torch._x import y\nimport torch\ntorch.nn._z.a(torch.ones(1))\nself._own\nfrom ._own import b\n"
    assert private_names(ast.parse(source)) == {"torch._x.y", "torch.nn._z.a"}
    with pytest.raises(AttributeError):
        find("torch._C._no_such_name")
