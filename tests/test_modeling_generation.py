"""`generate()` and the pipelines, with the cache and without it."""

import copy

import pytest
import torch
from tiny_models import POSITIONS, STACKS, VOCAB, WINDOWS, left_padded, make_model, random_ids
from transformers import DynamicCache, StoppingCriteriaList, TextIteratorStreamer, pipeline, set_seed

from hf_reformer import (
    ReformerByteTokenizer,
    ReformerCache,
    ReformerForCausalLM,
    ReformerForMaskedLM,
    ReformerForSequenceClassification,
    ReformerForTokenClassification,
)
from hf_reformer.modeling.decoding.cache_naming import CACHE_NAME, CACHE_NAMES


TEXTS = ["To be, or not to be", "that is the question: Whether 'tis nobler", "Ay, there's the rub"]


def make_generator(stack="mixed", **changes):
    """In float64, so that no two tokens tie; prompts grow across chunks of 16."""
    changes = WINDOWS | changes
    return make_model(ReformerForCausalLM, attn_layers=STACKS[stack], **changes).double()


def left_pad(prompts):
    ids, mask = left_padded([prompt[0] for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def text_model(model_class, tokenizer, **changes):
    changes = WINDOWS | {"vocab_size": len(tokenizer)} | changes
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


GREEDY = {"do_sample": False, "max_new_tokens": 30, "eos_token_id": None, "pad_token_id": 0}


def on_stacks(ways, *on_each):
    """Every way to decode on the stack that has layers of every kind, and some of them on stacks of one kind, too."""
    return [(name, stack) for stack in STACKS for name in (ways if stack == "mixed" else on_each)]


WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 0},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 4, "num_return_sequences": 2, "do_sample": True},
    "penalties": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize(("way", "stack"), on_stacks(WAYS, "greedy", "sampled beams"))
def test_the_cache_changes_nothing(way, stack):
    model = make_generator(stack)
    batch = left_pad([random_ids(1, length) for length in (3, 37, 20)])
    texts = []
    for use_cache in (True, False):
        set_seed(3)
        texts.append(model.generate(**batch, **(GREEDY | WAYS[way]), use_cache=use_cache))
    assert torch.equal(*texts)


OTHER_WAYS = {
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
    "prefill in pieces": {"prefill_chunk_size": 7},
    "assisted": {"assistant": "another model"},
    "assisted by itself": {"assistant": "itself"},
}


@pytest.mark.slow
@pytest.mark.parametrize(("way", "stack"), on_stacks(OTHER_WAYS, "prefill in pieces", "assisted by itself"))
def test_other_ways_to_decode_give_the_greedy_text(way, stack):
    model = make_generator(stack)
    for length in (7, 20):
        # 14 tokens are a few below the 16 from which attention hashes.
        ids = torch.cat([random_ids(1, length)] * 2, dim=1)
        check_against_greedy(model, ids, dict(OTHER_WAYS[way]))


def check_against_greedy(model, ids, options):
    expected = model.generate(ids, **GREEDY)
    if assistant := options.pop("assistant", None):
        options["assistant_model"] = make_generator("local") if assistant == "another model" else copy.deepcopy(model)
    assert torch.equal(model.generate(ids, **GREEDY, **options), expected)


def test_each_step_reads_the_new_token_only():
    model = make_generator()
    counts = []
    model.reformer.register_forward_pre_hook(lambda module, args: counts.append(args[0].shape[1]))
    model.generate(random_ids(2, 20), **GREEDY)
    assert counts == [20] + [1] * 29


def test_a_cache_has_two_names():
    model = make_model(ReformerForCausalLM, **WINDOWS)
    ids = random_ids(1, 50)
    caches = [model(ids[:, :30], use_cache=True).get(CACHE_NAME) for _ in range(2)]
    logits = [model(ids[:, 30:], **{name: cache}).logits for name, cache in zip(CACHE_NAMES, caches, strict=True)]
    assert torch.equal(*logits)
    with pytest.raises(ValueError, match="both are given"):
        model(ids[:, 30:], cache=caches[0], past_key_values=caches[1])


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_cache_goes_on_where_a_text_ended(name):
    model = make_generator()
    batch = left_pad([random_ids(1, 5), random_ids(1, 20)])
    whole = model.generate(**batch, **GREEDY)
    first = model.generate(**batch, **(GREEDY | {"max_new_tokens": 10}), return_dict_in_generate=True)
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 10), value=1)
    cache = first[CACHE_NAME]
    second = model.generate(first.sequences, attention_mask=mask, **{name: cache}, **(GREEDY | {"max_new_tokens": 20}))
    assert torch.equal(second, whole)
    assert cache.get_seq_length() == whole.shape[1] - 1


def test_generation_from_vectors():
    model = make_generator()
    ids = random_ids(2, 20)
    vectors = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=vectors, **GREEDY), model.generate(ids, **GREEDY)[:, 20:])
    with pytest.raises(ValueError, match="cannot continue `inputs_embeds` without a cache"):
        model.train().generate(inputs_embeds=vectors, **GREEDY)


def test_generation_stops_when_it_is_told_to():
    model = make_generator()
    ids = random_ids(1, 20)
    assert model.generate(ids, **GREEDY, max_time=1e-9).shape[1] == 21
    at_25 = StoppingCriteriaList([lambda ids, scores, **kwargs: torch.tensor([ids.shape[1] >= 25])])
    assert model.generate(ids, **GREEDY, stopping_criteria=at_25).shape[1] == 25


@pytest.mark.parametrize("changes", [{"num_buckets": None}, {"circular_look_around": True}], ids=["buckets", "circle"])
def test_stock_settings_generate(changes):
    """As stock checkpoints have them; the same seed gives the same text, and the first token is the uncached one."""
    model = make_model(ReformerForCausalLM, attn_layers=STACKS["mixed"], **changes).double()
    ids = random_ids(2, 40)
    texts = []
    for _ in range(2):
        set_seed(1)
        texts.append(model.generate(ids, **(GREEDY | {"do_sample": True, "max_new_tokens": 60})))
    assert torch.equal(*texts)
    if model.config.num_buckets is not None:
        with torch.no_grad():
            first = model(ids).logits[:, -1].argmax(-1)
        assert torch.equal(model.generate(ids, **GREEDY)[:, 40], first)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"prefill_chunk_size": 7}, {"prompt_lookup_num_tokens": 4}, {"assistant": "itself"}],
    ids=str,
)
def test_each_step_has_maps_of_its_tokens_over_the_text_so_far(options):
    model = make_generator()
    ids, options = random_ids(1 if "num_beams" not in options else 2, 20), dict(options)
    if options.pop("assistant", None):
        options["assistant_model"] = copy.deepcopy(model)
    output = model.generate(ids, **GREEDY, **options, output_attentions=True, return_dict_in_generate=True)
    assert torch.equal(output.sequences, model.generate(ids, **GREEDY, **options))
    rows, heads = len(ids) * options.get("num_beams", 1), model.config.num_attention_heads
    first = 20 % 7 if "prefill_chunk_size" in options else 20
    counts = [first] + [1] * (output.sequences.shape[1] - 21)
    for i, (maps, count) in enumerate(zip(output.attentions, counts, strict=True)):
        assert [weights.shape for weights in maps] == [(rows, heads, count, 20 + i)] * 3
    if rows == 1:
        with torch.no_grad():
            whole = model(output.sequences[:, :-1], output_attentions=True).attentions
        for weights, expected in zip(output.attentions[-1], whole, strict=True):
            torch.testing.assert_close(weights, expected[:, :, -1:], rtol=1e-9, atol=1e-9)


def test_maps_need_an_implementation_that_keeps_them():
    """With a cache as without one."""
    model, ids = make_generator(attn_implementation="sdpa"), random_ids(1, 20)
    with pytest.raises(ValueError, match=r"'sdpa' .* no attention probabilities to return; use .*'eager'"):
        model.generate(ids, **GREEDY, output_attentions=True, return_dict_in_generate=True)
    cache = ReformerCache(model.config)
    model(ids, cache=cache)
    with pytest.raises(ValueError, match=r"'sdpa' .* no attention probabilities to return; use .*'eager'"):
        model(ids, cache=cache, output_attentions=True)


def test_training_mode_does_without_a_cache():
    model = make_generator().train()
    output = model.generate(random_ids(2, 20), **GREEDY, output_attentions=True, return_dict_in_generate=True)
    assert output.sequences.shape == (2, 50)
    assert [step[0].shape[-2:] for step in output.attentions] == [(length, length) for length in range(20, 50)]
    assert output.get(CACHE_NAME) is None


@pytest.mark.parametrize("implementation", ["static", "offloaded", "quantized"])
def test_other_caches_are_refused(implementation):
    model = make_generator()
    with pytest.raises(ValueError, match=f"cache_implementation='{implementation}'` is not possible.*Leave"):
        model.generate(random_ids(1, 5), cache_implementation=implementation, **GREEDY)
    with pytest.raises(ValueError, match=r"is a DynamicCache; a Reformer takes.*prompt tuning and P-tuning can"):
        model.generate(random_ids(1, 5), **{CACHE_NAME: DynamicCache()}, **GREEDY)
    assert model.generate(random_ids(1, 5), cache_implementation="dynamic", **GREEDY).shape == (1, 35)
    with pytest.raises(ValueError, match=f"`{CACHE_NAME}` is given, but `use_cache=False`"):
        model.generate(random_ids(1, 5), **{CACHE_NAME: ReformerCache(model.config)}, use_cache=False, **GREEDY)


@pytest.mark.parametrize("implementation", [None, "sdpa", "eager"])
def test_continuous_batching_is_refused(implementation):
    # with "sdpa", transformers would take the model and wait for answers without end
    model = make_generator()
    if implementation:
        model.set_attn_implementation(implementation)
    with pytest.raises(ValueError, match=r"Continuous batching is not possible.*Call `generate`"):
        model.generate_batch([[5, 6, 7]], max_new_tokens=2)


def test_without_a_cache_padding_takes_positions():
    model = make_generator()
    batch = left_pad([random_ids(1, 100), random_ids(1, 60)])
    batch = {name: torch.nn.functional.pad(tensor, (20, 0)) for name, tensor in batch.items()}
    with pytest.raises(ValueError, match="up to 148 tokens, the position embeddings reach 128"):
        model.generate(**batch, **(GREEDY | {"max_new_tokens": 28}), use_cache=False)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_text_longer_than_the_position_table_is_refused_before_any_work(use_cache):
    model = make_generator()
    model.reformer.register_forward_pre_hook(lambda module, args: pytest.fail("work was done"))
    batch = left_pad([random_ids(1, 100), random_ids(1, 60)])
    with pytest.raises(ValueError, match="up to 130 tokens, the position embeddings reach 128"):
        model.generate(**batch, **GREEDY, use_cache=use_cache)


def test_padding_takes_no_positions():
    """Of 128, here 20 columns are padding in every row."""
    model = make_generator()
    batch = left_pad([random_ids(1, 100), random_ids(1, 60)])
    expected = model.generate(**batch, **(GREEDY | {"max_new_tokens": 28}))[:, 100:]
    batch = {name: torch.nn.functional.pad(tensor, (20, 0)) for name, tensor in batch.items()}
    assert torch.equal(model.generate(**batch, **(GREEDY | {"max_new_tokens": 28}))[:, 120:], expected)


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
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    [output] = generate(TEXTS[0], streamer=streamer, **options)
    assert TEXTS[0] + "".join(streamer) == output["generated_text"]


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


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_prompt_that_ends_in_padding_is_gone_on_with(use_cache):
    # Transformers warns; what comes is what one forward pass over the text with its gap gives.
    model = text_model(ReformerForCausalLM, ReformerByteTokenizer(), **POSITIONS["rotary"])
    ids = torch.randint(2, 250, (2, 20))
    mask = torch.ones_like(ids)
    mask[1, 13:] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "use_cache": use_cache}
    written = model.generate(input_ids=ids, attention_mask=mask, **options)
    mask = torch.cat([mask, torch.ones(2, 6, dtype=torch.long)], dim=1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        logits = model(input_ids=written, attention_mask=mask, position_ids=positions).logits
    assert torch.equal(logits[:, 19:-1].argmax(-1), written[:, 20:])


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
