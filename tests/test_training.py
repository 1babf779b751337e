"""hf_reformer.training: the recipe, its optimizer in the Trainer, and the measure of a result."""

import doctest
import importlib
import math
import re
import subprocess
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_reformer import ReformerByteTokenizer, ReformerForCausalLM
from hf_reformer.training import (
    ModelRecipe,
    bits_per_byte,
    conditional_entropy,
    lzma_bits_per_byte,
    recipe_config,
    reference_figures,
    without_attention,
)


# Bits per byte and the reference figures


def entropy_by_counting(data, order):
    grams = Counter(data[start : start + order + 1] for start in range(len(data) - order))
    contexts = Counter()
    for gram, count in grams.items():
        contexts[gram[:-1]] += count
    total = sum(grams.values())
    return -sum(count / total * math.log2(count / contexts[gram[:-1]]) for gram, count in grams.items())


@pytest.mark.parametrize("order", range(7))
def test_conditional_entropy_is_what_counting_gives(order):
    data = np.random.default_rng(0).integers(0, 256, 2000).clip(250).astype(np.uint8).tobytes() + bytes(100)
    assert conditional_entropy(data, order) == pytest.approx(entropy_by_counting(data, order), abs=1e-12)


def test_conditional_entropy_by_hand():
    assert conditional_entropy(b"abab", 0) == 1
    assert conditional_entropy(b"abab", 1) == 0
    assert conditional_entropy(b"aab", 0) == pytest.approx(math.log2(3) - 2 / 3)
    # The two bytes after an "a" are an "a" and a "b"; nothing follows the "b".
    assert conditional_entropy(b"aab", 1) == 1


def test_reference_figures_of_noise_and_of_repetition():
    noise = np.random.default_rng(0).integers(0, 256, 100_000).astype(np.uint8).tobytes()
    figures = reference_figures(noise)
    assert figures["order-0"] == pytest.approx(8, abs=0.01)
    assert 8 < figures["lzma"] < 8.1
    assert reference_figures(b"abc" * 10_000)["lzma"] < 0.1


def test_bits_per_byte_of_a_uniform_guess():
    assert bits_per_byte(math.log(256), 1.0) == pytest.approx(8)
    # One token in 16 equally likely ones for two bytes: four bits for two bytes.
    assert bits_per_byte(math.log(16), 0.5) == pytest.approx(2)


def test_reference_figures_refuse_what_has_no_figure():
    with pytest.raises(ValueError, match="order is 7; it must lie between 0 and 6"):
        conditional_entropy(b"abc", 7)
    with pytest.raises(ValueError, match="2 bytes hold no byte with 2 bytes before it; give at least 3"):
        conditional_entropy(b"ab", 2)
    with pytest.raises(ValueError, match="no bytes to compress"):
        lzma_bits_per_byte(b"")


# The recipe


@pytest.mark.parametrize("length", [2, 32, 100, 3000, 4096, 65536, 2**20])
def test_recipe_fits_the_context(length):
    config = recipe_config(context_length=length)
    # It goes on beyond that, too.
    assert config.max_position_embeddings == length and config.max_sequence_length is None
    assert recipe_config(length, position_embedding_type="axial").max_sequence_length == length
    for per_chunk in (0.5, 2):
        config = recipe_config(length, buckets_per_chunk=per_chunk)
        buckets, most = np.prod(config.num_buckets), per_chunk * length / config.lsh_attn_chunk_length
        assert buckets == 2 or most / 2 < buckets <= most
    assert not config.circular_look_around


def test_full_attention_twin_differs_in_nothing_else():
    config, twin = (recipe_config(64, full_attention=full) for full in (False, True))
    assert set(twin.attn_layers) == {"full"} and set(config.attn_layers) == {"local", "lsh"}
    config.attn_layers = twin.attn_layers
    assert config.to_dict() == twin.to_dict()


def test_every_setting_of_the_recipe_can_be_named():
    expected = recipe_config(4096).to_dict()
    assert recipe_config(4096, **vars(ModelRecipe())).to_dict() == expected
    changes = {
        "full_attention": True,
        "buckets_per_chunk": 2.0,
        "lsh_sliding_window": False,
        "lsh_value_shift": 0,
        "position_embedding_type": "axial",
        "dropout": 0.1,
        "attn_layers": ["lsh", "full"],
        "hidden_act": "relu",
        "initializer_range": 0.1,
    }
    for setting in fields(ModelRecipe):
        changed = recipe_config(4096, **{setting.name: changes.get(setting.name, 16)}).to_dict()
        different = {name for name in expected if changed[name] != expected[name]}
        assert setting.name in different or (setting.name in changes and different), setting.name


def test_settings_of_the_config_come_before_the_recipe():
    config = recipe_config(
        4096, dropout=0.1, lsh_attention_probs_dropout_prob=0.0, num_buckets=[8, 8], reversible=False
    )
    dropouts = (config.hidden_dropout_prob, config.local_attention_probs_dropout_prob)
    assert dropouts == (0.1, 0.1) and config.lsh_attention_probs_dropout_prob == 0
    assert list(config.num_buckets) == [8, 8] and not config.reversible
    assert recipe_config(4096, max_position_embeddings=8192).max_position_embeddings == 8192
    assert recipe_config(4096, axial_pos_shape=[64, 128]).max_sequence_length == 8192
    assert recipe_config(4096, axial_pos_embds=False).max_sequence_length == 4096
    assert recipe_config(64, attn_layers=["local"], lsh_attn_chunk_length=None).num_buckets is None
    kept = recipe_config(64, num_labels=3, cls_token_id=5, attn_implementation="eager")
    assert (kept.num_labels, kept.cls_token_id, kept._attn_implementation) == (3, 5, "eager")


def test_recipe_for_another_tokenizer_and_a_masked_model():
    tokenizer = ReformerByteTokenizer()
    tokenizer.add_head_tokens()
    config = recipe_config(64, tokenizer=tokenizer, is_decoder=False)
    assert config.vocab_size == len(tokenizer) > recipe_config(64).vocab_size == len(ReformerByteTokenizer())
    assert not config.is_decoder and config.local_num_chunks_after == config.lsh_num_chunks_after == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hiden_size", "`hiden_size` is not a setting of ReformerConfig. Did you mean `hidden_size`?"),
        ("n_layers", "Did you mean `attn_layers`?"),
        ("bucket_per_chunk", "neither ModelRecipe nor ReformerConfig. Did you mean `buckets_per_chunk`?"),
        ("xyz", "`xyz` is a setting of neither ModelRecipe nor ReformerConfig."),
    ],
)
def test_unknown_settings_are_refused(name, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        recipe_config(64, **{name: 1})


@pytest.mark.parametrize("module", ["recipe", "contribution", "packing"])
def test_examples_run(module):
    results = doctest.testmod(importlib.import_module(f"hf_reformer.training.{module}"))
    assert results.attempted and not results.failed


@pytest.mark.parametrize("kind", ["lsh", "local"])
def test_attention_can_be_switched_off(kind):
    model = ReformerForCausalLM(recipe_config(64, hidden_size=32, num_attention_heads=2)).eval()
    ids = torch.randint(1, 250, (2, 64))
    with torch.no_grad():
        before = model(ids).logits
        with without_attention(model, kind) as switched_off:
            without = model(ids).logits
        assert torch.equal(model(ids).logits, before)
        for index in switched_off:
            torch.nn.init.zeros_(model.reformer.encoder.layers[index].attention.output.dense.weight)
        assert torch.equal(model(ids).logits, without)
    assert not torch.equal(before, without)
    with pytest.raises(ValueError, match=r"no layer of kind 'full'; it has \['local', 'lsh'"):
        without_attention(model, "full").__enter__()


def test_the_how_to_trains_on_a_text_of_ones_own(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[1] / "docs" / "how_to" / "train.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n([^`]*recipe_config[^`]*)```", page)
    (tmp_path / "my_text.txt").write_text("A line of text.\n" * 40, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for written, small in {"4096": "32", "max_steps=1000": "max_steps=2, use_cpu=True, report_to=[]"}.items():
        assert written in example
        example = example.replace(written, small)
    exec(example, {})
    assert 0 < float(capsys.readouterr().out.splitlines()[-1]) < 10
    assert ReformerForCausalLM.from_pretrained(tmp_path / "runs" / "mine").config.max_position_embeddings == 32


WITHOUT_ACCELERATE = """
import importlib.machinery

find = importlib.machinery.PathFinder.find_spec
# peft is nothing without accelerate.
hidden = ("accelerate", "datasets", "matplotlib", "peft")
importlib.machinery.PathFinder.find_spec = staticmethod(
    lambda name, *rest: None if name.split(".")[0] in hidden else find(name, *rest)
)

from hf_reformer.training import MuonWithAdamW, ReformerTrainingArguments, recipe_config

recipe_config(64)
try:
    ReformerTrainingArguments("nowhere")
except ImportError as error:
    print(error)
"""


@pytest.mark.slow
def test_only_training_arguments_need_accelerate(tmp_path):
    probe = subprocess.run([sys.executable, "-c", WITHOUT_ACCELERATE], capture_output=True, text=True, cwd=tmp_path)
    assert probe.returncode == 0, probe.stderr
    assert "requires `accelerate" in probe.stdout
