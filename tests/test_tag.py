"""`hf-reformer tag`: labelled spans, or words with tags, to a model that finds them in new texts."""

import json

import datasets
import pytest
import torch
from huggingface_hub import ModelCard
from sklearn.metrics import f1_score
from tiny_models import TINY_RECIPE
from transformers import AutoTokenizer, pipeline

from hf_reformer import ReformerByteTokenizer, ReformerForTokenClassification
from hf_reformer.commands import tag
from hf_reformer.training import tagging
from hf_reformer.training.tagged_texts import (
    Span,
    TaggedDataArguments,
    read_spans,
    read_tagged,
    spans_of,
    tags_of,
    units_of,
)
from hf_reformer.training.tagging import tag_figures, windows_of


pytestmark = pytest.mark.usefixtures("own_datasets_cache")


TEXT = "Über Ada Lovelace, née Byron: born in London."
SPANS = [Span(5, 17, "person"), Span(38, 44, "place")]
TAGS = ["O", "B-person", "I-person", "O", "O", "O", "O", "O", "O", "B-place", "O"]
FILES = {"README.md", "config.json", "curve.png", "labels.png", "model.safetensors", "predictions.jsonl"}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def record(number):
    """A text with two spans, of a length of its own."""
    name = f"Ada{number} Byron"
    text = f"{'so ' * (number % 4)}{name} lives in York {number}."
    start, place = text.index(name), text.index("York")
    return {
        "text": text,
        "spans": [
            {"start": start, "end": start + len(name), "label": "person"},
            {"start": place, "end": place + 4, "label": "place"},
        ],
    }


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """A file of 30 texts with spans."""
    return write_jsonl(tmp_path_factory.mktemp("data") / "reports.jsonl", map(record, range(30)))


def run(folder, **changed):
    given = ({} if "model_name_or_path" in changed else TINY_RECIPE | {"initializer_range": 0.3}) | {
        "output_dir": folder,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "eval_strategy": "no",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    words = [
        word
        for name, value in (given | changed).items()
        for word in (f"--{name}", *map(str, value if isinstance(value, list) else [value]))
    ]
    return tag.tag(*tag.parse_arguments(words))


@pytest.fixture(scope="module")
def trained(reports, tmp_path_factory):
    """A run that learns a little, with a stage before it: its folder and its figures."""
    folder = tmp_path_factory.mktemp("runs") / "reports"
    how = {"max_steps": 120, "learning_rate": 1e-2, "eval_strategy": "steps", "eval_steps": 60}
    return folder, run(folder, data=reports, pretrain_steps=2, **how)


def test_spans_and_tags_are_the_same_thing():
    (units,) = units_of([TEXT])
    assert [TEXT[start:end] for start, end in units] == [
        "Über", "Ada", "Lovelace", ",", "née", "Byron", ":", "born", "in", "London", ".",
    ]  # fmt: skip
    assert tags_of(SPANS, units) == TAGS
    assert spans_of(TAGS, units) == SPANS
    # Neighbours are two spans, and an inside without a beginning begins one.
    beside = [Span(5, 8, "person"), Span(9, 17, "person")]
    assert tags_of(beside, units)[1:3] == ["B-person", "B-person"]
    assert spans_of(tags_of(beside, units), units) == beside
    assert spans_of(["O", "I-person", *["O"] * 9], units) == [Span(5, 8, "person")]
    # In DNA each base is a unit.
    assert len(units_of(["ACGTNNnnacgt"])[0]) == 12


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([{"start": 5, "end": 99, "label": "x"}], "span 5 to 99 .* in a text of 45 characters"),
        ([[0, 6, "x"], [5, 9, "y"]], "span 5 to 9 .* no two may overlap"),
        ([{"start": 4, "end": 4, "label": "x"}], "span 4 to 4"),
        ([{"start": "4", "end": 5, "label": "x"}], "a span has start, end and label"),
        ([{"start": 4, "end": 5}], "a span has start, end and label"),
    ],
)
def test_spans_that_are_none_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        read_spans(given, TEXT, 0, "reports.jsonl")


def test_every_form_says_the_same(tmp_path):
    (units,) = units_of([TEXT])
    words = [TEXT[start:end] for start, end in units]
    other = [["Bob", "smiles"], ["B-person", "O"]]
    bilou = ["O", "B-person", "L-person", *TAGS[3:9], "U-place", "O"]
    conll = "\n".join(f"{word} NN {tag}" for word, tag in zip(words, bilou, strict=True))
    (tmp_path / "some.conll").write_text(
        f"-DOCSTART- -X- O\n\n{conll}\n\nBob NN B-person\nsmiles VB O\n", encoding="utf-8"
    )
    write_jsonl(tmp_path / "words.jsonl", [{"tokens": words, "tags": TAGS}, {"tokens": other[0], "tags": other[1]}])
    names = ["O", "B-person", "I-person", "B-place"]
    feature = datasets.Features(
        {
            "tokens": datasets.List(datasets.Value("string")),
            "tags": datasets.List(datasets.ClassLabel(names=names)),
        }
    )
    numbers = [[names.index(tag) for tag in tags] for tags in (TAGS, other[1])]
    table = datasets.Dataset.from_dict({"tokens": [words, other[0]], "tags": numbers}, features=feature)
    table.to_parquet(str(tmp_path / "numbers.parquet"))
    found = [
        read_tagged(TaggedDataArguments(data=str(tmp_path / name), held_out_fraction=0.5))
        for name in ("some.conll", "words.jsonl", "numbers.parquet")
    ]
    for sides in found:
        both = {tuple(tags) for side in (sides.train, sides.held_out) for tags in side.tags}
        assert both == {tuple(TAGS), ("B-person", "O")}
        assert sides.train.words(0) in (words, other[0])


def test_a_file_that_does_not_fit_is_refused(tmp_path, reports):
    def read(**given):
        return read_tagged(TaggedDataArguments(**given))

    (tmp_path / "one.conll").write_text("alone\n")
    with pytest.raises(ValueError, match=r"Line 1 of .* must be a word and its tag"):
        read(data=str(tmp_path / "one.conll"))
    uneven = write_jsonl(tmp_path / "uneven.jsonl", [{"tokens": ["a", "b"], "tags": ["O"]}])
    with pytest.raises(ValueError, match=r"Row 1 of .* has 2 words and 1 tags"):
        read(data=uneven)
    with pytest.raises(ValueError, match=r"neither a column 'tokens'.* it has 'text', 'label'"):
        read(data=write_jsonl(tmp_path / "labels.jsonl", [{"text": "a", "label": "b"}] * 2))
    with pytest.raises(ValueError, match="has the tag 'O', so there is nothing to find"):
        read(data=write_jsonl(tmp_path / "none.jsonl", [{"text": text, "spans": []} for text in "ab"]))
    with pytest.warns(UserWarning, match="No training text has 'ship'"):
        ship = {"text": "A ship", "spans": [{"start": 2, "end": 6, "label": "ship"}]}
        read(data=reports, validation_data=write_jsonl(tmp_path / "ship.jsonl", [ship]))


@pytest.mark.parametrize("length", [8, 13, 1000])
@pytest.mark.parametrize("has_head_tokens", [True, False])
def test_windows_lose_no_unit(reports, length, has_head_tokens):
    texts = read_tagged(TaggedDataArguments(data=reports)).train
    tokenizer = ReformerByteTokenizer()
    if has_head_tokens:
        tokenizer.add_head_tokens()
    windows = windows_of(texts, tokenizer, length)
    assert max(len(window.ids) for window in windows) <= length
    seen = [[] for _ in texts.texts]
    for window in windows:
        for unit, column in zip(window.units, window.columns, strict=True):
            start = texts.units[window.text][unit][0]
            assert tokenizer.decode([window.ids[column]]) == texts.texts[window.text][start]
            seen[window.text].append(unit)
    assert seen == [list(range(len(units))) for units in texts.units]


def test_a_unit_may_begin_with_a_character_of_several_bytes():
    sides = tagging.TaggedTexts(["né Über"], [[(0, 2), (3, 7)]], [["O", "O"]], [0])
    (window,) = windows_of(sides, ReformerByteTokenizer(), 100)
    # Two bytes each for the accent and the umlaut.
    assert (window.units, window.columns) == ([0, 1], [0, 4])
    assert window.owners == [0, 0, 0, tagging.BETWEEN, 1, 1, 1, 1, 1]


def test_every_token_has_a_tag():
    (units,) = units_of([TEXT])
    tokenizer = ReformerByteTokenizer()
    tokenizer.add_head_tokens()
    texts, names = (
        tagging.TaggedTexts([TEXT], [units], [TAGS], [0]),
        ["O", "B-person", "I-person", "B-place", "I-place"],
    )
    (row,) = tagging.rows_of(windows_of(texts, tokenizer, 1000), texts, names)
    head, *inside, tail = row["labels"]
    assert (head, tail) == (tagging.IGNORED, tagging.IGNORED)
    said = [names[number] for number in inside]
    # Each byte of a character stands where it does; a blank in a span is inside of it.
    bytes_of = [len(letter.encode()) for letter in TEXT]
    at = [place for place, count in enumerate(bytes_of) for _ in range(count)]
    for place, found in zip(at, said, strict=True):
        (span,) = [span for span in SPANS if span.start <= place < span.end] or [None]
        assert found == ("O" if span is None else f"{'B' if place == span.start else 'I'}-{span.label}")


def test_figures_do_not_depend_on_the_parts(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    names = ["O", "B-x", "I-x", "B-y", "I-y"]
    (units,) = units_of(["a " * 500])

    def draw():
        drawn = [names[number] for number in torch.randint(5, (500,), generator=generator).tolist()]
        return tags_of(spans_of(drawn, units), units)

    given, found = draw(), draw()
    right = set(spans_of(given, units)) & set(spans_of(found, units))
    precision, recall = (len(right) / len(spans_of(tags, units)) for tags in (found, given))
    for at_once in (1, 7, 10_000):
        monkeypatch.setattr(tagging, "UNITS_AT_ONCE", at_once)
        figures = tag_figures([given], [found], True)
        assert figures["precision"] == pytest.approx(precision) and figures["recall"] == pytest.approx(recall)
    labels, predicted = given, found
    assert tag_figures([given], [found], False)["macro_f1"] == pytest.approx(
        f1_score(labels, predicted, average="macro", labels=sorted(set(labels)))
    )


def test_a_run_leaves_what_it_promises(trained, reports):
    folder, figures = trained
    assert {path.name for path in folder.iterdir()} >= FILES
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    sources = [json.loads(line) for line in open(reports, encoding="utf-8")]
    assert len(rows) == 6
    given, found, right = 0, 0, 0
    for row in rows:
        source = sources[row["row"] - 1]
        keys = ("start", "end", "label")
        assert row["text"] == source["text"]
        assert [{key: span[key] for key in keys} for span in row["spans"]] == source["spans"]
        wanted, had = ({tuple(span[key] for key in keys) for span in row[name]} for name in ("spans", "predicted"))
        given, found, right = given + len(wanted), found + len(had), right + len(wanted & had)
        assert all(span["text"] == row["text"][span["start"] : span["end"]] for span in row["predicted"])
    ours = figures["this model"]
    assert (
        right and ours["precision"] == pytest.approx(right / found) and ours["recall"] == pytest.approx(right / given)
    )
    # Words and their neighbours tell these spans.
    assert figures["logistic regression on 2 words on both sides"]["f1"] == 1


def test_the_card_says_what_was_measured(trained):
    folder, figures = trained
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "token-classification" and "$" not in card.text
    assert [result.metric_type for result in card.data.eval_results] == ["f1", "precision", "recall"]
    assert card.data.eval_results[0].metric_value == pytest.approx(figures["this model"]["f1"], abs=1e-4)
    assert "Labels: `person`, `place`." in card.text and "longer ones are read in windows" in card.text


def test_a_pipeline_finds_the_same(trained):
    folder, _ = trained
    tagger = pipeline("token-classification", model=str(folder), device="cpu", aggregation_strategy="simple")
    assert isinstance(tagger.model, ReformerForTokenClassification)
    row = json.loads((folder / "predictions.jsonl").read_text().splitlines()[0])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = tagging.TaggedTexts([row["text"]], units_of([row["text"]]), [[]], [0])
    (window,) = windows_of(texts, tokenizer, 10**6)
    with torch.no_grad():
        best = tagger.model(torch.tensor([window.ids])).logits.argmax(-1)[0, window.columns]
    tags = [tagger.model.config.id2label[number] for number in best.tolist()]
    found = [[span["start"], span["end"], span["label"]] for span in row["predicted"]]
    assert found == [list(span) for span in spans_of(tags, texts.units[0])]
    # Where it says the same of all bytes of a span, the pipeline finds that span.
    grouped = {(group["start"], group["end"], group["entity_group"]) for group in tagger(row["text"])}
    assert grouped & {tuple(span) for span in found}


def test_new_texts_are_tagged(trained, reports, tmp_path, capsys):
    folder, _ = trained
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    (tmp_path / "new.txt").write_text("".join(f"{row['text']}\n" for row in rows), encoding="utf-8")
    given = ["--model_name_or_path", str(folder), "--predict", str(tmp_path / "new.txt"), "--use_cpu", "True"]
    tag.main([*given, "--disable_tqdm", "True"])
    found = [json.loads(line) for line in (tmp_path / "new_predictions.jsonl").read_text().splitlines()]
    assert [row["predicted"] for row in found] == [row["predicted"] for row in rows]
    assert "6 texts, read in 6 windows" in capsys.readouterr().out
    # A context that is shorter reads each text in parts, and goes through all of it.
    tag.main(
        [*given, "--disable_tqdm", "True", "--context_length", "16", "--predictions_path", str(tmp_path / "b.jsonl")]
    )
    assert len((tmp_path / "b.jsonl").read_text().splitlines()) == 6
    assert "read in 6 windows" not in capsys.readouterr().out


def test_words_with_plain_tags(tmp_path):
    kinds = {"the": "article", "cat": "noun", "dog": "noun", "runs": "verb", "sees": "verb"}
    words = list(kinds)
    rows = [[words[(place * number) % 5] for place in range(1, 4 + number % 3)] for number in range(1, 13)]
    path = write_jsonl(
        tmp_path / "tags.jsonl", [{"words": row, "kinds": [kinds[word] for word in row]} for row in rows]
    )
    figures = run(tmp_path / "run", data=path, tokens_column="words", tags_column="kinds")
    assert set(figures["this model"]) == {"accuracy", "macro_f1"}
    assert figures["the most frequent tag of each word"]["accuracy"] == 1
    first = json.loads((tmp_path / "run" / "predictions.jsonl").read_text().splitlines()[0])
    assert set(first) == {"row", "tokens", "predicted", "tags"}
    assert set(first["predicted"]) <= set(kinds.values())


def test_a_mistake_ends_with_its_message(reports):
    with pytest.raises(SystemExit, match=r"hf-reformer tag: predict is new\.txt, but no model"):
        tag.main(["--predict", "new.txt"])
    with pytest.raises(SystemExit, match="hf-reformer tag: Name a file with --data"):
        tag.main([])
    with pytest.raises(SystemExit, match=r"Both data .* and predict"):
        tag.main(["--data", reports, "--predict", "new.txt"])
