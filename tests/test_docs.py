"""What the documents say of the repository: files, links and names exist."""

import re
import shutil
import subprocess
from itertools import chain
from pathlib import Path

import pytest
from launching import run_python

import hf_reformer
import hf_reformer.training
from scripts.maintain import documentation


ROOT = Path(__file__).parents[1]
# The model card is a template: what it links to lies beside a trained model.
PAGES = [
    path for path in (*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))) if path.stem != "model_card"
]
SOURCES = [
    path
    for folder in (
        "hf_reformer",
        "commands",
        "configuration",
        "modeling",
        "starter",
        "tokenization",
        "training",
        "scripts",
        "tests",
    )
    for path in sorted(ROOT.glob(f"{folder}/**/*.py"))
]
PACKAGE = [path for path in SOURCES if path.relative_to(ROOT).parts[0] not in ("scripts", "tests", "hf_reformer")]
FACADE = [path for path in SOURCES if path.relative_to(ROOT).parts[0] == "hf_reformer"]


def prose(page: Path) -> str:
    return documentation.CODE_BLOCK.sub("", page.read_text(encoding="utf-8"))


def quoted(page: Path) -> set[str]:
    """What stands in backticks, outside of code blocks."""
    return set(re.findall(r"`([^`\n]+)`", prose(page)))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path, text: str) -> list[str]:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        place, _, anchor = target.partition("#")
        if "://" in place or place.startswith("mailto:"):
            continue
        found = page.parent / place if place else page
        if not found.exists() or (anchor and found.suffix == ".md" and anchor not in anchors(found)):
            broken.append(target)
    return broken


def files_that_are_not_there(names: set[str]) -> list[str]:
    known = {path.name for path in SOURCES} | {"setup.py"}
    files = chain.from_iterable(re.findall(r"[\w/*]+\.py\b", name) for name in names)
    return sorted({file for file in files if "*" not in file and Path(file).name not in known})


def names_that_are_not_there(names: set[str]) -> list[str]:
    text = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES if path.name != "test_docs.py")
    words = set(re.findall(r"\w+", text))
    return sorted(name for name in names if re.fullmatch(r"_\w+(\(\))?", name) and name.strip("()") not in words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_names_exists(page):
    assert broken_links(page, prose(page)) == []
    assert files_that_are_not_there(quoted(page)) == []
    assert names_that_are_not_there(quoted(page)) == []
    assert "[ERROR]" not in page.read_text(encoding="utf-8")


def test_what_does_not_exist_is_found():
    page = ROOT / "README.md"
    assert broken_links(page, "[a](docs/design.md#the-map), [b](docs/nowhere.md), [c](docs/design.md#nowhere)") == [
        "docs/nowhere.md",
        "docs/design.md#nowhere",
    ]
    assert files_that_are_not_there({"modeling/nowhere.py", "setup.py", "scripts/benchmark*.py"}) == [
        "modeling/nowhere.py"
    ]
    assert names_that_are_not_there({"_now" + "here", "_put_dense_rows"}) == ["_now" + "here"]


def test_the_map_names_every_module():
    named = quoted(ROOT / "docs" / "design.md")
    assert [path.name for path in PACKAGE if path.name != "__init__.py" and path.name not in named] == []


def test_paths_in_the_sources_exist():
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    found = []
    for path in SOURCES:
        for place in re.findall(r"\bdocs/[\w/]+\.(?:md|json|png)\b", path.read_text(encoding="utf-8")):
            if place not in names and path.name != "test_docs.py":
                found.append(f"{path.relative_to(ROOT)}: {place}")
    assert found == []


def documented() -> list[str]:
    """What the API pages show, by the name that it has where it is defined or exported."""
    pages = "\n".join(page.read_text(encoding="utf-8") for page in ROOT.glob("docs/api/*.md"))
    return re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE)


def test_every_public_name_is_documented():
    public = {f"hf_reformer.{name}" for name in hf_reformer.__all__}
    public |= {f"hf_reformer.training.{name}" for name in hf_reformer.training.__all__}
    shown = {name.rpartition(".")[2] for name in documented()}
    assert sorted(name for name in public if name.rpartition(".")[2] not in shown) == []


def test_every_figure_has_its_command():
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    figures = [path for path in ROOT.glob("docs/**/*.png") if "_at_" not in path.name]
    assert figures and not [path.name for path in figures if f"`{path.name}`" not in table]


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = set(re.findall(r": ([\w/]+\.md)$", text, re.MULTILINE))
    written = {path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")}
    assert named == written | set(documentation.FROM_ROOT) | {documentation.COMMANDS_PAGE}


def test_links_of_the_site_lead_where_those_of_the_repository_do():
    cases = {
        ("index.md", "docs/design.md"): "design.md",
        ("index.md", "LICENSE"): "repository/LICENSE",
        ("contributing.md", "docs/design.md"): "design.md",
        ("how_to/train.md", "../recipe.md"): "recipe.md",
        ("design.md", "../CONTRIBUTING.md"): "contributing.md",
        ("design.md", "../README.md"): "index.md",
    }
    for (page, target), place in cases.items():
        assert documentation.place_on_site(documentation.file_of_link(page, target)) == place
    assert documentation.file_of_link("design.md", "https://arxiv.org/abs/2001.04451") is None
    with pytest.raises(documentation.PluginError, match=r"docs/design.md links to nowhere.md"):
        documentation.file_of_link("design.md", "nowhere.md")


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    # From a copy, as a build beside it may be under way.
    for name in ("setup.py", "pyproject.toml", "mkdocs.yml", "LICENSE", "model_card.md", *map(str, ROOT.glob("*.md"))):
        shutil.copy(ROOT / name, tmp_path)
    for folder in ("docs", "notebooks", "scripts", *{path.relative_to(ROOT).parts[0] for path in [*PACKAGE, *FACADE]}):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    typed = run_python("setup.py", "--quiet", "build_py", "--build-lib", "build/typed", cwd=tmp_path)
    assert typed.returncode == 0, typed.stderr
    built = run_python("-m", "mkdocs", "build", "--strict", cwd=tmp_path, NO_MKDOCS_2_WARNING="1")
    assert built.returncode == 0 and "WARNING" not in built.stderr, built.stderr
    site = tmp_path / "build" / "site"
    assert "Kitaev, Kaiser, Levskaya" in (site / "index.html").read_text(encoding="utf-8")
    models = (site / "api" / "models.html").read_text(encoding="utf-8")
    # The second is in no source: a decorator writes it.
    assert 'id="hf_reformer.ReformerConfig"' in models and "glossary#input-ids" in models
    assert (site / "repository" / "LICENSE").is_file()
    elsewhere = re.compile(r"""<(?:script|link|img)[^>]*(?:src|href)="https?://""")
    assert [page.name for page in site.glob("**/*.html") if elsewhere.search(page.read_text(encoding="utf-8"))] == []
