"""`generate()` and the pipelines, with every step computed from the whole text."""

import pytest
import torch
from tiny_models import STACKS, VOCAB, make_model, random_ids
from transformers import DynamicCache, TextIteratorStreamer, pipeline, set_seed

from hf_reformer import (
    ReformerByteTokenizer,
    ReformerForCausalLM,
    ReformerForMaskedLM,
    ReformerForSequenceClassification,
    ReformerForTokenClassification,
)


TEXTS = ["To be, or not to be", "that is the question: Whether 'tis nobler", "Ay, there's the rub"]


def make_generator(stack="mixed", **changes):
    """In float64, so that no two tokens tie; prompts grow across chunks of 16."""
    changes = {"circular_look_around": False} | changes
    return make_model(ReformerForCausalLM, attn_layers=STACKS[stack], **changes).double()


def left_pad(prompts):
    length = max(prompt.shape[1] for prompt in prompts)
    ids = torch.cat([torch.nn.functional.pad(prompt, (length - prompt.shape[1], 0)) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def text_model(model_class, tokenizer, **changes):
    changes = {"circular_look_around": False, "vocab_size": len(tokenizer)} | changes
    return make_model(model_class, attn_layers=STACKS["mixed"], **changes).double()


@pytest.mark.parametrize("stack", STACKS)
def test_greedy_takes_the_likeliest_token_at_each_step(stack):
    model = make_generator(stack)
    ids = expected = random_ids(2, 13)
    with torch.no_grad():
        for _ in range(25):
            expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(ids, max_new_tokens=25, do_sample=False, eos_token_id=None), expected)


@pytest.mark.parametrize("hash_seed", [None, 5])
def test_sampling_uses_the_global_generator_and_nothing_disturbs_it(hash_seed):
    model = make_generator(hash_seed=hash_seed)
    ids = expected = random_ids(2, 13)
    set_seed(7)
    with torch.no_grad():
        for _ in range(25):
            probabilities = model(expected).logits[:, -1].float().softmax(-1)
            expected = torch.cat([expected, torch.multinomial(probabilities, 1)], dim=1)
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 25, "eos_token_id": None}
    set_seed(7)
    sampled = model.generate(ids, **options)
    assert torch.equal(sampled, expected)
    assert not torch.equal(model.generate(ids, **options), sampled)


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 3},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
        {"use_cache": False},
    ],
    ids=["greedy", "beams", "many beams", "penalties", "no cache"],
)
def test_a_left_padded_batch_generates_what_each_prompt_does(options, stack):
    model = make_generator(stack, full_attention_threshold=20)
    prompts = [random_ids(1, length) for length in (3, 17, 30, 16)]
    options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0} | options
    batch = left_pad(prompts)
    together = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    alone = [model.generate(prompt, **options)[:, prompt.shape[1] :] for prompt in prompts]
    assert torch.equal(together, torch.cat(alone))


def test_every_returned_sequence_is_a_sample_of_its_own():
    model = make_generator()
    options = {"do_sample": True, "max_new_tokens": 8, "num_return_sequences": 3, "eos_token_id": None}
    sequences = model.generate(**left_pad([random_ids(1, 5), random_ids(1, 20)]), **options)
    assert sequences.shape == (6, 28)
    assert len({tuple(row.tolist()) for row in sequences}) == 6


def test_generation_ends_at_the_end_token_and_pads_after_it():
    model = make_generator()
    ids = random_ids(2, 13)
    free = model.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=None)[:, 13:]
    end = free[0, 3].item()
    stopped = model.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=end)[:, 13:]
    for row, expected in zip(stopped, free, strict=True):
        length = [*expected.tolist(), end].index(end) + 1
        assert row[:length].tolist() == expected[:length].tolist()
        assert not row[length:].any()


def test_logits_to_keep():
    model = make_generator()
    ids = random_ids(2, 20)
    with torch.no_grad():
        logits = model(ids).logits
        assert logits.shape == (2, 20, VOCAB)
        torch.testing.assert_close(model(ids, logits_to_keep=1).logits, logits[:, -1:])
        torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([2, 5])).logits, logits[:, [2, 5]])


def test_a_cache_is_refused():
    model = make_generator()
    with pytest.raises(ValueError, match=r"takes no `past_key_values`\. Leave them out"):
        model.generate(random_ids(1, 5), past_key_values=DynamicCache(), max_new_tokens=2)
    assert model(random_ids(1, 5), use_cache=True, past_key_values=None).past_key_values is None
    with pytest.raises(ValueError, match="the prompt as `input_ids`"):
        model.generate(inputs_embeds=torch.zeros(1, 5, 32, dtype=torch.float64), max_new_tokens=2)


def test_streaming_gives_the_text_that_is_returned():
    tokenizer = ReformerByteTokenizer()
    model = text_model(ReformerForCausalLM, tokenizer)
    inputs = tokenizer(TEXTS[0], return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    generated = model.generate(**inputs, streamer=streamer, max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert "".join(streamer) == tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :])


def test_text_generation_pipeline():
    tokenizer = ReformerByteTokenizer(padding_side="left")
    model = text_model(ReformerForCausalLM, tokenizer)
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    options = {"max_new_tokens": 10, "do_sample": False}
    alone = [generate(text, **options) for text in TEXTS]
    for text, output in zip(TEXTS, alone, strict=True):
        ids = model.generate(**tokenizer(text, return_tensors="pt"), **options)
        assert output == [{"generated_text": tokenizer.decode(ids[0], skip_special_tokens=True)}]
    assert generate(TEXTS, batch_size=3, **options) == alone


def test_fill_mask_pipeline():
    tokenizer = ReformerByteTokenizer(mask_token="<mask>")
    model = text_model(ReformerForMaskedLM, tokenizer)
    fill = pipeline("fill-mask", model=model, tokenizer=tokenizer, device="cpu")
    texts = [text.replace("t", "<mask>", 1) for text in TEXTS]
    alone = [fill(text) for text in texts]
    for text, answers in zip(texts, alone, strict=True):
        inputs = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits[inputs["input_ids"] == tokenizer.mask_token_id]
        best = logits.softmax(-1).topk(5)
        assert [answer["token"] for answer in answers] == best.indices[0].tolist()
        assert [answer["score"] for answer in answers] == pytest.approx(best.values[0].tolist())
    assert flatten(fill(texts, batch_size=3)) == pytest.approx(flatten(alone))


def flatten(answers):
    return [answer["score"] for row in answers for answer in row]


@pytest.mark.parametrize("is_decoder", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_text_classification_pipeline(padding_side, is_decoder):
    tokenizer = ReformerByteTokenizer(padding_side=padding_side)
    model = text_model(ReformerForSequenceClassification, tokenizer, is_decoder=is_decoder, num_labels=3)
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    alone = [classify(text, top_k=None) for text in TEXTS]
    for text, answers in zip(TEXTS, alone, strict=True):
        with torch.no_grad():
            expected = model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1)
        scores = {answer["label"]: answer["score"] for answer in answers}
        assert scores == pytest.approx({f"LABEL_{i}": score for i, score in enumerate(expected.tolist())})
    together = classify(TEXTS, top_k=None, batch_size=3)
    assert flatten(together) == pytest.approx(flatten(alone))


@pytest.mark.parametrize("is_decoder", [True, False], ids=["causal", "bidirectional"])
def test_token_classification_pipeline(is_decoder):
    tokenizer = ReformerByteTokenizer()
    model = text_model(ReformerForTokenClassification, tokenizer, is_decoder=is_decoder, num_labels=3)
    classify = pipeline("token-classification", model=model, tokenizer=tokenizer, ignore_labels=[], device="cpu")
    alone = [classify(text) for text in TEXTS]
    for text, answers in zip(TEXTS, alone, strict=True):
        with torch.no_grad():
            expected = model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1).max(-1)
        assert [answer["entity"] for answer in answers] == [f"LABEL_{i}" for i in expected.indices.tolist()]
        assert [answer["score"] for answer in answers] == pytest.approx(expected.values.tolist())
        assert [text[answer["start"] : answer["end"]] for answer in answers] == list(text)
    assert flatten(classify(TEXTS, batch_size=3)) == pytest.approx(flatten(alone))
