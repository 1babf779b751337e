"""`hf-reformer embed` and `score`: vectors that sentence-transformers gives too, and what each text costs."""

import csv
import json
import math
import warnings

import datasets
import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from tiny_models import POSITIONS, WINDOWS, make_model
from transformers import AutoModel, AutoTokenizer

from hf_reformer import (
    ReformerByteTokenizer,
    ReformerForCausalLM,
    ReformerForMaskedLM,
    ReformerForSequenceClassification,
)
from hf_reformer.commands import embed, score
from hf_reformer.training.row_batches import in_batches
from hf_reformer.training.text_scores import score_texts


pytestmark = pytest.mark.usefixtures("own_datasets_cache")


TEXTS = ["A short one.", "é 🙂, <cls> and <pad> as text", "Longer, and longer still. " * 9 + "End.", "x"]
ROUNDING = 1e-5
SETTINGS = {"max_position_embeddings": 128, **POSITIONS["rotary"], **WINDOWS}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of a causal, a masked and a classifying model of bytes, and of one with a table of positions."""
    folders, tokenizer = {}, ReformerByteTokenizer()
    tokenizer.add_head_tokens()
    for name, model_class, settings in (
        ("causal", ReformerForCausalLM, SETTINGS | {"is_decoder": True}),
        ("masked", ReformerForMaskedLM, SETTINGS | {"is_decoder": False}),
        ("classes", ReformerForSequenceClassification, SETTINGS | {"combine_streams": "mean"}),
        ("table", ReformerForCausalLM, WINDOWS | {"is_decoder": True}),
    ):
        folders[name] = str(tmp_path_factory.mktemp(name))
        make_model(model_class, vocab_size=len(tokenizer), **settings).save_pretrained(folders[name])
        (ReformerByteTokenizer() if name in ("causal", "table") else tokenizer).save_pretrained(folders[name])
    return folders


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "texts.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("id", "text"), *((number, text) for number, text in enumerate(TEXTS))])
    return str(path)


def embedded(tmp_path, *arguments):
    path = tmp_path / "vectors.npy"
    embed.main([*arguments, "--output", str(path), "--quiet", "True", "--device", "cpu"])
    return np.load(path)


# Vectors


@pytest.mark.parametrize("name", ["causal", "masked", "classes"])
def test_a_vector_is_the_mean_of_its_tokens_and_what_sentence_transformers_gives(name, saved, table, tmp_path, capsys):
    folder = tmp_path / "encoder"
    vectors = embedded(tmp_path, "--model", saved[name], "--data", table, "--save_sentence_transformer", str(folder))
    model, tokenizer = AutoModel.from_pretrained(saved[name]).eval(), AutoTokenizer.from_pretrained(saved[name])
    assert vectors.shape == (4, model.config.output_size) and vectors.dtype == np.float32
    # Two streams side by side, or their mean.
    assert model.config.output_size == (32 if name == "classes" else 64)
    for text, vector in zip(TEXTS, vectors, strict=True):
        ids = tokenizer(text, split_special_tokens=True, return_tensors="pt").input_ids
        with torch.no_grad():
            expected = model(ids).last_hidden_state[0].mean(0).numpy()
        assert np.abs(vector - expected).max() < ROUNDING
    assert f"4 vectors of {vectors.shape[1]} numbers\n" in capsys.readouterr().out
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        encoder = SentenceTransformer(str(folder), device="cpu")
    assert encoder.get_embedding_dimension() == vectors.shape[1]
    assert np.abs(encoder.encode(TEXTS) - vectors).max() < ROUNDING
    assert np.abs(encoder.encode(TEXTS[2]) - vectors[2]).max() < ROUNDING


def test_vectors_of_length_one_and_texts_that_are_cut(saved, table, tmp_path, capsys):
    folder = tmp_path / "encoder"
    given = ["--model", saved["masked"], "--data", table, "--normalize", "True", "--context_length", "40"]
    vectors = embedded(tmp_path, *given, "--save_sentence_transformer", str(folder))
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < ROUNDING
    assert "1 texts cut at 40 tokens" in capsys.readouterr().out
    assert np.abs(SentenceTransformer(str(folder), device="cpu").encode(TEXTS) - vectors).max() < ROUNDING


def test_a_table_of_positions_cuts_texts(saved, table, tmp_path, capsys):
    folder = tmp_path / "encoder"
    given = ["--model", saved["table"], "--data", table]
    vectors = embedded(tmp_path, *given, "--save_sentence_transformer", str(folder))
    assert "1 texts cut at 128 tokens" in capsys.readouterr().out
    assert np.abs(SentenceTransformer(str(folder), device="cpu").encode(TEXTS) - vectors).max() < ROUNDING
    with pytest.raises(SystemExit, match="context_length is 200, but this model has a table of 128 positions"):
        embedded(tmp_path, *given, "--context_length", "200")


def test_vectors_stand_beside_the_other_columns(saved, table, tmp_path):
    path = tmp_path / "vectors.parquet"
    given = ["--model", saved["masked"], "--data", table, "--quiet", "True"]
    embed.main([*given, "--output", str(path)])
    rows = datasets.Dataset.from_parquet(str(path))
    assert rows.column_names == ["row", "id", "vector"] and rows["row"][:] == [1, 2, 3, 4]
    assert np.array_equal(np.array(rows["vector"][:], np.float32), embedded(tmp_path, *given[:4]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "Give data with output, or save_sentence_transformer"),
        (["--data", "x.csv"], "data is x.csv and output is None; give both"),
        (
            ["--data", "x.csv", "--output", "x.csv"],
            "ends with '.csv'; what is written ends with one of .npy, .parquet",
        ),
        (["--data", "x.csv", "--output", "x.npy"], "There is no file or folder at x.csv"),
        (["--save_sentence_transformer", "."], "holds something already; give a new folder"),
        (
            ["--save_sentence_transformer", "y", "--device", "nowhere"],
            "device is 'nowhere', which cannot be used here",
        ),
    ],
)
def test_mistakes_of_embed_end_with_a_message(given, message, saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "something").touch()
    with pytest.raises(SystemExit, match=f"hf-reformer embed: .*{message}"):
        embed.main(["--model", saved["masked"], *given])


# Scores


def scored(tmp_path, *arguments):
    path = tmp_path / "scores.csv"
    score.main([*arguments, "--output", str(path), "--quiet", "True", "--device", "cpu"])
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def bits_of(folder, text):
    """By the loss, which is a mean over the tokens behind the first."""
    model, tokenizer = ReformerForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([[tokenizer.eos_token_id, *text.encode()]])
    ids[:, 1:] += 2
    with torch.no_grad():
        return model(ids, labels=ids).loss.item() / math.log(2)


def test_a_score_is_the_loss_of_the_text_behind_an_end_of_text(saved, table, tmp_path, capsys):
    rows = scored(tmp_path, "--model", saved["causal"], "--data", table, "--show", "2")
    assert list(rows[0]) == ["row", "bits_per_byte", "mean_log_likelihood", "tokens", "bytes", "text"]
    for row, text in zip(rows, TEXTS, strict=True):
        expected = bits_of(saved["causal"], text)
        assert float(row["bits_per_byte"]) == pytest.approx(expected, abs=1e-4)
        assert float(row["mean_log_likelihood"]) == pytest.approx(-expected * math.log(2), abs=1e-4)
        assert int(row["tokens"]) == int(row["bytes"]) == len(text.encode())
    printed = capsys.readouterr().out.splitlines()
    total = sum(float(row["bits_per_byte"]) * int(row["bytes"]) for row in rows) / sum(
        int(row["bytes"]) for row in rows
    )
    assert f"4 texts, {total:.3f} bits per byte of all of them" in printed[-3]
    oddest = max(rows, key=lambda row: float(row["bits_per_byte"]))
    assert printed[-2].startswith(f"row {oddest['row']}: {float(oddest['bits_per_byte']):.3f} bits per byte: ")


def test_lines_of_a_log_are_scored_and_empty_ones_passed_over(saved, tmp_path):
    (tmp_path / "a.log").write_text("first\n\nthird\n", encoding="utf-8")
    rows = scored(tmp_path, "--model", saved["causal"], "--data", str(tmp_path / "a.log"))
    assert [(row["row"], row["text"]) for row in rows] == [("1", "first"), ("3", "third")]


def test_only_what_is_read_counts(saved, table, tmp_path):
    rows = scored(tmp_path, "--model", saved["causal"], "--data", table, "--context_length", "7")
    assert [row["bytes"] for row in rows] == ["7", "7", "7", "1"]
    assert float(rows[2]["bits_per_byte"]) == pytest.approx(bits_of(saved["causal"], TEXTS[2][:7]), abs=1e-4)
    # One token of the table is for the end of text in front.
    assert scored(tmp_path, "--model", saved["table"], "--data", table)[2]["bytes"] == "127"
    with pytest.raises(SystemExit, match="context_length is 129, but this model has a table of 128 positions"):
        scored(tmp_path, "--model", saved["table"], "--data", table, "--context_length", "128")


def test_logits_are_taken_in_pieces(saved, monkeypatch):
    model, tokenizer = ReformerForCausalLM.from_pretrained(saved["causal"]), ReformerByteTokenizer()
    whole = score_texts(model, tokenizer, TEXTS, quiet=True)
    monkeypatch.setattr("hf_reformer.training.text_scores.PIECE", 5)
    pieces = score_texts(model, tokenizer, TEXTS, quiet=True)
    assert pieces["bits_per_byte"] == pytest.approx(whole["bits_per_byte"], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("masked", [], "is ReformerForMaskedLM, which does not predict the next token"),
        ("classes", [], "is ReformerForSequenceClassification, which does not predict the next token"),
        ("causal", ["--text_column", "body"], "has no column 'body'; it has 'id', 'text'"),
        ("causal", ["--context_length", "0"], "context_length is 0; it must be at least 1"),
        ("causal", ["--output", "scores.xls"], "ends with '.xls'; what is written"),
    ],
)
def test_mistakes_of_score_end_with_a_message(name, given, message, saved, table):
    with pytest.raises(SystemExit, match=f"hf-reformer score: .*{message}"):
        score.main(["--model", saved[name], "--data", table, *given])


def test_batches_hold_rows_of_about_one_length():
    lengths = [5, 100, 7, 50, 6, 49]
    assert list(in_batches(lengths, most=100)) == [[1], [3, 5], [2, 4, 0]]
    assert json.dumps(list(in_batches([], most=100))) == "[]"
