"""
Checkpoints of trax: weights as trax computes with them, nothing executed, what has no counterpart refused by name.

`data/trax_model.pkl.gz` was written by trax 1.4.1, and `data/trax_computed.safetensors` is what trax computes with it
in float64 (`python -m scripts.maintain.trax_agreement`).
"""

import gzip
import io
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import TINY, assert_equal_tensors, make_model

from hf_reformer import ReformerForCausalLM
from hf_reformer.commands import convert
from hf_reformer.modeling.conversion.trax_files import Unread, parse_gin
from hf_reformer.modeling.conversion.trax_weights import convert_trax
from hf_reformer.modeling.ops.lsh_hashing import hash_vectors


DATA = Path(__file__).parent / "data"
REAL = DATA / "trax_model.pkl.gz"
REAL_SETTINGS = {
    "hidden_act": "relu",
    "local_attn_chunk_length": 4,
    "local_num_chunks_before": 1,
    "lsh_attn_chunk_length": 4,
    "num_buckets": 4,
    "num_hashes": 2,
}
# What trax's files do not say of a tiny model.
UNSAID = (
    "attn_layers",
    "hidden_act",
    "local_attn_chunk_length",
    "local_num_chunks_before",
    "lsh_attn_chunk_length",
    "num_buckets",
    "num_hashes",
)
MIXED = ["local", "lsh", "full"]
POSITIONS = {
    "axial": {},
    "three axes": {"axial_pos_shape": [4, 2, 16], "axial_pos_embds_dim": [8, 8, 16]},
    "learned": {"axial_pos_embds": False},
    "none": {"position_embedding_type": "none"},
}


# --- what trax computes ---


def computed_by_trax():
    computed = load_file(DATA / "trax_computed.safetensors")
    ids = computed["tokens"].long()
    return computed, torch.cat([torch.zeros_like(ids[:, :1]), ids[:, :-1]], dim=1)


def give_buckets(model, computed, equal):
    """Trax's own buckets; `equal` gets how many of ours, from trax's rotations, are the same."""
    layer = model.reformer.encoder.layers[1].attention.self_attention
    rotations, buckets = computed["rotations0"], computed["buckets0"]

    def hash_as_trax(vectors, _, num_buckets, implementation):
        ours = [hash_vectors(vectors[[row]], rotations[row], num_buckets) for row in range(len(vectors))]
        equal.append((torch.cat(ours) == buckets).double().mean().item())
        return buckets

    layer._hash = hash_as_trax


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-6)])
def test_logits_are_those_of_trax(dtype, tolerance):
    computed, ids = computed_by_trax()
    model = convert_trax(REAL, **REAL_SETTINGS)
    assert type(model) is ReformerForCausalLM and not model.training and model.dtype == torch.float32
    assert model.config.attn_layers == ("local", "lsh") and model.config.is_decoder
    model, equal = model.to(dtype), []
    give_buckets(model, computed, equal)
    with torch.no_grad():
        logits = model(ids).logits
    assert equal == [1.0]
    error = (logits.double() - computed["logits"]).norm() / computed["logits"].norm()
    assert error < tolerance


def test_a_converted_model_is_saved_and_generates(tmp_path):
    model = convert_trax(REAL, **REAL_SETTINGS)
    model.save_pretrained(tmp_path)
    loaded = ReformerForCausalLM.from_pretrained(tmp_path)
    assert_equal_tensors(loaded.state_dict(), model.state_dict())
    assert loaded.config.layer_norm_eps == 1e-6
    # trax puts 0 in front of every text.
    assert loaded.config.bos_token_id == 0
    assert loaded.generate(max_new_tokens=5, do_sample=False, eos_token_id=None).shape == (1, 6)


# --- layouts and kinds of models, written here from models of ours ---


def heads(weight, num_heads):
    """Ours `[H * D, hidden]` as trax's `[H, hidden, D]`."""
    return np.ascontiguousarray(weight.reshape(num_heads, -1, weight.shape[1]).transpose(0, 2, 1))


def layer_as_trax(weights, name, num_heads):
    """The nested tuples of one layer: attention, swap, feed-forward, swap."""
    attention, feed_forward = f"{name}.attention.", f"{name}.feed_forward."
    own = {key.removeprefix(attention): value for key, value in weights.items() if key.startswith(attention)}
    parts = ("query_key", "value") if "self_attention.query_key.weight" in own else ("query", "key", "value")
    projections = [heads(own[f"self_attention.{part}.weight"], num_heads) for part in parts]
    output = own["output.dense.weight"]
    projections.append(output.T.reshape(num_heads, -1, len(output)).copy())
    norm = (own["layer_norm.weight"], own["layer_norm.bias"])
    ours = {key.removeprefix(feed_forward): value for key, value in weights.items() if key.startswith(feed_forward)}
    first, second = (
        (ours[f"{dense}.weight"].T.copy(), ours[f"{dense}.bias"]) for dense in ("dense.dense", "output.dense")
    )
    ours_norm = (ours["layer_norm.weight"], ours["layer_norm.bias"])
    return (((norm,), tuple(projections)), (), ((ours_norm, first, (), ((), (), ()), second, ()),), ())


def as_trax(model, rank_of_table=2):
    """The weights of a model as trax nests them, arrays of NumPy."""
    weights = {name: weight.numpy() for name, weight in model.state_dict().items()}
    name = "reformer.embeddings.position_embeddings"
    tables = tuple(weights[key][None] for key in sorted(weights) if key.startswith(f"{name}.weights."))
    table = weights.get(f"{name}.embedding.weight")
    if table is not None:
        tables = table if rank_of_table == 2 else table[None]
    layers = ()
    for index in range(model.config.num_hidden_layers):
        name = f"reformer.encoder.layers.{index}"
        layers += layer_as_trax(weights, name, model.config.num_attention_heads)
    norm = (weights["reformer.encoder.layer_norm.weight"], weights["reformer.encoder.layer_norm.bias"])
    head = (weights["lm_head.decoder.weight"].T.copy(), weights["lm_head.decoder.bias"])
    words = weights["reformer.embeddings.word_embeddings.weight"]
    return ((), words, (), ((), tables, ()), (), layers, (), norm, (), head)


def flat(nested):
    """The arrays in their order."""
    return [nested] if isinstance(nested, np.ndarray) else [array for part in nested for array in flat(part)]


def state_of(arrays):
    """Some of what stands beside the weights."""
    return {"step": np.int32(7), "slots": (arrays[:1], None), "opt_params": {"learning_rate": np.float32(1e-3)}}


def write_weights(path, nested):
    path = path / "model.pkl"
    path.write_bytes(pickle.dumps(state_of(flat(nested)) | {"weights": nested}, protocol=3))
    return path


def write_flat(path, nested):
    path = path / "model.pkl.gz"
    path.write_bytes(gzip.compress(pickle.dumps(state_of(flat(nested)) | {"flat_weights": flat(nested)}, protocol=5)))
    return path


def write_npy(path, nested):
    with gzip.open(path / "model.weights.npy.gz", "wb", compresslevel=2) as file:
        for array in flat(nested):
            np.save(file, array, allow_pickle=False)
    path = path / "model.pkl.gz"
    path.write_bytes(gzip.compress(pickle.dumps({"flat_weights": 2, "flat_state": []}, protocol=4)))
    return path


def write_shards(path, nested):
    arrays = flat(nested)
    for index, part in enumerate((arrays[:3], arrays[3:5], arrays[5:])):
        (path / f"model.pkl.gz.shard{index}").write_bytes(pickle.dumps(part, protocol=4))
    path = path / "model.pkl.gz"
    path.write_bytes(gzip.compress(pickle.dumps({"flat_weights": 3}, protocol=2)))
    return path


LAYOUTS = {"weights": write_weights, "flat": write_flat, "npy": write_npy, "shards": write_shards}


def unsaid(model):
    return {name: getattr(model.config, name) for name in UNSAID}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("positions", POSITIONS)
def test_every_weight_arrives_from_every_layout(layout, positions, tmp_path):
    model = make_model(ReformerForCausalLM, attn_layers=MIXED, is_decoder=True, **POSITIONS[positions])
    LAYOUTS[layout](tmp_path, as_trax(model))
    more = POSITIONS["none"] if positions == "none" else {}
    converted = convert_trax(tmp_path, **unsaid(model), **more)
    assert_equal_tensors(converted.state_dict(), model.state_dict())
    for name in TINY.keys() - {"max_position_embeddings", "axial_norm_std", "initializer_range"} - set(UNSAID):
        if "dropout" not in name and (positions == "axial" or "axial" not in name):
            assert getattr(converted.config, name) == getattr(model.config, name) or "axial" in name, name
    assert converted.config.max_sequence_length == model.config.max_sequence_length


def test_the_depth_and_the_kinds_need_no_setting_where_the_weights_say_them(tmp_path):
    model = make_model(ReformerForCausalLM, attn_layers=["lsh", "local", "lsh"], is_decoder=True)
    write_flat(tmp_path, as_trax(model))
    settings = unsaid(model)
    del settings["attn_layers"]
    assert convert_trax(tmp_path, **settings).config.attn_layers == ("lsh", "local", "lsh")


def test_a_position_table_of_old_files(tmp_path):
    model = make_model(ReformerForCausalLM, is_decoder=True, axial_pos_embds=False)
    write_weights(tmp_path, as_trax(model, rank_of_table=3))
    assert_equal_tensors(convert_trax(tmp_path, **unsaid(model)).state_dict(), model.state_dict())


def test_pathlike_text_and_file_names(tmp_path):
    model = make_model(ReformerForCausalLM, is_decoder=True)
    path = write_flat(tmp_path, as_trax(model))
    other = tmp_path / "model_1000.pkl.gz"
    path.rename(other)
    for given in (other, str(other)):
        assert_equal_tensors(convert_trax(given, **unsaid(model)).state_dict(), model.state_dict())


def in_bfloat16(array):
    """Bits of the nearest bfloat16."""
    return torch.from_numpy(array).bfloat16().view(torch.uint16).numpy()


@pytest.mark.parametrize("layout", ["pairs", "npy"])
def test_bfloat16_stays(layout, tmp_path):
    model = make_model(ReformerForCausalLM, is_decoder=True)
    arrays = [in_bfloat16(array) for array in flat(as_trax(model))]
    if layout == "npy":
        write_npy(tmp_path, arrays)
    else:
        pairs = {"flat_weights": [(array, "bfloat16") for array in arrays]}
        (tmp_path / "model.pkl.gz").write_bytes(gzip.compress(pickle.dumps(pairs, protocol=4)))
    converted = convert_trax(tmp_path, **unsaid(model))
    assert converted.dtype == torch.bfloat16 and converted.config.dtype == torch.bfloat16
    assert_equal_tensors(
        converted.state_dict(), {name: weight.bfloat16() for name, weight in model.state_dict().items()}
    )


def test_bfloat16_beside_float32_becomes_float32(tmp_path):
    model = make_model(ReformerForCausalLM, is_decoder=True)
    words, *arrays = flat(as_trax(model))
    content = {"flat_weights": [(in_bfloat16(words), "bfloat16"), *arrays]}
    (tmp_path / "model.pkl.gz").write_bytes(gzip.compress(pickle.dumps(content)))
    converted = convert_trax(tmp_path, **unsaid(model))
    assert {weight.dtype for weight in converted.parameters()} == {torch.float32}
    rounded = torch.from_numpy(words).bfloat16().float()
    assert torch.equal(converted.get_input_embeddings().weight, rounded)


# --- config.gin ---

GIN = """
# Parameters for LSHSelfAttention:
LSHSelfAttention.chunk_len = 16
LSHSelfAttention.n_buckets = [2, 4]
LSHSelfAttention.n_hashes = 2
SelfAttention.chunk_len = 16
trax.layers.SelfAttention.n_chunks_before = 1
scope/SelfAttention.n_chunks_after = 0
attention = [@trax.layers.SelfAttention,
             @LSHSelfAttention]
ReformerLM.attention_type = \\
    %attention
ReformerLM.dropout = 0.25
ReformerLM.ff_activation = @trax.layers.FastGelu
ReformerLM.d_model = __import__('os').system('false')
train.model = @trax.models.ReformerLM
"""


def test_settings_of_a_gin_file(tmp_path):
    model = make_model(ReformerForCausalLM, attn_layers=["local", "lsh"] * 2, is_decoder=True)
    write_flat(tmp_path, as_trax(model))
    (tmp_path / "config.gin").write_text(GIN)
    config = convert_trax(tmp_path).config
    assert config.attn_layers == ("local", "lsh", "local", "lsh")
    assert (config.num_hashes, list(config.num_buckets), config.hidden_act) == (2, [2, 4], "gelu_new")
    assert config.hidden_dropout_prob == config.lsh_attention_probs_dropout_prob == 0.25
    assert convert_trax(tmp_path, num_hashes=4).config.num_hashes == 4


def test_a_gin_file_is_read_and_not_run():
    settings = parse_gin(
        GIN
        + "\nA.b = @x()  # why\nA.c = %nowhere\nA.d = (1, 'two # (')\nnonsense\nA.e = [1,  # (\n  2]\nA.f = \\\n 5\n"
        "A.g = %after\nafter = 7\nA.h = 2 * 3\n"
    )
    assert [settings[f"A.{name}"] for name in "bdefg"] == ["x", (1, "two # ("), [1, 2], 5, 7]
    assert isinstance(settings["A.c"], Unread) and settings["A.h"] == Unread("2 * 3")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ReformerLM.ff_use_sru = 2", "sets ReformerLM.ff_use_sru = 2, which has no counterpart"),
        ("ReformerLM.ff_sparsity = '4 8'", "ff_sparsity"),
        ("ReformerLM.attention_chunk_size = 8", "attention_chunk_size"),
        ("SelfAttention.share_qk = True", "share_qk = True"),
        ("train.model = @trax.models.Reformer", "sets train.model = Reformer, which"),
        ("ReformerLM.attention_type = @tl.PureLSHSelfAttention", r"names the attention \['PureLSHSelfAttention'\]"),
        (
            "LSHSelfAttention.n_chunks_after = 2 * 3",
            r"sets LSHSelfAttention.n_chunks_after = 2 \* 3, which is not read",
        ),
        ("ReformerLM.attention_type = @LSHSelfAttention", "layer 0 is 'lsh', and its attention has 4 arrays"),
    ],
)
def test_what_a_gin_file_may_not_ask_for(line, message, tmp_path):
    write_flat(tmp_path, as_trax(make_model(ReformerForCausalLM, is_decoder=True)))
    (tmp_path / "config.gin").write_text(f"{GIN}\n{line}\n")
    with pytest.raises(ValueError, match=message):
        convert_trax(tmp_path)


def test_a_gin_file_that_is_no_text(tmp_path):
    shutil.copy(REAL, tmp_path / "model.pkl.gz")
    (tmp_path / "config.gin").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"config.gin' is no text: byte 0"):
        convert_trax(tmp_path, **REAL_SETTINGS)


def test_a_file_that_holds_one_array_again_and_again(tmp_path):
    """Which would take a million times the memory that it has itself."""
    weights = [np.zeros(1000, np.float32)]
    for _ in range(12):
        weights = [weights, weights]
    (tmp_path / "model.pkl").write_bytes(pickle.dumps({"flat_weights": weights}))
    with pytest.raises(ValueError, match="again and again"):
        convert_trax(tmp_path)


# --- settings that are missing, or contradict the weights ---


@pytest.mark.parametrize("name", [name for name in UNSAID if name != "attn_layers"])
def test_what_the_file_does_not_say_is_asked_for(name, tmp_path):
    model = make_model(ReformerForCausalLM, attn_layers=["local", "lsh"], is_decoder=True)
    write_flat(tmp_path, as_trax(model))
    settings = unsaid(model)
    del settings[name]
    with pytest.raises(ValueError, match=rf"Give these settings.*`{name}` \(\w+\."):
        convert_trax(tmp_path, **settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64}, r"`hidden_size=64` contradicts the file: there it is 32\. Leave it out"),
        ({"num_attention_heads": 4}, "`num_attention_heads=4` contradicts.* it is 2"),
        ({"axial_pos_shape": (4, 32)}, r"`axial_pos_shape=\(4, 32\)` contradicts.* it is \[8, 16\]"),
        ({"axial_pos_embds": False}, "`axial_pos_embds=False` contradicts"),
        ({"is_decoder": False}, "`is_decoder=False` contradicts"),
        ({"combine_streams": "mean"}, "`combine_streams='mean'` contradicts"),
        ({"attn_layers": ["local"]}, "names 1 layers, and the file has 2"),
        ({"attn_layers": ["local", "full"]}, "layer 1 is 'full', and its attention has 3 arrays: it can be 'lsh'"),
        ({"attn_layers": ["lsh", "lsh"]}, "layer 0 is 'lsh', and its attention has 4 arrays: it can be 'local' or"),
        ({"attn_layers": None, "local_attn_chunk_length": None}, r"'full' or 'local' for layers \[0\]"),
        ({"n_hashes": 2}, "Did you mean `num_hashes`"),
    ],
)
def test_settings_that_contradict_the_weights(changes, message, tmp_path):
    model = make_model(ReformerForCausalLM, attn_layers=["local", "lsh"], is_decoder=True)
    write_flat(tmp_path, as_trax(model))
    with pytest.raises(ValueError, match=message):
        convert_trax(tmp_path, **(unsaid(model) | changes))


def test_queries_that_are_keys_without_hashing(tmp_path):
    """`SelfAttention(share_qk=True)` has the weights of an LSH layer, but none of its state."""
    model = make_model(ReformerForCausalLM, attn_layers=["lsh", "lsh"], is_decoder=True)
    for states in (2, 1):
        hashing = [np.zeros((4, 32), np.int32)] * states + [np.zeros((4, 2), np.uint32)] * 2
        content = {"flat_weights": flat(as_trax(model)), "flat_state": [np.float32(0), *hashing]}
        (tmp_path / "model.pkl.gz").write_bytes(gzip.compress(pickle.dumps(content)))
        if states == 2:
            convert_trax(tmp_path, **unsaid(model))
    with pytest.raises(ValueError, match=r"3 arrays of attention in 2 layers, and buckets of 1.*share_qk=True"):
        convert_trax(tmp_path, **unsaid(model))


def test_a_file_without_positions_does_not_say_which_there_are(tmp_path):
    model = make_model(ReformerForCausalLM, is_decoder=True, position_embedding_type="none")
    write_flat(tmp_path, as_trax(model))
    for more in ({}, {"position_embedding_type": "rotary"}):
        with pytest.raises(ValueError, match=r"no positions|contradicts the file: there it is 'none'"):
            convert_trax(tmp_path, **unsaid(model), **more)


# --- models without a counterpart ---


def arrays_of(**changes):
    return flat(as_trax(make_model(ReformerForCausalLM, attn_layers=["local", "lsh"], is_decoder=True, **changes)))


def random(*shape):
    return np.ones(shape, np.float32)


# In the arrays of a tiny model: 0 words, 1 and 2 positions, 3 and 4 LayerNorm, 5 to 8 attention, 9 and 10 LayerNorm,
# 11 to 14 feed-forward, then the same with 3 arrays of attention, and 4 at the end.
FOREIGN = {
    "encoder-decoder": (
        lambda w: [*w[:-4], random(32), random(32), random(32, 50), random(50)],
        "The head reads 32 numbers per token.*encode and decode",
    ),
    "two attentions": (lambda w: w[:11] + w[5:9] + w[11:], "Layer 0 has a second attention"),
    "biases": (lambda w: w[:9] + [random(2, 8)] * 3 + w[9:], "of layer 0 has biases for queries"),
    "Dense attention": (lambda w: w[:5] + [random(32, 16), random(16)] * 4 + w[9:], "has 0 arrays.*`CausalAttention`"),
    "mixed attention": (lambda w: w[:5] + w[5:8] + w[5:9] + w[9:], "has 7 arrays.*MixedLSHSelfAttention"),
    "one-sided norm": (lambda w: w[:4] + w[5:], r"Array 4 .*it is the bias of the attention's LayerNorm of layer 0"),
    "SRU": (
        lambda w: [*w[:15], random(32), random(32), random(32, 8), random(8), *w[15:]],
        "layer 1 has 0 arrays.*`ff_use_sru`",
    ),
    "sparse head": (lambda w: [*w[:-2], random(4, 16, 50), random(50)], r"they are the head: \[\[64, 50\], \[50\]\]"),
    "other words": (lambda w: [random(50, 16), *w[1:]], r"with the word embedding \[50, 16\]"),
    "value size": (lambda w: [*w[:7], random(2, 32, 4), random(2, 4, 32), *w[9:]], "value of layer 0 have 4 numbers"),
    "other heads": (lambda w: [*w[:17], random(4, 32, 8), *w[18:]], r"shape \[4, 32, 8\].*of shape \[2, 32, any\]"),
    "axial sizes": (lambda w: [*w[:2], random(1, 1, 16, 8), *w[3:]], r"\[8, 8\] numbers, 16 together, and words have"),
    "axial shape": (lambda w: [*w[:2], random(1, 2, 16, 24), *w[3:]], "Array 2 .*the position table of axis 1"),
    "feed-forward": (lambda w: [*w[:13], random(40, 32), *w[14:]], r"\[40, 32\].*Dense layer of layer 0.*\[48, 32\]"),
    "integers": (lambda w: [w[0].astype(np.int32), *w[1:]], "Array 0 of the file is torch.int32"),
    "empty": (lambda w: [], "ends after 0 arrays"),
    "no layers": (lambda w: w[:3] + w[-4:], "no layers"),
    "cut off": (lambda w: w[:18], "The last arrays of the file have the shapes"),
    "not finite": (
        lambda w: [w[0] * np.inf, *w[1:]],
        r"not finite .* \['reformer.embeddings.word_embeddings.weight'\]",
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_models_without_a_counterpart_are_refused(name, tmp_path):
    change, message = FOREIGN[name]
    write_flat(tmp_path, change(arrays_of()))
    with pytest.raises(ValueError, match=message):
        convert_trax(tmp_path, **REAL_SETTINGS)


# --- files ---


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="There is no trax checkpoint at"):
        convert_trax(tmp_path)
    (tmp_path / "model.pkl.gz").write_bytes(pickle.dumps({"flat_weights": 2}))
    with pytest.raises(ValueError, match=r"'model.weights.npy.gz' or \['model.pkl.gz.shard0', 'model.pkl.gz.shard1'"):
        convert_trax(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": 1}, r"no checkpoint of trax.*holds \['model'\]"),
        ([1, 2], "no checkpoint of trax.*holds list"),
        ({"flat_weights": ["text"]}, "of type str instead of an array"),
        ({"flat_weights": [(np.ones(2, np.uint16), "float8")]}, "the dtype 'float8' is not known"),
    ],
)
def test_files_of_something_else(content, message, tmp_path):
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=message):
        convert_trax(tmp_path)


def test_a_file_that_names_more_than_arrays_is_refused_with_its_name(tmp_path):
    (tmp_path / "model.pkl").write_bytes(pickle.dumps({"weights": Path("x")}))
    with pytest.raises(ValueError, match=r"model.pkl' cannot be read. The pickle names `pathlib"):
        convert_trax(tmp_path)


def test_weights_that_hold_themselves(tmp_path):
    ring = []
    ring.append(ring)
    (tmp_path / "model.pkl").write_bytes(pickle.dumps({"weights": ring}))
    with pytest.raises(ValueError, match="more than 1000000 parts"):
        convert_trax(tmp_path)


@pytest.mark.parametrize("layout", ["flat", "npy", "shards"])
def test_files_that_end_too_early(layout, tmp_path):
    LAYOUTS[layout](tmp_path, arrays_of())
    victim = sorted(tmp_path.iterdir())[-1]
    content = victim.read_bytes()
    victim.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"incomplete|damaged"):
        convert_trax(tmp_path, **REAL_SETTINGS)


def test_npy_files_of_objects_are_refused(tmp_path):
    write_npy(tmp_path, arrays_of())
    stream = io.BytesIO()
    np.save(stream, np.array([Path("x")], dtype=object), allow_pickle=True)
    (tmp_path / "model.weights.npy.gz").write_bytes(gzip.compress(stream.getvalue()))
    with pytest.raises(ValueError, match=r"the dtype '\|O'.*no Python objects"):
        convert_trax(tmp_path)


def test_a_fixture_written_by_trax_has_its_own_layout(tmp_path):
    """The real file holds arrays of jax and a `ShapeDtype`; both are read without either package."""
    content = gzip.decompress(REAL.read_bytes())
    assert b"_reconstruct_array" in content and b"ShapeDtype" in content
    shutil.copy(REAL, tmp_path / "model.pkl.gz")
    assert convert_trax(tmp_path, **REAL_SETTINGS).config.axial_pos_shape == (4, 4)


def test_the_command(tmp_path, capsys):
    settings = [f"{name}={value}" for name, value in REAL_SETTINGS.items()]
    given = ["trax", "--weights", str(REAL), "--output_dir"]
    convert.main([*given, str(tmp_path / "out"), "--set", *settings])
    assert "layers ['local', 'lsh']" in capsys.readouterr().out
    assert_equal_tensors(
        ReformerForCausalLM.from_pretrained(tmp_path / "out").state_dict(),
        convert_trax(REAL, **REAL_SETTINGS).state_dict(),
    )
    with pytest.raises(SystemExit, match=r"hf-reformer convert: .*`num_hashes` \(LSHSelfAttention.n_hashes"):
        convert.main([*given, str(tmp_path / "other"), "--set", *settings[:-1]])
