"""Tables of text with labels: what is read, what is refused, and which texts are held out."""

import gzip
import json
import re
import warnings
from collections import Counter

import datasets
import pytest

from hf_reformer.training import labelled_texts, tables
from hf_reformer.training.labelled_texts import LabelledDataArguments, LabelledTexts, read_labelled, split_labelled
from hf_reformer.training.tables import read_table, texts_of, write_table


pytestmark = pytest.mark.usefixtures("own_datasets_cache")


ROWS = [{"text": f"text {number}", "label": "ab"[number % 2]} for number in range(20)]


def write_csv(path, *lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def arguments_of(path, **changed):
    return LabelledDataArguments(data=str(path), **changed)


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_every_type_of_table_is_read(tmp_path, ending):
    path = tmp_path / f"rows{ending}"
    if ending == ".tsv":
        write_csv(path, "text\tlabel", *(f"{row['text']}\t{row['label']}" for row in ROWS))
    elif ending == ".json":
        path.write_text(json.dumps(ROWS))
    else:
        write_table(path, {name: [row[name] for row in ROWS] for name in ("text", "label")})
    assert list(read_table(path)) == ROWS


def test_lines_records_and_folders_are_read(tmp_path):
    (tmp_path / "some.log").write_text("one\n\nthree\n")
    assert read_table(tmp_path / "some.log")["text"][:] == ["one", "", "three"]
    (tmp_path / "some.fasta").write_text(">first of two\nACGT\nNNac\n\n>second\nGG\n")
    assert list(read_table(tmp_path / "some.fasta")) == [
        {"name": "first of two", "text": "ACGTNNac"},
        {"name": "second", "text": "GG"},
    ]
    for name in ("good/a.txt", "good/deep/b.txt", "bad/c.txt"):
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "folder" / "README").write_text("not a text of a label")
    table = read_table(tmp_path / "folder")
    assert table["label"][:] == ["bad", "good", "good"] and table["text"][1] == "good/a.txt"


def test_fields_of_csv_stay_what_they_are(tmp_path):
    path = write_csv(tmp_path / "a.csv", "text,label", '"NA",01', "nan,None", '"two\nlines, ""quoted""",1.0', "12,x")
    assert list(read_table(path)) == [
        {"text": "NA", "label": "01"},
        {"text": "nan", "label": "None"},
        {"text": 'two\nlines, "quoted"', "label": "1.0"},
        {"text": "12", "label": "x"},
    ]
    # What spreadsheets write first.
    (tmp_path / "b.csv").write_bytes(b"\xef\xbb\xbftext\r\n\xc3\xa9\r\n")
    assert list(read_table(tmp_path / "b.csv")) == [{"text": "é"}]
    long = "x" * 300_000
    assert read_table(write_csv(tmp_path / "c.csv", "text", long))["text"][:] == [long]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nowhere.csv", None, "There is no file or folder at .*nowhere.csv"),
        ("a.xlsx", b"PK", "ends with '.xlsx', which is no known type. Give one of .csv, .tsv, .json"),
        ("a.csv", b"text,label\nx,y\n1,2,3,4\n", "cannot be read as csv .*Expected 2 fields"),
        ("b.csv", b"text\n\xff\xfe\n", "cannot be read as csv .*UnicodeDecodeError.* must be UTF-8"),
        ("c.csv", b"", "cannot be read as csv .*it is empty"),
        ("d.csv", b"text,text\na,b\n", "two columns have one name: text, text"),
        ("e.csv", b"text,label\n", "e.csv has no rows"),
        ("f.json", b'{"text": ', "cannot be read as json"),
        ("g.parquet", b"PAR", "cannot be read as parquet"),
        ("h.fasta", b"ACGT\n", "begins in line 1 without a '>' and a name: it is no FASTA file"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        read_table(tmp_path / name)


def test_a_folder_without_folders_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match="has no folder with files in it"):
        read_table(tmp_path)
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "a.txt").write_bytes(gzip.compress(b"text"))
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 text \(byte 1\)"):
        read_table(tmp_path)


# Texts and labels


@pytest.mark.parametrize(
    ("lines", "changed", "message"),
    [
        (
            ["body,label", "x,y"],
            {},
            "has no column 'text'; it has 'body', 'label'. Name one of them with --text_column",
        ),
        (
            ["text,stars", "x,y"],
            {},
            "has no column 'label'; it has 'text', 'stars'. Name one of them with --label_col",
        ),
        (["text,label", "x,a", '" ",b'], {}, r"1 of the 2 rows .* no text in column 'text' \(the first is row 2\)"),
        (["text,label", "x,a", "y,"], {}, r"1 of the 2 rows .* no label in column 'label' \(the first is row 2\)"),
        (["text,label", ",a"], {"drop_incomplete": True}, "No row of .* has text in column 'text'"),
        (["text,label", "x,a", "y,a"], {}, "All 2 texts have the label 'a', so there is nothing to tell apart"),
        (["text,label", "x,a", "x,a", "y,b"], {}, "Each of the 2 labels has one text, copies aside"),
        (["text,label", *(f"t{n},{n}.5" for n in range(60))], {}, "looks like a quantity: 60 different numbers"),
        (["text,label", *(f"t{n},{n % 51}" for n in range(120))], {}, "looks like a quantity: 51 different numbers"),
        (["text,label", *(f"t{n},{n % 21}.5" for n in range(99))], {}, "looks like a quantity: 21 different numbers"),
        (["text,label", *(f"t{n},id{n}" for n in range(30))], {}, "30 of the 30 labels in column 'label' appear once"),
        (
            ["text,label,side", "x,a,left", "y,b,test"],
            {"split_column": "side"},
            "says 'left'; it must say one of train",
        ),
        (["text,label,side", "x,a,train", "y,b,train"], {"split_column": "side"}, "says 'train' only"),
        (
            ["text,label,side", "x,a,train", "y,b,train", "z,c,test"],
            {"split_column": "side"},
            "no training text has: 'c'",
        ),
    ],
)
def test_bad_tables_are_refused(tmp_path, lines, changed, message):
    with pytest.raises(ValueError, match=message):
        read_labelled(arguments_of(write_csv(tmp_path / "a.csv", *lines), **changed))


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"held_out_fraction is 1\.0; it must lie between 0 and 1"):
        LabelledDataArguments(held_out_fraction=1.0)
    with pytest.raises(ValueError, match=r"split_column \(side\) says which rows are held out, and so do"):
        LabelledDataArguments(split_column="side", test_data="x.csv")
    with pytest.raises(ValueError, match="Name a file with --data"):
        read_labelled(LabelledDataArguments())
    (tmp_path / "a.jsonl").write_text('{"text": "x", "label": ["a", "b"]}\n{"text": "y", "label": ["a"]}\n')
    with pytest.raises(ValueError, match=r"\['a', 'b'\]: several labels for one text"):
        read_labelled(arguments_of(tmp_path / "a.jsonl"))
    (tmp_path / "b.jsonl").write_text('{"text": 3, "label": "a"}\n')
    with pytest.raises(ValueError, match=r"Column 'text' of .* does not hold text but int, such as 3"):
        read_labelled(arguments_of(tmp_path / "b.jsonl"))


def test_labels_of_any_type_become_names(tmp_path):
    rows = [{"text": f"t{n}", "label": float(n % 3)} for n in range(9)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_labelled(arguments_of(tmp_path / "a.jsonl")).names == ["0", "1", "2"]
    path = write_csv(tmp_path / "b.csv", "text,label", *(f"t{n},{n % 12}" for n in range(36)))
    # By value and not by name, which would have 10 behind 1.
    assert read_labelled(arguments_of(path)).names == [str(number) for number in range(12)]
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    table = datasets.Dataset.from_dict({"text": list("abcd"), "label": [0, 1, 1, 0]}, features=features)
    table.to_parquet(str(tmp_path / "c.parquet"))
    assert read_labelled(arguments_of(tmp_path / "c.parquet")).names == ["no", "yes"]


def test_labels_that_appear_once_are_trained_on(tmp_path):
    path = write_csv(tmp_path / "a.csv", "text,label", *(f"t{n},{'ab'[n % 2]}" for n in range(20)), "alone,c")
    with pytest.warns(UserWarning, match="1 labels appear once: 'c'"):
        sides = read_labelled(arguments_of(path))
    assert "alone" in sides.train.texts and "c" not in sides.held_out.labels


def test_incomplete_rows_can_be_left_out(tmp_path):
    lines = ["text,label", *(f"t{n},{'ab'[n % 2]}" for n in range(10)), ",a", "x,", "y,b"]
    sides = read_labelled(arguments_of(write_csv(tmp_path / "a.csv", *lines), drop_incomplete=True))
    kept = dict(zip(sides.train.rows + sides.held_out.rows, sides.train.texts + sides.held_out.texts, strict=True))
    assert sorted(kept) == [*range(10), 12] and kept[12] == "y"


# The split


def make(num, labels="abc", copies=1):
    texts = [f"text {number}" for number in range(num) for _ in range(copies)]
    return LabelledTexts(texts, [labels[hash_of(text) % len(labels)] for text in texts], list(range(len(texts))))


def hash_of(text):
    return int(text.split()[1])


def test_the_split_has_the_share_of_each_label_and_copies_on_one_side():
    everything = make(300, labels="aaaaab", copies=3)
    sides = split_labelled(everything, 0.2)
    assert not set(sides["train"].texts) & set(sides["held_out"].texts)
    assert Counter(sides["held_out"].labels) == {"a": 150, "b": 30}
    assert sorted(sides["train"].rows + sides["held_out"].rows) == everything.rows
    assert split_labelled(everything, 0.2) == sides
    backwards = split_labelled(everything.select(range(len(everything) - 1, -1, -1)), 0.2)
    assert set(backwards["held_out"].texts) == set(sides["held_out"].texts)


def test_two_texts_of_a_label_are_one_on_each_side():
    sides = split_labelled(LabelledTexts(["x", "y", "z", "w"], ["a", "a", "b", "b"], [0, 1, 2, 3]), 0.01)
    assert Counter(sides["train"].labels) == Counter(sides["held_out"].labels) == {"a": 1, "b": 1}


def test_a_copy_with_another_label_is_on_the_same_side():
    texts = [f"text {number}" for number in range(50)] * 2
    labels = ["ab"[number % 2] for number in range(50)] + ["ba"[number % 2] for number in range(50)]
    sides = split_labelled(LabelledTexts(texts, labels, list(range(100))), 0.3)
    assert not set(sides["train"].texts) & set(sides["held_out"].texts)
    assert len(sides["train"]) + len(sides["held_out"]) == 100


def test_a_text_counts_for_its_first_label():
    texts = [f"text {number}" for number in range(30)]
    first = min((f"own {number}" for number in range(1000)), key=labelled_texts.hash_of)
    assert first < "p" and labelled_texts.hash_of(first) < min(map(labelled_texts.hash_of, texts))
    # The only one that is of its label alone would be the first to be held out.
    everything = LabelledTexts([*texts, *texts, first], ["a"] * 30 + ["b"] * 31, list(range(61)))
    assert first in split_labelled(everything, 0.1)["train"].texts


def test_files_and_columns_say_who_is_held_out(tmp_path):
    train = write_csv(tmp_path / "a.csv", "text,label,fold", "x,a,train", "y,b,Train", "z,a,dev", "w,b,test")
    other = write_csv(tmp_path / "b.csv", "text,label", "v,b")
    by_column = read_labelled(arguments_of(train, split_column="fold"))
    assert [by_column.train.texts, by_column.held_out.texts, by_column.test.texts] == [["x", "y"], ["z"], ["w"]]
    assert by_column.measured is by_column.test and "column 'fold'" in by_column.how
    # A warning: each label appears twice.
    by_file = read_labelled(arguments_of(train, validation_data=other))
    assert by_file.held_out.texts == ["v"] and by_file.measured is by_file.held_out and len(by_file.train) == 4
    both = read_labelled(arguments_of(train, test_data=other))
    assert both.measured.texts == ["v"] and len(both.train) == len(both.held_out) == 2


def test_what_a_person_reads():
    side = LabelledTexts(["x"] * 7, [*"aabcdef"], list(range(7)))
    assert side.describe() == "7 texts (a 2, b 1, c 1, d 1, e 1, and 1 other labels)"
    assert side.digest != LabelledTexts(["x"] * 7, [*"aabcdee"], list(range(7))).digest
    assert tables.excerpt("one\n two" * 50, 12) == "one twoone …"
    assert labelled_texts._listed([f"n{number}" for number in range(7)]).endswith("'n4' and 2 others")
    assert arguments_of("a/b.csv", test_data="c.csv").source == "b.csv, c.csv"


def test_tables_are_written_where_their_type_is_known(tmp_path):
    with pytest.raises(
        ValueError, match=re.escape("ends with '.xlsx'; what is written ends with one of .csv, .jsonl")
    ):
        write_table(tmp_path / "a.xlsx", {"text": ["x"]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_table(tmp_path / "deep" / "a.csv", {"text": ['two\nlines, "x"', "é"], "number": [1, 2.5]})
    assert read_table(tmp_path / "deep" / "a.csv")["text"][:] == ['two\nlines, "x"', "é"]
    assert texts_of(read_table(tmp_path / "deep" / "a.csv"), "text", "a.csv")[1] == [0, 1]
