"""The labelled texts of docs/tasks.md, and the figures of vectors and scores on them."""

import csv
import itertools
import re

import numpy as np
import pytest

from hf_reformer.training.tables import read_table
from scripts.experiments import task_figures, task_texts


pytestmark = pytest.mark.usefixtures("own_datasets_cache")


def test_functions_have_the_package_they_are_from():
    rows = list(task_texts.functions(("json", "http")))
    assert {label for _, label in rows} == {"json", "http"}
    assert all(re.match(r"(async )?def ", text) and len(text) >= 150 for text, _ in rows)
    assert any("JSONDecodeError" in text for text, label in rows if label == "json")


def test_sequences_are_ragged_and_have_the_motif_of_their_strand(tmp_path):
    task_texts.main(["dna", str(tmp_path / "dna.csv")])
    table = read_table(tmp_path / "dna.csv")
    assert len(table) == 3000 and table.column_names == ["sequence", "label"]
    rows = list(task_texts.sequences(200))
    assert rows == [(row["sequence"], row["label"]) for row in table.select(range(200))]
    lengths = {len(sequence) for sequence, _ in rows}
    assert min(lengths) >= 120 and max(lengths) <= 600 and len(lengths) > 100
    # Changed bases and runs of N leave the whole motif in most.
    motifs = {"forward": "GATTACAGG", "reverse": "CCTGTAATC"}
    assert np.mean([motifs[label] in sequence.upper() for sequence, label in rows]) > 0.9
    assert any("N" * 10 in sequence for sequence, _ in rows) and any(sequence.islower() for sequence, _ in rows)
    assert set("".join(sequence for sequence, _ in rows)) == set("ACGTNacgtn")


def test_spans_are_what_their_label_says():
    found = {label: [] for label in ("definition", "parameter", "docstring", "string", "comment")}
    for text, spans in itertools.islice(task_texts.parts(), 300):
        for span in spans:
            found[span["label"]].append((text, text[span["start"] : span["end"]]))
    assert all(re.search(rf"(def|class) {re.escape(name)}", text) for text, name in found["definition"])
    assert all(name.isidentifier() for _, name in found["parameter"]) and ("self" in dict(found["parameter"]).values())
    quoted = found["docstring"] + found["string"]
    assert all(part[-1] in "'\"" and re.match(r"\w{0,2}['\"]", part) for _, part in quoted)
    assert all(part.startswith("#") for _, part in found["comment"]) and all(found.values())
    motifs = {"forward": "GATTACAGG", "reverse": "CCTGTAATC"}
    for (sequence, spans), (same, label) in zip(task_texts.motifs(100), task_texts.sequences(100), strict=True):
        assert sequence == same and {span["label"] for span in spans} == {label}
        for span in spans:
            part = sequence[span["start"] : span["end"]].upper()
            assert sum(base == right for base, right in zip(part, motifs[label], strict=True)) >= 6


def test_answers_are_parts_of_their_texts():
    asked = [*itertools.islice(task_texts.parameters(), 200), *task_texts.sites(50)]
    for question, context, answers in asked:
        (answer,) = answers
        start, text = answer["answer_start"], answer["text"]
        assert text and context[start : start + len(text)] == text
        if question.startswith("What"):
            name = re.fullmatch(r"What is (\w+)\?", question)[1]
            assert context[:start].endswith(f"{name} : ")
        else:
            assert context[:start].endswith(question) and context.count(question) == 1


@pytest.mark.slow
def test_lines_are_python_but_for_one_in_twenty(tmp_path):
    rows = list(task_texts.lines(100))
    assert rows == list(task_texts.lines(100)) and sum(odd == "yes" for _, odd in rows) == 5
    with (tmp_path / "lines.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "odd"), *rows])
    scores = ["bits_per_byte", *("9.0" if odd == "yes" else "1.0" for _, odd in rows)]
    (tmp_path / "scores.csv").write_text("\n".join(scores))
    figures = task_figures.of_scores(tmp_path / "lines.csv", tmp_path / "scores.csv")
    own, counted, length = (values["area under the curve"] for values in figures.values())
    assert own == 1 and counted > 0.8 and 0 < length <= 1


def test_vectors_that_tell_labels_apart_have_all_of_them_right(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"word{n} text,{'ab'[n % 2]}\n" for n in range(40)))
    np.save(tmp_path / "a.npy", np.array([[n % 2, n / 40] for n in range(40)]))
    task_figures.main(["vectors", str(tmp_path / "a.csv"), str(tmp_path / "a.npy")])
    assert "| logistic regression on the vectors | **1.000** | **1.000** |" in capsys.readouterr().out


def test_bits_by_counting_are_those_of_the_counts():
    # Of 256 bytes after "ab" each has a tenth, and "c" four more; "abc" is four of the four.
    (bits,) = task_figures.bits_by_counting(b"\n\nabc" * 4, ["abc"])
    chance = (4 + 0.1) / (4 + 25.6)
    assert bits == pytest.approx(-np.log2(chance))
