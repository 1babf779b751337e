"""Dense models beside the Reformers that begin with their weights, part by part."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, get_peft_model
from tiny_models import random_ids
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from hf_reformer import ReformerByteTokenizer, ReformerForCausalLM, convert_dense
from hf_reformer.commands import convert
from hf_reformer.modeling.conversion.dense_weights import TYING, symmetric_part


GPT2 = {"n_embd": 32, "n_head": 2, "n_layer": 2, "n_positions": 128, "vocab_size": 50, "n_inner": 48}
LLAMA = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "vocab_size": 50,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
}
IDS = {"bos_token_id": None, "eos_token_id": 0}


def make(kind, **changes):
    """With every weight drawn, so that none is zero or one."""
    torch.manual_seed(0)
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(**GPT2 | IDS | changes))
    else:
        model = LlamaForCausalLM(LlamaConfig(**LLAMA | IDS | changes))
    model = model.double().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            is_gain = weight.dim() == 1 and name.endswith("weight")
            weight.copy_(torch.randn_like(weight) * 0.2 + is_gain)
    return model


def parts(kind, model, index):
    """The functions of a layer: what its attention and its feed-forward layer add to the stream."""
    if kind == "gpt2":
        block = model.transformer.h[index]
        return lambda x: block.attn(block.ln_1(x))[0], lambda x: block.mlp(block.ln_2(x))
    block = model.model.layers[index]

    def attention(x):
        places = model.model.rotary_emb(x, torch.arange(x.shape[1])[None])
        return block.self_attn(block.input_layernorm(x), position_embeddings=places, attention_mask=None)[0]

    return attention, lambda x: block.mlp(block.post_attention_layernorm(x))


def streams(length=40):
    """Without a mean, which Llama's norm does not subtract."""
    vectors = torch.randn(2, length, 32, dtype=torch.float64)
    return vectors - vectors.mean(-1, keepdim=True)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}], ids=["", "untied"])
@pytest.mark.parametrize("layers", [["full", "full"], ["local", "full"]], ids="-".join)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_layers_add_what_they_added(kind, layers, changes):
    """A local layer of one chunk is a dense one. Biases of queries, keys and values are where a Reformer has some."""
    model = make(kind, **changes)
    converted = convert_dense(model, layers)
    x = streams()
    with torch.no_grad():
        for index, layer in enumerate(converted.reformer.encoder.layers):
            mask = torch.full((40, 40), torch.finfo(torch.float64).min, dtype=torch.float64).triu(1)[None, None]
            rotation = None if kind == "gpt2" else rotation_for(converted, x)
            expected = [part(x) for part in parts(kind, model, index)]
            actual = [layer.attention(x, full_attention_mask=mask, rotation=rotation)[0], layer.feed_forward(x)]
            for ours, theirs in zip(actual, expected, strict=True):
                # The frequencies of rotations have the precision of float32.
                assert (ours - theirs).norm() <= (1e-9 if kind == "gpt2" else 1e-5) * theirs.norm()


def rotation_for(model, hidden_states):
    from hf_reformer.modeling.layers.rotary_positions import rotation_of

    return rotation_of(model.config, None, hidden_states)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_embeddings_norm_and_head(kind):
    """Without layers both models are the same: what goes in and what comes out."""
    model = make(kind)
    converted = convert_dense(model, ["full", "full"])
    with torch.no_grad():
        stack = model.transformer if kind == "gpt2" else model.model
        ids, norm = random_ids(2, 30), stack.ln_f if kind == "gpt2" else stack.norm
        words = stack.wte(ids) + stack.wpe.weight[:30] if kind == "gpt2" else stack.embed_tokens(ids)
        torch.testing.assert_close(converted.reformer.embeddings(ids), words, rtol=0, atol=0)
        x = streams(30)
        actual, expected = converted.lm_head(converted.reformer.encoder.layer_norm(x)), model.lm_head(norm(x))
        # Llama's norm computes in float32.
        assert (actual - expected).norm() <= (1e-12 if kind == "gpt2" else 1e-6) * expected.norm()
    tied = model.config.tie_word_embeddings
    assert converted.config.tie_word_embeddings == tied
    assert (converted.lm_head.decoder.weight is converted.reformer.embeddings.word_embeddings.weight) == tied


def test_of_one_layer_the_streams_add_up_to_the_stream():
    """`y1 + y2` is the dense model's stream and one embedding more."""
    model = make("gpt2", n_layer=1)
    converted, ids, seen = convert_dense(model, ["full"]), random_ids(2, 40), []
    converted.reformer.encoder.layers[0].register_forward_hook(lambda *args: seen.extend(args[2][:2]))
    model.transformer.ln_f.register_forward_pre_hook(lambda norm, args: seen.append(args[0]))
    with torch.no_grad():
        embedded = converted.reformer.embeddings(ids)
        converted(ids)
        model(ids)
    y1, y2, expected = seen
    torch.testing.assert_close(y1 + y2 - embedded, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rule", TYING)
def test_tied_vectors_have_the_scores_that_were(rule):
    """Where query and key are one projection already, of equally long vectors: all but a token's own score."""
    model = make("gpt2", n_layer=1, n_head=1)
    block = model.transformer.h[0]
    with torch.no_grad():
        projection = 0.7 * nn.init.orthogonal_(torch.empty(32, 32, dtype=torch.float64))
        block.attn.c_attn.weight[:, :64] = projection.T.repeat(1, 2)
        block.attn.c_attn.bias.zero_()
        block.ln_1.weight.fill_(1.0)
        block.ln_1.bias.zero_()
        block.ln_1.eps = 0.0
        converted = convert_dense(model, ["lsh"], rule, full_attention_threshold=128, attn_implementation="eager")
        x = streams(20)
        normalised = nn.functional.layer_norm(x, (32,))
        scores = (normalised @ projection.T) @ (normalised @ projection.T).mT / 32**0.5
        place = torch.arange(20)
        visible = (place[:, None] > place) | ((place[:, None] == 0) & (place == 0))
        expected = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        attention = converted.reformer.encoder.layers[0].attention
        _, weights, _ = attention(x, return_weights=True)
    # A norm with 1e-6 under its root, where the mean square of a vector is 0.24, and scores up to 3.
    torch.testing.assert_close(weights[:, 0], expected, rtol=0, atol=1e-5)


def test_the_symmetric_rule_is_the_nearest_projection():
    query, key = torch.randn(2, 3, 5, 16, dtype=torch.float64)
    projection = symmetric_part(query, key)
    form = query.mT @ key
    values, vectors = torch.linalg.eigh((form + form.mT) / 2)
    positive = vectors @ torch.diag_embed(values.clamp(min=0)) @ vectors.mT
    assert projection.shape == query.shape
    # As many directions as there are pairs of query and key, half of them positive: none is left out.
    torch.testing.assert_close(projection.mT @ projection, positive)


def test_keys_of_lsh_layers_do_not_share_a_bias():
    """Which the query's would be, if it were folded as for dense layers: then all keys would be alike."""
    model = make("gpt2", n_layer=1)
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.bias *= 20
    attention = convert_dense(model, ["lsh"]).reformer.encoder.layers[0].attention
    with torch.no_grad():
        keys = attention.self_attention.query_key(attention.layer_norm(streams()))
    keys = nn.functional.normalize(keys[0].unflatten(-1, (2, -1)).transpose(0, 1), dim=-1)
    assert (keys @ keys.mT).mean() < 0.2


def test_folding_is_exact_where_the_projection_is_large():
    model = make("gpt2", n_layer=1, n_embd=512, n_head=8, n_inner=8)
    converted = convert_dense(model, ["full"])
    x = torch.randn(1, 20, 512, dtype=torch.float64)
    mask = torch.full((20, 20), torch.finfo(torch.float64).min, dtype=torch.float64).triu(1)[None, None]
    with torch.no_grad():
        expected = parts("gpt2", model, 0)[0](x)
        actual = converted.reformer.encoder.layers[0].attention(x, full_attention_mask=mask)[0]
    assert (actual - expected).norm() <= 1e-8 * expected.norm()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_what_else_is_taken_over(kind):
    dropout = {"attn_pdrop": 0.2} if kind == "gpt2" else {"attention_dropout": 0.2}
    model = make(kind, **dropout)
    model.generation_config.eos_token_id = [3, 4]
    converted = convert_dense(model, local_attn_chunk_length=8)
    assert converted.generation_config.eos_token_id == [3, 4]
    names = ("local_attention_probs_dropout_prob", "lsh_attention_probs_dropout_prob")
    assert [getattr(converted.config, name) for name in names] == [0.2, 0.2]
    with torch.no_grad():
        before = {name: weight.clone() for name, weight in model.named_parameters()}
        for parameter in converted.parameters():
            parameter += 1
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]), name
    if kind == "llama":
        assert convert_dense(model, max_position_embeddings=4096).config.num_buckets == 32


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_trains_generates_and_comes_back(kind, tmp_path):
    model = convert_dense(make(kind).float(), lsh_value_shift=1)
    assert model.config.attn_layers == ("local", "lsh") and model.dtype == torch.float32
    assert model.config.num_buckets == 2 and model.config.max_position_embeddings == 128
    ids = random_ids(2, 100)
    model.train()(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.eval().save_pretrained(tmp_path)
    again = ReformerForCausalLM.from_pretrained(tmp_path)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(again.generate(ids, **options), model.generate(ids, **options))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "`scale_attn_by_inverse_layer_idx` and"),
        ("gpt2", {"add_cross_attention": True}, "`add_cross_attention`, "),
        ("llama", {"attention_bias": True}, "`attention_bias=True` of a Llama has no counterpart"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10.0}}, "'dynamic'"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(kind, changes, message):
    with pytest.raises(ValueError, match=message):
        convert_dense(make(kind, **changes))


def test_arguments_that_do_not_fit():
    model = make("gpt2")
    for layers in (["lsh"], "lsh", 2):
        with pytest.raises(ValueError, match=r"`attn_layers` must be a list of 2 kinds, as many as layers, but got"):
            convert_dense(model, layers)
    with pytest.raises(StrictDataclassError, match=r"`lsh_attn_chunk_length` must be at least 1"):
        convert_dense(model, lsh_attn_chunk_length=0)
    for name, value in {
        "attention_output_bias": False,
        "is_decoder": False,
        "max_position_embeddings": 256,
        "num_attention_heads": 4,
        "position_embedding_type": "rotary",
    }.items():
        with pytest.raises(ValueError, match=f"`{name}={value!r}` contradicts the GPT2Config of the model"):
            convert_dense(model, **{name: value})
    with pytest.raises(ValueError, match="`tie_word_embeddings=True` contradicts the LlamaConfig"):
        convert_dense(make("llama"), tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"has other parameters than its class: .*lora_A.* Merge adapters"):
        convert_dense(get_peft_model(make("llama"), LoraConfig(target_modules="all-linear")).base_model.model)
    with pytest.raises(ValueError, match="`tie` must be one of mean, query, key, symmetric, but got 'sum'"):
        convert_dense(model, tie="sum")
    mistral = MistralForCausalLM(MistralConfig(hidden_size=32, num_hidden_layers=1, vocab_size=50))
    with pytest.raises(ValueError, match="MistralForCausalLM; it must be one of GPT2LMHeadModel, LlamaForCausalLM"):
        convert_dense(mistral)
    with pytest.raises(ValueError, match="is a GPT2Model"):
        convert_dense(model.transformer)


def test_the_command(tmp_path, capsys):
    model = make("llama", vocab_size=258).float()
    model.save_pretrained(tmp_path / "dense")
    ReformerByteTokenizer().save_pretrained(tmp_path / "dense")
    given = ["dense", "--weights", str(tmp_path / "dense"), "--output_dir", str(tmp_path / "out")]
    convert.main([*given, "--tie", "query", "--set", 'attn_layers=["full", "lsh"]', "num_hashes=2"])
    assert "layers ['full', 'lsh']" in capsys.readouterr().out
    converted = ReformerForCausalLM.from_pretrained(tmp_path / "out")
    expected = convert_dense(model, ["full", "lsh"], "query", num_hashes=2)
    for name, weight in expected.state_dict().items():
        assert torch.equal(converted.state_dict()[name], weight), name
    assert ReformerByteTokenizer.from_pretrained(tmp_path / "out")("a").input_ids == [99]
    for wrong, message in (
        ([], "holds something already"),
        (["--output_dir", str(tmp_path / "other"), "--set", "n_hashes=2"], "settings of ReformerConfig as name=value"),
        (["--output_dir", str(tmp_path / "other"), "--weights", str(tmp_path / "none")], "none"),
    ):
        with pytest.raises(SystemExit, match=message):
            convert.main([*given, *wrong])
