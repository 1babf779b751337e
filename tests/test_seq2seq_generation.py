"""Encoder and decoder: texts that are written, and checkpoints."""

import copy

import pytest
import torch
from seq2seq_models import MASK, SOURCE, TARGET, inputs_of, make
from tiny_models import (
    STACKS,
    TIED,
    VOCAB,
    WINDOWS,
    assert_equal_tensors,
    left_padded,
    make_model,
    random_ids,
)
from transformers import AutoModelForSeq2SeqLM
from transformers.models.reformer import modeling_reformer as stock

import hf_reformer
from hf_reformer import (
    ReformerByteTokenizer,
    ReformerForCausalLM,
    ReformerForConditionalGeneration,
    ReformerForMaskedLM,
    ReformerModel,
)


# Generation.


MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 5},
    "beams": {"num_beams": 3},
    "returned": {"num_beams": 4, "num_return_sequences": 2},
    "sampled returned": {"do_sample": True, "num_return_sequences": 3},
}


@pytest.mark.parametrize("mode", MODES)
def test_cached_equals_uncached(mode):
    model, ids = make(), inputs_of()["input_ids"]
    found = []
    for use_cache in (True, False):
        torch.manual_seed(7)
        found.append(
            model.generate(
                ids,
                attention_mask=MASK,
                max_new_tokens=40,
                use_cache=use_cache,
                **MODES[mode],
                output_scores=True,
                return_dict_in_generate=True,
            )
        )
    assert torch.equal(found[0].sequences, found[1].sequences)
    for cached, uncached in zip(found[0].scores, found[1].scores, strict=True):
        torch.testing.assert_close(cached, uncached, rtol=1e-9, atol=1e-9)


def test_a_left_padded_source_is_continued_as_alone():
    model, rows = make(), [random_ids(1, count)[0] for count in (40, 11, 23)]
    together = model.generate(*left_padded(rows)[:1], attention_mask=left_padded(rows)[1], max_new_tokens=30)
    for row, ids in enumerate(rows):
        alone = model.generate(ids[None], max_new_tokens=30)
        assert torch.equal(together[row, : alone.shape[1]], alone[0])


def test_each_step_continues_both_texts():
    """One target, given token by token and in pieces, with and without padding, to the logits of one pass."""
    model, ids, target = make(), random_ids(3, SOURCE), random_ids(3, TARGET)
    with torch.no_grad():
        expected = model(ids, MASK, decoder_input_ids=target)
        encoded, cache, found = (expected.encoder_last_hidden_state,), None, []
        for piece in target.split([1, 10, 1, 1, 16], dim=1):
            outputs = model(
                encoder_outputs=encoded,
                attention_mask=MASK,
                decoder_input_ids=piece,
                past_key_values=cache,
                use_cache=True,
            )
            cache = outputs[hf_reformer.modeling.decoding.cache_naming.CACHE_NAME]
            found.append(outputs.logits)
    torch.testing.assert_close(torch.cat(found, 1), expected.logits, rtol=1e-10, atol=1e-10)
    assert cache.has_source
    assert cache.get_seq_length() == TARGET
    cache.crop(-9)
    with torch.no_grad():
        again = model(
            encoder_outputs=encoded, attention_mask=MASK, decoder_input_ids=target[:, -9:], cache=cache
        ).logits
    torch.testing.assert_close(again, expected.logits[:, -9:], rtol=1e-10, atol=1e-10)
    cache.reset()
    assert not cache.has_source


def test_a_filled_cache_refuses_another_source():
    model, ids = make(), random_ids(3, SOURCE)
    cache = model(ids, decoder_input_ids=random_ids(3, 5), use_cache=True).cache
    for other, what in ((ids[:, 1:], f"3 rows and {SOURCE - 1}"), (ids[:2], f"2 rows and {SOURCE}")):
        with pytest.raises(ValueError, match=f"of 3 rows and {SOURCE} tokens, and the encoder's output has {what} "):
            model(other, decoder_input_ids=random_ids(len(other), 1), cache=cache)
    assert cache.get_seq_length() == 5
    cache.reset()
    model(ids[:, 1:], decoder_input_ids=random_ids(3, 5), cache=cache)


def test_assisted_and_streamed(capsys):
    from transformers import TextStreamer

    model, ids = make(vocab_size=258), random_ids(1, SOURCE)
    assistant = copy.deepcopy(model)
    expected = model.generate(ids, max_new_tokens=25, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=25, do_sample=False, assistant_model=assistant), expected)
    streamer = TextStreamer(ReformerByteTokenizer())
    assert torch.equal(model.generate(ids, max_new_tokens=25, do_sample=False, streamer=streamer), expected)
    assert capsys.readouterr().out


def test_an_encoder_runs_once_and_by_itself():
    model, ids = make(), random_ids(3, SOURCE)
    encoded = model.get_encoder()(ids, attention_mask=MASK)
    given = model.generate(encoder_outputs=encoded, attention_mask=MASK, max_new_tokens=9)
    assert torch.equal(given, model.generate(ids, attention_mask=MASK, max_new_tokens=9))
    assert torch.equal(given, model.generate(ids, attention_mask=MASK, max_new_tokens=9, num_hashes=2))


# Checkpoints.


def test_saved_and_loaded(tmp_path):
    model, inputs = make(**TIED), inputs_of()
    assert model.lm_head.decoder.weight is model.reformer.encoder.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).double()
    assert type(loaded) is ReformerForConditionalGeneration
    assert_equal_tensors(loaded.state_dict(), model.state_dict())
    assert loaded.config.decoder_attn_layers == tuple(STACKS["mixed"])
    torch.testing.assert_close(loaded.eval()(**inputs).loss, model.eval()(**inputs).loss)
    assert loaded.generation_config.decoder_start_token_id == 0
    # What the settings of transformers' own class mean there would be another model.
    with pytest.raises((NotImplementedError, ValueError), match=r"hf_reformer\."):
        stock.ReformerModel.from_pretrained(tmp_path)
    for other in (ReformerModel, ReformerForCausalLM, ReformerForMaskedLM):
        with pytest.raises(ValueError, match="`is_encoder_decoder=True` is for `ReformerForConditionalGeneration`"):
            other.from_pretrained(tmp_path)


@pytest.mark.parametrize("changes", [{}, TIED], ids=["separate", "tied"])
def test_new_tokens_are_those_of_both_sides(changes):
    model, inputs = make(**changes), inputs_of()
    before = model(**inputs).logits
    model.resize_token_embeddings(VOCAB + 6)
    sides = model.reformer.encoder, model.reformer.decoder
    assert [side.get_input_embeddings().num_embeddings for side in sides] == [VOCAB + 6] * 2
    assert [side.config.vocab_size for side in sides] == [VOCAB + 6] * 2
    assert (sides[0].get_input_embeddings().weight is sides[1].get_input_embeddings().weight) == bool(changes)
    inputs["input_ids"][0, 0] = inputs["labels"][0, 0] = VOCAB + 5
    after = model(**inputs)
    assert after.loss.isfinite()
    torch.testing.assert_close(after.logits[1:, :, :VOCAB], before[1:])


def test_longer_and_shorter_texts(tmp_path):
    make().save_pretrained(tmp_path)
    short = ReformerForConditionalGeneration.from_pretrained(tmp_path, max_position_embeddings=SOURCE - 1)
    with pytest.raises(ValueError, match=f"The input has {SOURCE} tokens"):
        short(random_ids(1, SOURCE), labels=random_ids(1, 5))
    model = ReformerForConditionalGeneration.from_pretrained(tmp_path, axial_pos_shape=[32, 16])
    ids = random_ids(1, 400)
    assert model(ids, labels=ids).logits.shape == (1, 400, VOCAB)


def test_two_trained_models_begin_one(tmp_path):
    encoder = make_model(ReformerForMaskedLM, **WINDOWS, local_num_chunks_after=1)
    decoder = make_model(ReformerForCausalLM, **WINDOWS, attn_layers=STACKS["mixed"], lsh_value_shift=1)
    encoder.save_pretrained(tmp_path / "encoder")
    decoder.save_pretrained(tmp_path / "decoder")
    model = ReformerForConditionalGeneration.from_encoder_decoder_pretrained(
        tmp_path / "encoder", tmp_path / "decoder", decoder_start_token_id=4
    )
    assert model.config.decoder_start_token_id == 4
    ids, target = random_ids(2, SOURCE), random_ids(2, TARGET)
    torch.testing.assert_close(
        model(ids, decoder_input_ids=target).encoder_last_hidden_state, encoder.reformer(ids).last_hidden_state
    )
    for name, weight in decoder.reformer.state_dict().items():
        assert torch.equal(model.reformer.decoder.state_dict()[name], weight), name
    assert model.dtype == decoder.dtype
    sources = {"encoder": tmp_path / "decoder", "decoder": tmp_path / "decoder"}
    with pytest.raises(ValueError, match="look back only"):
        ReformerForConditionalGeneration.from_encoder_decoder_pretrained(**sources)
    sources["encoder"] = tmp_path / "encoder"
    dropped = ReformerForConditionalGeneration.from_encoder_decoder_pretrained(**sources, hidden_dropout_prob=0.3)
    assert dropped.config.hidden_dropout_prob == 0.3
    other = make_model(ReformerForCausalLM, **WINDOWS, feed_forward_size=40)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"differ in settings that both sides share: feed_forward_size \(48 and 40\)"):
        ReformerForConditionalGeneration.from_encoder_decoder_pretrained(tmp_path / "encoder", tmp_path / "other")
