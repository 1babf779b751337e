"""`hf-reformer tag`: labelled spans, or words with tags, to a model that finds them in new texts."""

import csv
import json
import shutil

import datasets
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from sklearn.metrics import f1_score
from task_runs import run_small
from tiny_models import make_model
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, pipeline

from hf_reformer import ReformerByteTokenizer, ReformerForCausalLM, ReformerForTokenClassification
from hf_reformer.commands import tag
from hf_reformer.training import tagging
from hf_reformer.training.tagged_texts import (
    Span,
    TaggedDataArguments,
    kind_of,
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
    return run_small(tag.parse_arguments, tag.tag, folder, **changed)


@pytest.fixture(scope="module")
def trained(reports, tmp_path_factory):
    """A run that learns a little, with a stage before it: its folder and its figures."""
    folder = tmp_path_factory.mktemp("runs") / "reports"
    how = {"max_steps": 120, "learning_rate": 1e-2, "eval_strategy": "steps", "eval_steps": 60}
    return folder, run(folder, data=reports, pretrain_steps=2, **how)


def test_spans_and_tags_are_the_same_thing():
    (units,) = units_of([TEXT], "words")
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
    assert kind_of(["ACGTNNnnacgt", "ACGT"]) == "characters" and kind_of([TEXT, "ACGT"]) == "words"
    assert len(units_of(["ACGTNNnnacgt"], "characters")[0]) == 12


def test_words_of_all_scripts():
    def words(text):
        (units,) = units_of([text], "words")
        return [text[start:end] for start, end in units]

    assert words("cafe\u0301 हिन्दी, na\u00efve_1!") == ["cafe\u0301", "हिन्दी", ",", "na\u00efve_1", "!"]
    # Where words have no blanks between them, a letter is a unit.
    assert words("去了 2024年 กา") == ["去", "了", "2024", "年", "ก", "า"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([{"start": 5, "end": 99, "label": "x"}], "span 5 to 99 .* in a text of 45 characters"),
        ([[0, 6, "x"], [5, 9, "y"]], "span 5 to 9 .* no two may overlap"),
        ([{"start": 4, "end": 4, "label": "x"}], "span 4 to 4"),
        ([{"start": "4", "end": 5, "label": "x"}], "a span has start, end and label"),
        ([{"start": 4, "end": 5}], "a span has start, end and label"),
        (3, "has a span 3; a span has start, end and label"),
        ("Ada", "has a span 'Ada'"),
    ],
)
def test_spans_that_are_none_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        read_spans(given, TEXT, 0, "reports.jsonl")


def test_every_form_of_a_span():
    span = {"start": 5, "end": 17, "label": "person"}
    lists = {name: [value] for name, value in span.items()}
    for given in ([span], span, lists, [[5, 17, "person"]], json.dumps([span]), json.dumps(span)):
        assert read_spans(given, TEXT, 0, "a.csv") == SPANS[:1]
    assert read_spans(None, TEXT, 0, "a.csv") == read_spans("", TEXT, 0, "a.csv") == []


def test_spans_in_csv_are_json(tmp_path):
    spans = json.dumps([span._asdict() for span in SPANS])
    with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "spans"), (TEXT, spans), ("Nobody.", "")])
    sides = read_tagged(TaggedDataArguments(data=str(tmp_path / "a.csv"), held_out_fraction=0.5))
    assert TAGS in sides.train.tags + sides.held_out.tags


def test_spans_inside_of_words_are_told(tmp_path, capsys):
    rows = [{"text": "60mg in Yorkshire", "spans": [[0, 2, "dose"], [2, 4, "unit"], [8, 12, "place"]]}] * 2
    rows.append({"text": "none here", "spans": []})
    sides = read_tagged(TaggedDataArguments(data=write_jsonl(tmp_path / "a.jsonl", rows), held_out_fraction=0.5))
    assert ["B-dose", "O", "B-place"] in sides.train.tags + sides.held_out.tags
    said = capsys.readouterr().out
    assert "4 spans of" in said and "taken whole" in said and "2 spans of" in said and "left out" in said


def test_every_form_says_the_same(tmp_path):
    (units,) = units_of([TEXT], "words")
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
    gap = write_jsonl(tmp_path / "gap.jsonl", [{"tokens": ["a", "b"], "tags": ["A", None]}])
    with pytest.raises(ValueError, match=r"Row 1 of .* has a word without a tag"):
        read(data=gap)
    (tmp_path / "latin.conll").write_bytes("né O\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.conll is not UTF-8 text \(byte 1\)"):
        read(data=str(tmp_path / "latin.conll"))
    odd = write_jsonl(tmp_path / "odd.jsonl", [{"tokens": ["a", "b"], "tags": ["B-person", "Y"]}])
    with pytest.raises(ValueError, match=r"those of spans, but others have 'Y'"):
        read(data=reports, validation_data=odd)
    with pytest.warns(UserWarning, match="30 of the 30 held-out texts are training texts, too"):
        read(data=reports, validation_data=reports)
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


def subwords(texts, pattern):
    """A tokenizer whose tokens are what a pattern finds, such as four letters."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=["?", "<pad>"]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", pad_token="<pad>")


class Perfect(torch.nn.Module):
    """In the place of a model: it knows the label of every token."""

    device = torch.device("cpu")

    def __init__(self, rows, num_labels):
        super().__init__()
        self.known = {tuple(row["input_ids"]): row["labels"] for row in rows}
        self.num_labels = num_labels

    def forward(self, input_ids, attention_mask):
        labels = torch.zeros_like(input_ids)
        for row, (ids, mask) in enumerate(zip(input_ids.tolist(), attention_mask.tolist(), strict=True)):
            found = self.known[tuple(ids[: sum(mask)])]
            labels[row, : len(found)] = torch.tensor(found).clamp(min=0)
        return type("Output", (), {"logits": 9.0 * torch.nn.functional.one_hot(labels, self.num_labels)})


@pytest.mark.parametrize(
    ("text", "kind", "span", "pattern"),
    [
        (TEXT, "words", SPANS[0], r"\w{1,3}|\W"),
        ("so Ada Byron said", "words", Span(3, 12, "person"), r"Ada Byron|."),
        ("ACGTACGT" + "GATTACAG" + "TTGC" * 5, "characters", Span(8, 16, "motif"), ".{4}"),
        ("ACGTACGT" + "GATTACAG" + "TTGC" * 5, "characters", Span(8, 16, "motif"), "."),
    ],
)
def test_who_knows_every_token_finds_the_span(text, kind, span, pattern):
    """A unit inside of a token goes on with the token's label."""
    units = units_of([text], kind)
    texts = tagging.TaggedTexts([text], units, [tags_of([span], units[0])], [0], kind)
    tokenizer, names = subwords([text], pattern), ["O", f"B-{span.label}", f"I-{span.label}"]
    windows = windows_of(texts, tokenizer, 1000)
    model = Perfect(tagging.rows_of(windows, texts, names), 3)
    found, chances = tagging.find_tags(model, windows, texts, names, pad_token_id=1, quiet=True)
    assert spans_of(found[0], units[0]) == [span]
    assert all(chance > 0.9 for chance in chances[0])


def test_every_token_has_a_tag():
    (units,) = units_of([TEXT], "words")
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
    (units,) = units_of(["a " * 500], "words")

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
    log = json.loads((folder / "training_log.json").read_text())
    watched = {row["step"]: row["eval_f1"] for row in log["log_history"] if "eval_f1" in row}
    # What training is watched by is what the report says.
    assert list(watched) == [60, 120] and watched[120] == pytest.approx(ours["f1"])
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
    texts = tagging.TaggedTexts([row["text"]], units_of([row["text"]], "words"), [[]], [0])
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


def test_a_labelled_file_is_measured(trained, reports, tmp_path, capsys):
    folder, figures = trained
    given = ["--model_name_or_path", str(folder), "--use_cpu", "True", "--disable_tqdm", "True"]
    sources = [json.loads(line) for line in open(reports, encoding="utf-8")]
    held_out = [json.loads(line)["row"] - 1 for line in (folder / "predictions.jsonl").read_text().splitlines()]
    rows = [{"id": f"number {row}", **sources[row]} for row in held_out]
    path = write_jsonl(tmp_path / "labelled.jsonl", rows)
    tag.main([*given, "--predict", path, "--predictions_path", str(tmp_path / "out.csv")])
    assert f"f1 {figures['this model']['f1']:.3f}" in capsys.readouterr().out
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    # Other columns are kept, and spans are JSON.
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    assert all(
        {"start", "end", "label", "text"} <= set(span) for row in found for span in json.loads(row["predicted"])
    )
    words = [{"tokens": ["Ada7", "Byron", "lives", "in", "York"]}]
    tag.main([*given, "--predict", write_jsonl(tmp_path / "words.jsonl", words)])
    (row,) = [json.loads(line) for line in (tmp_path / "words_predictions.jsonl").read_text().splitlines()]
    assert row["text"] == "Ada7 Byron lives in York"


def test_labels_are_found_by_their_number(trained, tmp_path):
    folder, _ = trained
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("checkpoint*", "pretrained"))
    config = json.loads((copy / "config.json").read_text())
    config["id2label"] = dict(reversed(config["id2label"].items()))
    (copy / "config.json").write_text(json.dumps(config))
    (tmp_path / "new.txt").write_text("Ada7 Byron lives in York 7.\n")
    for name in (folder, copy):
        tag.main(
            [
                "--model_name_or_path",
                str(name),
                "--predict",
                str(tmp_path / "new.txt"),
                "--use_cpu",
                "True",
                "--predictions_path",
                str(tmp_path / f"{name.name}.jsonl"),
            ]
        )
    assert (tmp_path / "copy.jsonl").read_text() == (tmp_path / f"{folder.name}.jsonl").read_text()


def test_texts_that_share_rows_learn_the_same(reports, tmp_path):
    """Packed or padded, a step computes the same: with little text and no dropout the weights agree to rounding."""
    weights = []
    for packing in (True, False):
        folder = tmp_path / str(packing)
        run(
            folder,
            data=reports,
            packing=packing,
            dropout=0,
            optim="sgd",
            muon=False,
            learning_rate=0.1,
            max_steps=2,
            baseline=False,
            context_length=128,
            max_grad_norm=1e9,
        )
        weights.append(load_file(folder / "model.safetensors"))
    for name, packed in weights[0].items():
        torch.testing.assert_close(packed, weights[1][name], rtol=1e-3, atol=1e-5)


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


def test_a_mistake_ends_with_its_message(reports, tmp_path):
    with pytest.raises(SystemExit, match=r"hf-reformer tag: predict is new\.txt, but no model"):
        tag.main(["--predict", "new.txt"])
    with pytest.raises(SystemExit, match="hf-reformer tag: Name a file with --data"):
        tag.main([])
    with pytest.raises(SystemExit, match=r"Both data .* and predict"):
        tag.main(["--data", reports, "--predict", "new.txt"])
    with pytest.raises(SystemExit, match=r"new\.jsonl is read, so answers cannot go there"):
        tag.main(["--predict", "new.jsonl", "--predictions_path", "./new.jsonl"])
    with pytest.raises(SystemExit, match=r"cannot be written: /proc is no folder that you may write to|is no folder"):
        tag.main(["--predict", "new.jsonl", "--predictions_path", f"{reports}/x.jsonl"])
    make_model(ReformerForCausalLM).save_pretrained(tmp_path / "causal")
    ReformerByteTokenizer().save_pretrained(tmp_path / "causal")
    with pytest.raises(SystemExit, match=r"causal is causal: at the first letter of a word"):
        tag.main(["--data", reports, "--model_name_or_path", str(tmp_path / "causal")])


def test_a_baseline_that_cannot_be_fitted_is_left_out(tmp_path, reports):
    rows = [{"text": f"nothing {number}", "spans": []} for number in range(8)]
    path = write_jsonl(tmp_path / "none.jsonl", rows)
    sides = read_tagged(TaggedDataArguments(data=path, validation_data=reports))
    assert list(tagging.baselines(sides)) == ["the most frequent tag of each word"]
