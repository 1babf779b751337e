"""
Labelled text for docs/tasks.md, from what every Python ships, and DNA with a planted motif.

    python -m scripts.experiments.task_texts functions functions.csv  # which package a function is from
    python -m scripts.experiments.task_texts lines lines.csv          # Python, and C++ among it
    python -m scripts.experiments.task_texts dna dna.csv              # which strand a motif is on
    python -m scripts.experiments.task_texts parts parts.jsonl        # docstrings, comments, ... in functions
    python -m scripts.experiments.task_texts motifs motifs.jsonl      # where motifs are in DNA
    python -m scripts.experiments.task_texts parameters parameters.jsonl  # what a parameter is, asked of docstrings
    python -m scripts.experiments.task_texts sites sites.jsonl        # what follows a given sequence in DNA

Functions are those of Python's standard library, from a definition to its end, with the package as the label. Lines
are of files of the library that `hf-reformer train` holds out, and one in twenty is of PyTorch's C++ headers. DNA is
in the form of genomic-benchmarks, a sequence and a label for each row. Parts of functions and motifs are spans: start,
end and label. Docstrings are the shorter ones of scikit-learn; the answer is what stands behind the name of the
parameter.
"""

import argparse
import ast
import csv
import io
import json
import re
import sysconfig
import textwrap
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import sklearn
import torch

from hf_reformer.training.corpus import TextArguments, read_standard_library, split_documents


PACKAGES = (
    "asyncio",
    "ctypes",
    "email",
    "http",
    "idlelib",
    "importlib",
    "lib2to3",
    "multiprocessing",
    "tkinter",
    "unittest",
)
TESTS = {"test", "tests", "idle_test", "__pycache__"}
SHORTEST_FUNCTION, LONGEST_DOCSTRING = 150, 1200
PARAMETER = re.compile(r"^(\w+) : (.+)$", re.MULTILINE)
SEED = 0
NUM_LINES, ODD_SHARE, SHORTEST_LINE = 2000, 0.05, 20
NUM_SEQUENCES, SHORTEST_SEQUENCE, LONGEST_SEQUENCE = 3000, 120, 600
# Two to four copies of a motif, of which a twentieth of the bases is changed, or of its reverse complement.
MOTIF = "GATTACAGG"
FEWEST_COPIES, MOST_COPIES, MUTATED = 2, 4, 0.05
COMPLEMENT = str.maketrans("ACGT", "TGCA")
LOWER_CASE_SHARE, UNKNOWN_SHARE, LONGEST_RUN = 0.3, 0.2, 50


def functions(packages: tuple[str, ...] = PACKAGES) -> Iterator[tuple[str, str]]:
    """Source and package of the functions and methods of the packages, those inside others left out."""
    root = Path(sysconfig.get_path("stdlib"))
    for package in packages:
        for path in sorted((root / package).rglob("*.py")):
            if TESTS.intersection(path.relative_to(root).parts):
                continue
            source = path.read_text(encoding="utf-8")
            nodes = list(ast.parse(source).body)
            while nodes:
                node = nodes.pop(0)
                if isinstance(node, ast.ClassDef):
                    nodes[:0] = node.body
                elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    text = ast.get_source_segment(source, node) or ""
                    if len(text) >= SHORTEST_FUNCTION:
                        yield text, package


def parts() -> Iterator[tuple[str, list[dict[str, str | int]]]]:
    """The same functions, and in each its name, parameters, docstrings, other strings and comments."""
    for source, _ in functions():
        text = textwrap.dedent(source)
        try:
            nodes, tokens = list(ast.walk(ast.parse(text))), list(tokenize.generate_tokens(io.StringIO(text).readline))
        except (SyntaxError, tokenize.TokenError):
            continue
        lines = text.splitlines(keepends=True)
        begins = [0]
        for line in lines:
            begins.append(begins[-1] + len(line))
        labels: dict[tuple[int, int], str] = {}
        for node in nodes:
            if isinstance(node, ast.arg):
                column = len(lines[node.lineno - 1].encode()[: node.col_offset].decode())
                labels[node.lineno, column] = "parameter"
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and ast.get_docstring(node):
                labels[node.body[0].lineno, node.body[0].col_offset] = "docstring"
        spans, after = [], ""
        for token in tokens:
            label = labels.get(token.start)
            if token.type == tokenize.NAME and after in ("def", "class"):
                label = "definition"
            elif token.type == tokenize.COMMENT:
                label = "comment"
            elif token.type == tokenize.STRING and label is None:
                label = "string"
            if label is not None:
                start, end = (begins[line - 1] + column for line, column in (token.start, token.end))
                spans.append({"start": start, "end": end, "label": label})
            after = token.string
        yield text, spans


def mutated(generator: np.random.Generator, motif: str) -> str:
    """The motif, some of its bases changed."""
    return "".join(base if generator.random() >= MUTATED else generator.choice(list("ACGT")) for base in motif)


def sequences(count: int = NUM_SEQUENCES, seed: int = SEED) -> Iterator[tuple[str, str]]:
    """Sequences of ragged length with the motif on one strand or the other, some with runs of N or in lower case."""
    for sequence, strand, _ in _sequences(count, seed):
        yield sequence, strand


def motifs(count: int = NUM_SEQUENCES, seed: int = SEED) -> Iterator[tuple[str, list[dict[str, str | int]]]]:
    """The same sequences, and where the motif is."""
    for sequence, strand, places in _sequences(count, seed):
        # One that a later one was written over is not there any more.
        whole = [
            place
            for number, place in enumerate(places)
            if all(abs(later - place) >= len(MOTIF) for later in places[number + 1 :])
        ]
        yield sequence, [{"start": place, "end": place + len(MOTIF), "label": strand} for place in sorted(whole)]


def _sequences(count: int, seed: int) -> Iterator[tuple[str, str, list[int]]]:
    generator = np.random.default_rng(seed)
    for number in range(count):
        strand = ("forward", "reverse")[number % 2]
        length = int(generator.integers(SHORTEST_SEQUENCE, LONGEST_SEQUENCE + 1))
        bases = generator.choice(list("ACGT"), length)
        if generator.random() < UNKNOWN_SHARE:
            begin = generator.integers(0, length - LONGEST_RUN)
            bases[begin : begin + generator.integers(10, LONGEST_RUN)] = "N"
        motif = MOTIF if strand == "forward" else MOTIF.translate(COMPLEMENT)[::-1]
        places = []
        for _ in range(generator.integers(FEWEST_COPIES, MOST_COPIES + 1)):
            places.append(int(generator.integers(0, length - len(motif) + 1)))
            bases[places[-1] : places[-1] + len(motif)] = list(mutated(generator, motif))
        sequence = "".join(bases)
        yield sequence.lower() if generator.random() < LOWER_CASE_SHARE else sequence, strand, places


def parameters() -> Iterator[tuple[str, str, list[dict[str, str | int]]]]:
    """A question about each described parameter of scikit-learn's docstrings, the docstring, and its type."""
    seen = set()
    for path in sorted(Path(sklearn.__file__).parent.rglob("*.py")):
        if TESTS.intersection(path.parts):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = ast.get_docstring(node) if isinstance(node, ast.FunctionDef | ast.ClassDef) else None
            if text is None or text in seen or len(text) > LONGEST_DOCSTRING:
                continue
            seen.add(text)
            for found in PARAMETER.finditer(text):
                yield f"What is {found[1]}?", text, [{"text": found[2], "answer_start": found.start(2)}]


def sites(count: int = NUM_SEQUENCES, seed: int = SEED) -> Iterator[tuple[str, str, list[dict[str, str | int]]]]:
    """A sequence of bases as the question, random DNA with it somewhere, and the bases behind it."""
    generator = np.random.default_rng(seed)
    for _ in range(count):
        length = int(generator.integers(SHORTEST_SEQUENCE, LONGEST_SEQUENCE + 1))
        context = "".join(generator.choice(list("ACGT"), length))
        place = int(generator.integers(0, length - 2 * len(MOTIF)))
        asked, behind = context[place : place + len(MOTIF)], place + len(MOTIF)
        answer = context[behind : behind + len(MOTIF)]
        if context.count(asked) == 1:
            yield asked, context, [{"text": answer, "answer_start": behind}]


def lines(count: int = NUM_LINES, seed: int = SEED) -> Iterator[tuple[str, str]]:
    """Lines of Python that a model of the standard library was not trained on, and of C++, in random order."""
    generator = np.random.default_rng(seed)
    _, held_out = split_documents(read_standard_library(), TextArguments().held_out_fraction)
    headers = sorted((Path(torch.__file__).parent / "include" / "ATen").glob("*.h"))
    num_odd = round(count * ODD_SHARE)
    drawn = [(line, "no") for line in _draw(generator, held_out["text"], count - num_odd)]
    drawn += [(line, "yes") for line in _draw(generator, [path.read_text() for path in headers], num_odd)]
    yield from (drawn[place] for place in generator.permutation(len(drawn)))


def _draw(generator: np.random.Generator, texts: Iterable[str], count: int) -> list[str]:
    """Different lines that are not short, blanks around them taken off."""
    found = sorted({line.strip() for text in texts for line in text.splitlines()})
    found = [line for line in found if len(line) >= SHORTEST_LINE]
    return [found[place] for place in generator.choice(len(found), count, replace=False)]


KINDS = {
    "functions": (functions, ("text", "label")),
    "lines": (lines, ("text", "odd")),
    "dna": (sequences, ("sequence", "label")),
    "parts": (parts, ("text", "spans")),
    "motifs": (motifs, ("text", "spans")),
    "parameters": (parameters, ("question", "context", "answers")),
    "sites": (sites, ("question", "context", "answers")),
}


def main(argv: list[str] | None = None) -> None:
    """Write a csv file, or one of a JSON record in each line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("kind", choices=tuple(KINDS))
    parser.add_argument("path", type=Path)
    arguments = parser.parse_args(argv)
    rows, columns = KINDS[arguments.kind]
    with arguments.path.open("w", encoding="utf-8", newline="") as file:
        if arguments.path.suffix == ".jsonl":
            file.writelines(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows())
            return
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows())


if __name__ == "__main__":
    main()
