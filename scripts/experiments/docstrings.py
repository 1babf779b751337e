"""Another text than source code that every machine has: the documentation in an installed package's docstrings."""

import ast
import importlib.util
from pathlib import Path

from .resumable import CHECKPOINTS


# Of characters; shorter ones are hardly prose.
SHORTEST = 200
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def docstrings_of(source: str) -> list[str]:
    """All docstrings of a module's source that are not short, with indentation removed."""
    found = [ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, DOCUMENTED)]
    return [docstring for docstring in found if docstring and len(docstring) >= SHORTEST]


def write_docstrings(package: str, folder: Path = CHECKPOINTS) -> Path:
    """
    A folder with a text file for each module of an installed package that has docstrings; each docstring once.

    Raises:
        ValueError: the package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ValueError(f"There is no installed package {package}.")
    root, target = Path(spec.origin).parent, folder / f"docstrings_of_{package}"
    seen = set()
    for path in sorted(root.rglob("*.py")):
        new = [text for text in dict.fromkeys(docstrings_of(path.read_text(encoding="utf-8"))) if text not in seen]
        seen.update(new)
        if new:
            place = target / path.relative_to(root).with_suffix(".txt")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text("\n\n".join(new) + "\n", encoding="utf-8")
    return target
