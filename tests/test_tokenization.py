"""The byte tokenizer: ids, round trips, special tokens, streaming, batches, saving, AutoTokenizer, errors."""

import copy
import doctest
import importlib.util
import json
import pickle
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import DecodeStream
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    ReformerTokenizer,
    TextIteratorStreamer,
    TextStreamer,
)

import hf_reformer
from hf_reformer.tokenization import tokenization_reformer_byte
from hf_reformer.tokenization.tokenization_reformer_byte import ReformerByteTokenizer


TOKENIZER = ReformerByteTokenizer()
MULTILINGUAL = "Съешь ещё этих мягких 🙂 булок,\nда 漢字 выпей 👩‍👩‍👧 чаю. naïve Ġé\x00\t\r\n  end"
REPLACEMENT = "\ufffd"

hypothesis_settings = settings(deadline=None, max_examples=100, database=None)
texts = st.text(st.characters(exclude_categories=("Cs",)))


def byte_ids(text):
    """The `encode` of google/reformer-enwik8's model card."""
    return [byte + 2 for byte in text.encode("utf-8")]


def stream(tokenizer, ids, streamer_class=TextIteratorStreamer, **decode_kwargs):
    """The pieces that a streamer of `generate` hands out when `ids` arrive one by one."""
    streamer = streamer_class(tokenizer, **decode_kwargs)
    for token_id in ids:
        streamer.put(torch.tensor([token_id]))
    streamer.end()
    return list(streamer) if streamer_class is TextIteratorStreamer else None


# ids


def test_ids_are_those_of_the_published_enwik8_model():
    assert (TOKENIZER.pad_token_id, TOKENIZER.eos_token_id) == (0, 1)
    assert len(TOKENIZER) == TOKENIZER.vocab_size == len(TOKENIZER.get_vocab()) == 258
    assert sorted(TOKENIZER.get_vocab().values()) == list(range(258))
    assert TOKENIZER.convert_ids_to_tokens([0, 1]) == ["<pad>", "</s>"]
    for byte in range(256):
        assert TOKENIZER.decode([byte + 2], errors="surrogateescape").encode("utf-8", "surrogateescape") == bytes(
            [byte]
        )


def test_other_names_for_pad_and_end_of_text_keep_their_ids():
    tokenizer = ReformerByteTokenizer(pad_token="[PAD]", eos_token=AddedToken("[END]"))
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)) == (0, 1, 258)
    assert tokenizer("[PAD]a[END]").input_ids == [0, 99, 1]


@hypothesis_settings
@given(texts)
@example(MULTILINGUAL)
@example("")
def test_text_round_trips_through_byte_plus_two(text):
    ids = TOKENIZER(text, split_special_tokens=True).input_ids
    assert ids == byte_ids(text)
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.convert_tokens_to_string(TOKENIZER.convert_ids_to_tokens(ids)) == text


@pytest.mark.parametrize(
    "text", ["🙂", "👩‍👩‍👧", "Привет, мир", "漢字", "e\u0301", "Ġ", "\x00", "\ufeff", " a  b ", "\r\n\t"]
)
def test_text_is_neither_normalised_nor_stripped(text):
    assert TOKENIZER(text).input_ids == byte_ids(text)
    assert TOKENIZER.decode(byte_ids(text), clean_up_tokenization_spaces=True) == text


def test_no_token_is_added_unless_asked_for():
    assert TOKENIZER("ab").input_ids == [99, 100]
    assert TOKENIZER("ab", "c").input_ids == [99, 100, 101]
    assert ReformerByteTokenizer(add_eos_token=True)("ab").input_ids == [99, 100, 1]


@hypothesis_settings
@given(st.binary(), st.sampled_from(["replace", "ignore", "backslashreplace", "surrogateescape"]))
@example("🙂".encode()[:3], "replace")
def test_any_bytes_decode_as_python_decodes_them(data, errors):
    ids = [byte + 2 for byte in data]
    expected = data.decode("utf-8", errors)
    assert TOKENIZER.decode(ids, errors=errors) == expected
    assert ReformerByteTokenizer(errors=errors).decode(ids) == expected
    tokens = TOKENIZER.convert_ids_to_tokens(ids)
    assert TOKENIZER.convert_tokens_to_string(tokens) == data.decode("utf-8", "replace")


@hypothesis_settings
@given(st.binary())
def test_any_bytes_come_back(data):
    text = TOKENIZER.decode([byte + 2 for byte in data], errors="surrogateescape")
    assert text.encode("utf-8", "surrogateescape") == data


def test_strict_decoding_raises():
    with pytest.raises(UnicodeDecodeError):
        ReformerByteTokenizer(errors="strict").decode([byte_ids("ж")[0]])


def test_decode_takes_ids_in_any_form():
    ids = byte_ids("ж🙂")
    assert TOKENIZER.decode(torch.tensor(ids)) == TOKENIZER.decode(tuple(ids)) == "ж🙂"
    assert TOKENIZER.decode(torch.tensor(ids).numpy()) == "ж🙂"
    assert TOKENIZER.decode(99) == TOKENIZER.decode(torch.tensor(99)) == "a"
    assert TOKENIZER.decode([]) == ""
    assert TOKENIZER.decode(torch.tensor([ids, ids])) == ["ж🙂", "ж🙂"]


@pytest.mark.parametrize("errors", ["replace", "ignore", "strict", "surrogateescape"])
def test_an_id_that_no_token_has_becomes_one_replacement_character(errors):
    tokenizer = ReformerByteTokenizer(errors=errors)
    for ids in ([99, 258, 10**12, 100], torch.tensor([99, 258, 319, 100]).numpy()):
        assert tokenizer.decode(ids) == f"a{REPLACEMENT}{REPLACEMENT}b"
    assert tokenizer.decode(300) == tokenizer.convert_tokens_to_string(tokenizer.convert_ids_to_tokens([300]))
    assert "".join(stream(tokenizer, [99, 300, 100])) == f"a{REPLACEMENT}b"


def test_tokens_may_be_joined_or_decoded():
    tokenizer = ReformerByteTokenizer(mask_token="<é>")
    tokens = tokenizer.convert_ids_to_tokens(byte_ids("ж 🙂!"))
    for pieces in (tokens, ["".join(tokens)], ["".join(tokens[:3]), "".join(tokens[3:])]):
        assert tokenizer.convert_tokens_to_string(pieces) == "ж 🙂!"
    for text in ("ж 🙂!", "a b", "plain", "Köln", "漢字", "<é>", "</s>"):
        assert tokenizer.convert_tokens_to_string([text]) == text
    broken = tokenizer.decode(byte_ids("ж")[:1], errors="surrogateescape")
    assert tokenizer.convert_tokens_to_string([broken]) == REPLACEMENT


# special tokens


def test_special_tokens_are_appended_beyond_257():
    tokenizer = ReformerByteTokenizer(mask_token="<mask>")
    assert (tokenizer.mask_token_id, len(tokenizer), tokenizer.vocab_size) == (258, 259, 258)
    named = {f"{name}_token": f"<{name}>" for name in ("cls", "sep", "bos", "unk")}
    assert tokenizer.add_special_tokens({**named, "extra_special_tokens": ["<doc>"]}) == 5
    assert tokenizer.convert_tokens_to_ids([*named.values(), "<doc>"]) == [259, 260, 261, 262, 263]
    assert tokenizer.add_tokens(["gattaca"]) == 1
    ids = tokenizer("<cls>a<mask>gattaca<doc>", add_special_tokens=False).input_ids
    assert ids == [259, 99, 258, 264, 263]
    assert tokenizer("plain", add_special_tokens=False).input_ids == byte_ids("plain")


@pytest.mark.parametrize("name", ["<mask>", "<маска>", "<é>", "é!", "[a b]", "Ġx", "🙂"])
def test_a_special_token_of_any_name_round_trips(name):
    tokenizer = ReformerByteTokenizer(mask_token=name)
    ids = tokenizer(f"ж{name}🙃").input_ids
    assert ids == [*byte_ids("ж"), 258, *byte_ids("🙃")]
    assert tokenizer.decode(ids) == f"ж{name}🙃"
    assert tokenizer.convert_tokens_to_string(tokenizer.convert_ids_to_tokens(ids)) == f"ж{name}🙃"


def test_special_tokens_are_skipped_on_request_and_others_are_not():
    tokenizer = ReformerByteTokenizer(mask_token="<mask>")
    tokenizer.add_tokens(["gattaca"])
    ids = [0, 0, 99, 258, 259, 100, 1]
    assert tokenizer.decode(ids) == "<pad><pad>a<mask>gattacab</s>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "agattacab"
    assert tokenizer.batch_decode([ids, [99]], skip_special_tokens=True) == ["agattacab", "a"]
    assert ReformerByteTokenizer(pad_token=None).decode([0, 99]) == "<pad>a"


def test_a_special_tokens_name_inside_text_is_special_unless_split():
    text = "a<pad></s>b"
    assert TOKENIZER(text).input_ids == [99, 0, 1, 100]
    assert TOKENIZER(text, split_special_tokens=True).input_ids == byte_ids(text)
    assert ReformerByteTokenizer(split_special_tokens=True)(text).input_ids == byte_ids(text)
    assert TOKENIZER(text).input_ids == [99, 0, 1, 100]


def test_the_masked_language_modelling_collator_masks_bytes_only():
    tokenizer = ReformerByteTokenizer(mask_token="<mask>")
    collator = DataCollatorForLanguageModeling(
        tokenizer, mlm_probability=0.5, mask_replace_prob=1, random_replace_prob=0, seed=0
    )
    batch = collator([tokenizer("a" * 200), tokenizer("b" * 100)])
    masked = batch["input_ids"] == 258
    assert 50 < masked.sum() < 250
    assert torch.equal(batch["labels"] != -100, masked)
    assert torch.equal(batch["input_ids"][1, 100:], torch.zeros(100, dtype=torch.long))


# streaming


@hypothesis_settings
@given(texts)
@example(MULTILINGUAL)
@example("🙂" * 20)
def test_streamed_text_is_whole_and_never_shows_half_a_character(text):
    text = text.replace(REPLACEMENT, "")
    pieces = stream(TOKENIZER, byte_ids(text))
    assert "".join(pieces) == text
    assert not any(REPLACEMENT in piece for piece in pieces)


@hypothesis_settings
@given(st.lists(st.integers(0, 257)), st.sampled_from(["replace", "ignore"]), st.booleans())
def test_any_streamed_ids_come_out_as_the_whole_decode(ids, errors, skip):
    options = {"errors": errors, "skip_special_tokens": skip}
    assert "".join(stream(TOKENIZER, ids, **options)) == TOKENIZER.decode(ids, **options)


def test_streamed_text_comes_while_it_is_made():
    """Words, or letters from transformers 5.24 on; symbols wait for the next space."""
    words, letters = ["мир ", "🙂🙂 ", "漢", "字", " ", "да"], [*"мир ", "🙂🙂 ", *"漢字 да"]
    pieces = [piece for piece in stream(TOKENIZER, byte_ids("мир 🙂🙂 漢字 да")) if piece]
    assert pieces in (words, letters)


def test_text_streamer_prints_the_whole_text(capsys):
    stream(TOKENIZER, [*byte_ids(MULTILINGUAL), 1], streamer_class=TextStreamer, skip_special_tokens=True)
    assert capsys.readouterr().out == MULTILINGUAL + "\n"


def test_an_unfinished_character_shows_only_at_the_very_end():
    pieces = stream(TOKENIZER, byte_ids("a 🙂")[:-1])
    assert "".join(pieces[:-1]) == "a "
    assert pieces[-1] == REPLACEMENT


@hypothesis_settings
@given(texts)
@example(MULTILINGUAL)
def test_the_decode_stream_of_the_tokenizers_library_waits_for_whole_characters(text):
    text = text.replace(REPLACEMENT, "")
    decode_stream = DecodeStream(ids=[])
    pieces = [decode_stream.step(TOKENIZER.backend_tokenizer, token_id) for token_id in byte_ids(text)]
    assert [piece for piece in pieces if piece] == list(text)


# batches


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_both_sides(side):
    batch = TOKENIZER(["ж", "", "abc"], padding=True, padding_side=side, return_tensors="pt")
    for row, text in enumerate(["ж", "", "abc"]):
        ids, padding = byte_ids(text), [0] * (3 - len(text.encode()))
        ones = [1] * len(ids)
        assert batch["input_ids"][row].tolist() == (padding + ids if side == "left" else ids + padding)
        assert batch["attention_mask"][row].tolist() == (padding + ones if side == "left" else ones + padding)
    assert TOKENIZER.batch_decode(batch["input_ids"], skip_special_tokens=True) == ["ж", "", "abc"]
    assert ReformerByteTokenizer(padding_side=side)(["a", "bc"], padding=True).input_ids == (
        [[0, 99], [100, 101]] if side == "left" else [[99, 0], [100, 101]]
    )


def test_padding_to_a_multiple_and_to_a_length():
    batch = TOKENIZER(["a", "b" * 65], padding=True, pad_to_multiple_of=64, return_tensors="np")
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 128)
    assert TOKENIZER("a", padding="max_length", max_length=4).input_ids == [99, 0, 0, 0]
    padded = TOKENIZER.pad([TOKENIZER("a"), TOKENIZER("bc")], pad_to_multiple_of=4, return_tensors="pt")
    assert padded["input_ids"].tolist() == [[99, 0, 0, 0], [100, 101, 0, 0]]


def test_truncation_on_both_sides_and_overflow():
    assert TOKENIZER("abcd", truncation=True, max_length=2).input_ids == byte_ids("ab")
    left = ReformerByteTokenizer(truncation_side="left", model_max_length=3)
    assert left("abcd", truncation=True).input_ids == byte_ids("bcd")
    assert left("abcd").input_ids == byte_ids("abcd")
    windows = TOKENIZER("abcde", truncation=True, max_length=3, stride=1, return_overflowing_tokens=True)
    assert TOKENIZER.batch_decode(windows["input_ids"]) == ["abc", "cde"]


def test_options_of_one_call_do_not_leak_into_the_next():
    TOKENIZER(["a", "bc"], padding=True, truncation=True, max_length=1, padding_side="left", split_special_tokens=True)
    assert TOKENIZER(["a", "bc<pad>"]).input_ids == [[99], [100, 101, 0]]


def test_empty_input():
    assert dict(TOKENIZER("")) == {"input_ids": [], "attention_mask": []}
    assert TOKENIZER(["", ""]).input_ids == [[], []]


def test_offsets_are_those_of_the_characters():
    encoding = TOKENIZER("aж 🙂", return_offsets_mapping=True)
    assert encoding["offset_mapping"] == [(0, 1), (1, 2), (1, 2), (2, 3), (3, 4), (3, 4), (3, 4), (3, 4)]
    assert encoding.char_to_token(3) == 4
    words = TOKENIZER([["ab", "ж"]], is_split_into_words=True)
    assert words.word_ids(0) == [0, 0, 1, 1]
    assert words["input_ids"] == [byte_ids("abж")]


def test_a_megabyte_encodes_and_decodes_in_seconds():
    text = "def f(x):\n    return x  # ещё 🙂\n" * 27_000
    assert len(text.encode()) > 1_000_000
    start = time.process_time()
    ids = TOKENIZER(text).input_ids
    assert TOKENIZER.decode(ids) == text
    # 0.5 s measured on one core; ByT5Tokenizer needs seven to decode as much
    assert time.process_time() - start < 4
    assert ids == byte_ids(text)


def test_threads_and_processes_can_share_it():
    documents = [MULTILINGUAL * n for n in range(20)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda text: TOKENIZER.decode(TOKENIZER(text).input_ids), documents)) == documents
    tokenizer = ReformerByteTokenizer(mask_token="<mask>", errors="ignore")
    for copied in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
        assert (copied("ж<mask>").input_ids, copied.errors) == ([*byte_ids("ж"), 258], "ignore")


# saving, loading, AutoTokenizer


@pytest.fixture
def extended():
    tokenizer = ReformerByteTokenizer(
        mask_token="<mask>",
        pad_token="[PAD]",
        errors="ignore",
        padding_side="left",
        truncation_side="left",
        model_max_length=4096,
        add_eos_token=True,
    )
    tokenizer.add_special_tokens({"cls_token": AddedToken("<é>", lstrip=True), "extra_special_tokens": ["<doc>"]})
    tokenizer.add_tokens(["gattaca"])
    return tokenizer


@pytest.mark.parametrize("loader", [ReformerByteTokenizer, AutoTokenizer])
def test_everything_survives_saving_and_loading(extended, loader, tmp_path):
    once, twice = tmp_path / "once", tmp_path / "twice"
    extended.save_pretrained(once)
    loader.from_pretrained(once).save_pretrained(twice)
    loaded = loader.from_pretrained(twice)
    assert type(loaded) is ReformerByteTokenizer
    assert loaded.get_vocab() == extended.get_vocab()
    assert loaded.special_tokens_map == extended.special_tokens_map
    assert loaded.extra_special_tokens == ["<doc>"]
    assert {i: repr(t) for i, t in loaded.added_tokens_decoder.items()} == {
        i: repr(t) for i, t in extended.added_tokens_decoder.items()
    }
    for name in ("errors", "padding_side", "truncation_side", "model_max_length"):
        assert getattr(loaded, name) == getattr(extended, name)
    text = "ж <é>a<mask><doc>gattaca[PAD]"
    assert loaded(text).input_ids == extended(text).input_ids == [259, *byte_ids("ж"), 259, 99, 258, 260, 261, 0, 1]
    assert loaded.decode(extended(text).input_ids) == extended.decode(extended(text).input_ids)


def test_arguments_of_from_pretrained_add_to_what_was_saved(extended, tmp_path):
    extended.save_pretrained(tmp_path)
    loaded = ReformerByteTokenizer.from_pretrained(tmp_path, sep_token="<sep>", pad_token="<other>", errors="replace")
    assert (loaded.mask_token_id, loaded.eos_token_id, loaded.cls_token_id) == (258, 1, 259)
    assert sorted([loaded.sep_token_id, loaded.pad_token_id]) == [262, 263]
    assert loaded.errors == "replace"
    assert loaded.decode(list(range(2, 258))) == bytes(range(256)).decode(errors="replace")


def test_pad_may_become_end_of_text_and_is_saved(tmp_path):
    tokenizer = ReformerByteTokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    assert ReformerByteTokenizer.from_pretrained(tmp_path).pad_token_id == 1


def test_the_saved_file_works_with_the_tokenizers_library_alone(extended, tmp_path):
    extended.save_pretrained(tmp_path)
    backend = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert backend.encode("ж🙂<mask>").ids == [259, *byte_ids("ж🙂"), 258, 1]
    assert backend.decode(byte_ids("ж🙂")) == "ж🙂"


def write_config(folder, **tokenizer_config):
    """Make `folder` a published Reformer checkpoint, as far as AutoTokenizer looks."""
    (folder / "config.json").write_text('{"model_type": "reformer", "architectures": ["ReformerModelWithLMHead"]}')
    if tokenizer_config:
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))


def stock_tokenizer():
    vocab = {"<unk>": 0, "</s>": 1, "▁": 2, "a": 3, "b": 4, "ab": 5}
    return ReformerTokenizer(vocab=vocab, merges=[("a", "b")])


def test_auto_tokenizer_gives_ours_for_a_folder_it_saved(tmp_path):
    write_config(tmp_path)
    ReformerByteTokenizer(mask_token="<mask>").save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (type(loaded), loaded.mask_token_id) == (ReformerByteTokenizer, 258)


def test_auto_tokenizer_gives_ours_for_a_folder_without_tokenizer_as_enwik8_has(tmp_path):
    write_config(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path, mask_token="<mask>")
    assert type(loaded) is ReformerByteTokenizer
    assert loaded("ж<mask>").input_ids == [*byte_ids("ж"), 258]


@pytest.mark.parametrize("name", ["ReformerTokenizer", "ReformerTokenizerFast"])
def test_auto_tokenizer_gives_the_stock_class_for_a_folder_that_names_it(name, tmp_path):
    stock_tokenizer().save_pretrained(tmp_path)
    write_config(tmp_path, tokenizer_class=name)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is ReformerTokenizer
    assert loaded("ab a").input_ids == stock_tokenizer()("ab a").input_ids


# google/reformer-crime-and-punishment has spiece.model, tokenizer.json, and 28 bytes of tokenizer_config.json
@pytest.mark.parametrize("tokenizer_config", [{}, {"model_type": "reformer"}], ids=["none", "28 bytes"])
def test_auto_tokenizer_gives_the_stock_class_for_a_folder_with_sentencepiece(tokenizer_config, tmp_path):
    stock_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "spiece.model").write_bytes(b"read only where tokenizer.json is missing")
    write_config(tmp_path, **tokenizer_config)
    loaded = AutoTokenizer.from_pretrained(tmp_path, padding_side="left")
    assert (type(loaded), loaded.padding_side) == (ReformerTokenizer, "left")
    assert type(AutoTokenizer.from_pretrained(tmp_path.parent, subfolder=tmp_path.name)) is ReformerTokenizer
    assert loaded("ab a").input_ids == stock_tokenizer()("ab a").input_ids
    ReformerByteTokenizer().save_pretrained(tmp_path)
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is ReformerByteTokenizer


def test_the_facade_exports_it():
    assert hf_reformer.ReformerByteTokenizer is ReformerByteTokenizer


def test_the_file_works_alone_in_a_flat_folder(tmp_path):
    source = open(tokenization_reformer_byte.__file__, encoding="utf-8").read()
    assert not re.search(r"^\s*(from|import)\s+\.", source, flags=re.MULTILINE)
    path = tmp_path / "tokenization_reformer_byte.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("flat_tokenization_reformer_byte", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        module.ReformerByteTokenizer(mask_token="<mask>").save_pretrained(tmp_path)
        loaded = module.ReformerByteTokenizer.from_pretrained(tmp_path)
        assert loaded("ж<mask>").input_ids == [*byte_ids("ж"), 258]
    finally:
        del sys.modules[spec.name]


def test_the_example_in_the_docstring_runs():
    results = doctest.testmod(tokenization_reformer_byte)
    assert results.attempted >= 6 and results.failed == 0


# errors


@pytest.mark.parametrize("token_id", [-1, -100, 1.5, None])
def test_what_is_no_id_is_refused(token_id):
    with pytest.raises(ValueError, match=rf"Cannot decode {token_id}: an id is an integer from 0 on"):
        TOKENIZER.decode([99, token_id])


def test_a_vocabulary_size_is_refused():
    with pytest.raises(ValueError, match=r"vocab_size=320.*it is 258"):
        ReformerByteTokenizer(vocab_size=320)


@pytest.mark.parametrize("errors", ["replase", None, 1])
def test_an_unknown_error_handler_is_refused(errors):
    with pytest.raises(ValueError, match=rf"errors={errors!r} is no error handler. Use 'replace'"):
        ReformerByteTokenizer(errors=errors)


@pytest.mark.parametrize("token", ["a", "Ġ", "é", ""])
@pytest.mark.parametrize("role", ["pad_token", "eos_token", "mask_token", "unk_token"])
def test_a_special_token_that_takes_a_bytes_place_is_refused(token, role):
    tokenizer = ReformerByteTokenizer()
    message = rf"^'{token}' cannot be a special or an added token.*Choose a longer name"
    with pytest.raises(ValueError, match=message):
        ReformerByteTokenizer(**{role: AddedToken(token)})
    with pytest.raises(ValueError, match=message):
        tokenizer.add_special_tokens({role: token})
    with pytest.raises(ValueError, match=message):
        setattr(tokenizer, role, token)
    with pytest.raises(ValueError, match=message):
        tokenizer.add_tokens([token])
    assert tokenizer.special_tokens_map == {"pad_token": "<pad>", "eos_token": "</s>"}
    assert len(tokenizer) == 258


def test_one_name_for_both_pad_and_end_of_text_is_refused():
    with pytest.raises(ValueError, match="pad_token and eos_token are both '</s>', but name two ids"):
        ReformerByteTokenizer(pad_token="</s>")


@pytest.mark.parametrize("vocab", ["vocab.json", {}, {"<pad>": 0, "</s>": 1, "a": 2}, [("a", 0.0)]])
def test_another_vocabulary_is_refused(vocab):
    with pytest.raises(ValueError, match=f"Not the vocabulary of a byte tokenizer: {type(vocab).__name__}"):
        ReformerByteTokenizer(vocab=vocab)


def test_the_vocabulary_of_another_tokenizer_is_refused(tmp_path):
    stock_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"")
    (tmp_path / "tokenizer_config.json").unlink()
    backend = stock_tokenizer().backend_tokenizer
    with pytest.raises(ValueError, match="Not the vocabulary of a byte tokenizer"):
        ReformerByteTokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Not the vocabulary of a byte tokenizer"):
        ReformerByteTokenizer(tokenizer_object=backend)


@pytest.mark.parametrize("text", [["a", None], ["a", 5], "lone \ud800", ["a", "\udcff"]])
def test_what_is_not_text_is_refused(text):
    with pytest.raises(ValueError, match="Each text must be a str of valid Unicode"):
        TOKENIZER(text)


def test_padding_without_a_pad_token_is_refused():
    with pytest.raises(ValueError, match="does not have a padding token"):
        ReformerByteTokenizer(pad_token=None)(["a", "bc"], padding=True)
