"""`hf-reformer classify`: from a csv of one's own to a model that a pipeline loads, and the labels of new texts."""

import csv
import json
import os
import re
import signal

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from sklearn.metrics import f1_score
from task_runs import QUIET, options
from tiny_models import POSITIONS, TINY_RECIPE, assert_equal_tensors, make_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback, pipeline
from transformers.trainer import DEFAULT_CALLBACKS

from hf_reformer import ReformerByteTokenizer, ReformerForCausalLM, ReformerForSequenceClassification
from hf_reformer.commands import classify
from hf_reformer.training import classification_figures
from hf_reformer.training.labelled_texts import LabelledTexts
from hf_reformer.training.task_trainer import LengthSampler


pytestmark = pytest.mark.usefixtures("own_datasets_cache")


# So large that different texts get different labels.
TINY = TINY_RECIPE | {"initializer_range": 0.5}
WORDS = {"fruit, or so": ("apple", "pear", "plum"), "animal": ("horse", "mouse", "goat")}
FILES = {"README.md", "config.json", "confusion.png", "curve.png", "model.safetensors", "predictions.csv"}
FILES |= {"tokenizer.json", "tokenizer_config.json", "training_log.json"}


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    """A csv file of 40 short texts of two labels."""
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "body", "kind"])
        for number in range(40):
            label = list(WORDS)[number % 2]
            word = WORDS[label][number % 3]
            writer.writerow([number, f"A {word}, {'very ' * (number % 5)}good: {number} {word}s.", label])
    return path


def arguments_of(reviews, folder, **changed):
    given = ({} if "model_name_or_path" in changed else TINY) | {
        "data": reviews,
        "text_column": "body",
        "label_column": "kind",
        "output_dir": folder,
        "held_out_fraction": 0.3,
        "save_steps": 2,
        "logging_steps": 1,
    }
    return options(given | QUIET | changed)


def run(data, folder, **changed):
    return classify.classify(*classify.parse_arguments(arguments_of(data, folder, **changed)))


@pytest.fixture(scope="module")
def trained(reviews, tmp_path_factory):
    """A run with a stage before it and a checkpoint half-way: its folder and its figures."""
    folder = tmp_path_factory.mktemp("runs") / "reviews"
    return folder, run(reviews, folder, pretrain_steps=3, eval_strategy="steps", eval_steps=2)


@pytest.fixture(scope="module")
def not_evaluated(reviews, tmp_path_factory):
    """The folder of such a run without evaluations, which draw random numbers."""
    folder = tmp_path_factory.mktemp("runs") / "reviews"
    run(reviews, folder, pretrain_steps=3)
    return folder


def rows_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_what_it_promises(trained, reviews):
    folder, figures = trained
    assert {path.name for path in folder.iterdir()} >= FILES
    rows, texts = rows_of(folder / "predictions.csv"), rows_of(reviews)
    assert len(rows) == 12 and list(rows[0]) == ["row", "label", "predicted", "probability", "text"]
    for row in rows:
        source = texts[int(row["row"]) - 1]
        assert (row["label"], row["text"]) == (source["kind"], " ".join(source["body"].split()))
    assert {row["predicted"] for row in rows} == set(WORDS)
    hits = [row["label"] == row["predicted"] for row in rows]
    assert figures["this model"]["accuracy"] == pytest.approx(np.mean(hits))
    labels, predicted = ([row[name] for row in rows] for name in ("label", "predicted"))
    assert figures["this model"]["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    # Words tell these labels apart, and each label has as many texts.
    assert figures["TF-IDF of words and their pairs, logistic regression"]["accuracy"] == 1
    assert figures["the most frequent label"]["accuracy"] == 0.5


def test_card_and_log_say_what_was_measured(trained):
    folder, figures = trained
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "text-classification" and "$" not in card.text
    (first, second) = card.data.eval_results
    assert (first.metric_type, second.metric_type) == ("accuracy", "f1")
    assert first.metric_value == pytest.approx(figures["this model"]["accuracy"], abs=1e-4)
    said = " ".join(card.text.split())
    assert "`animal`, `fruit, or so`" in said and "| the most frequent label | 0.500 | 0.333 |" in said
    assert "3 steps of filling in hidden tokens of the training texts" in said
    log = json.loads((folder / "training_log.json").read_text())
    assert log["figures"] == figures and log["run"]["fixed"]["pretrain_steps"] == 3
    assert [row["step"] for row in log["log_history"] if "eval_accuracy" in row] == [2, 4]
    assert log["data_arguments"]["label_column"] == "kind" and log["versions"]["torch"]


def test_an_evaluation_changes_nothing_of_what_is_learned(reviews, tmp_path):
    """Its loader draws random numbers, which dropout and hashing draw from, too."""
    how = {"save_strategy": "no", "hidden_dropout_prob": None, "dropout": 0.2, "baseline": False}
    for name, changed in (("with", {"eval_strategy": "steps", "eval_steps": 1}), ("without", {})):
        run(reviews, tmp_path / name, **how | changed)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("with", "without")]
    assert_equal_tensors(*weights)


def test_a_pipeline_answers_with_the_names_of_labels(trained):
    folder, _ = trained
    classifier = pipeline("text-classification", model=str(folder), device="cpu")
    assert isinstance(classifier.model, ReformerForSequenceClassification)
    rows = rows_of(folder / "predictions.csv")
    for row, answer in zip(rows, classifier([row["text"] for row in rows], batch_size=4), strict=True):
        assert answer["label"] == row["predicted"]
        assert answer["score"] == pytest.approx(float(row["probability"]), abs=1e-4)


def test_new_texts_are_labelled(trained, tmp_path, capsys):
    new = tmp_path / "new.csv"
    new.write_text("id,body\n7,A horse.\n8,\n9,A plum. \n", encoding="utf-8")
    to_predict = ["--model_name_or_path", str(trained[0]), "--predict", str(new), "--text_column", "body"]
    quiet = ["--disable_tqdm", "True", "--use_cpu", "True"]
    with pytest.raises(SystemExit, match=r"1 of the 3 rows of .* have no text in column 'body'"):
        classify.main([*to_predict, *quiet])
    classify.main([*to_predict, *quiet, "--drop_incomplete", "True"])
    rows = rows_of(tmp_path / "new_predictions.csv")
    assert [(row["id"], row["body"]) for row in rows] == [("7", "A horse."), ("9", "A plum. ")]
    assert {row["predicted"] for row in rows} <= set(WORDS) and "accuracy" not in capsys.readouterr().out


def test_figures_are_printed_where_new_texts_have_labels(trained, reviews, tmp_path, capsys):
    folder, figures = trained
    held_out = {row["row"] for row in rows_of(folder / "predictions.csv")}
    lines = [row | {"id": int(row["id"]) + 1} for row in rows_of(reviews)]
    path = tmp_path / "held_out.jsonl"
    kept = [row for row in lines if str(row["id"]) in held_out]
    path.write_text("".join(json.dumps(row) + "\n" for row in kept))
    target = tmp_path / "out.parquet"
    arguments = arguments_of(None, tmp_path / "none", model_name_or_path=folder, predict=path, predictions_path=target)
    classify.main(arguments)
    assert f"accuracy {figures['this model']['accuracy']:.3f}" in capsys.readouterr().out
    assert datasets.Dataset.from_parquet(str(target)).column_names == [
        "id",
        "body",
        "kind",
        "predicted",
        "probability",
    ]
    assert not (tmp_path / "none").exists()


def test_a_resumed_run_equals_the_uninterrupted_one(trained, reviews, tmp_path):
    folder, figures = trained
    os.symlink(folder / "pretrained", tmp_path / "pretrained")
    os.symlink(folder / "checkpoint-2", tmp_path / "checkpoint-2")
    again = run(
        reviews, tmp_path, pretrain_steps=3, eval_strategy="steps", eval_steps=2, resume_from_checkpoint="last"
    )
    assert again == figures
    assert_equal_tensors(*(load_file(path / "model.safetensors") for path in (tmp_path, folder)))


def test_runs_are_not_mixed(trained, reviews, tmp_path):
    folder, _ = trained
    with pytest.raises(SystemExit, match="holds checkpoints of an earlier run, up to checkpoint-4"):
        classify.main(arguments_of(reviews, folder, pretrain_steps=3))
    changed = tmp_path / "changed.csv"
    changed.write_text(reviews.read_text().replace("horse", "zebra"))
    same = {"pretrain_steps": 3, "resume_from_checkpoint": "last"}
    with pytest.raises(ValueError, match="pretrained is of another run: training text was"):
        run(changed, folder, **same)
    with pytest.raises(ValueError, match="checkpoint-4 is of another run: pretrain_steps was 3, is 0"):
        run(reviews, folder, resume_from_checkpoint="last")


class Stop(TrainerCallback):
    """Sends this process SIGTERM in the middle of the second step."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrained", "."])
def test_a_signal_in_either_stage_saves_and_the_run_goes_on(
    stage, not_evaluated, reviews, tmp_path, monkeypatch, capfd
):
    class StopHere(Stop):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if args.output_dir == str(tmp_path / stage):
                super().on_pre_optimizer_step(args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("transformers.trainer.DEFAULT_CALLBACKS", [*DEFAULT_CALLBACKS, StopHere])
        with pytest.raises(SystemExit) as stopped:
            run(reviews, tmp_path, pretrain_steps=3)
    assert stopped.value.code == 143
    assert "from which --resume_from_checkpoint last goes on." in capfd.readouterr().out
    assert (tmp_path / stage / "checkpoint-2" / "run.json").is_file()
    run(reviews, tmp_path, pretrain_steps=3, resume_from_checkpoint="last")
    assert (tmp_path / "pretrained" / "run.json").is_file() and (tmp_path / "checkpoint-4").is_dir()
    weights, expected = (load_file(path / "model.safetensors") for path in (tmp_path, not_evaluated))
    # A stage that goes on hides other tokens than it would have.
    assert (stage == "pretrained") != all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_pretraining_is_where_the_task_begins(trained, reviews, tmp_path):
    run(reviews, tmp_path, pretrain_steps=3, max_steps=1, learning_rate=0.0, baseline=False)
    begun, masked = (load_file(path / "model.safetensors") for path in (tmp_path, trained[0] / "pretrained"))
    shared = [name for name in begun if name.startswith("reformer.")]
    assert len(shared) > 10
    assert_equal_tensors({name: begun[name] for name in shared}, {name: masked[name] for name in shared})


# Other models


def test_an_existing_causal_model_gets_a_head(reviews, tmp_path):
    model = make_model(ReformerForCausalLM, vocab_size=258, max_position_embeddings=64, **POSITIONS["rotary"])
    model.save_pretrained(tmp_path / "start")
    ReformerByteTokenizer().save_pretrained(tmp_path / "start")
    run(reviews, tmp_path / "run", model_name_or_path=tmp_path / "start", max_steps=1)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert loaded.config.is_decoder and loaded.config.id2label == {0: "animal", 1: "fruit, or so"}
    # What a masked model needs in front of a text would be of no use to this one.
    assert tokenizer.cls_token is None and loaded.config.vocab_size == len(tokenizer) == 258


def test_a_classifier_learns_other_labels(trained, tmp_path):
    path = tmp_path / "three.csv"
    path.write_text("body,kind\n" + "".join(f"text {n},{n % 3}\n" for n in range(12)))
    run(path, tmp_path / "run", model_name_or_path=trained[0], max_steps=1)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "run").config.id2label == dict(
        enumerate("012")
    )


def test_long_texts_are_cut_and_that_is_said(trained, tmp_path, capsys):
    path = tmp_path / "long.csv"
    path.write_text("body,kind\n" + "".join(f"{'ACGTNNNNacgt' * (n + 3)},{n % 2}\n" for n in range(16)))
    run(path, tmp_path / "run", context_length=64, max_steps=1)
    assert re.search(r"\d+ of 12 texts are longer than 64 tokens and are cut there", capsys.readouterr().out)
    assert AutoTokenizer.from_pretrained(tmp_path / "run").model_max_length == 64
    figures = json.loads((tmp_path / "run" / "training_log.json").read_text())["figures"]
    # Hardly a blank in it: no words.
    assert list(figures)[1] == "TF-IDF of 1 to 5 characters, logistic regression"


def test_a_long_input_is_labelled_whole_if_asked_for(trained, tmp_path, capsys):
    path = tmp_path / "genome.fasta"
    path.write_text(f">a\n{'ACGTNNNNNNacgt' * 200}\n>b\nACG\n")
    given = {"model_name_or_path": trained[0], "predict": path, "text_column": "text"}
    classify.main(arguments_of(None, tmp_path, **given))
    assert "2 texts labelled, 1 of them cut at" in capsys.readouterr().out
    classify.main(arguments_of(None, tmp_path, **given, context_length=4096))
    assert capsys.readouterr().out.endswith("2 texts labelled\n")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"label_column": "stars"}, "has no column 'stars'; it has 'id', 'body', 'kind'"),
        ({"label_column": "id"}, "looks like a quantity|appear once"),
        ({"text_column": "kind", "label_column": "kind"}, "none can be held out"),
        ({"context_length": 4}, "context_length is 4; a text needs at least 8 tokens"),
        ({"pretrain_steps": -1}, "pretrain_steps is -1; it must be at least 0"),
        ({"mlm_probability": 0}, r"mlm_probability is 0\.0; it must lie between 0 and 1"),
        ({"predict": "x.csv"}, "Both data .* and predict .* were given"),
        ({"predictions_path": "x.xlsx"}, "ends with '.xlsx'; what is written ends with one of"),
        ({"data": None}, "Name a file with --data"),
        ({"data": None, "predict": "x.csv"}, "predict is x.csv, but no model"),
        ({"model_name_or_path": "x", "pretrain_steps": 3}, "pretrain_steps is 3, but x is trained already"),
        ({"position_embedding_type": "axial", "set": "max_position_embeddings=16"}, "has a table of 16 positions"),
        ({"set": "hiden_size=3"}, "--set takes settings of ReformerConfig as name=value"),
    ],
)
def test_mistakes_end_with_a_message(changed, message, reviews, tmp_path):
    with pytest.raises(SystemExit, match=f"hf-reformer classify: .*{message}|{message}"):
        classify.main(arguments_of(reviews, tmp_path, **changed))


def test_a_slip_of_the_keyboard_is_told(reviews, tmp_path):
    with pytest.raises(SystemExit, match=r"There is no option --hiden_size\. Did you mean --hidden_size\?"):
        classify.main(["--hiden_size", "64"])
    (tmp_path / "there").mkdir()
    with pytest.raises(SystemExit, match=r"There is no folder .*nope\. .* has .*there"):
        classify.main(["--model_name_or_path", str(tmp_path / "nope"), "--predict", str(reviews)])


def test_a_model_without_labels_labels_nothing(trained, reviews, tmp_path):
    given = {"model_name_or_path": trained[0] / "pretrained", "predict": reviews}
    with pytest.raises(SystemExit, match="is ReformerForMaskedLM, which cannot do this"):
        classify.main(arguments_of(None, tmp_path, **given))


# Parts


def test_the_order_of_rows_depends_on_seed_and_epoch_alone():
    lengths = np.random.default_rng(0).integers(1, 100, 50)
    sampler = LengthSampler(lengths, 4, seed=1)
    first, again = list(sampler), list(LengthSampler(lengths, 4, seed=1))
    assert sorted(first) == list(range(50)) and first == again and len(sampler) == 50
    sampler.set_epoch(1)
    assert list(sampler) != first and list(LengthSampler(lengths, 4, seed=2)) != first
    padded = sum(4 * max(lengths[first[begin : begin + 4]]) for begin in range(0, 48, 4))
    assert padded < 1.15 * sum(lengths[first[:48]])


def test_macro_f1_counts_labels_that_are_there():
    figures = classification_figures.classification_figures(["a", "a", "b"], ["a", "c", "b"])
    assert figures == {"accuracy": pytest.approx(2 / 3), "macro_f1": pytest.approx((2 / 3 + 1) / 2)}


def test_many_labels_are_drawn_without_numbers(tmp_path):
    names = [f"a rather long name of label {number}" for number in range(30)]
    classification_figures.draw_confusion(tmp_path / "a.png", names, names[::-1], names)
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_baselines_learn_from_training_texts_only():
    train, other = (
        LabelledTexts(texts, list(labels), list(range(len(texts))))
        for texts, labels in ((["x y", "z w", "x"], "aba"), (["q", "r"], "bb"))
    )
    figures = classification_figures.baselines(train, other)
    assert figures["the most frequent label"]["accuracy"] == 0
    marks = LabelledTexts(["! !", "? ?", "! ."], list("aba"), [0, 1, 2])
    assert next(iter(classification_figures.baselines(marks, marks))).startswith("TF-IDF of 1 to 5 characters")
    assert torch.tensor([list(of.values()) for of in figures.values()]).shape == (2, 2)
