"""The scripts: real text in, real Trainer runs, and what they leave behind."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from tiny_models import POSITIONS, TINY_RECIPE, assert_equal_tensors, make_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    TrainerCallback,
    pipeline,
)
from transformers.trainer import DEFAULT_CALLBACKS

from hf_reformer import ReformerByteTokenizer, ReformerForCausalLM, ReformerForMaskedLM
from hf_reformer.commands import evaluate, generate, memory, train
from hf_reformer.modeling.layers.lsh_attention import LSHSelfAttention
from hf_reformer.training import ModelRecipe, conditional_entropy, context_gain, corpus, run_checkpoints
from scripts import demo


SCRIPTS = Path(__file__).parent.parent / "scripts"


CONTEXT = 32
TINY = TINY_RECIPE | {"dropout": 0.1}


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for number in range(12):
        (folder / f"{number}.txt").write_text(
            f"Line {number} — naïve 🙂, plain text.\n" * (number + 3), encoding="utf-8"
        )
    return folder


@pytest.fixture(scope="module")
def trained(text_folder, tmp_path_factory):
    """A causal run of four steps with a checkpoint half-way: its folder, its figures and its arguments."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    arguments = causal_arguments(text_folder, folder)
    return folder, train.train(*train.parse_arguments(arguments)), arguments


def causal_arguments(text_folder, folder, **changed):
    given = ({} if "model_name_or_path" in changed else TINY) | {
        "text_path": text_folder,
        "output_dir": folder,
        "context_length": CONTEXT,
        "held_out_fraction": 0.3,
        "max_held_out_windows": 3,
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "learning_rate": 0.01,
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    return [
        word
        for name, value in (given | changed).items()
        for word in (f"--{name}", *map(str, value if isinstance(value, list) else [value]))
    ]


def test_figure_equals_a_count_from_the_logits(trained, text_folder):
    """Three windows in batches of two: nothing is averaged that has different weights."""
    folder, figures, _ = trained
    held_out = build(text_folder, max_held_out_windows=3).held_out
    model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def count():
        nats, num_bytes = 0.0, 0
        for row in held_out.dataset:
            tokens = row["input_ids"]
            with torch.no_grad():
                scores = model(input_ids=tokens[None]).logits[0].double().log_softmax(-1)
            for position in range(1, CONTEXT):
                nats -= scores[position - 1, tokens[position]].item()
                num_bytes += tokens[position].item() != 1
        return nats / math.log(2) / num_bytes

    assert len(held_out.dataset) == 3
    assert figures["model"] == pytest.approx(count(), rel=1e-5)
    for layer in model.reformer.encoder.layers:
        if isinstance(layer.attention.self_attention, LSHSelfAttention):
            # What is projected to no vector but zero is no attention.
            torch.nn.init.zeros_(layer.attention.output.dense.weight)
    assert figures["LSH attention off"] == pytest.approx(count(), rel=1e-5) != figures["model"]
    assert figures["order-2"] == conditional_entropy(held_out.text, 2)


# The corpus


def build(text_folder, tokenizer=None, alignment=1, **changed):
    arguments = {"text_path": str(text_folder), "context_length": CONTEXT, "held_out_fraction": 0.3} | changed
    return corpus.build_corpus(corpus.DataArguments(**arguments), tokenizer or ReformerByteTokenizer(), alignment)


def test_what_a_named_model_or_machine_does_not_have_is_said(trained, text_folder, tmp_path, capsys):
    folder, arguments = trained[0], causal_arguments(text_folder, tmp_path / "new")
    with pytest.raises(ValueError, match=r"--attn_layers, --hidden_size, .*: this is for new models"):
        train.train(*train.parse_arguments([*arguments, "--model_name_or_path", str(folder)]))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    for command, given, message in (
        (memory, ["--model_name_or_path", str(tmp_path)], "is a gpt2 by its config"),
        (memory, ["--model_name_or_path", str(folder), "--hidden_size", "8"], "--hidden_size: this is for new models"),
        (evaluate, ["--model", str(folder), "--device", "toaster"], "device is 'toaster', which cannot be used here"),
        (generate, ["--model", str(folder), "--prompt", "a", "--device", "toaster"], "device is 'toaster'"),
    ):
        with pytest.raises(SystemExit) as ended:
            command.main(given)
        assert message in f"{ended.value} {capsys.readouterr().err}"


def test_split_is_disjoint_and_does_not_move_when_documents_are_added(text_folder):
    documents = corpus.read_text(text_folder)
    train_side, held_out = corpus.split_documents(documents, 0.3)
    assert sorted([*train_side["name"], *held_out["name"]]) == sorted(documents["name"])
    fewer = documents.select(range(0, len(documents), 2))
    assert set(corpus.split_documents(fewer, 0.3)[1]["name"]) <= set(held_out["name"])


def test_split_leaves_no_side_empty(text_folder):
    documents = corpus.read_text(text_folder)
    assert [len(side) for side in corpus.split_documents(documents, 1e-9)] == [11, 1]
    assert [len(side) for side in corpus.split_documents(documents, 1 - 1e-9)] == [1, 11]
    single = corpus.read_text(text_folder / "3.txt")
    sides = corpus.split_documents(single, 0.25)
    assert "".join(side["text"][0] for side in sides) == single["text"][0]
    assert len(sides[1]["text"][0]) == pytest.approx(len(single["text"][0]) / 4, abs=1)


def test_packing_drops_nothing(text_folder):
    documents = corpus.read_text(text_folder)
    windows = corpus.pack(documents, ReformerByteTokenizer(), CONTEXT)
    expected = b"".join(text.encode() + b"\x00" for text in documents["text"])
    tokens = windows.dataset["input_ids"][:].flatten()
    assert len(tokens) + windows.tail_tokens == len(expected)
    assert len(windows.text) + windows.tail_bytes == windows.num_bytes == len(expected) - len(documents)
    ends = np.cumsum([len(text.encode()) + 1 for text in documents["text"]]) - 1
    assert torch.nonzero(tokens == 1).flatten().tolist() == [end for end in ends if end < len(tokens)]
    assert bytes((tokens[tokens != 1] - 2).tolist()) == windows.text
    assert (
        f"{windows.num_bytes:,} bytes" in windows.describe() and f"{windows.tail_bytes:,} bytes" in windows.describe()
    )


def test_evenly_spaced_windows_keep_their_bytes(text_folder):
    windows = corpus.pack(corpus.read_text(text_folder), ReformerByteTokenizer(), CONTEXT)
    chosen = windows.evenly_spaced(4)
    tokens = chosen.dataset["input_ids"][:]
    assert torch.equal(tokens[0], windows.dataset[0]["input_ids"])
    assert torch.equal(tokens[-1], windows.dataset[len(windows.dataset) - 1]["input_ids"])
    assert bytes((tokens[tokens != 1] - 2).tolist()) == chosen.text
    assert windows.evenly_spaced(10**6) is windows


def subword_tokenizer(texts):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<end>"])
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def test_bytes_of_subword_tokens(text_folder):
    texts = corpus.read_text(text_folder)["text"][:]
    tokenizer = subword_tokenizer(texts)
    windows = corpus.pack(corpus.read_text(text_folder), tokenizer, CONTEXT)
    for row, widths in zip(windows.dataset["input_ids"][:].tolist(), windows.token_bytes, strict=True):
        for token, width in zip(row, widths, strict=True):
            text = tokenizer.decode([token])
            if "\ufffd" not in text:
                assert width == (0 if token == tokenizer.eos_token_id else len(text.encode()))
    assert windows.token_bytes.sum() == len(windows.text)
    assert windows.causal_tokens_per_byte == windows.token_bytes[:, 1:].size / windows.token_bytes[:, 1:].sum()
    assert windows.causal_tokens_per_byte < 0.9


def test_special_names_in_a_text_are_text(tmp_path):
    (tmp_path / "a.txt").write_text("<pad></s>" * 20)
    windows = corpus.pack(corpus.read_text(tmp_path), ReformerByteTokenizer(), 180)
    assert windows.dataset[0]["input_ids"].min() > 1


def test_standard_library_is_the_default():
    documents = corpus.read_standard_library()
    assert {"argparse.py", "email/message.py"} <= set(documents["name"])
    assert not any("site-packages" in name or "/test" in name for name in documents["name"])
    assert documents["name"][:] == sorted(documents["name"])
    assert corpus.DataArguments().source.startswith("the source files of the standard library of Python 3")


def test_a_dataset_with_its_own_held_out_split(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "test"):
        rows = [{"body": f"{split} {number} " * 20} for number in range(9)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = {"text_path": None, "dataset_name": str(folder), "held_out_split": "test", "text_column": "body"}
    built = build(None, **arguments)
    assert b"train 3" in built.train.text and b"test" not in built.train.text
    assert b"test 3" in built.held_out.text and b"train" not in built.held_out.text
    with pytest.raises(ValueError, match="has no column 'text'; set text_column to one of body"):
        build(None, **arguments | {"text_column": "text"})
    with pytest.raises(ValueError, match="has no split 'validation'; it has train, test"):
        build(None, **arguments | {"held_out_split": "validation"})
    with pytest.raises(ValueError, match=r"There is no dataset '.*nowhere'; check dataset_name"):
        build(None, **arguments | {"dataset_name": str(tmp_path / "nowhere")})


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["the same text " * 20] * 20, "All 20 documents hold the same text, so none of them can be held out"),
        (["a text " * 20, None, "b text " * 20, None], r"2 of the 4 rows of .* no text in column 'text' .* row 1\)"),
        (["", ""], "The corpus is empty"),
        (["abc"], r"The training text \(1 documents, 3 bytes, 4 tokens\) is too short"),
        ([7, 8], r"Column 'text' of .* does not hold text; its type is Value\('int64'\)"),
    ],
    ids=["equal", "null", "empty", "short", "numbers"],
)
def test_rows_that_cannot_be_used(texts, message, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    with pytest.raises(ValueError, match=message):
        build(None, text_path=None, dataset_name=str(tmp_path / "data"), held_out_fraction=0.05)


def test_digest_names_the_windows_and_their_order(text_folder):
    digest = lambda **changed: build(text_folder, **changed).train.digest  # noqa: E731
    assert digest() == digest()
    assert len({digest(), digest(context_length=CONTEXT // 2), digest(file_pattern="1*")}) == 3
    windows = build(text_folder).train
    assert windows.evenly_spaced(3).digest not in (windows.digest, windows.evenly_spaced(2).digest)


def test_corpus_errors(tmp_path, text_folder):
    with pytest.raises(ValueError, match="There is no file or folder at"):
        build(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"No file in .* matches '\*.md'"):
        build(text_folder, file_pattern="*.md")
    with pytest.raises(ValueError, match="is too short for one window of 100000 tokens"):
        build(text_folder, context_length=100_000)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match="The corpus is empty"):
        build(tmp_path)
    (tmp_path / "picture.bin").write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match=r"picture.bin is not UTF-8 text \(byte 2\)"):
        build(tmp_path)
    with pytest.raises(ValueError, match=r"Both text_path .* and dataset_name .* were given"):
        corpus.DataArguments(text_path="a", dataset_name="b")
    with pytest.raises(ValueError, match=r"held_out_fraction is 1\.5"):
        corpus.DataArguments(held_out_fraction=1.5)
    with pytest.raises(ValueError, match="has neither eos_token nor sep_token"):
        tokenizer = subword_tokenizer(["text"])
        tokenizer.eos_token = None
        build(text_folder, tokenizer)


# Training


def test_output_folder_is_complete(trained):
    folder, figures, _ = trained
    with Image.open(folder / "loss_curve.png") as picture:
        assert picture.width > 500
    card = ModelCard.load(folder / "README.md")
    # The license of the weights is for their owner to say.
    assert card.data.license is None
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert card.data.eval_results[0].metric_value == pytest.approx(figures["model"], abs=1e-4)
    assert f"**{figures['model']:.3f}**" in card.text and f"| lzma | {figures['lzma']:.3f} |" in card.text
    assert "$" not in card.content
    assert "It takes inputs of any length, and" in " ".join(card.text.split())
    log = json.loads((folder / "training_log.json").read_text())
    assert log["figures"] == pytest.approx(figures)
    assert [row["step"] for row in log["log_history"] if "loss" in row] == [1, 2, 3, 4]
    assert all("eval_bits_per_byte" in row for row in log["log_history"] if "eval_loss" in row)


def test_reload_through_the_auto_classes(trained):
    folder, _, _ = trained
    model = AutoModelForCausalLM.from_pretrained(folder)
    saved = load_file(folder / "model.safetensors")
    # In files the bias of the head has a second name.
    assert torch.equal(saved.pop("lm_head.bias"), model.lm_head.bias)
    assert_equal_tensors(model.state_dict(), saved)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("é").input_ids == [0xC3 + 2, 0xA9 + 2]
    text = pipeline("text-generation", model=str(folder), device="cpu")("Line", max_new_tokens=3)[0]["generated_text"]
    assert text.startswith("Line")


def test_resumed_run_equals_the_uninterrupted_one(trained, text_folder, tmp_path):
    folder, figures, _ = trained
    arguments = causal_arguments(text_folder, tmp_path, resume_from_checkpoint=folder / "checkpoint-2")
    assert train.train(*train.parse_arguments(arguments)) == figures
    whole, resumed = (load_file(path / "model.safetensors") for path in (folder, tmp_path))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    losses = [
        [row["loss"] for row in json.loads((path / "training_log.json").read_text())["log_history"] if "loss" in row]
        for path in (folder, tmp_path)
    ]
    assert losses[0] == losses[1]


def test_find_checkpoint(trained, tmp_path):
    find = lambda folder, wanted: train.find_checkpoint(  # noqa: E731
        run_checkpoints.RunArguments(output_dir=str(folder), resume_from_checkpoint=wanted)
    )
    assert find(trained[0], "last") == str(trained[0] / "checkpoint-4")
    assert find(tmp_path, None) is None
    with pytest.raises(ValueError, match="There is no checkpoint in"):
        find(tmp_path, "last")
    with pytest.raises(ValueError, match="resume_from_checkpoint is nowhere, which is no folder"):
        find(tmp_path, "nowhere")


def test_masked_model_from_a_settings_file(text_folder, tmp_path):
    settings = TINY | {
        "objective": "masked",
        "text_path": str(text_folder),
        "output_dir": str(tmp_path / "masked"),
        "context_length": CONTEXT,
        "held_out_fraction": 0.3,
        "max_steps": 2,
        "use_cpu": True,
        "disable_tqdm": True,
        "set": ["lsh_rotary=True", 'combine_streams="mean"'],
    }
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(settings))
    parsed = train.parse_arguments([str(path)])
    # JSON is YAML, too.
    assert train.parse_arguments([str(path.rename(path.with_suffix(".yaml")))])[:3] == parsed[:3]
    assert parsed[3].learning_rate == run_checkpoints.RunArguments().learning_rate
    figures = train.train(*parsed)
    # A masked model sees both sides, so figures that know only what precedes a byte do not stand beside it.
    assert list(figures) == ["model", "LSH attention off"] and 4 < figures["model"] < 10
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "masked")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "masked")
    assert model.config.vocab_size == len(tokenizer) == 259 and tokenizer.mask_token_id == 258
    assert not model.config.is_decoder and model.config.lsh_rotary and model.config.combine_streams == "mean"
    card = (tmp_path / "masked" / "README.md").read_text()
    assert "pipeline_tag: fill-mask" in card and "bits per masked byte" in card
    # One row of 32 tokens, or two of 16: what is hidden stays the same, and so nearly does an untrained model's cost.
    options = ["--lengths", "16", "32", "--num_windows", "6", "--output_dir", str(tmp_path / "figures")]
    evaluate.main(["--model", str(tmp_path / "masked"), "--text_path", str(text_folder), *options])
    stored = json.loads((tmp_path / "figures" / "context.json").read_text())
    assert stored["unit"] == "bits per masked byte"
    assert [row["all"] for row in stored["rows"]["with LSH layers"]] == pytest.approx([figures["model"]] * 2, rel=0.1)


def test_training_goes_on_from_a_saved_model(trained, text_folder, tmp_path):
    arguments = causal_arguments(
        text_folder,
        tmp_path,
        model_name_or_path=trained[0],
        max_steps=1,
        eval_strategy="no",
        learning_rate=0,
        label_smoothing_factor=0.1,
        set="reversible=False",
    )
    # Nothing learnt and the training loss smoothed: the figure is the saved model's all the same.
    assert train.train(*train.parse_arguments(arguments))["model"] == pytest.approx(trained[1]["model"], rel=1e-6)
    assert not ReformerForCausalLM.from_pretrained(tmp_path).config.reversible


def test_a_model_without_a_longest_input_is_trained_and_goes_on_beyond(text_folder, tmp_path, capsys):
    model = make_model(ReformerForCausalLM, vocab_size=258, max_position_embeddings=CONTEXT, **POSITIONS["rotary"])
    model.save_pretrained(tmp_path / "start")
    ReformerByteTokenizer().save_pretrained(tmp_path / "start")
    folder = tmp_path / "trained"
    arguments = causal_arguments(
        text_folder, folder, model_name_or_path=tmp_path / "start", max_steps=1, eval_strategy="no"
    )
    train.train(*train.parse_arguments(arguments))
    assert "It takes inputs of any length, and" in " ".join((folder / "README.md").read_text().split())
    prompt = "a" * CONTEXT
    capsys.readouterr()
    generate.main(["--model", str(folder), "--prompt", prompt, "--max_new_tokens", "3"])
    assert capsys.readouterr().out.startswith(prompt)


def test_trainer_draft_does_not_replace_the_model_card(trained):
    before = (trained[0] / "README.md").read_text()
    train.BitsPerByteTrainer.create_model_card(None, model_name="draft")
    assert (trained[0] / "README.md").read_text() == before


def test_unknown_objective():
    with pytest.raises(ValueError, match="objective is 'both'; it must be 'causal' or 'masked'"):
        train.ModelArguments(objective="both")


# The demo and generation


@pytest.mark.slow
def test_demo_trains_saves_loads_and_continues(text_folder, tmp_path, monkeypatch, capsys):
    assert demo.DEMO_CONTEXT_LENGTH >= 4096
    monkeypatch.setattr(demo, "ModelRecipe", partial(ModelRecipe, **TINY))
    monkeypatch.setattr(demo, "DEMO_CONTEXT_LENGTH", 2048)
    read = corpus.read_standard_library
    monkeypatch.setattr(corpus, "read_standard_library", lambda: (found := read()).select(range(0, len(found), 3)))
    monkeypatch.setattr(demo, "NEW_TOKENS", 5)
    monkeypatch.setattr(demo, "CONTEXT_LENGTHS", (64, 4096))
    threads = torch.get_num_threads()
    demo.main(["--steps", "1", "--output_dir", str(tmp_path), "--threads", str(threads)])
    printed = capsys.readouterr().out
    assert "the source files of the standard library" in printed
    assert all(f"\n  {name} " in printed for name in ("model", "order-0", "order-2", "lzma"))
    assert demo.PROMPT in printed and "s in all" in printed
    assert re.search(r"\n +4,096 +\d\.\d{3} +\d\.\d{3} +\d\.\d{3} / \d\.\d{3}\n", printed)
    assert (tmp_path / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_demo_that_was_stopped_goes_on(text_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "ModelRecipe", partial(ModelRecipe, **TINY))
    monkeypatch.setattr(demo, "DataArguments", partial(corpus.DataArguments, text_path=str(text_folder)))
    monkeypatch.setattr(demo, "DEMO_CONTEXT_LENGTH", CONTEXT)
    monkeypatch.setattr(demo, "PROMPT", "Line")
    monkeypatch.setattr(demo, "NEW_TOKENS", 1)
    monkeypatch.setattr(demo, "CONTEXT_LENGTHS", (16, 64))
    arguments = ["--steps", "2", "--output_dir", str(tmp_path), "--threads", str(torch.get_num_threads())]
    callback = type("Stop", (TrainerCallback,), {"on_step_end": lambda *_, **__: os.kill(os.getpid(), signal.SIGINT)})
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("transformers.trainer.DEFAULT_CALLBACKS", [*DEFAULT_CALLBACKS, callback])
        demo.main(arguments)
    demo.main(arguments)
    assert f"going on from {tmp_path / 'checkpoint-1'}" in capsys.readouterr().out
    assert not list(tmp_path.glob("checkpoint-*"))


def run_generate(*arguments, stdin=""):
    return subprocess.run(
        [sys.executable, SCRIPTS / "generate.py", *map(str, arguments)], input=stdin, capture_output=True, text=True
    )


@pytest.mark.slow
def test_generate_streams_the_continuation_of_stdin(trained):
    done = run_generate(
        "--model", trained[0], "--max_new_tokens", 4, "--do_sample", "--top_k", 5, "--seed", 1, stdin="Line 🙂"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Line 🙂")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "The prompt is empty"),
        (["--prompt_file", "nowhere.txt"], "There is no file at nowhere.txt"),
        (["--prompt", "a", "--max_new_tokens", "0"], "it must be at least 1"),
        (["--prompt", "a", "--top_p", "0.5"], "--top_p has no effect without --do_sample"),
        (["--prompt", "a", "--prompt_file", "b"], "not allowed with argument"),
        (
            ["--prompt", "a", "--set", "rounds=4"],
            "--set takes settings of ReformerConfig as name=value, but got 'rounds",
        ),
    ],
)
def test_generate_errors(trained, arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        generate.main(["--model", str(trained[0]), *arguments])
    assert message in f"{stopped.value} {capsys.readouterr().err}"


def test_a_text_longer_than_the_table_of_positions_is_refused(tmp_path):
    make_model(ReformerForCausalLM, vocab_size=258).save_pretrained(tmp_path)
    ReformerByteTokenizer().save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="The prompt has 1 tokens, which with 99999 new ones"):
        generate.main(["--model", str(tmp_path), "--prompt", "a", "--max_new_tokens", "99999"])


def test_generation_is_the_seeds(trained, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        generate.main(
            ["--model", str(trained[0]), "--prompt", "Line", "--max_new_tokens", "12", "--do_sample", "--seed", seed]
        )
        texts.append(capsys.readouterr().out)
    assert [first == second for first, second in pairwise(texts)] == [True, False]


def test_generation_with_other_settings(trained, monkeypatch):
    asked = []
    monkeypatch.setattr(ReformerForCausalLM, "generate", lambda model, **_: asked.append(model.config))
    settings = ["--set", "num_hashes=3", "num_buckets=[4, 8]"]
    generate.main(["--model", str(trained[0]), "--prompt", "Line", *settings])
    assert (asked[0].num_hashes, asked[0].num_buckets) == (3, [4, 8])


# What context buys


def test_bits_of_the_halves_of_windows(trained):
    model = ReformerForCausalLM.from_pretrained(trained[0]).eval()
    tokens = torch.randint(2, 250, (3, 32))
    widths = torch.randint(0, 3, (3, 32)).float()
    measured = context_gain.bits_by_half(model, context_gain.Reading(tokens, tokens, widths, causal=True))
    bf16 = context_gain.multiplies_in_bfloat16("cpu")
    costs = torch.cat([context_gain.bits_of_tokens(model, window[None], bf16) for window in tokens])
    with torch.no_grad():
        loss = model(tokens, labels=tokens).loss
    assert costs.mean().item() == pytest.approx(loss.item() / math.log(2), rel=0.02)
    for name, part in {"all": slice(None), "first": slice(15), "second": slice(15, None)}.items():
        expected = costs[:, part].sum() / widths[:, 1:][:, part].sum()
        # A batch may be multiplied in another order.
        assert measured[name] == pytest.approx(expected.item(), rel=0.02 if bf16 else 1e-5)


def test_bits_of_what_is_hidden_from_a_masked_model():
    model = make_model(ReformerForMaskedLM, is_decoder=False)
    ids, labels = torch.randint(2, 30, (2, 16)), torch.full((2, 16), context_gain.IGNORED)
    hidden = [(0, 3), (1, 4), (1, 12)]
    for row, column in hidden:
        labels[row, column], ids[row, column] = ids[row, column], 1
    measured = context_gain.bits_by_half(model, context_gain.Reading(ids, labels, torch.ones(2, 16), causal=False))
    with torch.no_grad():
        scores = model(ids).logits.log_softmax(-1)
    costs = [-scores[row, column, labels[row, column]].item() / math.log(2) for row, column in hidden]
    expected = {"all": sum(costs) / 3, "first": sum(costs[:2]) / 2, "second": costs[2]}
    assert measured == pytest.approx(expected, rel=0.02 if context_gain.multiplies_in_bfloat16("cpu") else 1e-5)


def test_windows_of_all_lengths_read_the_same_text(trained, text_folder, capsys):
    given = ["--model", str(trained[0]), "--text_path", str(text_folder)]
    evaluate.main([*given, "--lengths", "16", "64"])
    printed = capsys.readouterr().out
    stored = json.loads((trained[0] / "context.json").read_text())["rows"]
    assert list(stored) == ["with LSH layers", "LSH attention off"]
    for row in stored["with LSH layers"]:
        assert f"{row['length']:>9,}  {row['all']:17.3f}" in printed
    assert (trained[0] / "context.png").is_file()
    with pytest.raises(SystemExit):
        evaluate.main([*given, "--lengths", "16", "24"])
    assert "lengths is 16, 24; each must divide the longest" in capsys.readouterr().err


def test_evaluation_with_other_settings(trained, text_folder, tmp_path):
    def bits(*settings):
        given = ["--model", str(trained[0]), "--text_path", str(text_folder), "--lengths", "64"]
        evaluate.main([*given, "--output_dir", str(tmp_path), "--set", "hash_seed=1", *settings])
        stored = json.loads((tmp_path / "context.json").read_text())
        return stored["rows"]["with LSH layers"], stored["settings"]

    once = bits()
    assert once == bits() and once[1] == {"hash_seed": 1}
    more = bits("num_hashes=3")
    assert more[0] != once[0] and more[1] == {"hash_seed": 1, "num_hashes": 3}
