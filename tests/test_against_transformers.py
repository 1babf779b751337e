"""
The same weights in transformers' own Reformer: the same buckets, logits and gradients, and checkpoints both ways.
"""

import math

import pytest
import torch
from tiny_models import TINY as SIZES
from transformers import AutoModelForCausalLM
from transformers.models.reformer.configuration_reformer import ReformerConfig as StockConfig
from transformers.models.reformer.modeling_reformer import ReformerForMaskedLM as StockForMaskedLM
from transformers.models.reformer.modeling_reformer import (
    ReformerForQuestionAnswering as StockForQuestionAnswering,
)
from transformers.models.reformer.modeling_reformer import (
    ReformerForSequenceClassification as StockForSequenceClassification,
)
from transformers.models.reformer.modeling_reformer import ReformerModel as StockModel
from transformers.models.reformer.modeling_reformer import ReformerModelWithLMHead as StockForCausalLM

from hf_reformer import (
    ReformerConfig,
    ReformerForCausalLM,
    ReformerForMaskedLM,
    ReformerForQuestionAnswering,
    ReformerForSequenceClassification,
    ReformerModel,
    ReformerModelWithLMHead,
)
from hf_reformer.modeling.ops.lsh_hashing import bucket_factors, default_num_buckets, draw_rotations, hash_vectors


# The sizes of the other tests with the initial weights of stock Reformer, which `make_stock` scales; layers vary.
TINY = SIZES | {"hash_seed": 7, "axial_norm_std": 1.0, "eos_token_id": 2, "initializer_range": 0.02}
del TINY["attn_layers"]
STACKS = {"lsh": ["lsh", "lsh"], "local": ["local", "local"], "mixed": ["local", "lsh", "local", "lsh"]}


def make_stock(stock_class, **changes):
    """
    A stock model with weights large enough for attention to matter.

    Its penalty on attention to oneself is -150 instead of -1e5: that is still nothing beside any other score, and
    float32 resolves a log-sum-exp of that size. At -1e5 stock loses the last digits of tokens that see only
    themselves; `test_tokens_alone_are_where_stock_rounds` keeps that penalty.
    """
    config = StockConfig(**(TINY | changes))
    torch.manual_seed(1)
    model = stock_class(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embeddings" not in name:
                weight.mul_(10)
            elif name == "lm_head.decoder.bias":
                weight.normal_()
    weaken_self_mask(model)
    return model


def weaken_self_mask(stock):
    for name, buffer in stock.named_buffers():
        if "self_mask" in name:
            buffer.fill_(-150)


def exchange(stock, own_class, tmp_path):
    """
    The stock model's checkpoint in our class, and ours back in the stock one; no key missing or left over, but for the
    bias of the LM head: stock has one and ignores it, from 5.24 on a second one, which it adds.
    """
    stock.save_pretrained(tmp_path / "stock")
    ours, info = own_class.from_pretrained(tmp_path / "stock", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    ours.save_pretrained(tmp_path / "ours")
    back, info = type(stock).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "mismatched_keys")), info
    assert info["unexpected_keys"] <= {"lm_head.decoder.bias"} - stock.state_dict().keys()
    for (name, old), (_, new) in zip(stock.state_dict().items(), back.state_dict().items(), strict=True):
        assert name == "lm_head.bias" or torch.equal(old, new), name
    return ours


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def compare_gradients(ours, stock, ids, mask=None):
    """Gradients of every parameter, in training: stock trains at one length only, that of its position table."""
    arguments = {} if mask is None else {"attention_mask": mask.long()}
    actual, expected = ours.train()(ids, **arguments).logits, stock.train()(ids, **arguments).logits
    weight = torch.randn_like(expected) * (1 if mask is None else mask[..., None])
    (expected * weight).sum().backward()
    (actual * weight).sum().backward()
    # Stock v5 ignores one bias of its LM head, and has no other until 5.23.
    theirs = {name: weight for name, weight in stock.named_parameters() if name != "lm_head.bias"}
    own = dict(ours.named_parameters())
    assert own.keys() - {"lm_head.decoder.bias"} == theirs.keys() - {"lm_head.decoder.bias"}
    for name, weight in theirs.items():
        assert relative_error(own[name].grad, weight.grad) < 1e-4, name


def cases():
    for stack in STACKS:
        for num_hashes, num_buckets in [(1, 8), (2, 8), (4, 8), (1, [4, 6]), (2, [4, 6]), (4, [4, 6])]:
            if stack == "local" and (num_hashes, num_buckets) != (1, 8):
                continue
            for causal in (True, False):
                yield stack, num_hashes, num_buckets, causal


@pytest.mark.parametrize(("stack", "num_hashes", "num_buckets", "causal"), list(cases()))
def test_logits_and_gradients(stack, num_hashes, num_buckets, causal, tmp_path):
    stock_class, own_class = (
        (StockForCausalLM, ReformerForCausalLM) if causal else (StockForMaskedLM, ReformerForMaskedLM)
    )
    around = {} if causal else {"lsh_num_chunks_after": 1, "local_num_chunks_after": 1}
    stock = make_stock(
        stock_class,
        attn_layers=STACKS[stack],
        is_decoder=causal,
        num_hashes=num_hashes,
        num_buckets=num_buckets,
        **around,
    )
    ours = exchange(stock, own_class, tmp_path)
    # Below, at and above the chunk length; stock pads 40 to 48.
    for length in (5, 16, 40, 128):
        ids = torch.randint(50, (2, length))
        with torch.no_grad():
            assert relative_error(ours.eval()(ids).logits, stock.eval()(ids).logits) < 1e-5, length

    compare_gradients(ours, stock, torch.randint(50, (2, 128)))


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("stack", STACKS)
def test_padded_batches(stack, causal):
    stock_class, own_class = (
        (StockForCausalLM, ReformerForCausalLM) if causal else (StockForMaskedLM, ReformerForMaskedLM)
    )
    stock = make_stock(stock_class, attn_layers=STACKS[stack], is_decoder=causal).eval()
    ours = own_class(ReformerConfig(**stock.config.to_dict())).eval()
    ours.load_state_dict(stock.state_dict())
    for length in (12, 30, 64):
        ids = torch.randint(50, (3, length))
        mask = torch.arange(length) < torch.tensor([length, length - 7, length // 2])[:, None]
        with torch.no_grad():
            actual, expected = (
                ours(ids, attention_mask=mask.long()).logits,
                stock(ids, attention_mask=mask.long()).logits,
            )
        assert relative_error(actual[mask], expected[mask]) < 1e-5, length
    mask = torch.arange(128) < torch.tensor([128, 101, 64])[:, None]
    compare_gradients(ours, stock, torch.randint(50, (3, 128)), mask)


@pytest.mark.parametrize("num_buckets", [8, [4, 6]], ids=["buckets", "factors"])
@pytest.mark.parametrize("num_hashes", [1, 2, 4])
def test_buckets(num_hashes, num_buckets):
    stock = make_stock(StockModel, attn_layers=["lsh"], num_hashes=num_hashes, num_buckets=num_buckets).eval()
    theirs = stock.encoder.layers[0].attention.self_attention
    hidden = torch.randn(2, 128, 32)
    vectors = theirs.query_key(hidden).detach().unflatten(-1, (2, 8))
    rotations = draw_rotations(2, 8, num_hashes, num_buckets, device=hidden.device, seed=7)
    state = torch.get_rng_state()
    ours = hash_vectors(vectors, rotations, num_buckets)
    assert torch.equal(torch.get_rng_state(), state)
    expected = theirs._hash_vectors(vectors.transpose(1, 2), num_hashes, None).unflatten(2, (num_hashes, -1))
    # Stock numbers each round's buckets on from those of the round before.
    total = math.prod(bucket_factors(num_buckets))
    assert torch.equal(ours, expected - torch.arange(num_hashes).view(-1, 1) * total)


@pytest.mark.parametrize("length", [100, 128, 1000, 8192, 65536])
@pytest.mark.parametrize("chunk_length", [16, 64])
def test_number_of_buckets(length, chunk_length):
    stock = StockModel(StockConfig(**TINY, attn_layers=["lsh"])).encoder.layers[0].attention.self_attention
    stock.chunk_length = chunk_length
    for longest in (4096, 524288):
        stock.max_position_embeddings = longest
        stock._set_num_buckets(length)
        assert default_num_buckets(length, chunk_length, longest) == stock.num_buckets


@pytest.mark.parametrize("num_before", [2, 3, 4])
@pytest.mark.parametrize("stack", ["lsh", "local"])
def test_more_neighbours_than_chunks(stack, num_before):
    stock = make_stock(
        StockForMaskedLM,
        attn_layers=STACKS[stack],
        num_hashes=1,
        lsh_num_chunks_before=num_before,
        local_num_chunks_before=num_before,
    ).eval()
    ours = ReformerForMaskedLM(ReformerConfig(**stock.config.to_dict())).eval()
    ours.load_state_dict(stock.state_dict())
    for length in (32, 48):
        ids = torch.randint(50, (2, length))
        with torch.no_grad():
            assert relative_error(ours(ids).logits, stock(ids).logits) < 1e-5, length


def test_without_num_buckets_the_length_decides():
    stock = make_stock(StockForMaskedLM, attn_layers=["lsh", "local"], num_buckets=None).eval()
    ours = ReformerForMaskedLM(ReformerConfig(**stock.config.to_dict())).eval()
    ours.load_state_dict(stock.state_dict())
    for length in (128, 20, 40, 128):
        fresh = StockForMaskedLM(StockConfig(**TINY | {"num_buckets": None}, attn_layers=["lsh", "local"])).eval()
        fresh.load_state_dict(stock.state_dict())
        weaken_self_mask(fresh)
        ids = torch.randint(50, (1, length))
        with torch.no_grad():
            assert relative_error(ours(ids).logits, fresh(ids).logits) < 1e-5, length
    assert ours.config.num_buckets is None


@pytest.mark.parametrize("chunks", [(16, 24), (24, 16), (64, 16)])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_chunk_lengths_of_layers_may_differ(chunks, causal):
    """The circle closes where stock's padding to the least common multiple puts it."""
    stock_class, own_class = (
        (StockForCausalLM, ReformerForCausalLM) if causal else (StockForMaskedLM, ReformerForMaskedLM)
    )
    stock = make_stock(
        stock_class,
        attn_layers=["lsh", "local"],
        is_decoder=causal,
        lsh_attn_chunk_length=chunks[0],
        local_attn_chunk_length=chunks[1],
    ).eval()
    ours = own_class(ReformerConfig(**stock.config.to_dict())).eval()
    ours.load_state_dict(stock.state_dict())
    for length in (15, 17, 30, 50, 90):
        ids = torch.randint(50, (2, length))
        with torch.no_grad():
            assert relative_error(ours(ids).logits, stock(ids).logits) < 1e-5, length


@pytest.mark.parametrize("num_hashes", [2, 4, 8])
def test_tokens_alone_are_where_stock_rounds(num_hashes):
    """
    With stock's own penalty its output is up to 0.5% off for tokens that see only themselves; ours is their value.
    """
    stock = make_stock(StockForCausalLM, attn_layers=["lsh"], is_decoder=True, num_hashes=num_hashes).eval()
    ours = ReformerForCausalLM(ReformerConfig(**stock.config.to_dict())).eval()
    ours.load_state_dict(stock.state_dict())
    theirs = stock.reformer.encoder.layers[0].attention.self_attention
    theirs.self_mask_value_float32.fill_(-1e5)
    attention = ours.reformer.encoder.layers[0].attention.self_attention
    hidden = torch.randn(1, 128, 32)
    with torch.no_grad():
        rotations = attention.draw_rotations(128, 128, None, hidden.device)
        actual, value, expected = (
            context.unflatten(-1, (2, 8))
            for context in (
                attention(hidden, rotations=rotations)[0],
                attention.value(hidden),
                theirs(hidden).hidden_states,
            )
        )
    error = (expected - actual).norm(dim=-1) / actual.norm(dim=-1)
    alone = (actual - value).norm(dim=-1) / value.norm(dim=-1) < 1e-6
    assert alone[:, 0].all()
    assert error[~alone].max() < 1e-5
    assert 1e-5 < error[alone].max() < 5e-3


@pytest.mark.parametrize(
    ("stock_class", "own_class"),
    [
        (StockModel, ReformerModel),
        (StockForCausalLM, ReformerModelWithLMHead),
        (StockForMaskedLM, ReformerForMaskedLM),
        (StockForQuestionAnswering, ReformerForQuestionAnswering),
        (StockForSequenceClassification, ReformerForSequenceClassification),
    ],
)
def test_heads(stock_class, own_class, tmp_path):
    stock = make_stock(stock_class, attn_layers=["local", "lsh"], is_decoder=stock_class is StockForCausalLM).eval()
    ours = exchange(stock, own_class, tmp_path).eval()
    ids = torch.randint(3, 50, (2, 128))
    with torch.no_grad():
        actual, expected = ours(ids, output_hidden_states=True), stock(ids, use_cache=False, output_hidden_states=True)
    name = next(iter(expected))
    assert relative_error(actual[name], expected[name]) < 1e-5
    for own, theirs in zip(actual.hidden_states, expected.hidden_states, strict=True):
        assert relative_error(own, theirs) < 1e-5


def test_bias_of_the_head_counts():
    """Stock ignores it before 5.24; the checkpoints that v4 trained have it."""
    stock = make_stock(StockForCausalLM, attn_layers=["local"], is_decoder=True).eval()
    ours = ReformerForCausalLM(ReformerConfig(**stock.config.to_dict())).eval()
    ours.load_state_dict(stock.state_dict())
    bias = torch.randn(50)
    ours.lm_head.bias.data += bias
    ids = torch.randint(50, (1, 20))
    with torch.no_grad():
        assert relative_error(ours(ids).logits, stock(ids).logits + bias) < 1e-5


GOOGLE_ENWIK8 = {
    "attention_head_size": 128,
    "attn_layers": ["local", "local", "lsh", "local"] * 3,
    "axial_pos_embds_dim": [256, 768],
    "axial_pos_shape": [128, 512],
    "feed_forward_size": 4096,
    "hidden_size": 1024,
    "local_attn_chunk_length": 128,
    "lsh_attn_chunk_length": 256,
    "max_position_embeddings": 65536,
    "num_attention_heads": 8,
    "num_buckets": 512,
    "num_hashes": 4,
    "vocab_size": 258,
}
GOOGLE_CRIME_AND_PUNISHMENT = {
    "attention_head_size": 64,
    "attn_layers": ["local", "lsh"] * 3,
    "axial_pos_embds_dim": [64, 192],
    "axial_pos_shape": [512, 1024],
    "feed_forward_size": 512,
    "hidden_size": 256,
    "local_attn_chunk_length": 64,
    "lsh_attn_chunk_length": 64,
    "max_position_embeddings": 524288,
    "num_attention_heads": 2,
    "num_buckets": [64, 128],
    "num_hashes": 1,
    "vocab_size": 320,
    # Keys of the published file that no version reads any more.
    "num_chunks_before": 1,
    "num_chunks_after": 0,
    "attention_probs_dropout_prob": 0.1,
    "output_past": True,
    "num_hidden_layers": 6,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("published", "length"),
    [(GOOGLE_ENWIK8, 300), (GOOGLE_CRIME_AND_PUNISHMENT, 1000)],
    ids=["enwik8", "crime-and-punishment"],
)
def test_models_like_the_published_ones(published, length, tmp_path):
    """Random weights in the published sizes, found by the Auto class as users load them."""
    torch.manual_seed(0)
    config = StockConfig(**published, is_decoder=True, hash_seed=3)
    stock = StockForCausalLM(config).eval()
    weaken_self_mask(stock)
    stock.save_pretrained(tmp_path)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(ours) is ReformerForCausalLM
    ids = torch.randint(published["vocab_size"], (1, length))
    with torch.no_grad():
        assert relative_error(ours(ids).logits, stock(ids, use_cache=False).logits) < 1e-5


NO_SUCH_LAYER = NotImplementedError, "Only attn layer types 'lsh' and 'local' exist"


@pytest.mark.parametrize(
    ("switch", "error"),
    [
        ({"circular_look_around": False}, NO_SUCH_LAYER),
        ({"attend_across_buckets": False}, NO_SUCH_LAYER),
        ({"allow_duplicate_attention": False}, NO_SUCH_LAYER),
        ({"full_attention_threshold": 64}, NO_SUCH_LAYER),
        ({"attention_output_bias": True}, NO_SUCH_LAYER),
        ({"gated_feed_forward": True}, NO_SUCH_LAYER),
        ({"classifier_pooling": "mean"}, NO_SUCH_LAYER),
        ({"combine_streams": "mean", "tie_word_embeddings": True}, NO_SUCH_LAYER),
        ({"position_embedding_type": "rotary"}, NO_SUCH_LAYER),
        ({"position_embedding_type": "none"}, NO_SUCH_LAYER),
        ({"attn_layers": ["full", "local"]}, NO_SUCH_LAYER),
        (
            {"axial_pos_shape": [8, 4, 4], "axial_pos_embds_dim": [8, 8, 16]},
            (ValueError, "too many values to unpack"),
        ),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else "",
)
def test_stock_refuses_what_it_does_not_have(switch, error, tmp_path):
    """Rather than compute something else from our checkpoint, silently."""
    config = ReformerConfig(**(TINY | {"attn_layers": ["local", "lsh"]} | switch))
    ReformerForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(error[0], match=error[1]):
        stock = StockForCausalLM.from_pretrained(tmp_path)
        stock(torch.randint(50, (1, 128)))
    again = ReformerForCausalLM.from_pretrained(tmp_path)
    assert again.config.attn_layers == config.attn_layers
    assert all(getattr(again.config, name) == getattr(config, name) for name in switch if name != "attn_layers")
