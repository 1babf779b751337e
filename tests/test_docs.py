"""What the documents say of the repository: files, links and names exist."""

import re
import subprocess
from itertools import chain
from pathlib import Path

import pytest


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
        "tokenization",
        "training",
        "scripts",
        "tests",
    )
    for path in sorted(ROOT.glob(f"{folder}/**/*.py"))
]
PACKAGE = [path for path in SOURCES if path.relative_to(ROOT).parts[0] not in ("scripts", "tests", "hf_reformer")]
CODE_BLOCK = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    return CODE_BLOCK.sub("", page.read_text(encoding="utf-8"))


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
