"""
What mkdocs.yml needs beside mkdocs: pages from the repository's root, and links that work there and on GitHub.

README.md is the site's first page. A link to a page of docs/ leads to that page, one to any other file of the
repository to a copy of it on the site.
"""

import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from hf_reformer.commands.entry_point import COMMANDS


ROOT = Path(__file__).parents[2]
# Pages of the site that lie elsewhere than in docs/.
FROM_ROOT = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
COMMANDS_PAGE = "api/commands.md"
# Where other files of the repository are on the site.
COPIES = "repository"
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
CODE_BLOCK = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def source_of(page: str) -> PurePosixPath:
    """The file of the repository that a page of the site is made from."""
    return PurePosixPath(FROM_ROOT.get(page, f"docs/{page}"))


def place_on_site(source: str) -> str:
    """Where a file of the repository is on the site."""
    for page, root_file in FROM_ROOT.items():
        if source == root_file:
            return page
    return source.removeprefix("docs/") if source.startswith("docs/") else f"{COPIES}/{source}"


def file_of_link(page: str, target: str) -> str | None:
    """
    The file of the repository that a link on a page leads to; None for an address or a place on the page itself.

    Raises:
        PluginError: There is no such file.
    """
    path, _, _ = target.partition("#")
    if not path or "://" in path or path.startswith("mailto:"):
        return None
    source = os.path.normpath(source_of(page).parent / path)
    if not (ROOT / source).is_file():
        raise PluginError(f"{source_of(page)} links to {target}, which is no file of the repository.")
    return source


def outside_code(markdown: str, change) -> str:
    """`markdown` with `change` made to everything but blocks of code."""
    blocks = CODE_BLOCK.findall(markdown)
    parts = [change(part) for part in CODE_BLOCK.split(markdown)]
    return parts[0] + "".join(block + part for block, part in zip(blocks, parts[1:], strict=True))


def links_of(page: str, markdown: str) -> set[str]:
    """The files of the repository that a page links to."""
    found = {file_of_link(page, match[2]) for match in LINK.finditer(CODE_BLOCK.sub("", markdown))}
    return {source for source in found if source is not None}


def commands_page() -> str:
    """A page with each command, and how its module describes it."""
    lines = ["# Commands", "", "`hf-reformer COMMAND --help` lists the options of a command.", ""]
    for name, (where, _) in COMMANDS.items():
        module = f"hf_reformer.commands.{where.partition(':')[0]}"
        options = "    options: {show_root_heading: false, show_root_toc_entry: false}"
        lines += [f"## hf-reformer {name}", "", f"::: {module}", options, ""]
    return "\n".join(lines)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the root, and the files that pages link to."""
    for page, source in FROM_ROOT.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    files.append(File.generated(config, COMMANDS_PAGE, content=commands_page()))
    linked = set().union(*(links_of(file.src_uri, file.content_string) for file in files.documentation_pages()))
    for source in sorted(linked):
        place = place_on_site(source)
        if place.startswith(f"{COPIES}/"):
            files.append(File.generated(config, place, content=(ROOT / source).read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn each link to a file of the repository into one to its place on the site."""
    name = page.file.src_uri
    folder = PurePosixPath(name).parent

    def rewrite(match: re.Match) -> str:
        source = file_of_link(name, match[2])
        if source is None:
            return match[0]
        anchor = match[2].partition("#")[2]
        place = os.path.relpath(place_on_site(source), folder)
        return f"{match[1]}{place}{'#' if anchor else ''}{anchor}{match[3]}"

    return outside_code(markdown, lambda part: LINK.sub(rewrite, part))
