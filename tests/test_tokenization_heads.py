"""The byte tokenizer beside a model: tokens around texts and pairs, pipelines, the longest text."""

import pytest
import torch
from tiny_models import make_model, tiny_config
from transformers import AutoTokenizer, pipeline

from hf_reformer import (
    ReformerByteTokenizer,
    ReformerForCausalLM,
    ReformerForMaskedLM,
    ReformerForTokenClassification,
)


REPLACEMENT = "\ufffd"


# tokens around texts


def test_texts_stand_between_cls_and_sep_where_these_have_a_name():
    tokenizer = ReformerByteTokenizer(cls_token="<cls>", sep_token="<s e:p>")
    one = tokenizer("ab", return_token_type_ids=True)
    assert (tokenizer.sep_token_id, tokenizer.cls_token_id) == (258, 259)
    assert (one["input_ids"], one["token_type_ids"]) == ([259, 99, 100, 258], [0, 0, 0, 0])
    two = tokenizer("ab", "cd", return_token_type_ids=True, return_special_tokens_mask=True)
    assert two["input_ids"] == [259, 99, 100, 258, 101, 102, 258]
    assert two["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]
    assert two["special_tokens_mask"] == [1, 0, 0, 1, 0, 0, 1]
    assert two.sequence_ids() == [None, 0, 0, None, 1, 1, None]
    assert set(tokenizer("ab", "cd")) == {"input_ids", "attention_mask"}
    assert tokenizer("ab", "cdef", truncation="only_second", max_length=6).input_ids == [259, 99, 100, 258, 101, 258]
    assert tokenizer.num_special_tokens_to_add(pair=True) == 3
    assert tokenizer.decode(two["input_ids"], skip_special_tokens=True) == "abcd"


def test_each_role_counts_by_itself_and_from_when_it_has_a_name(tmp_path):
    tokenizer = ReformerByteTokenizer(add_eos_token=True)
    assert tokenizer("a", "b").input_ids == [99, 1, 100, 1]
    tokenizer.add_special_tokens({"sep_token": "<sep>"})
    assert tokenizer("a", "b").input_ids == [99, 258, 1, 100, 258, 1]
    tokenizer.cls_token = "<sep>"
    assert tokenizer("a").input_ids == [258, 99, 258, 1]
    tokenizer.add_eos_token, tokenizer.sep_token = False, None
    assert tokenizer("a", "b").input_ids == [258, 99, 100]
    tokenizer.save_pretrained(tmp_path)
    loaded = ReformerByteTokenizer.from_pretrained(tmp_path, sep_token="<other>")
    assert loaded("a", "b").input_ids == [258, 99, 259, 100, 259]


def test_head_tokens_are_named_by_one_call(tmp_path):
    tokenizer = ReformerByteTokenizer()
    assert tokenizer.add_head_tokens() == 3
    assert (tokenizer.mask_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id) == (258, 259, 260)
    assert tokenizer("a", "b").input_ids == [259, 99, 260, 100, 260]
    assert tokenizer.add_head_tokens() == 0
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("a", "b").input_ids == [259, 99, 260, 100, 260]
    named = ReformerByteTokenizer(sep_token="[SEP]")
    assert named.add_head_tokens() == 2
    assert (named.sep_token, named.mask_token_id, named.cls_token_id) == ("[SEP]", 259, 260)


# pipelines


@pytest.fixture
def head_tokens():
    tokenizer = ReformerByteTokenizer()
    tokenizer.add_head_tokens()
    return tokenizer


TAGGED = "in Köln am See"


@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
@pytest.mark.parametrize("strategy", ["none", "simple", "first", "average", "max"])
def test_token_classification_gives_words(strategy, head_tokens):
    model = make_model(ReformerForTokenClassification, vocab_size=len(head_tokens), num_labels=3)
    entities = pipeline("token-classification", model, tokenizer=head_tokens)(TAGGED, aggregation_strategy=strategy)
    words = [entity["word"] for entity in entities]
    if strategy == "none":
        assert words == head_tokens.convert_ids_to_tokens([byte + 2 for byte in TAGGED.encode()])
    elif strategy != "simple":
        # Neighbours with the same label are one entity.
        assert "".join(words).replace(" ", "") == TAGGED.replace(" ", "")


def test_filling_a_mask(head_tokens):
    model = make_model(ReformerForMaskedLM, vocab_size=320)
    filled = pipeline("fill-mask", model, tokenizer=head_tokens)("ab<mask>d", top_k=320)
    assert len(filled) == 320
    assert {one["token_str"] for one in filled} >= {"c", REPLACEMENT}


def test_a_pipeline_generates_ids_that_no_token_has():
    model = make_model(ReformerForCausalLM, vocab_size=320)
    with torch.no_grad():
        model.lm_head.bias[300] = 1e3
    generator = pipeline("text-generation", model, tokenizer=ReformerByteTokenizer())
    (output,) = generator("ab", max_new_tokens=3, do_sample=False)
    assert output["generated_text"] == "ab" + 3 * REPLACEMENT


# the longest text


@pytest.mark.parametrize("loader", [ReformerByteTokenizer, AutoTokenizer])
def test_the_longest_text_is_that_of_the_model_beside_it(loader, tmp_path):
    tiny_config(max_position_embeddings=100).save_pretrained(tmp_path)
    for saved in (None, ReformerByteTokenizer()):
        if saved is not None:
            saved.save_pretrained(tmp_path)
        tokenizer = loader.from_pretrained(tmp_path)
        assert tokenizer.model_max_length == 100
        assert len(tokenizer("a" * 200, truncation=True).input_ids) == 100
    assert loader.from_pretrained(tmp_path, model_max_length=50).model_max_length == 50
    ReformerByteTokenizer(model_max_length=60).save_pretrained(tmp_path)
    assert loader.from_pretrained(tmp_path).model_max_length == 60
    tiny_config(position_embedding_type="rotary").save_pretrained(tmp_path / "without a bound")
    ReformerByteTokenizer().save_pretrained(tmp_path / "without a bound")
    for unbound in (ReformerByteTokenizer(), loader.from_pretrained(tmp_path / "without a bound")):
        assert unbound.model_max_length > 10**9
