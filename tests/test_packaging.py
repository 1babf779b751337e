"""The wheel has one import name, and the sources keep the rules that packaging and the Hub exporter rest on."""

import ast
import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path
from zipfile import ZipFile

import pytest
from launching import run_python

import hf_reformer
import hf_reformer.__main__ as main_module
from hf_reformer.__main__ import main
from hf_reformer.commands import entry_point


ROOT = Path(__file__).parents[1]
FOLDERS = ("commands", "configuration", "modeling", "starter", "tokenization", "training")
PACKAGE_FILES = [path for folder in ("hf_reformer", *FOLDERS) for path in sorted(ROOT.glob(f"{folder}/**/*.py"))]
# What `pip install hf_reformer[train]` is for, beside what everybody gets.
TRAINING_FILES = [path for path in PACKAGE_FILES if path.relative_to(ROOT).parts[0] in ("commands", "training")]
MODEL_FILES = [path for path in PACKAGE_FILES if path not in TRAINING_FILES]
SOURCE_FILES = [*PACKAGE_FILES, ROOT / "setup.py", *sorted(ROOT.glob("scripts/**/*.py"))]
TEST_FILES = sorted(ROOT.glob("tests/**/*.py"))

MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 60

# joined here so that this file does not name what it forbids
REGISTRY_HOSTS = [".".join(parts) for parts in [("pypi", "org"), ("pythonhosted", "org"), ("npmjs", "org")]]
REGISTRY_HOSTS += [".".join(parts) for parts in [("deb", "debian", "org"), ("download", "pytorch", "org")]]
MACHINE_PATH = re.compile(r"(?<![\w.~}-])/(?:home|root|work|opt|srv|mnt|Users)/")


def requirement_names(extra: str | None = None) -> set[str]:
    """Return what the package requires, or what one of its extras adds, as import names."""
    marker = "extra ==" if extra is None else f'extra == "{extra}"'
    lines = [line for line in requires("hf_reformer") if (marker in line) == (extra is not None)]
    return {re.match(r"[\w-]+", line).group().replace("-", "_") for line in lines}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    # built from a copy: in the checkout, a build folder left by an earlier build would leak into the wheel
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "model_card.md"):
        shutil.copy(ROOT / name, source)
    for folder in ("hf_reformer", *FOLDERS):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    options = ("--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", str(output))
    build = run_python("-m", "pip", "wheel", *options, str(source), cwd=source)
    assert build.returncode == 0, build.stderr
    return next(output.glob("*.whl"))


def test_wheel_has_one_top_level_name(wheel):
    names = ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"hf_reformer"}


def test_wheel_holds_every_source(wheel):
    in_wheel = {name for name in ZipFile(wheel).namelist() if name.endswith(".py")}
    expected = {path.relative_to(ROOT).as_posix() for path in PACKAGE_FILES}
    assert in_wheel == {name if name.startswith("hf_reformer/") else f"hf_reformer/{name}" for name in expected}
    assert {"hf_reformer/py.typed", "hf_reformer/model_card.md"} <= set(ZipFile(wheel).namelist())
    starter = {f"hf_reformer/starter/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json")}
    assert starter <= set(ZipFile(wheel).namelist())
    assert {"hf_reformer/__init__.py", *(f"hf_reformer/{folder}/__init__.py" for folder in FOLDERS)} <= in_wheel


IMPORT_PROBE = """
import json, sys
from transformers import AutoModel, AutoTokenizer, GenerationMixin, PreTrainedModel

asked_for = []

class Recorder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        asked_for.append(name.partition(".")[0])

sys.meta_path.insert(0, Recorder)
import hf_reformer

files = [module.__file__ for name, module in sys.modules.items() if name.partition(".")[0] == "hf_reformer"]
print(json.dumps([sorted(set(asked_for)), files]))
"""


@pytest.mark.slow
def test_wheel_imports_on_its_own_and_asks_for_no_optional_package(wheel, tmp_path):
    ZipFile(wheel).extractall(tmp_path)
    probe = run_python("-c", IMPORT_PROBE, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert probe.returncode == 0, probe.stderr
    asked_for, files = json.loads(probe.stdout.splitlines()[-1])
    assert all(Path(file).is_relative_to(tmp_path) for file in files)
    assert "hf_reformer" in asked_for
    assert not {"accelerate", "datasets", "matplotlib", "triton"} & set(asked_for)
    assert not [file for file in files if Path(file).name in ("memory_estimate.py", "allocations.py")]


@pytest.mark.slow
def test_the_command_of_the_wheel_trains_and_measures(wheel, tmp_path):
    ZipFile(wheel).extractall(tmp_path / "installed")
    (tmp_path / "text.txt").write_text("Some words, again and again. " * 40)
    command = ["-c", "from hf_reformer.commands.entry_point import main; main()"]
    small = "--hidden_size 16 --num_attention_heads 2 --attention_head_size 8 --feed_forward_size 16 --use_cpu True"
    data = ["--text_path", "text.txt", "--held_out_fraction", "0.3"]
    installed = {"PYTHONPATH": str(tmp_path / "installed"), "OMP_NUM_THREADS": "1"}
    settings = [*small.split(), "--context_length", "64", "--max_steps", "1", "--output_dir", "run"]
    trained = run_python(*command, "train", *data, *settings, cwd=tmp_path, **installed)
    assert trained.returncode == 0, trained.stderr
    assert "pipeline_tag: text-generation" in (tmp_path / "run" / "README.md").read_text()
    measured = run_python(
        *command, "evaluate", "--model", "run", *data, "--lengths", "32", "64", cwd=tmp_path, **installed
    )
    assert measured.returncode == 0, measured.stderr
    assert "held-out bits per byte, the same text in windows of several lengths" in measured.stdout


@pytest.fixture
def type_command(monkeypatch, capsys):
    """`hf-reformer` in this process: exit code, or message, and what was printed."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["hf-reformer", *arguments])
        with pytest.raises(SystemExit) as end:
            entry_point.main()
        return end.value.code, capsys.readouterr().out

    return call


def test_the_command_says_what_there_is(type_command):
    assert type_command("--help") == (0, entry_point.usage() + "\n")
    assert type_command() == (2, entry_point.usage() + "\n")
    code, _ = type_command("evalute")
    assert code == f"'evalute' is no command of hf-reformer.\n\n{entry_point.usage()}"
    for name in entry_point.COMMANDS:
        code, printed = type_command(name, "--help")
        assert code == 0 and printed.startswith(f"usage: hf-reformer {name} [-h]")


def test_the_command_says_what_it_needs(type_command, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name in ("hf_reformer.commands.evaluate", "hf_reformer.training.context_gain", "hf_reformer.training.corpus"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    code, _ = type_command("evaluate", "--model", "x")
    assert code == ("hf-reformer evaluate needs datasets, which is not installed: pip install 'hf_reformer[train]'.")


def test_every_public_name_is_there():
    assert {name for name in hf_reformer.__all__ if hasattr(hf_reformer, name)} == set(hf_reformer.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        hf_reformer.no_such_name  # noqa: B018


def test_lint_checks_types(tmp_path):
    for folder in ("hf_reformer", *FOLDERS):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text('"""A package."""\n')
    (tmp_path / "modeling" / "planted.py").write_text('"""A module."""\n\n\ndef f() -> int:\n    return ""\n')
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    lint = run_python(str(ROOT / "scripts" / "maintain" / "lint.py"), cwd=tmp_path)
    assert lint.returncode == 1
    assert "hf_reformer/modeling/planted.py:5: error: Incompatible return value type" in lint.stdout


SCRIPT = """
import json, pathlib, sys
import transformers
print(json.dumps([sys.argv, sys.path[0], __name__, transformers.ReformerModelWithLMHead.__module__]))
sys.exit(len(sys.argv))
"""


@pytest.mark.slow
def test_the_launcher_runs_a_script_that_finds_our_classes(tmp_path):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "script.py").write_text(SCRIPT)
    launched = run_python("-m", "hf_reformer", "scripts/script.py", "--help", "x", cwd=tmp_path)
    assert (launched.returncode, launched.stderr) == (3, "")
    assert json.loads(launched.stdout) == [
        ["scripts/script.py", "--help", "x"],
        str(tmp_path / "scripts"),
        "__main__",
        "hf_reformer.modeling.modeling_reformer",
    ]


TRANSFORMERS_FIRST = """
import sys
import transformers
from transformers import processing_utils
import hf_reformer
for module in (transformers, sys.modules["transformers"]):
    assert module.ReformerForMaskedLM is hf_reformer.ReformerForMaskedLM
"""


@pytest.mark.slow
def test_whoever_imported_transformers_first_finds_our_classes_too(tmp_path):
    (tmp_path / "script.py").write_text(TRANSFORMERS_FIRST)
    probe = run_python("script.py", cwd=tmp_path)
    assert (probe.returncode, probe.stdout + probe.stderr) == (0, "")


@pytest.fixture
def launch(monkeypatch, capsys, tmp_path):
    """The launcher in this process: exit code, or message, and what was printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["__main__.py", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, capsys.readouterr().out

    return call


def test_the_launcher_runs_modules(launch, tmp_path):
    (tmp_path / "launched_module.py").write_text(SCRIPT)
    code, printed = launch("launched_module", "x")
    assert code == 2
    assert json.loads(printed) == [
        [str(tmp_path / "launched_module.py"), "x"],
        str(tmp_path),
        "__main__",
        "hf_reformer.modeling.modeling_reformer",
    ]


def test_the_launcher_runs_installed_commands(launch, tmp_path):
    metadata = tmp_path / "launched-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: launched\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[console_scripts]\nlaunched-command = launched_command:main\n")
    (tmp_path / "launched_command.py").write_text("def main():\n    import sys\n    return ' '.join(sys.argv)\n")
    sys.path.insert(1, str(tmp_path))
    assert launch("launched-command", "serve") == ("launched-command serve", "")
    # A command has not the current folder in front, where a script of a package's name might be.
    assert sys.path[0] == str(tmp_path) != sys.path[1]


def test_the_launcher_says_what_it_does_and_what_it_cannot_find(launch):
    assert launch("--help") == (0, main_module.__doc__.strip() + "\n")
    assert launch() == (2, main_module.__doc__.strip() + "\n")
    for program in ("no_such_program", "no.such.module", "no_such.py", "-m"):
        code, printed = launch(program)
        assert code.startswith(f"{program!r} is no file, no installed command and no module") and not printed


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["modeling", "training"])
def test_mapped_folders_do_not_import_from_the_checkout(folder):
    probe = run_python("-c", f"import {folder}", cwd=ROOT)
    assert "ImportError" in probe.stderr


def test_every_direct_requirement_has_a_tested_version():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.partition("==")[0].replace("-", "_") for line in lines if "==" in line}
    extras = (None, "train", "serve", "demo", "test", "contract", "integrations")
    assert set().union(*map(requirement_names, extras)) <= pinned


def imported_modules(tree: ast.Module) -> list[tuple[ast.stmt, str]]:
    """Return each absolute import with the module it names."""
    plain = [(node, alias.name) for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    return plain + [
        (node, node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 0
    ]


def absolute_imports_of_the_package(tree: ast.Module) -> list[ast.AST]:
    return [node for node, module in imported_modules(tree) if module.split(".")[0] in ("hf_reformer", *FOLDERS)]


def imports_of_a_sibling_module(tree: ast.Module) -> list[ast.AST]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module is None]


def unguarded_optional_imports(tree: ast.Module, *extras: str) -> list[ast.AST]:
    tries = [node for node in ast.walk(tree) if isinstance(node, ast.Try)]
    guarded = {inner for node in tries for statement in node.body for inner in ast.walk(statement)}
    always_there = sys.stdlib_module_names | requirement_names() | {"hf_reformer", *FOLDERS}
    always_there = always_there.union(*map(requirement_names, extras))
    # One package is imported by another name.
    always_there |= {"sklearn"} & {name.replace("scikit_learn", "sklearn") for name in always_there}
    return [
        node
        for node, module in imported_modules(tree)
        if module.split(".")[0] not in always_there and node not in guarded
    ]


def imports_beyond_the_train_extra(tree: ast.Module) -> list[ast.AST]:
    return unguarded_optional_imports(tree, "train")


def checks_of_the_config_class(tree: ast.Module) -> list[ast.AST]:
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [
        node for node in calls if re.match(r"(isinstance|issubclass)\(.*\bReformerConfig\b", ast.unparse(node), re.S)
    ]


def asserts(tree: ast.Module) -> list[ast.AST]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]


def long_functions(tree: ast.Module) -> list[ast.AST]:
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [node for node in functions if node.end_lineno - node.lineno >= MAX_FUNCTION_LINES]


LONG_FUNCTION = "def f():\n" + "    pass\n" * MAX_FUNCTION_LINES

# each rule with the files it holds for and sources that break it
RULES = [
    (absolute_imports_of_the_package, PACKAGE_FILES, ["import hf_reformer.modeling", "from modeling.x import y"]),
    (imports_of_a_sibling_module, PACKAGE_FILES, ["from . import x", "from .. import x"]),
    (unguarded_optional_imports, MODEL_FILES, ["import triton", "def f():\n    from datasets import Dataset"]),
    (imports_beyond_the_train_extra, TRAINING_FILES, ["import datasets, triton"]),
    (checks_of_the_config_class, PACKAGE_FILES, ["isinstance(self.config, ReformerConfig)"]),
    (asserts, SOURCE_FILES, ["assert x > 0"]),
    (long_functions, SOURCE_FILES + TEST_FILES, [LONG_FUNCTION]),
]


@pytest.mark.parametrize(("rule", "files"), [rule[:2] for rule in RULES], ids=[rule[0].__name__ for rule in RULES])
def test_sources_are_free_of(rule, files):
    places = {path: rule(ast.parse(path.read_text(encoding="utf-8"))) for path in files}
    assert [f"{path.relative_to(ROOT)}:{node.lineno}" for path, nodes in places.items() for node in nodes] == []


@pytest.mark.parametrize(("rule", "broken"), [(rule, source) for rule, _, sources in RULES for source in sources])
def test_rule_finds_what_breaks_it(rule, broken):
    assert len(rule(ast.parse(broken))) == 1


def test_guarded_optional_import_is_allowed():
    tree = ast.parse("try:\n    import triton\nexcept ImportError:\n    triton = None")
    assert unguarded_optional_imports(tree) == []


def test_module_names_are_unique_over_the_folders():
    names = [path.name for path in PACKAGE_FILES if path.name != "__init__.py"]
    assert sorted(set(names)) == sorted(names)


# The rooms of the package, from the bottom up: a module imports from its own room and from those before it.
ROOMS = (
    "configuration",
    "modeling/kernels",
    "modeling/ops",
    "modeling/decoding",
    "modeling/layers",
    "modeling",
    "modeling/conversion",
    "modeling/memory",
    "tokenization",
    "training",
    "starter",
    "commands",
    "hf_reformer",
)


def imported_rooms(path: Path) -> set[str]:
    """Return the rooms that a module of the package imports from."""
    tree, room = ast.parse(path.read_text(encoding="utf-8")), path.parent.relative_to(ROOT)
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            # Installed, the folders lie in the facade's.
            parts = [] if room.parts == ("hf_reformer",) else list(room.parts)
            parts = parts[: len(parts) - node.level + 1] + node.module.split(".")
            # What is imported is a module of a room, or the room itself.
            found.add("/".join(parts if "/".join(parts) in ROOMS else parts[:-1]))
    return found


def test_rooms_are_those_of_the_tree():
    assert {path.parent.relative_to(ROOT).as_posix() for path in PACKAGE_FILES} == set(ROOMS)


def test_rooms_import_from_those_below():
    upward = []
    for path in PACKAGE_FILES:
        room = path.parent.relative_to(ROOT).as_posix()
        above = [other for other in imported_rooms(path) if ROOMS.index(other) > ROOMS.index(room)]
        upward += [f"{path.relative_to(ROOT)} imports from {other}" for other in above]
    assert upward == []


def test_no_file_is_long():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCE_FILES + TEST_FILES}
    assert [path.name for path, length in lengths.items() if length > MAX_FILE_LINES] == []


def test_no_file_names_a_registry_host_or_a_machine_path():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    # untracked files count too, so that a new file is seen before it is committed
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    found = []
    for path in (ROOT / name for name in names if (ROOT / name).is_file()):
        text = path.read_bytes().decode("utf-8", errors="ignore")
        hits = [host for host in REGISTRY_HOSTS if host in text] + MACHINE_PATH.findall(text)
        found += [f"{path.relative_to(ROOT)}: {hit}" for hit in hits]
    assert found == []


@pytest.mark.parametrize(
    ("source", "finding"),
    [
        ("assert True", "modeling/ops/lsh_planted.py:1: TRF027"),
        ("assert True  # trf-ignore: TRF027", "modeling/ops/lsh_planted.py:1: TRF027 is waived without a reason"),
        ("# trf-ignore: TRF1 x\n# trf-ignore: TRF2 x\n# trf-ignore: TRF3 x", "not TRF1, TRF2, TRF3"),
    ],
)
def test_lint_sees_files_that_mlinter_alone_passes_over(tmp_path, source, finding):
    (tmp_path / "modeling" / "ops").mkdir(parents=True)
    (tmp_path / "modeling" / "ops" / "lsh_planted.py").write_text(source + "\n")
    lint = run_python(str(ROOT / "scripts" / "maintain" / "lint.py"), cwd=tmp_path)
    assert lint.returncode == 1
    assert finding in lint.stdout
