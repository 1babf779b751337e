"""Small files of real text, in the formats that example scripts and trainers read: Python's own language reference."""

import csv
import json
import random
import re
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any


ROWS = 24


@cache
def sentences(shortest: int = 30, longest: int = 90) -> list[str]:
    """Sentences of the language reference, as long as the limits say, in the order of the topics."""
    text = " ".join(" ".join(topics[name].split()) for name in sorted(topics))
    found = re.findall(r"(?<=[.:] )[A-Z][^.:]+[.]", text)
    return [sentence for sentence in found if shortest <= len(sentence) <= longest]


def write_text(path: Path) -> Path:
    """A text file, a sentence on each line."""
    path.write_text("\n".join(sentences()[: 5 * ROWS]), encoding="utf-8")
    return path


def write_classification(path: Path) -> Path:
    """A table of sentences and whether they quote something."""
    rows = [{"sentence": sentence, "label": int('"' in sentence)} for sentence in sentences()[: 2 * ROWS]]
    return _write_table(path, rows)


def write_pairs(path: Path) -> Path:
    """A table of two sentences and whether the second follows the first."""
    texts = sentences()
    rows = [
        {"sentence1": texts[place], "sentence2": texts[place + (1 if place % 2 else 50)], "label": place % 2}
        for place in range(ROWS)
    ]
    return _write_table(path, rows)


def write_tagged_words(path: Path) -> Path:
    """Lines of words and their tags: what stands in quotes is code."""
    rows = []
    for sentence in sentences()[:ROWS]:
        words = sentence.split()
        rows.append({"tokens": words, "ner_tags": ["B-CODE" if '"' in word else "O" for word in words]})
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def write_questions(path: Path) -> Path:
    """Questions about sentences; an answer is the third word."""
    data = []
    for number, context in enumerate(sentences()[:ROWS]):
        answer = context.split()[2]
        data.append(
            {
                "id": str(number),
                "question": f"What follows {context.split()[1]}?",
                "context": context,
                "answers": {"text": [answer], "answer_start": [context.index(f" {answer}") + 1]},
            }
        )
    path.write_text(json.dumps({"data": data}), encoding="utf-8")
    return path


def write_choices(path: Path) -> Path:
    """A table of beginnings with four endings, the right one among them."""
    texts, draw, rows = sentences(), random.Random(0), []
    for place in range(ROWS):
        first, second = texts[place].split(maxsplit=1)
        endings = [" ".join(texts[place + 10 * wrong].split()[-3:]) for wrong in range(4)]
        label = draw.randrange(4)
        endings[0], endings[label] = endings[label], endings[0]
        rows.append(
            {"sent1": first, "sent2": second, "label": label}
            | {f"ending{number}": ending for number, ending in enumerate(endings)}
        )
    return _write_table(path, rows)


def _write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path
