"""
Transformers' own common test suites, brought together for the installed version.

The source distribution has `tests/test_*_common.py` and the like; the suites for generation, export and pipelines are
in the repository only. Nothing of it is kept in this repository.
"""

import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

import transformers


REPOSITORY = "https://github.com/huggingface/transformers"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hf_reformer" / "contract"
IN_REPOSITORY = ("tests/exporters", "tests/generation", "tests/pipelines", "tests/utils", "utils/test_module")

# What the suites of the source distribution import from the folders that it lacks.
STAND_INS = {
    "tests/exporters/test_export.py": "class ExportTesterMixin: ...\n",
    "tests/generation/test_utils.py": "class GenerationTesterMixin: ...\n",
    "tests/utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
}


@dataclass
class Sources:
    """A folder with a package `tests`, where its files come from, and which suites it lacks."""

    folder: Path
    origins: list[str]
    left_out: list[str] = field(default_factory=list)


def assemble(cache: Path = CACHE, repository: str = REPOSITORY, revision: str | None = None) -> Sources:
    """
    Bring the suites for the installed version of transformers together in a folder below `cache`.

    Args:
        cache: Where downloads are kept.
        repository: A URL or the path of a clone; bare ones too.
        revision: A branch or tag there, by default the tag of the installed version. A file of the source distribution
            is never replaced by one of the repository.

    Returns:
        The folder, and what it lacks where the repository cannot be reached or has no such revision.
    """
    version = transformers.__version__
    revision = revision or f"v{version}"
    archive = _source_distribution(cache, version)
    folder = cache / f"suites-{version}"
    shutil.rmtree(folder, ignore_errors=True)
    sources = Sources(folder, [f"source distribution {version}"])
    clone = _clone(cache / f"clone-{revision.replace('/', '-')}", repository, revision)
    if clone is None:
        sources.left_out = [name for name in IN_REPOSITORY if name.startswith("tests/")]
        for name, text in STAND_INS.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
    else:
        commit = subprocess.check_output(["git", "-C", clone, "rev-parse", "--short=12", "HEAD"], text=True).strip()
        sources.origins.append(f"repository at {revision} ({commit})")
        for name in IN_REPOSITORY:
            shutil.copytree(clone / name, folder / name)
    _unpack_tests(archive, folder, version)
    # Some suites read the library's sources beside themselves.
    (folder / "src").mkdir()
    (folder / "src" / "transformers").symlink_to(Path(transformers.__file__).parent)
    for package in {path.parent for path in (folder / "tests").rglob("*.py")}:
        (package / "__init__.py").touch()
    return sources


def _source_distribution(cache: Path, version: str) -> Path:
    archive = cache / f"transformers-{version}.tar.gz"
    if not archive.is_file():
        options = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--dest", str(cache)]
        command = [sys.executable, "-m", "pip", "download", *options, f"transformers=={version}"]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return archive


def _unpack_tests(archive: Path, folder: Path, version: str) -> None:
    prefix = f"transformers-{version}/"
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            if member.isfile() and member.name.startswith(f"{prefix}tests/"):
                member.name = member.name.removeprefix(prefix)
                tar.extract(member, folder, filter="data")


def _clone(folder: Path, repository: str, revision: str) -> Path | None:
    """The folders that the source distribution lacks, checked out from `repository`; None where that fails."""
    if (folder / IN_REPOSITORY[0]).is_dir():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    if Path(repository).exists():
        # Git takes only a part of a repository that it is given as a URL.
        repository = Path(repository).absolute().as_uri()
    options = ["--quiet", "--depth", "1", "--filter", "blob:none", "--no-checkout", "--branch", revision]
    commands = [
        ["git", "clone", *options, repository, str(folder)],
        ["git", "-C", str(folder), "sparse-checkout", "set", *IN_REPOSITORY],
        ["git", "-C", str(folder), "checkout", "--quiet"],
    ]
    try:
        for command in commands:
            subprocess.run(command, check=True, env=os.environ | {"GIT_TERMINAL_PROMPT": "0"})
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"{repository} at {revision} cannot be had ({error}).", file=sys.stderr)
        return None
    return folder
