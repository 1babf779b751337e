"""`hf-reformer train --objective seq2seq`: pairs of texts to a model that reads one and writes the other."""

import importlib.util
import json
import math
import os
import re
import signal
from dataclasses import replace
from itertools import islice

import pytest
import torch
from task_runs import QUIET, options, run_small
from text_experiments import has_picture
from tiny_models import TINY_RECIPE, make_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
)

from hf_reformer import ReformerByteTokenizer, ReformerForCausalLM, ReformerForConditionalGeneration
from hf_reformer.commands import generate, train, train_pairs
from hf_reformer.training import recipe_config
from hf_reformer.training.interruptions import Interrupted
from hf_reformer.training.pair_rows import bits_per_target_byte, rows_of_pairs, written
from hf_reformer.training.pairs import PairDataArguments, Pairs, read_pairs
from scripts.experiments import copy_reverse, docstring_pairs, resumable


pytestmark = pytest.mark.usefixtures("own_datasets_cache")

FILES = {"README.md", "config.json", "curve.png", "model.safetensors", "predictions.jsonl", "training_log.json"}
LETTERS = "abcd"


def pair(number):
    """A word and its first letter three times: what a tiny model learns in seconds."""
    letter = LETTERS[number % len(LETTERS)]
    return {"source": f"{letter}{number:03d}é", "target": 3 * letter}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "words.jsonl", map(pair, range(60)))


def run(folder, **changed):
    return run_small(train.parse_arguments, train_pairs.train_pairs, folder, **{"objective": "seq2seq"} | changed)


@pytest.fixture(scope="module")
def trained(words, tmp_path_factory):
    """A run that learns: its folder and its figures."""
    folder = tmp_path_factory.mktemp("runs") / "words"
    how = {"max_steps": 120, "eval_strategy": "steps", "eval_steps": 60, "exact_examples": 8, "hidden_size": 32}
    return folder, run(folder, data=words, **how)


def pairs(*rows):
    return Pairs([row[0] for row in rows], [row[1] for row in rows], list(range(len(rows))))


def test_a_run_leaves_a_model_that_writes_and_its_report(trained):
    folder, figures = trained
    own = figures["this model"]
    assert own["bits_per_target_byte"] < 0.1 and own["exact"] == 1
    assert {path.name for path in folder.iterdir()} >= FILES
    log = json.loads((folder / "training_log.json").read_text())
    assert log["figures"]["this model"] == own
    measured = [row["eval_bits_per_target_byte"] for row in log["log_history"] if "eval_loss" in row]
    # The last evaluation and the report measure the same weights, in other batches.
    assert len(measured) == 2 and measured[-1] == pytest.approx(own["bits_per_target_byte"], rel=1e-4)
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: text2text-generation" in card and "local, lsh; decoder: local, lsh" in card
    assert "of 8 of these pairs" in card and f"**{own['bits_per_target_byte']:.3f}**" in card
    predictions = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len(predictions) == 8
    assert sum(row["predicted"] == row["target"] for row in predictions) == 8 * own["exact"]


def test_the_way_in_the_card_works(trained, monkeypatch, capsys):
    folder, _ = trained
    monkeypatch.chdir(folder.parent)
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    exec(code.replace("A text to read.", "b001é"), {})
    assert capsys.readouterr().out.strip().endswith("bbb")


def test_bits_are_those_of_a_count_from_the_logits(trained):
    folder, _ = trained
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder).eval(), ReformerByteTokenizer()
    given = pairs(("a000é", "aaa"), ("c002é", "é"), ("b", "dd"))
    nats = 0
    for source, target in zip(given.sources, given.targets, strict=True):
        labels = torch.tensor([[*tokenizer(target).input_ids, tokenizer.eos_token_id]])
        inputs = torch.tensor([[0, *labels[0, :-1].tolist()]])
        logits = model(tokenizer(source, return_tensors="pt").input_ids, decoder_input_ids=inputs).logits.double()
        nats -= logits.log_softmax(-1).gather(-1, labels[..., None]).sum().item()
    found = bits_per_target_byte(model, rows_of_pairs(given, tokenizer, None, None), 0, quiet=True)
    # Three, two and two bytes, and an end of text for each.
    assert found == pytest.approx(nats / math.log(2) / 7, rel=1e-5)


def test_targets_are_cut_behind_a_character_count_and_end(capsys, words, tmp_path):
    tokenizer = ReformerByteTokenizer()
    rows = rows_of_pairs(pairs(("abcdef", "ghijkl"), ("ab", "gh")), tokenizer, 4, 5)
    assert rows.sources == [tokenizer("abcd").input_ids, tokenizer("ab").input_ids]
    assert rows.targets == [[*tokenizer("ghij").input_ids, 1], [*tokenizer("gh").input_ids, 1]]
    assert (rows.num_bytes, rows.cut_sources, rows.cut_targets) == (6, 1, 1)
    # What was cut is never written exactly.
    assert rows.whole == [None, tokenizer("gh").input_ids]
    run(tmp_path / "cut", data=words, source_length=5, target_length=3, baseline=False)
    said = capsys.readouterr().out
    assert "training: 48 of 48 sources are longer than 5 tokens and 48 targets than 3; they are cut there" in said
    assert "held-out: 12 of 12 sources" in said


def test_bytes_are_counted_whatever_the_tokens_are(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"<end>": 0, "<pad>": 1, "<unk>": 2, "one": 3, "three": 4}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unk>")
    words.save_pretrained(tmp_path / "words")
    loaded = train_pairs.load_tokenizer(train_pairs.PairModelArguments(tokenizer_name=str(tmp_path / "words")))
    assert loaded.pad_token == "<pad>"
    rows = rows_of_pairs(pairs(("one", "three one é"), ("one three", "one")), loaded, None, 3)
    assert rows.targets == [[4, 3, 0], [3, 0]] and rows.whole == [None, [3]]
    # "three", " one" and "one".
    assert rows.num_bytes == 5 + 4 + 3


def test_what_is_written_does_not_depend_on_the_batch(trained):
    folder, _ = trained
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), ReformerByteTokenizer()
    sources = [tokenizer(text).input_ids for text in ("a000é", "d", "c002é and more")]
    together = written(model, sources, tokenizer, 6, quiet=True)
    assert together == [written(model, [source], tokenizer, 6, quiet=True)[0] for source in sources]
    assert tokenizer.decode(together[0]) == "aaa"


def test_a_source_is_on_one_side(tmp_path):
    twice = [pair(number) | {"target": str(half)} for number in range(20) for half in range(2)]
    sides = read_pairs(PairDataArguments(data=write(tmp_path / "twice.jsonl", twice)))
    assert not set(sides.train.sources) & set(sides.held_out.sources)
    assert (len(sides.train), len(sides.held_out)) == (32, 8)


def test_every_table_says_the_same(tmp_path):
    rows = [pair(number) for number in range(9)]
    files = {"rows.jsonl": [json.dumps(row, ensure_ascii=False) for row in rows]}
    for ending, between in ((".csv", ","), (".tsv", "\t")):
        files[f"rows{ending}"] = [between.join(row) for row in [rows[0], *(row.values() for row in rows)]]
    digests = set()
    for name, lines in files.items():
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        digests.add(read_pairs(PairDataArguments(data=str(tmp_path / name))).train.digest)
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data": None}, "Name a file with --data"),
        ({"data": "nowhere.csv"}, "no file or folder at nowhere.csv"),
        ({"target_column": "summary"}, "no column 'summary'; it has 'source', 'target'. .* --target_column"),
        ({"source_column": "text"}, "no column 'text'; .* --source_column"),
        ({"source_column": "target"}, "source_column and target_column are both 'target'"),
        ({"target_length": 1}, "target_length is 1; it must be at least 2"),
        ({"source_length": 0}, "source_length is 0; it must be at least 1"),
        ({"exact_examples": 0}, "exact_examples is 0; it must be at least 1"),
        ({"held_out_fraction": 1}, "held_out_fraction is 1"),
        ({"set": ["axial_pos_shape=[2,4]"], "source_length": 9}, "source_length is 9, but .* a table of 8 positions"),
        ({"set": ["attn_layer=[]"]}, "--set takes settings of ReformerConfig"),
        ({"text_path": "my_texts"}, "no option --text_path"),
        ({"packing": True}, "no option --packing"),
    ],
)
def test_a_mistake_is_said(words, tmp_path, changed, message):
    changed = {"data": words, "position_embedding_type": "axial" if "set" in changed else None} | changed
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **changed)


def test_rows_without_a_text_are_refused_or_left_out(tmp_path):
    rows = [pair(number) for number in range(9)]
    rows[3]["target"], rows[5]["source"] = "", " "
    path = write(tmp_path / "gaps.jsonl", rows)
    with pytest.raises(ValueError, match=r"1 of the 9 rows .* have no text in column 'source' .the first is row 6"):
        read_pairs(PairDataArguments(data=path))
    rows[5]["source"] = "f"
    with pytest.raises(ValueError, match=r"1 of the 9 rows .* have no text in column 'target' .the first is row 4"):
        read_pairs(PairDataArguments(data=write(tmp_path / "gap.jsonl", rows)))
    sides = read_pairs(PairDataArguments(data=path, drop_incomplete=True))
    assert sorted(sides.train.rows + sides.held_out.rows) == [0, 1, 2, 4, 6, 7, 8]


def test_a_model_of_one_side_is_refused(words, tmp_path):
    make_model(ReformerForCausalLM, vocab_size=258).save_pretrained(tmp_path / "causal")
    with pytest.raises(ValueError, match=r"is a ReformerForCausalLM, .*from_encoder_decoder_pretrained"):
        run(tmp_path / "new", data=words, model_name_or_path=tmp_path / "causal")


class Stop(TrainerCallback):
    """Ctrl-C in the second step."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)


def test_a_run_that_is_stopped_goes_on_to_the_same_weights(words, tmp_path, monkeypatch, capsys):
    how = {"data": words, "baseline": False, "save_strategy": "steps", "max_steps": 4}
    whole = run(tmp_path / "whole", **how)
    with monkeypatch.context() as patch:
        patch.setattr("hf_reformer.training.task_run.SayTimeLeft", lambda count: Stop())
        with pytest.raises(Interrupted):
            run(tmp_path / "stopped", **how)
    assert "--resume_from_checkpoint last goes on" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"is of another run: .*target_length was 4, is 3"):
        run(tmp_path / "stopped", **how, target_length=3, resume_from_checkpoint="last")
    resumed = run(tmp_path / "stopped", **how, resume_from_checkpoint="last")
    assert resumed == whole
    models = [AutoModelForSeq2SeqLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "stopped")]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_the_command_line_trains_predicts_and_generates(trained, words, tmp_path, capsys):
    new = write(tmp_path / "new.jsonl", [pair(number) | {"name": number} for number in range(100, 103)])
    folder = tmp_path / "runs"
    given = TINY_RECIPE | QUIET | {"max_steps": 1, "data": words, "output_dir": folder, "save_strategy": "no"}
    train.main(["--objective", "seq2seq", *options(given)])
    assert "step" in capsys.readouterr().out and (folder / "predictions.jsonl").is_file()
    settings = tmp_path / "settings.json"
    settings.write_text(
        json.dumps(
            {
                "objective": "seq2seq",
                "model_name_or_path": str(trained[0]),
                "predict": new,
                "use_cpu": True,
                "disable_tqdm": True,
            }
        )
    )
    train.main([str(settings)])
    assert "new_predictions.jsonl: 3 targets, " in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "new_predictions.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows] == [100, 101, 102] and all(row["predicted"] for row in rows)
    # A file without targets is as good.
    write(tmp_path / "new.jsonl", [{"source": "a000é"}])
    train.main([str(settings)])
    assert capsys.readouterr().out.strip().endswith("1 targets")
    assert json.loads((tmp_path / "new_predictions.jsonl").read_text())["predicted"] == "aaa"
    generate.main(["--model", str(trained[0]), "--prompt", "a000é", "--device", "cpu"])
    assert capsys.readouterr().out == "aaa\n"


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["--objective", "seq2sec", "--data", "x.csv"], "objective is 'seq2sec'; .*causal, masked, seq2seq"),
        (["--data", "x.csv"], "--data is for pairs of texts, which --objective seq2seq reads"),
        (["--objective=masked", "--source_column=x"], "--source_column=x is for pairs"),
        (["--objective=seq2seq", "--mlm_probability", "1"], "no option --mlm_probability"),
    ],
)
def test_an_option_of_another_objective_is_refused(typed, message):
    with pytest.raises(ValueError, match=message):
        train.parse_arguments([*typed, "--use_cpu", "True"])


def test_labels_may_be_smoothed(words, tmp_path):
    """The Trainer then takes them away from the model."""
    how = {"data": words, "max_steps": 1, "baseline": False, "learning_rate": 0.0}
    plain, smooth = (run(tmp_path / str(share), label_smoothing_factor=share, **how) for share in (0.0, 0.2))
    # What is measured is not smoothed.
    assert smooth == plain


def test_training_goes_on_with_a_trained_model(trained, words, tmp_path):
    figures = run(tmp_path / "on", data=words, model_name_or_path=trained[0], learning_rate=0.0, max_steps=1)
    assert figures["this model"]["bits_per_target_byte"] == pytest.approx(
        trained[1]["this model"]["bits_per_target_byte"], rel=1e-4
    )
    with pytest.raises(ValueError, match="--hidden_size: this is for new models"):
        run(tmp_path / "other", data=words, model_name_or_path=trained[0], hidden_size=64)


def test_the_trainer_of_transformers_trains_one(tmp_path):
    """`Seq2SeqTrainer`, its collator and `predict_with_generate`."""
    tokenizer = ReformerByteTokenizer()
    rows = [
        {"input_ids": tokenizer(pair(n)["source"]).input_ids, "labels": [*tokenizer("ab").input_ids, 1]}
        for n in range(8)
    ]
    torch.manual_seed(0)
    model = ReformerForConditionalGeneration(recipe_config(16, is_encoder_decoder=True, **TINY_RECIPE))
    arguments = Seq2SeqTrainingArguments(
        tmp_path,
        max_steps=30,
        learning_rate=1e-2,
        predict_with_generate=True,
        generation_config=GenerationConfig(max_new_tokens=5, decoder_start_token_id=0, eos_token_id=1, pad_token_id=0),
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    collator = DataCollatorForSeq2Seq(tokenizer, model)
    trainer = Seq2SeqTrainer(model, arguments, collator, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    predicted = trainer.predict(rows).predictions
    assert {tuple(row[:4]) for row in predicted.tolist()} == {(0, *tokenizer("ab").input_ids, 1)}


def test_the_recipe_for_two_sides():
    config = recipe_config(1024, is_encoder_decoder=True)
    assert (config.is_decoder, config.local_num_chunks_after, config.lsh_value_shift) == (False, 1, 1)
    model = ReformerForConditionalGeneration(recipe_config(64, is_encoder_decoder=True, **TINY_RECIPE))
    encoder, decoder = model.reformer.encoder.config, model.reformer.decoder.config
    assert (encoder.local_num_chunks_after, encoder.lsh_value_shift, encoder.is_decoder) == (1, 0, False)
    assert (decoder.local_num_chunks_after, decoder.lsh_value_shift, decoder.is_decoder) == (0, 1, True)


# The experiments.


@pytest.fixture
def short(monkeypatch, tmp_path):
    """Copying of 16 symbols by small models; checkpoints go to a folder of the test."""
    changes = {"LENGTH": 16, "HIDDEN_SIZE": 16, "HEAD_SIZE": 8, "CHUNK_LENGTH": 4, "EVAL_EVERY": 2}
    changes |= {"WINDOWS": ((8, 0.0), (16, 0.5)), "SYMBOLS_OF_STEP": 64}
    changes |= {"GRID_STEPS": 2, "LEARNING_RATES": (5e-3, 1e-2), "NUM_STEPS": 4, "MANY": 8, "FEW": 4}
    for name, value in changes.items():
        monkeypatch.setattr(copy_reverse, name, value)
    monkeypatch.setattr(resumable, "CHECKPOINTS", tmp_path / "checkpoints")


def test_what_copies_in_reverse_has_no_loss(short):
    class Reverses(torch.nn.Module):
        def forward(self, input_ids, decoder_input_ids, position_ids, decoder_position_ids):
            assert torch.equal(position_ids, 15 - decoder_position_ids.flip(1))
            # Behind the start stands what has been written so far.
            assert (decoder_input_ids[:, 0] == copy_reverse.START).all()
            assert torch.equal(decoder_input_ids[:, 1:], input_ids.flip(1)[:, :-1])
            return 100.0 * torch.nn.functional.one_hot(input_ids.flip(1), copy_reverse.VOCABULARY)

    run = copy_reverse.CopyRun("hf_reformer", 0, 1e-2, num_steps=4, num_symbols=8)
    training = copy_reverse.CopyTraining(run, resumable.CHECKPOINTS)
    batches = list(islice(training.batches(), 4))
    assert [tuple(sources.shape) for sources, _ in batches] == [(8, 8), (8, 8), (4, 16), (4, 16)]
    assert set(batches[0][0].unique().tolist()) <= set(range(2, 10))
    # Windows stand anywhere, a whole sequence in one place only.
    first = torch.cat([starts for _, starts in batches[:2]])
    assert first.min() >= 0 and first.max() <= 8 and len(first.unique()) > 3 and not batches[2][1].any()
    for batch in batches:
        assert training.loss(Reverses(), batch) == 0
    whole = copy_reverse.CopyTraining(replace(run, whole=True), resumable.CHECKPOINTS)
    assert next(whole.batches())[0].shape == (4, 16)
    assert training.held_out(Reverses(), 4) == 0 < training.held_out(copy_reverse.ours().eval(), 4)


def test_the_copying_experiment_runs_and_reports(short, tmp_path, capsys):
    contenders = ["hf_reformer"] + ["reformer-pytorch"] * (importlib.util.find_spec("reformer_pytorch") is not None)
    given = ["--seeds", "0", "--results", str(tmp_path / "copy_reverse"), "--steps", "4", "--only", *contenders]
    copy_reverse.main(given)
    table = capsys.readouterr().out
    assert all(f"| {name} |" in table for name in contenders)
    assert has_picture(tmp_path / "copy_reverse.png")
    files = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "copy_reverse").glob("**/*.json")}
    assert len(files) == 3 * len(contenders)
    copy_reverse.main([*given, "--report"])
    assert capsys.readouterr().out.splitlines()[-4:] == table.splitlines()[-4:]
    assert files == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "copy_reverse").glob("**/*.json")}


FUNCTIONS = '''
def first(x):
    """Say
    so.
    """
    return x


class Kind:
    def method(self): "In the line."; return 1

    async def second(self):
        "Short."
        # Why.
        def inner():
            """Inner."""
            return 2
        return inner

    def only(self):
        """Nothing else."""
'''


def test_functions_and_their_docstrings():
    pairs = dict(docstring_pairs.pairs_in(FUNCTIONS))
    assert pairs["def first(x):\n    return x\n"] == "Say\nso."
    assert [target for source, target in pairs.items() if "async" in source] == ["Short."]
    assert sorted(pairs.values()) == ["Inner.", "Say\nso.", "Short."]
    assert all('"Short."' not in source for source, target in pairs.items() if target == "Short.")


def test_a_decoder_alone_reads_the_source_and_learns_the_target():
    rows = rows_of_pairs(pairs(("ab", "x"), ("c", "yz")), ReformerByteTokenizer(), None, None)
    ids, labels, mask = docstring_pairs.joined(rows, [0, 1], with_targets=True)
    byte = {letter: ord(letter) + 2 for letter in "abcxyz"}
    assert ids.tolist() == [
        [byte["a"], byte["b"], 258, byte["x"], 1],
        [byte["c"], 258, byte["y"], byte["z"], 1],
    ]
    assert labels.tolist() == [[-100, -100, -100, byte["x"], 1], [-100, -100, byte["y"], byte["z"], 1]]
    assert mask.all()
    ids, labels, mask = docstring_pairs.joined(rows, [0, 1], with_targets=False)
    assert ids.tolist() == [[byte["a"], byte["b"], 258], [0, byte["c"], 258]]
    assert mask.tolist() == [[1, 1, 1], [0, 1, 1]]


@pytest.mark.slow
def test_the_docstring_experiment_runs_and_reports(tmp_path, monkeypatch, capsys):
    sides = Pairs(["def f(): pass"] * 200, ["Nothing."] * 200, list(range(200)))
    small = {"hidden_size": 16, "attention_head_size": 8, "num_attention_heads": 2, "feed_forward_size": 16}
    few = {"WRITTEN": 2, "MEASURED": 3, "TIMED_STEPS": 1, "EVALUATIONS": 2, "BATCH_SIZE": 2, "TWIN_FEED_FORWARD": 16}
    for name, value in (few | {"SIZE": small, "TARGET_LENGTH": 10, "SOURCE_LENGTH": 64}).items():
        monkeypatch.setattr(docstring_pairs, name, value)
    monkeypatch.setattr(docstring_pairs, "read_sides", lambda: (sides, sides.select(range(5))))
    monkeypatch.setattr(
        docstring_pairs, "run_of", lambda name, seed, rate, *_: docstring_pairs.PairRun(name, seed, rate, 3, 2)
    )
    monkeypatch.setattr(resumable, "CHECKPOINTS", tmp_path / "checkpoints")
    docstring_pairs.main(["--seeds", "0", "--results", str(tmp_path / "pairs")])
    table = capsys.readouterr().out
    assert all(f"| {name} |" in table for name in docstring_pairs.CONTENDERS)
    records = [json.loads(path.read_text()) for path in (tmp_path / "pairs").glob("*.json")]
    assert len(records) == 3
    assert all(len(record["evaluations"]) == 2 and 0 < record["bits_per_target_byte"] < 20 for record in records)
