"""Saving and loading: nothing lost, another position table on request, damaged files refused."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file, save_file
from tiny_models import MODEL_CLASSES, TIED, TINY, assert_equal_tensors, make_model, random_ids, tiny_config

from hf_reformer import (
    ReformerConfig,
    ReformerForCausalLM,
    ReformerForMaskedLM,
    ReformerForMultipleChoice,
    ReformerForTokenClassification,
    ReformerModel,
)


LEARNED = {"axial_pos_embds": False}
THREE_AXES = {"axial_pos_shape": [4, 2, 16], "axial_pos_embds_dim": [8, 8, 16]}
WEIGHTS = "model.safetensors"


def saved(folder, model_class=ReformerForCausalLM, **changes):
    model = make_model(model_class, **changes)
    model.save_pretrained(folder)
    return model


def position_table(model):
    """Learned vectors, or the axes' tables; without the dimensions of the other axes."""
    positions = model.get_position_embeddings()
    if hasattr(positions, "embedding"):
        return [positions.embedding.weight]
    return [table.flatten(0, -2) for table in positions.weights]


def parameter_names(model):
    """One for each parameter, whatever names it has."""
    return [name for name, _ in model.named_parameters()]


def log_lines(caplog):
    return [
        record.getMessage() for record in caplog.records if record.name.startswith(("hf_reformer", "transformers"))
    ]


@pytest.fixture
def logs(caplog):
    """What a user sees: everything of both packages from warnings on."""
    transformers.logging.enable_propagation()
    transformers.logging.set_verbosity_warning()
    yield lambda: log_lines(caplog)
    transformers.logging.disable_propagation()


def logits_of(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs)[0]


# --- round trips ---


@pytest.mark.parametrize("settings", [{}, LEARNED, THREE_AXES, TIED], ids=["axial", "learned", "three axes", "tied"])
@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_nothing_is_lost(model_class, settings, tmp_path, logs):
    model = saved(tmp_path, model_class, num_labels=3, attn_layers=["local", "lsh", "full"], **settings)
    assert (tmp_path / WEIGHTS).exists()
    assert not list(tmp_path.glob("*.bin"))
    loaded, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert logs() == []
    assert not loaded.training
    assert_equal_tensors(loaded.state_dict(), model.state_dict())
    assert parameter_names(loaded) == parameter_names(model)
    assert loaded.config.architectures == [model_class.__name__]
    assert {**loaded.config.to_dict(), "_name_or_path": ""} == {**model.config.to_dict(), "_name_or_path": ""}
    ids = random_ids(2, 40)
    ids = ids[:, None] if model_class is ReformerForMultipleChoice else ids
    # Loaded weights are aligned differently in memory, which can change the order of a sum.
    torch.testing.assert_close(logits_of(loaded, ids), logits_of(model, ids))


@pytest.mark.parametrize("settings", [{}, TIED], ids=["untied", "tied"])
def test_a_shard_at_a_time(settings, tmp_path):
    model = make_model(ReformerForCausalLM, **settings)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_equal_tensors(ReformerForCausalLM.from_pretrained(tmp_path).state_dict(), model.state_dict())


def test_every_missing_weight_is_told_once(tmp_path):
    saved(tmp_path)
    save_file({"other": torch.zeros(1)}, tmp_path / WEIGHTS, metadata={"format": "pt"})
    model, info = ReformerForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {name for name, _ in model.named_parameters()}
    assert not model.lm_head.bias.any()


@pytest.mark.parametrize("settings", [{}, TIED], ids=["untied", "tied"])
def test_a_head_on_a_language_models_body(settings, tmp_path):
    body = saved(tmp_path, ReformerForCausalLM, **settings)
    model, info = ReformerForTokenClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}
    head = {"lm_head.bias", "lm_head.decoder.bias"} | ({"lm_head.decoder.weight"} if settings != TIED else set())
    assert info["unexpected_keys"] == head
    assert_equal_tensors(model.reformer.state_dict(), body.reformer.state_dict())
    # A new layer starts like any other, and the tables of the base model too.
    assert model.classifier.weight.std().item() == pytest.approx(TINY["initializer_range"], rel=0.3)
    assert not model.classifier.bias.any()


@pytest.mark.parametrize("settings", [{}, TIED], ids=["untied", "tied"])
def test_new_models_have_the_initial_weights_of_their_config(settings):
    """Five standard deviations of the estimate, for 1024 numbers or more, are below 12%."""
    model = ReformerForCausalLM(
        tiny_config(initializer_range=0.05, axial_norm_std=3.0, attn_layers=["lsh", "local"] * 2, **settings)
    )
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            assert not weight.any(), name
        elif "layer_norm" in name:
            assert (weight == 1).all(), name
        elif "position" not in name:
            assert weight.std().item() == pytest.approx(0.05, rel=0.12), name
    table = torch.cat([table.flatten() for table in position_table(model)])
    assert table.std().item() == pytest.approx(3.0, rel=0.2)
    learned = ReformerModel(tiny_config(initializer_range=0.05, **LEARNED))
    assert position_table(learned)[0].std().item() == pytest.approx(0.05, rel=0.12)


# The names of the head's bias in files of several versions of transformers; zeros are what that version ignores.
BIASES = {
    "v4": lambda bias: {"lm_head.bias": bias, "lm_head.decoder.bias": bias.clone()},
    "5.0 to 5.23": lambda bias: {"lm_head.bias": bias},
    "5.24": lambda bias: {"lm_head.bias": torch.zeros_like(bias), "lm_head.decoder.bias": bias},
    "without the unused one": lambda bias: {"lm_head.decoder.bias": bias},
}


@pytest.mark.parametrize("version", BIASES)
@pytest.mark.parametrize("model_class", [ReformerForCausalLM, ReformerForMaskedLM])
def test_the_bias_of_the_head_by_any_name(model_class, version, tmp_path, logs):
    model = saved(tmp_path, model_class)
    assert model.lm_head.bias is model.get_output_embeddings().bias
    weights = load_file(tmp_path / WEIGHTS)
    bias = weights.pop("lm_head.bias")
    assert torch.equal(weights.pop("lm_head.decoder.bias"), bias) and bias.any()
    weights |= BIASES[version](bias)
    save_file(weights, tmp_path / WEIGHTS, {"format": "pt"})
    loaded, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert logs() == []
    others = [model_class(tiny_config()) for _ in range(2)]
    for other, assign in zip(others, (False, True), strict=True):
        other.load_state_dict(weights, assign=assign)
    for twin in (loaded, *others, copy.deepcopy(loaded)):
        assert_equal_tensors(twin.state_dict(), model.state_dict())
        assert twin.lm_head.bias is twin.get_output_embeddings().bias


@pytest.mark.parametrize("version", BIASES)
def test_a_head_that_stays_on_disk(version, tmp_path):
    model = saved(tmp_path, axial_pos_embds=False)
    weights = load_file(tmp_path / WEIGHTS)
    weights |= BIASES[version](weights.pop("lm_head.bias") + 0 * weights.pop("lm_head.decoder.bias"))
    save_file(weights, tmp_path / WEIGHTS, {"format": "pt"})
    where = {"device_map": {"reformer": "cpu", "lm_head": "disk"}, "offload_folder": tmp_path / "offloaded"}
    loaded = ReformerForCausalLM.from_pretrained(tmp_path, **where)
    ids = random_ids(2, 20)
    torch.testing.assert_close(logits_of(loaded, ids), logits_of(model, ids))


@pytest.mark.parametrize("load", [ReformerForCausalLM, transformers.AutoModelForCausalLM])
def test_loading_in_bfloat16(load, tmp_path):
    model = saved(tmp_path, hash_seed=1)
    loaded = load.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {weight.dtype for weight in loaded.parameters()} == {torch.bfloat16}
    ids = random_ids(2, 40)
    rounded = copy.deepcopy(model)
    rounded.load_state_dict({name: weight.bfloat16().float() for name, weight in model.state_dict().items()})
    expected, actual = logits_of(rounded, ids), logits_of(loaded, ids)
    assert actual.dtype == torch.bfloat16
    # A hash of a low-precision vector may fall into another bucket: bound the error of the typical token.
    error = (actual.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.median() < 0.05
    loss = loaded.train()(ids, labels=ids).loss
    loss.backward()
    assert loss.isfinite()
    assert all(weight.grad.isfinite().all() for weight in loaded.parameters())


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_every_model_computes_in_low_precision(model_class):
    ids = random_ids(2, 40)
    ids = ids[:, None] if model_class is ReformerForMultipleChoice else ids
    model = make_model(model_class, attn_layers=["local", "lsh", "full"])
    for compute_in, context in (
        (torch.bfloat16, torch.autocast("cpu", enabled=False)),
        (torch.float32, torch.autocast("cpu", torch.bfloat16)),
    ):
        model.to(compute_in).train().zero_grad()
        with context:
            output = model(ids)[0]
        output.float().square().sum().backward()
        assert output.isfinite().all()
        assert all(weight.grad.isfinite().all() and weight.grad.dtype == compute_in for weight in model.parameters())


# --- another position table ---


def expected_tables(model, lengths):
    """Cropped, or continued from the start."""
    return [
        table[torch.arange(length) % len(table)] for table, length in zip(position_table(model), lengths, strict=True)
    ]


# The table of the checkpoint and the wanted one: cropped and extended on each axis.
AXIAL_CASES = {
    "first axis cropped": ({}, (4, 16)),
    "first axis extended": ({}, (19, 16)),
    "last axis cropped": ({}, (8, 10)),
    "last axis extended": ({}, (8, 40)),
    "cropped and extended": ({}, (3, 64)),
    "same number of positions": ({}, (16, 8)),
    "three axes": (THREE_AXES, (2, 3, 20)),
    "one axis": ({"axial_pos_shape": [128], "axial_pos_embds_dim": [32]}, (300,)),
}
AS_ARGUMENT = {
    "argument": ReformerForCausalLM.from_pretrained,
    "argument of the Auto class": transformers.AutoModelForCausalLM.from_pretrained,
    "config": lambda path, **table: ReformerForCausalLM.from_pretrained(
        path, config=ReformerConfig.from_pretrained(path, **table)
    ),
    "config of the Auto class": lambda path, **table: transformers.AutoModelForCausalLM.from_pretrained(
        path, config=ReformerConfig.from_pretrained(path, **table)
    ),
}


@pytest.mark.parametrize("way", AS_ARGUMENT)
@pytest.mark.parametrize("case", AXIAL_CASES)
def test_another_axial_table(case, way, tmp_path, logs):
    settings, shape = AXIAL_CASES[case]
    model = saved(tmp_path / "first", **settings)
    load = AS_ARGUMENT[way]
    loaded = load(tmp_path / "first", axial_pos_shape=list(shape))
    assert [line for line in logs() if "position table was resized" in line] == logs()
    (line,) = logs()
    assert f"from {tuple(model.config.axial_pos_shape)} to {shape}" in line
    for actual, expected in zip(position_table(loaded), expected_tables(model, shape), strict=True):
        assert torch.equal(actual, expected)
    others = {name: weight for name, weight in model.state_dict().items() if "position" not in name}
    assert_equal_tensors({name: loaded.state_dict()[name] for name in others}, others)

    positions = torch.Size(shape).numel()
    assert tuple(loaded.config.axial_pos_shape) == shape
    assert loaded.config.max_sequence_length == positions
    assert logits_of(loaded, random_ids(1, positions)).isfinite().all()
    with pytest.raises(ValueError, match=f"the position embeddings reach {positions}"):
        loaded(random_ids(1, positions + 1))
    if shape[1:] == tuple(model.config.axial_pos_shape)[1:]:
        # Positions that both have keep their vectors.
        ids = random_ids(1, min(positions, 128))
        torch.testing.assert_close(logits_of(loaded, ids), logits_of(model, ids))

    loaded.save_pretrained(tmp_path / "second")
    again, info = ReformerForCausalLM.from_pretrained(tmp_path / "second", output_loading_info=True)
    assert not any(info.values())
    assert len(logs()) == 1
    assert_equal_tensors(again.state_dict(), loaded.state_dict())


@pytest.mark.parametrize("way", AS_ARGUMENT)
@pytest.mark.parametrize("length", [50, 300])
def test_another_number_of_learned_positions(length, way, tmp_path, logs):
    model = saved(tmp_path, **LEARNED)
    loaded = AS_ARGUMENT[way](tmp_path, max_position_embeddings=length)
    (line,) = logs()
    assert f"resized from 128 to {length}" in line
    assert torch.equal(position_table(loaded)[0], *expected_tables(model, [length]))
    assert loaded.config.max_position_embeddings == loaded.config.max_sequence_length == length
    ids = random_ids(1, min(length, 128))
    torch.testing.assert_close(logits_of(loaded, ids), logits_of(model, ids))
    assert logits_of(loaded, random_ids(1, length)).isfinite().all()


@pytest.mark.parametrize("way", AS_ARGUMENT)
def test_the_same_table_is_not_worth_a_line(way, tmp_path, logs):
    model = saved(tmp_path)
    loaded = AS_ARGUMENT[way](tmp_path, axial_pos_shape=(8, 16), max_position_embeddings=128)
    loaded.resize_position_embeddings((8, 16))
    assert logs() == []
    assert_equal_tensors(loaded.state_dict(), model.state_dict())


@pytest.mark.parametrize("way", AS_ARGUMENT)
def test_fewer_positions_than_the_grid_has(way, tmp_path):
    saved(tmp_path)
    loaded = AS_ARGUMENT[way](tmp_path, max_position_embeddings=100)
    assert tuple(loaded.config.axial_pos_shape) == (8, 16)
    with pytest.raises(ValueError, match="reach 100"):
        loaded(random_ids(1, 101))


@pytest.mark.parametrize("way", AS_ARGUMENT)
@pytest.mark.parametrize("settings", [{}, THREE_AXES], ids=["two axes", "three axes"])
def test_more_positions_than_the_grid_has_make_its_first_axis_longer(settings, way, tmp_path):
    model = saved(tmp_path, **settings)
    loaded = AS_ARGUMENT[way](tmp_path, max_position_embeddings=300)
    first, *others = model.config.axial_pos_shape
    rows = -(-300 // torch.Size(others).numel())
    assert loaded.get_position_embeddings().shape == (rows, *others)
    assert rows > first
    assert loaded.config.max_sequence_length == 300
    ids = random_ids(1, 128)
    torch.testing.assert_close(logits_of(loaded, ids), logits_of(model, ids))
    assert logits_of(loaded, random_ids(1, 300)).isfinite().all()


def test_loading_info_comes_with_another_table(tmp_path):
    saved(tmp_path)
    model, info = ReformerForCausalLM.from_pretrained(tmp_path, axial_pos_shape=(4, 16), output_loading_info=True)
    assert not any(info.values())
    assert model.get_position_embeddings().shape == (4, 16)


def test_the_config_that_was_given_stays_as_it_is(tmp_path):
    saved(tmp_path)
    config = tiny_config(axial_pos_shape=[4, 16])
    before = config.to_dict()
    ReformerForCausalLM.from_pretrained(tmp_path, config=config)
    assert config.to_dict() == before


def test_other_settings_count_too(tmp_path):
    saved(tmp_path)
    others = {"num_hashes": 5, "circular_look_around": False, "num_buckets": None}
    table = {"axial_pos_shape": (4, 16)}
    for model in (
        ReformerForMaskedLM.from_pretrained(tmp_path, config=tiny_config(**others, **table)),
        ReformerForMaskedLM.from_pretrained(tmp_path, **others, **table),
        transformers.AutoModelForMaskedLM.from_pretrained(tmp_path, **others, **table),
    ):
        assert {name: getattr(model.config, name) for name in (*others, *table)} == others | table


def test_a_resized_table_stays_frozen(tmp_path):
    model = make_model(ReformerForCausalLM)
    model.get_position_embeddings().requires_grad_(False)
    model.resize_position_embeddings((4, 32))
    assert not any(table.requires_grad for table in model.get_position_embeddings().weights)
    model.train()(random_ids(1, 20), labels=random_ids(1, 20)).loss.backward()


TABLE_ERRORS = {
    "fewer axes": (
        {},
        {"axial_pos_shape": [128]},
        r"have 2 axes of lengths \[8, 16\] and cannot be resized to \[128\]",
    ),
    "more axes": (
        {},
        {"axial_pos_shape": [2, 4, 16]},
        r"2 axes .* cannot be resized to \[2, 4, 16\]. Give one positive",
    ),
    "empty axis": (
        {},
        {"axial_pos_shape": [0, 16]},
        r"cannot be resized to \[0, 16\]. Give one positive length per axis",
    ),
    "no positions": (LEARNED, {"max_position_embeddings": 0}, "must be a positive integer, but got 0"),
}


@pytest.mark.parametrize("case", TABLE_ERRORS)
def test_tables_that_cannot_be(case, tmp_path):
    settings, table, message = TABLE_ERRORS[case]
    saved(tmp_path, **settings)
    with pytest.raises(ValueError, match=message):
        ReformerForCausalLM.from_pretrained(tmp_path, **table)


@pytest.mark.parametrize("load", [ReformerForCausalLM, transformers.AutoModelForCausalLM])
@pytest.mark.parametrize("axial", [True, False])
def test_axial_positions_cannot_become_learned_ones(axial, load, tmp_path):
    saved(tmp_path, axial_pos_embds=axial)
    message = f"checkpoint has `axial_pos_embds={axial}` and not `axial_pos_embds={not axial}`: there are no weights"
    with pytest.raises(ValueError, match=message):
        load.from_pretrained(tmp_path, config=tiny_config(axial_pos_embds=not axial))
    with pytest.raises(ValueError, match=message):
        load.from_pretrained(tmp_path, axial_pos_embds=not axial)


@pytest.mark.parametrize(("kind", "other"), [("axial", "rotary"), ("learned", "none"), ("rotary", "none")])
def test_the_kind_of_positions_is_the_checkpoints(kind, other, tmp_path):
    model = saved(tmp_path, position_embedding_type=kind)
    with pytest.raises(ValueError, match="there are no weights for that"):
        ReformerForCausalLM.from_pretrained(tmp_path, config=tiny_config(position_embedding_type=other))
    message = f"checkpoint has `position_embedding_type={kind}` and not `position_embedding_type={other}`"
    with pytest.raises(ValueError, match=message):
        ReformerForCausalLM.from_pretrained(tmp_path, position_embedding_type=other)
    loaded = ReformerForCausalLM.from_pretrained(tmp_path, position_embedding_type=kind)
    assert_equal_tensors(loaded.state_dict(), model.state_dict())


@pytest.mark.parametrize("kind", ["rotary", "none"])
def test_positions_without_a_table(kind, tmp_path):
    """Nothing to save of them and nothing to resize; what other settings say is taken over."""
    model = saved(
        tmp_path, position_embedding_type=kind, rope_parameters={"rope_theta": 20.0} if kind == "rotary" else None
    )
    assert not [name for name in model.state_dict() if "position" in name or "freq" in name]
    assert model.get_position_embeddings() is None
    for load in AS_ARGUMENT.values():
        loaded = load(tmp_path, max_position_embeddings=64)
        assert loaded.config.max_position_embeddings == 64
        assert loaded.config.rope_parameters == model.config.rope_parameters
        ids = random_ids(2, 200)
        with torch.no_grad():
            assert torch.equal(loaded(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match=f"`position_embedding_type='{kind}'` has no table of positions"):
        model.resize_position_embeddings(256)


@pytest.mark.parametrize("settings", [THREE_AXES, {"axial_pos_embds_dim": [16, 16]}], ids=["axes", "sizes"])
def test_axes_keep_their_number_and_sizes(settings, tmp_path):
    saved(tmp_path)
    message = r"checkpoint has `axial_pos_embds_dim=\(8, 24\)` and not .* Use the checkpoint's value"
    with pytest.raises(ValueError, match=message):
        ReformerForCausalLM.from_pretrained(tmp_path, config=tiny_config(**settings))
    for load in (ReformerForCausalLM, transformers.AutoModelForCausalLM):
        with pytest.raises(ValueError, match=message):
            load.from_pretrained(tmp_path, **settings)


def test_weights_without_a_config_file(tmp_path):
    model = saved(tmp_path)
    (tmp_path / "config.json").unlink()
    for path, more in ((tmp_path, {}), (None, {"state_dict": model.state_dict()})):
        loaded = ReformerForCausalLM.from_pretrained(path, config=model.config, **more)
        assert_equal_tensors(loaded.state_dict(), model.state_dict())


# --- damaged files ---


@pytest.mark.parametrize("load", [ReformerForCausalLM, transformers.AutoModelForCausalLM])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value, load, tmp_path):
    saved(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    weights["lm_head.decoder.weight"][3, 4] = value
    save_file(weights, tmp_path / WEIGHTS, {"format": "pt"})
    message = r"values that are not finite .* in \['lm_head.decoder.weight'\]. .* use an earlier checkpoint"
    with pytest.raises(ValueError, match=message) as error:
        load.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)
    for name in weights:
        weights[name].fill_(value)
    save_file(weights, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match="and others"):
        load.from_pretrained(tmp_path, dtype=torch.bfloat16)


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("load", [ReformerForCausalLM, transformers.AutoModelForCausalLM])
def test_a_truncated_file_is_refused(load, kept, tmp_path):
    saved(tmp_path)
    data = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(data[: int(kept * len(data))])
    with pytest.raises(
        ValueError, match=r"weights file of .* is damaged or incomplete .* Copy or download it again"
    ) as e:
        load.from_pretrained(tmp_path)
    assert str(tmp_path) in str(e.value)


def test_settings_in_the_file_are_checked(tmp_path):
    saved(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_buckets": 5}))
    with pytest.raises(Exception, match="`num_buckets` must be an even number"):
        ReformerForCausalLM.from_pretrained(tmp_path)


# --- on the Hub ---


@pytest.fixture
def hub(monkeypatch):
    """A Hub without repositories; the files that it is sent."""
    sent = {}

    def create_commit(self, repo_id, operations, **kwargs):
        for operation in operations:
            with operation.as_file() as file:
                sent[operation.path_in_repo] = file.read()

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **kwargs: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    return sent


PUSH = {
    "push_to_hub": lambda model, folder: model.push_to_hub("me/mine"),
    "save_pretrained": lambda model, folder: model.save_pretrained(folder, push_to_hub=True, repo_id="me/mine"),
}


@pytest.mark.parametrize("settings", [{}, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("way", PUSH)
def test_the_card_of_a_pushed_model_says_how_to_load_it(way, settings, hub, tmp_path, monkeypatch):
    model = make_model(ReformerForCausalLM, **settings)
    PUSH[way](model, tmp_path / "pushed")
    card = ModelCard(hub["README.md"].decode())
    assert card.data.library_name == "transformers"
    code = card.text.split("```python")[1].split("```")[0]
    repository = tmp_path / "me" / "mine"
    repository.mkdir(parents=True)
    for name, content in hub.items():
        (repository / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert_equal_tensors(names["model"].state_dict(), model.state_dict())


def test_a_card_that_names_the_package_stays_as_it_is(hub, tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nLoaded with hf_reformer.\n")
    card = ModelCard.load(tmp_path / "README.md")
    monkeypatch.setattr(ModelCard, "load", classmethod(lambda cls, path, **kwargs: card))
    make_model(ReformerForCausalLM).push_to_hub("me/mine")
    assert hub["README.md"].decode().endswith("---\nLoaded with hf_reformer.\n")
