"""`hf-reformer train --packing True`: documents are kept apart, and what is measured is what each would give alone."""

import math
from functools import partial
from itertools import pairwise

import datasets
import numpy as np
import pytest
import torch
from test_scripts import CONTEXT, build, causal_arguments, subword_tokenizer, text_folder  # noqa: F401
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_reformer import ReformerByteTokenizer
from hf_reformer.commands import train
from hf_reformer.training import corpus
from hf_reformer.training.bits_trainer import collate_causal


ROOMY = 256
ALIGNMENT = 8


def documents_of(windows):
    """The tokens of each document, window by window."""
    for row in windows.dataset:
        numbers = row["attention_mask"]
        assert set(numbers[numbers > 0].tolist()) == set(range(1, int(numbers.max()) + 1))
        for number in range(1, int(numbers.max()) + 1):
            yield row["input_ids"][numbers == number]


@pytest.mark.parametrize("context_length", [CONTEXT, ROOMY])
def test_each_document_is_in_a_window_or_cut(text_folder, context_length):  # noqa: F811
    texts = corpus.read_text(text_folder)
    windows = corpus.pack(texts, ReformerByteTokenizer(), context_length, apart=True, alignment=ALIGNMENT)
    tokens = [list(map(int, document)) for document in documents_of(windows)]
    whole = [[byte + 2 for byte in text.encode()] + [1] for text in texts["text"]]
    expected = [text[at : at + context_length] for text in whole for at in range(0, len(text), context_length)]
    assert sorted(tokens) == sorted(piece for piece in expected if len(piece) > 1)
    assert bytes(token - 2 for document in tokens for token in document if token != 1) == windows.text
    assert len(windows.text) == windows.num_bytes == windows.token_bytes.sum()
    assert windows.num_packed == len(windows.dataset) and windows.tail_tokens == 0
    for row in windows.dataset:
        lengths = np.unique_counts(row["attention_mask"][row["attention_mask"] > 0].numpy()).counts
        assert sum(-(-length // ALIGNMENT) * ALIGNMENT for length in lengths[:-1]) + lengths[-1] <= context_length
    assert "documents kept apart" in windows.describe()


def test_what_is_predicted(text_folder):  # noqa: F811
    """All tokens of a document but the first, in the figures and in the labels."""
    texts = corpus.read_text(text_folder)
    windows = corpus.pack(texts, subword_tokenizer(texts["text"][:]), ROOMY, apart=True)
    documents = list(documents_of(windows))
    predicted = sum(len(document) - 1 for document in documents)
    assert windows.is_predicted.sum() == predicted
    assert windows.tokens_per_window * len(windows.dataset) == sum(map(len, documents))
    labels = collate_causal(list(windows.dataset))["labels"]
    assert (labels != -100).numpy().tolist() == windows.is_predicted.tolist()
    assert windows.causal_tokens_per_byte == predicted / windows.token_bytes[windows.is_predicted].sum()
    some = windows.evenly_spaced(2)
    assert some.is_predicted.shape == some.token_bytes.shape == (2, ROOMY)


def test_other_borders_are_other_windows(text_folder):  # noqa: F811
    packed, again = (build(text_folder, packing=True, context_length=ROOMY).train for _ in range(2))
    assert packed.digest == again.digest
    numbers = np.minimum(packed.dataset["attention_mask"][:].numpy(), 1)
    dataset = corpus._rows(input_ids=packed.dataset["input_ids"][:].numpy(), attention_mask=numbers)
    assert corpus.replace(packed, dataset=dataset).digest != packed.digest


def test_the_figure_is_that_of_the_documents_alone(text_folder, tmp_path):  # noqa: F811
    """Windows have different numbers of predicted tokens, and the last batch fewer windows."""
    changed = {"packing": True, "context_length": ROOMY, "max_held_out_windows": 1000, "held_out_fraction": 0.6}
    arguments = causal_arguments(text_folder, tmp_path, per_device_eval_batch_size=4, **changed)
    figures = train.train(*train.parse_arguments(arguments))
    held_out = build(text_folder, alignment=ALIGNMENT, **changed).held_out
    assert len(held_out.dataset) % 4
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    nats, num_bytes = 0.0, 0
    for document in documents_of(held_out):
        with torch.no_grad():
            scores = model(input_ids=document[None]).logits[0].double().log_softmax(-1)
        for position, (_, token) in enumerate(pairwise(document.tolist())):
            nats -= scores[position, token].item()
            num_bytes += token != 1
    assert figures["model"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)


def test_texts_that_leave_little(tmp_path):
    """A document, or a piece of one, of a single token; one document for a whole side; none with text."""
    pack = partial(corpus.pack, tokenizer=ReformerByteTokenizer(), context_length=CONTEXT, apart=True)
    texts = ["a" * CONTEXT, "", "abc"]
    windows = pack(datasets.Dataset.from_dict({"text": texts}))
    assert [len(document) for document in documents_of(windows)] == [CONTEXT, 4]
    assert windows.text == b"a" * CONTEXT + b"abc"
    (only,) = documents_of(pack(datasets.Dataset.from_dict({"text": ["abc"]})))
    assert only.tolist() == [99, 100, 101, 1]
    with pytest.raises(ValueError, match="The 2 documents are empty"):
        pack(datasets.Dataset.from_dict({"text": ["", ""]}))


def test_a_window_without_a_masked_token_counts_nothing(tmp_path):
    """In evaluation; the share of hidden tokens is so small that there are such windows."""
    for number in range(12):
        (tmp_path / f"{number}.txt").write_text("abc" * (number % 3 + 1))
    changed = {"packing": True, "objective": "masked", "mlm_probability": 0.3, "per_device_eval_batch_size": 1}
    changed |= {"per_device_train_batch_size": 8, "max_steps": 1, "max_held_out_windows": 100}
    figures = train.train(*train.parse_arguments(causal_arguments(tmp_path, tmp_path / "run", **changed)))
    assert math.isfinite(figures["model"])


def test_a_masked_model_reads_documents_apart(text_folder, tmp_path):  # noqa: F811
    changed = {"packing": True, "context_length": ROOMY, "objective": "masked", "max_steps": 2}
    figures = train.train(*train.parse_arguments(causal_arguments(text_folder, tmp_path, **changed)))
    assert math.isfinite(figures["model"])


def test_other_models_do_not_keep_documents_apart(text_folder, tmp_path):  # noqa: F811
    LlamaForCausalLM(
        LlamaConfig(vocab_size=258, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(tmp_path / "llama")
    ReformerByteTokenizer().save_pretrained(tmp_path / "llama")
    arguments = causal_arguments(text_folder, tmp_path, packing=True, model_name_or_path=tmp_path / "llama")
    with pytest.raises(ValueError, match="packing is True, but LlamaConfig is of no Reformer"):
        train.train(*train.parse_arguments(arguments))
