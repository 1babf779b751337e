"""What `hf-reformer demo` says that a token reads is what attention gives weight to; and whose characters it shows."""

import re

import pytest
import torch
from tiny_models import POSITIONS, WINDOWS, make_model, random_ids
from transformers import ReformerTokenizer

from hf_reformer import ReformerByteTokenizer, ReformerForCausalLM, ReformerForMaskedLM
from hf_reformer.commands.reading import Reading, keys_read
from hf_reformer.commands.token_text import TokenText, whole_text


LENGTH = 100
RECIPE = WINDOWS | POSITIONS["LSH rotary"] | {"lsh_value_shift": 1}
CASES = {
    "the recipe": RECIPE,
    "rounds that share keys": RECIPE | {"num_hashes": 4, "num_buckets": 4, "lsh_attn_chunk_length": 32},
    "one round": RECIPE | {"num_hashes": 1},
    "each key once": RECIPE | {"num_buckets": 2, "allow_duplicate_attention": False},
    "hashing before turning": RECIPE | POSITIONS["LSH rotary, after hashing"],
    "own values": WINDOWS | POSITIONS["rotary"],
    "stock": {},
    "stock, few tokens on the circle": {"lsh_attn_chunk_length": 32, "num_hashes": 1, "lsh_num_chunks_before": 4},
    "stock, each key once": {"allow_duplicate_attention": False, "lsh_num_chunks_after": 1},
    "chunks": {"circular_look_around": False},
    "chunks within buckets": {"circular_look_around": False, "attend_across_buckets": False},
    "a long beginning is dense": RECIPE | {"full_attention_threshold": 60},
    "dense": RECIPE | {"full_attention_threshold": 200},
    "a bucket for each": RECIPE | {"num_buckets": [16, 16], "num_hashes": 1},
}


def map_of(model, ids):
    """The map of the LSH layer `[H, L, L]`, by key: without the shift to the token whose value is read."""
    maps = model(ids[None], output_attentions=True, use_cache=False).attentions[1][0]
    shift = model.config.lsh_value_shift
    return torch.nn.functional.pad(maps[..., shift:], (0, shift)).detach()


def map_by_keys(model, ids):
    """The same from what is said of each token."""
    reading = Reading(model, ids)
    found = torch.zeros(model.config.num_attention_heads, len(ids), len(ids))
    for position in range(len(ids)):
        read = reading.keys_read(position, 1)
        found[:, position].index_put_((read.heads, read.positions), read.weights, accumulate=True)
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_token_reads_what_attention_gives_weight_to(case):
    # Small vectors: no weight is too small for a number.
    model = make_model(ReformerForCausalLM, **CASES[case])
    model.reformer.encoder.layers[1].attention.self_attention.query_key.weight.data *= 0.3
    ids = random_ids(1, LENGTH)[0]
    expected, found = map_of(model, ids), map_by_keys(model, ids)
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    # Something is hidden, unless nothing is.
    share = (found > 0).float().mean()
    assert 0 < share < 0.5 and (share < 0.45 or "dense" in case or "stock" in case)


def test_a_token_of_a_masked_model_reads_both_sides():
    model = make_model(ReformerForMaskedLM, **WINDOWS, is_decoder=False, lsh_num_chunks_after=1)
    ids = random_ids(1, LENGTH)[0]
    torch.testing.assert_close(map_by_keys(model, ids), map_of(model, ids), rtol=1e-4, atol=1e-6)


def test_rounds_and_heads_are_told_apart():
    model = make_model(ReformerForCausalLM, **RECIPE)
    read = keys_read(model, random_ids(1, LENGTH)[0], 90, 1)
    assert (read.position, read.layer, read.num_heads, read.num_rounds, read.is_dense) == (90, 1, 2, 2, False)
    assert read.buckets.shape == read.bucket_sizes.shape == (2, 2)
    both = read.by_key()
    assert sum(both.values()) == pytest.approx(1) and list(both.values()) == sorted(both.values(), reverse=True)
    parts = [read.by_key(number, head) for number in range(2) for head in range(2)]
    assert set(both) == set().union(*parts) and len(set(map(frozenset, parts))) > 1
    for key, weight in both.items():
        assert weight == pytest.approx(sum(part.get(key, 0) for part in parts) / 2)
        assert key < 90
    # Windows hold keys of the token's own bucket.
    assert all(
        len(read.by_key(number, head)) < read.bucket_sizes[head, number] for number in (0, 1) for head in (0, 1)
    )


def test_the_first_token_reads_nothing_or_itself():
    ids = random_ids(1, LENGTH)[0]
    assert keys_read(make_model(ReformerForCausalLM, **RECIPE), ids, 0, 1).by_key() == {}
    alone = keys_read(make_model(ReformerForCausalLM, **CASES["own values"]), ids, 0, 1)
    assert alone.is_dense and alone.by_key() == {0: 1}


def test_a_short_text_is_dense():
    model, ids = make_model(ReformerForCausalLM, **RECIPE), random_ids(1, 16)[0]
    read = keys_read(model, ids, 10, 1)
    assert read.is_dense and read.buckets is None and sorted(read.by_key()) == list(range(10))


def test_a_long_text_is_read_without_a_map():
    model = make_model(ReformerForCausalLM, **RECIPE | {"num_buckets": [8, 16], "num_hashes": 1})
    ids = random_ids(1, 16_384)[0]
    largest = 0

    def seen(shape):
        nonlocal largest
        largest = max(largest, shape.numel())

    reading = Reading(model, ids)
    with _Shapes(seen):
        read = reading.keys_read(16_000, 1)
    assert 0 < len(read.by_key()) < 64
    # The vectors of all tokens: two heads of 8 numbers.
    assert largest <= 2 * 8 * len(ids)


class _Shapes(torch.utils._python_dispatch.TorchDispatchMode):
    """Tells the shape of each tensor that is made."""

    def __init__(self, tell):
        super().__init__()
        self.tell = tell

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.tell(tensor.shape)
        return result


def test_nothing_stays_on_the_model():
    model = make_model(ReformerForCausalLM, **RECIPE)
    Reading(model, random_ids(1, 40)[0])
    with pytest.raises(ValueError, match="The input has no tokens"):
        Reading(model, random_ids(1, 0)[0])
    assert not [module for module in model.modules() if module._forward_hooks]


@pytest.mark.parametrize(
    ("position", "layer", "message"),
    [
        (5, 0, "layer is 0, but the LSH layers of this model are [1]."),
        (40, 1, "position is 40, but the text has 40 tokens, from 0 on."),
        (-1, 1, "position is -1"),
    ],
)
def test_what_is_not_there_is_named(position, layer, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        keys_read(make_model(ReformerForCausalLM, **RECIPE), random_ids(1, 40)[0], position, layer)


def test_a_model_without_lsh_layers_has_none():
    model = make_model(ReformerForCausalLM, attn_layers=["local", "full"])
    assert Reading(model, random_ids(1, 40)[0]).layers == []


# Characters of tokens

SENTENCE = "Съешь 🙂 漢字 и выпей чаю."


def test_bytes_of_a_character_share_it():
    tokenizer = ReformerByteTokenizer()
    ids = tokenizer(SENTENCE).input_ids
    text = TokenText.of(tokenizer, ids)
    assert text.text == SENTENCE and len(text) == len(ids)
    assert "".join(text.of_token(position) for position in range(3)) == "ССъ"
    for place, character in enumerate(SENTENCE):
        first = text.token_at(place)
        width = len(character.encode())
        assert [text.of_token(first + byte) for byte in range(width)] == [character] * width
    assert text.token_at(10_000) == len(ids) - 1


def test_bytes_that_are_no_text_have_a_character_each():
    tokenizer = ReformerByteTokenizer()
    ids = [*tokenizer("a漢").input_ids[:-1], 1, 0x80 + 2, *tokenizer("b").input_ids, 0xF0 + 2]
    text = TokenText.of(tokenizer, ids)
    assert text.text == "a\ufffd</s>\ufffdb\ufffd"
    assert [text.of_token(position) for position in range(len(ids))] == list("a") + ["\ufffd"] * 2 + [
        "</s>",
        "\ufffd",
        "b",
        "\ufffd",
    ]


def test_tokens_of_several_characters():
    letters = sorted({*SENTENCE} - {" "})
    vocab = {token: index for index, token in enumerate(["<unk>", "</s>", "▁", *letters, "▁и"])}
    tokenizer = ReformerTokenizer(vocab=vocab, merges=[("▁", "и")])
    ids = tokenizer(SENTENCE).input_ids
    text = TokenText.of(tokenizer, ids)
    assert text.text == tokenizer.decode(ids) and len(text) == len(ids) < len(SENTENCE) + 2
    assert " и" in [text.of_token(position) for position in range(len(ids))]


def test_a_growing_text_has_whole_characters():
    tokenizer = ReformerByteTokenizer()
    ids = tokenizer(SENTENCE).input_ids
    grown = [whole_text(tokenizer, ids[:count], False) for count in range(len(ids) + 1)]
    assert all(SENTENCE.startswith(text) for text in grown) and grown[-1] == SENTENCE
    assert whole_text(tokenizer, ids[:1], True) == "\ufffd"
