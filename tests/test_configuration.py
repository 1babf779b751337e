"""The configuration: a superset of the stock one, checked when it is made, the same after a trip through JSON."""

import dataclasses
import json
import logging

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from tiny_models import tiny_config
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.models.reformer.configuration_reformer import ReformerConfig as StockConfig

from hf_reformer import ReformerByteTokenizer, ReformerConfig, ReformerForCausalLM, ReformerModel
from hf_reformer.configuration.setting_names import MEANT_BY, NOT_IN_A_REFORMER, OTHER_NAMES


OWN_FIELDS = {
    "reversible": True,
    "exact_inversion": None,
    "activation_memory": 0,
    "circular_look_around": True,
    "attend_across_buckets": True,
    "allow_duplicate_attention": True,
    "full_attention_threshold": None,
    "lsh_sliding_window": False,
    "lsh_value_shift": 0,
    "attention_output_bias": False,
    "gated_feed_forward": False,
    "combine_streams": "concat",
    "classifier_pooling": "token",
    "position_embedding_type": None,
    "rope_parameters": None,
    "lsh_rotary": False,
    "decoder_attn_layers": None,
    "decoder_start_token_id": None,
    "cross_attention_probs_dropout_prob": 0.0,
}
# Each makes the model compute what stock transformers cannot.
SWITCHED = (
    {"circular_look_around": False},
    {"attend_across_buckets": False},
    {"allow_duplicate_attention": False},
    {"full_attention_threshold": 64},
    {"lsh_sliding_window": True, "circular_look_around": False, "attend_across_buckets": False},
    {"lsh_value_shift": 1},
    {"attention_output_bias": True},
    {"gated_feed_forward": True},
    {"combine_streams": "mean"},
    {"classifier_pooling": "mean"},
    {"is_encoder_decoder": True},
    {"combine_streams": "mean", "tie_word_embeddings": True},
    {"position_embedding_type": "none"},
    {"position_embedding_type": "rotary", "rope_parameters": {"rope_type": "default", "rope_theta": 10.0}},
)


@pytest.fixture
def warnings_of(monkeypatch):
    """A function that calls another one and returns its result and the warnings that both packages log for it."""

    def call(function):
        messages = []
        transformers.logging.get_logger().warning_once.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(
                logging.Logger,
                "warning",
                lambda self, message, *args, **kwargs: messages.append(message),
            )
            return function(), messages

    return call


def settings_of(config):
    """All but where it was loaded from."""
    return {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}


def test_has_the_settings_of_stock_with_their_defaults_and_some_more():
    stock, ours = settings_of(StockConfig()), settings_of(ReformerConfig())
    assert ours == stock | OWN_FIELDS | {"eos_token_id": 1}
    assert ReformerConfig.model_type == StockConfig.model_type == "reformer"
    assert ReformerConfig.attribute_map == StockConfig.attribute_map


def test_a_new_model_ends_its_texts_as_the_byte_tokenizer_does(tmp_path):
    config, tokenizer = ReformerConfig(), ReformerByteTokenizer()
    assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert ReformerConfig.from_dict({}).eos_token_id == StockConfig.from_dict({}).eos_token_id == 2


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"attn_layers": ["local", "lsh"], "num_buckets": [4, 8], "num_hashes": 4, "is_decoder": True, "hash_seed": 3},
        {"axial_pos_embds": False, "axial_pos_embds_dim": [1, 2], "classifier_dropout": 0.5, "num_labels": 5},
    ],
    ids=["defaults", "settings", "learned positions"],
)
def test_means_the_same_as_a_stock_file(settings, tmp_path):
    StockConfig(**settings).save_pretrained(tmp_path)
    ours, stock = AutoConfig.from_pretrained(tmp_path), StockConfig.from_pretrained(tmp_path)
    assert type(ours) is ReformerConfig
    assert settings_of(ours) == settings_of(stock) | OWN_FIELDS
    # And the other way: without a switch of ours the file is one that stock reads.
    ours.save_pretrained(tmp_path)
    assert settings_of(StockConfig.from_pretrained(tmp_path)) == settings_of(stock) | OWN_FIELDS


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("attn_layer", "attn_layers"),
        ("axial_pos_shapes", "axial_pos_shape"),
        ("chunk_size_lmhead", "chunk_size_lm_head"),
        ("circular_lookaround", "circular_look_around"),
        ("eos_tokenid", "eos_token_id"),
        ("full_attn_threshold", "full_attention_threshold"),
        ("hidden_dropout", "hidden_dropout_prob"),
        ("lsh_attention_chunk_length", "lsh_attn_chunk_length"),
        ("num_bucket", "num_buckets"),
        ("num_hash", "num_hashes"),
        ("reversable", "reversible"),
    ],
)
def test_a_misspelt_keyword_is_told_the_right_one(misspelt, meant):
    with pytest.raises(
        ValueError, match=rf"`{misspelt}` is not a setting of ReformerConfig. Did you mean `{meant}`\?"
    ):
        ReformerConfig(**{misspelt: 2})


@pytest.mark.parametrize(
    ("foreign", "meant"),
    [
        ("intermediate_size", "feed_forward_size"),
        ("attention_probs_dropout_prob", "local_attention_probs_dropout_prob"),
        ("layer_norm_epsilon", "layer_norm_eps"),
        ("num_layers", "attn_layers"),
        ("d_model", "hidden_size"),
        ("rope_theta", "rope_parameters"),
        ("rope_scaling", "rope_parameters"),
    ],
)
def test_another_models_name_of_a_setting_is_told_ours(foreign, meant):
    with pytest.raises(ValueError, match=rf"`{foreign}` is not a setting of .* Did you mean `{meant}`\?"):
        ReformerConfig(**{foreign: 2})


def test_other_names_are_no_settings_and_mean_settings():
    fields = {field.name for field in dataclasses.fields(ReformerConfig)}
    assert set(OTHER_NAMES) <= fields
    assert not fields & {*MEANT_BY, *NOT_IN_A_REFORMER}
    assert len(MEANT_BY) == sum(map(len, OTHER_NAMES.values()))


def test_what_a_reformer_has_not_is_refused():
    with pytest.raises(ValueError, match=r"`type_vocab_size=2`: a Reformer has no such thing. Leave it out"):
        ReformerConfig(type_vocab_size=2)
    assert ReformerConfig(add_cross_attention=False, sliding_window=None).hidden_size == 256


# What a tool sets on any config, and what older files carry.
CARRIED = {"layer_norm_epsilon": 1.0, "rope_theta": 1e4, "num_layers": 3, "rope_parameters": {"rope_theta": 1e4}}


def test_what_a_file_or_a_tool_carries_is_kept_with_a_warning(tmp_path, warnings_of):
    config = ReformerConfig()
    for name, value in CARRIED.items():
        setattr(config, name, value)
    config.save_pretrained(tmp_path)
    for load in (
        lambda: ReformerConfig.from_pretrained(tmp_path),
        lambda: AutoConfig.from_pretrained(tmp_path),
        lambda: ReformerConfig(**config.to_dict()),
        lambda: ReformerConfig(**config.to_diff_dict()),
        lambda: ReformerConfig.from_dict(CARRIED),
    ):
        loaded, messages = warnings_of(load)
        assert {name: getattr(loaded, name) for name in CARRIED} == CARRIED
        assert loaded.num_hidden_layers == 6
        for name in CARRIED:
            assert [message.startswith(f"`{name}") for message in messages].count(True) == 1, (name, messages)


def test_tied_embeddings_are_refused_where_they_are_typed(tmp_path, warnings_of):
    message = "`tie_word_embeddings=True` is not possible: .* 512 numbers .* has 256.*: `combine_streams='mean'`"
    with pytest.raises(ValueError, match=message):
        ReformerConfig(tie_word_embeddings=True)
    config = tiny_config()
    config.tie_word_embeddings = True
    config.save_pretrained(tmp_path)
    for load in (lambda: config, lambda: ReformerConfig.from_pretrained(tmp_path)):
        model, (message,) = warnings_of(lambda load=load: ReformerForCausalLM(load()))
        assert "The weights stay separate, as in stock Reformer" in message
        assert not model.config.tie_word_embeddings
        # Resizing ties again what is to be tied.
        model.config.tie_word_embeddings = True
        model.resize_token_embeddings(60)
        assert model(torch.tensor([[59]])).logits.shape == (1, 1, 60)


def test_positions_follow_from_each_other_and_sizes_from_the_width():
    for settings, shape, sizes, longest in (
        ({}, (64, 64), (64, 192), 4096),
        ({"max_position_embeddings": 65536}, (256, 256), (64, 192), 65536),
        ({"max_position_embeddings": 8192}, (128, 64), (64, 192), 8192),
        ({"max_position_embeddings": 1000}, (32, 32), (64, 192), 1000),
        ({"max_position_embeddings": 1}, (1, 1), (64, 192), 1),
        ({"axial_pos_shape": [128, 512]}, (128, 512), (64, 192), 65536),
        ({"hidden_size": 512}, (64, 64), (128, 384), 4096),
        ({"hidden_size": 30}, (64, 64), (7, 23), 4096),
        ({"axial_pos_shape": [8, 4, 16]}, (8, 4, 16), (42, 42, 172), 512),
        ({"axial_pos_shape": [512]}, (512,), (256,), 512),
        ({"axial_pos_shape": [64, 64], "max_position_embeddings": 65536}, (64, 64), (64, 192), 4096),
    ):
        config = ReformerConfig(**settings)
        assert config.axial_pos_shape == shape
        assert config.axial_pos_embds_dim == sizes
        assert config.max_sequence_length == longest
    learned = ReformerConfig(axial_pos_embds=False, axial_pos_shape=[2, 2])
    assert learned.max_sequence_length == learned.max_position_embeddings == 4096


def test_auto_map_is_there_to_be_read_and_saved_with_code_only():
    config = ReformerConfig()
    assert config.auto_map == {}
    assert "auto_map" not in config.to_dict()
    # So transformers notes where the code of a repository is.
    config.auto_map["AutoConfig"] = "configuration_x.Config"
    assert ReformerConfig(auto_map=config.auto_map).auto_map == {"AutoConfig": "configuration_x.Config"}
    # Saved from the package, a checkpoint has no code; test_remote_code.py has the other case.
    assert "auto_map" not in config.to_dict()
    assert ReformerConfig().auto_map == {}


# The file of google/reformer-crime-and-punishment, with the keys that no version reads any more, and what
# transformers v4 wrote into every file.
PUBLISHED = {
    "architectures": ["ReformerModelWithLMHead"],
    "attention_head_size": 64,
    "attention_probs_dropout_prob": 0.1,
    "attn_layers": ["local", "lsh", "local", "lsh", "local", "lsh"],
    "axial_norm_std": 1.0,
    "axial_pos_embds": True,
    "axial_pos_embds_dim": [64, 192],
    "axial_pos_shape": [512, 1024],
    "chunk_size_feed_forward": 0,
    "chunk_size_lm_head": 0,
    "eos_token_id": 2,
    "feed_forward_size": 512,
    "hash_seed": None,
    "hidden_act": "relu",
    "hidden_dropout_prob": 0.05,
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 512,
    "is_decoder": True,
    "layer_norm_eps": 1e-12,
    "local_attention_probs_dropout_prob": 0.05,
    "local_attn_chunk_length": 64,
    "local_num_chunks_after": 0,
    "local_num_chunks_before": 1,
    "lsh_attention_probs_dropout_prob": 0.0,
    "lsh_attn_chunk_length": 64,
    "lsh_num_chunks_after": 0,
    "lsh_num_chunks_before": 1,
    "max_position_embeddings": 524288,
    "model_type": "reformer",
    "num_attention_heads": 2,
    "num_buckets": [64, 128],
    "num_chunks_after": 0,
    "num_chunks_before": 1,
    "num_hashes": 1,
    "num_hidden_layers": 6,
    "output_past": True,
    "pad_token_id": 0,
    "sinusoidal_pos_embds": False,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 100}},
    "tie_encoder_decoder": False,
    "torch_dtype": "float32",
    "torchscript": False,
    "vocab_size": 320,
}


def test_the_keys_of_published_files_are_kept():
    config = ReformerConfig.from_dict(dict(PUBLISHED))
    saved = config.to_dict()
    renamed = {"torch_dtype": "dtype"}
    assert {key: saved[renamed.get(key, key)] for key in PUBLISHED} == PUBLISHED
    assert config.num_hidden_layers == 6


@pytest.mark.parametrize("key", ["my_note", "cls_token_id", "mask_token_id", "sep_token_id", "unk_token_id"])
def test_unknown_keys_are_kept(key, tmp_path):
    ReformerConfig(**{key: 7}).save_pretrained(tmp_path)
    assert getattr(ReformerConfig.from_pretrained(tmp_path), key) == 7


def test_keys_of_generation_are_no_mistakes():
    """Files of transformers v4 hold them; the base class drops them."""
    for name, value in GenerationConfig._get_default_generation_params().items():
        ReformerConfig(**{name: value})


ROTARY = {"position_embedding_type": "rotary"}
# What is wrong, and what the message has to say.
INVALID = {
    "odd buckets": ({"num_buckets": 7}, "`num_buckets` must be an even number >= 2, .* got 7"),
    "no buckets": ({"num_buckets": 0}, "`num_buckets` must be an even number >= 2, .* got 0"),
    "negative buckets": ({"num_buckets": -2}, "even number >= 2, .* got -2"),
    "odd factor": ({"num_buckets": [4, 3]}, r"even number >= 2, .* got \[4, 3\]"),
    "zero factor": ({"num_buckets": (0, 4)}, r"even number >= 2, .* got \(0, 4\)"),
    "no factors": ({"num_buckets": []}, r"even number >= 2, .* got \[\]"),
    "one axis": (
        {"axial_pos_shape": [128], "axial_pos_embds_dim": [31]},
        r"`axial_pos_embds_dim=\[31\]` adds up to 31 and must add up to `hidden_size=32`",
    ),
    "two axes": ({"axial_pos_embds_dim": [8, 23]}, r"`axial_pos_embds_dim=\[8, 23\]` adds up to 31"),
    "three axes": (
        {"axial_pos_shape": [2, 4, 8], "axial_pos_embds_dim": [8, 8, 8]},
        r"\[8, 8, 8\]` adds up to 24 .*`hidden_size=32`.*Change one of the two, or set `axial_pos_embds=False`",
    ),
    "more axes than sizes": (
        {"axial_pos_shape": [2, 4, 16]},
        r"one positive number per axis each, but got \[2, 4, 16\] and \[8, 24\]",
    ),
    "more sizes than axes": ({"axial_pos_shape": [128]}, r"per axis each, but got \[128\] and \[8, 24\]"),
    "no axes": ({"axial_pos_shape": [], "axial_pos_embds_dim": []}, r"per axis each, but got \[\] and \[\]"),
    "empty axis": ({"axial_pos_shape": [0, 16]}, r"one positive number per axis each, but got \[0, 16\]"),
    "negative size": ({"axial_pos_embds_dim": [-8, 40]}, r"one positive number per axis each, .* \[-8, 40\]"),
    "local chunk": ({"local_attn_chunk_length": 0}, "`local_attn_chunk_length` must be at least 1, but got 0"),
    "lsh chunk": ({"lsh_attn_chunk_length": -1}, "`lsh_attn_chunk_length` must be at least 1, but got -1"),
    "lsh chunk left out": ({"lsh_attn_chunk_length": None}, "`lsh_attn_chunk_length` must be at least 1, .* None"),
    "local before": ({"local_num_chunks_before": -1}, "`local_num_chunks_before` must be at least 0, but got -1"),
    "local after": ({"local_num_chunks_after": -1}, "`local_num_chunks_after` must be at least 0, but got -1"),
    "lsh before": ({"lsh_num_chunks_before": -1}, "`lsh_num_chunks_before` must be at least 0, but got -1"),
    "lsh after": ({"lsh_num_chunks_after": -2}, "`lsh_num_chunks_after` must be at least 0, but got -2"),
    "head in chunks": ({"chunk_size_lm_head": -1}, "`chunk_size_lm_head` must be at least 0, but got -1"),
    "feed-forward in chunks": ({"chunk_size_feed_forward": -1}, "`chunk_size_feed_forward` must be at least 0"),
    "hidden dropout": (
        {"hidden_dropout_prob": 1.5},
        "`hidden_dropout_prob` is a probability .* 0 and 1, but got 1.5",
    ),
    "local dropout": (
        {"local_attention_probs_dropout_prob": -0.1},
        "`local_attention_probs_dropout_prob` is .* -0.1",
    ),
    "lsh dropout": ({"lsh_attention_probs_dropout_prob": 2}, "`lsh_attention_probs_dropout_prob` is .* got 2"),
    "head's dropout": ({"classifier_dropout": -1}, "`classifier_dropout` is a probability .* got -1"),
    "no layers": (
        {"attn_layers": []},
        r"at least one layer, each one of \['lsh', 'local', 'full'\], but got \[\]",
    ),
    "unknown layer": (
        {"attn_layers": ["lsh", "global"]},
        r"\['lsh', 'local', 'full'\], but got \['lsh', 'global'\]",
    ),
    "threshold": (
        {"full_attention_threshold": 15},
        "`full_attention_threshold` must be None or at least `lsh_attn_chunk_length=16`, but got 15",
    ),
    "values further on": ({"lsh_value_shift": 2}, "`lsh_value_shift` must be 0 or 1, but got 2"),
    "pooling": ({"classifier_pooling": "max"}, r"must be one of \['token', 'mean'\], but got 'max'"),
    "streams": ({"combine_streams": "sum"}, r"`combine_streams` must be one of \['concat', 'mean'\], but got 'sum'"),
    "streams of tied embeddings": (
        {"combine_streams": "average", "tie_word_embeddings": True},
        r"one of \['concat', 'mean'\], but got 'average'",
    ),
    "windows on the circle": (
        {"lsh_sliding_window": True, "attend_across_buckets": False},
        "`lsh_sliding_window=True` needs .* but they are True and False",
    ),
    "windows across buckets": (
        {"lsh_sliding_window": True, "circular_look_around": False},
        "`lsh_sliding_window=True` needs .* but they are False and True",
    ),
    "chunk lengths without a small multiple": (
        {"local_attn_chunk_length": 1009, "lsh_attn_chunk_length": 1013},
        "`lsh_attn_chunk_length=1013` and `local_attn_chunk_length=1009`: 1022117 tokens, where .* 128",
    ),
    "a chunk of gigabytes": ({"local_attn_chunk_length": 2**22}, "multiple of both .*: 4194304 tokens, where"),
    "kind of positions": (
        {"position_embedding_type": "relative"},
        r"must be None or one of \['axial', 'learned', 'rotary', 'none'\], but got 'relative'",
    ),
    "learned and axial": (
        {"position_embedding_type": "learned", "axial_pos_embds": True},
        "`position_embedding_type='learned'` contradicts `axial_pos_embds=True`. Leave one of the two out",
    ),
    "axial and learned": (
        {"position_embedding_type": "axial", "axial_pos_embds": False},
        "`position_embedding_type='axial'` contradicts `axial_pos_embds=False`",
    ),
    "LSH alone rotary": (
        {"position_embedding_type": "none", "lsh_rotary": True},
        "`lsh_rotary=True` needs `position_embedding_type='rotary'`, but it is 'none'",
    ),
    "LSH rotary, misspelt": (
        ROTARY | {"lsh_rotary": "before"},
        "`lsh_rotary` must be False, True or 'after_hashing', but got 'before'",
    ),
    "odd heads": (ROTARY | {"attention_head_size": 7}, "`attention_head_size` must be even, but got 7"),
    "rotation that follows the length": (
        ROTARY | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
        r"a `rope_type` of \['default', 'linear', 'yarn', 'llama3'\], but it is 'dynamic'",
    ),
    "rotation by nothing": (ROTARY | {"rope_parameters": {"rope_theta": 0}}, "a finite `rope_theta` above 1, .* 0"),
    "rotation of a part": (
        ROTARY | {"rope_parameters": {"partial_rotary_factor": 0.5}},
        "`partial_rotary_factor=0.5` is not possible",
    ),
    "scaling without a factor": (
        ROTARY | {"rope_parameters": {"rope_type": "linear"}},
        "Missing required keys in `rope_parameters` for 'rope_type'='linear': {'factor'}",
    ),
    "seed": ({"hash_seed": 2**70}, r"`hash_seed` must be between .*, but got 1180591620717411303424"),
    "activation": ({"hidden_act": "rely"}, "`hidden_act` must be one of .*'relu'.* but got 'rely'"),
} | {
    name: ({name: 0}, f"`{name}` must be at least 1, but got 0")
    for name in (
        "attention_head_size",
        "feed_forward_size",
        "max_position_embeddings",
        "num_attention_heads",
        "num_hashes",
        "vocab_size",
    )
}
INVALID |= {
    f"{name}={value}": ({name: value}, f"`{name}` must be a finite number >= 0, but got {value}")
    for name in ("axial_norm_std", "initializer_range", "layer_norm_eps")
    for value in (float("nan"), float("inf"), -1.0)
}


@pytest.mark.parametrize("case", INVALID)
def test_what_cannot_work_is_refused(case):
    settings, message = INVALID[case]
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        tiny_config(**settings)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attn_layers", "lsh"),
        ("num_buckets", "8"),
        ("num_hashes", 2.0),
        ("num_hashes", "2"),
        ("circular_look_around", "no"),
        ("full_attention_threshold", "64"),
        ("reversible", None),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(name, value):
    with pytest.raises(StrictDataclassFieldValidationError, match=f"'{name}'"):
        tiny_config(**{name: value})


@pytest.mark.parametrize(
    "settings",
    [
        {"num_buckets": None},
        {"num_buckets": 2},
        {"num_buckets": [2]},
        {"num_buckets": (4, 6)},
        {"num_buckets": [2, 4, 6]},
        {"axial_pos_shape": [128], "axial_pos_embds_dim": [32]},
        {"axial_pos_shape": (2, 4, 16), "axial_pos_embds_dim": (8, 8, 16)},
        {"axial_pos_embds": False, "axial_pos_embds_dim": [1]},
        {"position_embedding_type": "axial", "axial_pos_embds": True},
        {"position_embedding_type": "learned", "axial_pos_embds": False},
        {"position_embedding_type": "none", "attention_head_size": 7},
        {"local_attn_chunk_length": 1, "lsh_attn_chunk_length": 1},
        {"local_num_chunks_before": 0, "lsh_num_chunks_before": 0},
        {"hidden_dropout_prob": 0, "local_attention_probs_dropout_prob": 1, "lsh_attention_probs_dropout_prob": 0},
        {"lsh_attention_probs_dropout_prob": None, "classifier_dropout": None},
        {"axial_norm_std": 1},
        {"attn_layers": ("full", "local"), "lsh_attn_chunk_length": None, "lsh_num_chunks_before": None},
        {"num_hidden_layers": 2},
        {"full_attention_threshold": 16},
        {"eos_token_id": [1, 2]},
        {"hash_seed": 2**64 - 1},
        {"hash_seed": -(2**63)},
        {"layer_norm_eps": 0.0},
        {"attn_layers": ("lsh",), "lsh_attn_chunk_length": 2**22},
        {"local_attn_chunk_length": 2**22, "circular_look_around": False},
        {"local_attn_chunk_length": 2**14},
    ],
    ids=str,
)
def test_what_works_is_accepted(settings):
    config = tiny_config(**settings)
    for name, value in settings.items():
        kept = getattr(config, name)
        assert list(kept) == list(value) if isinstance(value, (list, tuple)) else kept == value


def test_the_depth_follows_from_the_layers(tmp_path):
    config = tiny_config(attn_layers=["lsh"] * 5)
    assert config.num_hidden_layers == config.to_dict()["num_hidden_layers"] == 5
    config.save_pretrained(tmp_path)
    assert ReformerConfig.from_pretrained(tmp_path, attn_layers=["full"] * 3).num_hidden_layers == 3
    message = "`num_hidden_layers=3` contradicts `attn_layers`, which names 5 layers. Leave `num_hidden_layers` out"
    for contradict in (
        lambda: tiny_config(attn_layers=["lsh"] * 5, num_hidden_layers=3),
        lambda: ReformerConfig.from_pretrained(tmp_path, num_hidden_layers=3),
        lambda: setattr(config, "num_hidden_layers", 3),
    ):
        with pytest.raises(ValueError, match=message):
            contradict()


def test_a_bad_assignment_is_found_by_the_model_and_at_saving(tmp_path):
    config = tiny_config()
    config.num_buckets = 3
    for use in (ReformerModel, lambda config: config.save_pretrained(tmp_path)):
        with pytest.raises(StrictDataclassClassValidationError, match="got 3"):
            use(config)


def test_the_longest_input():
    assert tiny_config(axial_pos_shape=[4, 8]).max_sequence_length == 32
    assert tiny_config(axial_pos_shape=[2, 4, 8], axial_pos_embds_dim=[8, 8, 16]).max_sequence_length == 64
    assert tiny_config(max_position_embeddings=100).max_sequence_length == 100
    assert tiny_config(axial_pos_embds=False, max_position_embeddings=300).max_sequence_length == 300
    for kind in ("rotary", "none"):
        assert tiny_config(position_embedding_type=kind).max_sequence_length is None


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_buckets": (4, 6), "attn_layers": ("full", "lsh", "local"), "reversible": False},
        {"axial_pos_shape": (2, 4, 16), "axial_pos_embds_dim": (8, 8, 16), "note": {"of": ["mine"]}},
        *SWITCHED,
    ],
    ids=str,
)
def test_json_changes_nothing(settings, tmp_path):
    config = tiny_config(**settings)
    config.save_pretrained(tmp_path)
    loaded = ReformerConfig.from_pretrained(tmp_path)
    assert settings_of(loaded) == settings_of(config) == settings_of(ReformerConfig(**config.to_dict()))
    assert loaded.attn_layers == config.attn_layers
    assert loaded.to_json_string() == config.to_json_string()
    for name, value in settings.items():
        loaded_value = getattr(loaded, name)
        assert list(loaded_value) == list(value) if isinstance(value, tuple) else loaded_value == value


def test_lists_and_tuples_are_the_same():
    settings = {"attn_layers": ("lsh", "local"), "axial_pos_shape": (8, 16), "axial_pos_embds_dim": (8, 24)}
    lists = {name: list(value) for name, value in settings.items()}
    assert tiny_config(**settings, num_buckets=(2, 4)).to_dict() == tiny_config(**lists, num_buckets=[2, 4]).to_dict()


@pytest.mark.parametrize("switch", SWITCHED, ids=str)
def test_files_that_stock_cannot_read_say_so(switch, tmp_path):
    """In their layers' names, which stock takes for unknown ones."""
    config = tiny_config(**switch)
    assert config.attn_layers == ("local", "lsh")
    config.save_pretrained(tmp_path)
    on_disk = json.loads((tmp_path / "config.json").read_text())
    assert on_disk["attn_layers"] == ["hf_reformer.local", "hf_reformer.lsh"]
    for load in (ReformerConfig.from_pretrained, AutoConfig.from_pretrained):
        loaded = load(tmp_path)
        assert loaded.attn_layers == ("local", "lsh")
        assert {name: getattr(loaded, name) for name in switch} == switch
    # The Trainer reads the file so when it resumes.
    assert PreTrainedConfig.from_json_file(tmp_path / "config.json").num_hidden_layers == 2


def test_other_files_hold_the_plain_names():
    own = {"reversible": False}, {"attn_layers": ["full", "local"]}, {"position_embedding_type": "learned"}
    for settings in ({}, *own):
        config = tiny_config(**settings)
        assert config.to_dict()["attn_layers"] == list(config.attn_layers)


def test_a_setting_can_be_changed_when_loading(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    config = ReformerConfig.from_pretrained(tmp_path, attn_layers=["full", "full"], num_hashes=5)
    config.validate()
    assert (tuple(config.attn_layers), config.num_hashes) == (("full", "full"), 5)


def test_positions_that_do_not_fit_each_other_are_told(warnings_of):
    contradiction = {"axial_pos_shape": [4, 17], "max_position_embeddings": 65536}
    config, messages = warnings_of(lambda: ReformerConfig(**contradiction))
    assert config.max_sequence_length == 68
    assert len(messages) == 1 and "holds 68 positions, and no input may be longer" in messages[0]
    assert warnings_of(lambda: ReformerConfig.from_dict(config.to_dict()))[1] == []
