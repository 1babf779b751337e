"""Models whose weights are elsewhere: on the meta device, offloaded by hooks, inside adapters, quantised."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import LoraConfig, get_peft_model
from tiny_models import MODEL_CLASSES, POSITIONS, TIED, make_model, random_ids

from hf_reformer import (
    ReformerForCausalLM,
    ReformerForMultipleChoice,
)
from hf_reformer.modeling.decoding.cache_naming import CACHE_NAME
from hf_reformer.modeling.weights_loading import CheckpointMixin


LAYERS = {"attn_layers": ["local", "lsh", "full"], "hash_seed": 1}
CPU = torch.device("cpu")


def inputs_for(model_class):
    """Ids and a mask with padding."""
    ids = random_ids(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    if model_class is ReformerForMultipleChoice:
        ids, mask = ids[:, None], mask[:, None]
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(
    ("model_class", "settings"),
    [(model_class, settings) for model_class in MODEL_CLASSES for settings in ({}, {"axial_pos_embds": False})]
    + [(ReformerForCausalLM, POSITIONS["LSH rotary"])],
)
def test_offloaded_weights_are_there_when_they_are_needed(model_class, settings, tmp_path):
    model = make_model(model_class, **LAYERS, **settings)
    inputs = inputs_for(model_class)
    with torch.no_grad():
        expected = model(**inputs)[0]
        for offload in (lambda model: cpu_offload(model, CPU), lambda model: disk_offload(model, tmp_path, CPU)):
            offloaded = copy.deepcopy(model)
            offload(offloaded)
            assert all(weight.is_meta for weight in offloaded.parameters())
            torch.testing.assert_close(offloaded(**inputs)[0], expected)


@pytest.mark.parametrize(
    "device_map",
    [{"": "disk"}, {"reformer.embeddings": "disk", "reformer.encoder": "cpu", "lm_head": "disk"}],
    ids=["all", "some"],
)
@pytest.mark.parametrize("positions", ["axial", "rotary"])
def test_generation_from_a_disk(device_map, positions, tmp_path):
    model = make_model(ReformerForCausalLM, **LAYERS, **POSITIONS[positions])
    model.save_pretrained(tmp_path)
    loaded = ReformerForCausalLM.from_pretrained(tmp_path, device_map=device_map, offload_folder=tmp_path / "offload")
    assert any(weight.is_meta for weight in loaded.parameters())
    inputs = inputs_for(ReformerForCausalLM)
    expected, actual = (m.generate(**inputs, max_new_tokens=4, do_sample=False) for m in (model, loaded))
    assert torch.equal(actual, expected)


def test_a_table_on_a_disk_keeps_its_size(tmp_path):
    make_model(ReformerForCausalLM, **LAYERS).save_pretrained(tmp_path)
    offload = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "offload"}
    with pytest.raises(ValueError, match="position table is offloaded and cannot be resized"):
        ReformerForCausalLM.from_pretrained(tmp_path, axial_pos_shape=(16, 16), **offload)
    model = make_model(ReformerForCausalLM, **LAYERS).to("meta")
    model.resize_position_embeddings((16, 16))
    assert model.config.max_sequence_length == 256


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_the_meta_device_computes_shapes(model_class):
    model, inputs = make_model(model_class, **LAYERS), inputs_for(model_class)
    with torch.no_grad():
        expected = model(**inputs)[0].shape
    model.to("meta").train()
    inputs = {name: tensor.to("meta") for name, tensor in inputs.items()}
    for kept in (inputs, {"input_ids": inputs["input_ids"]}):
        output = model(**kept)[0]
        assert output.is_meta and output.shape == expected
    output.sum().backward()
    assert all(weight.grad.shape == weight.shape for weight in model.parameters())


@pytest.mark.parametrize("masked", [True, False])
def test_the_meta_device_has_a_cache(masked):
    model = make_model(ReformerForCausalLM, **LAYERS).to("meta")
    inputs = {name: tensor.to("meta") for name, tensor in inputs_for(ReformerForCausalLM).items()}
    mask = inputs["attention_mask"] if masked else None
    with torch.no_grad():
        output = model(inputs["input_ids"], attention_mask=mask, use_cache=True)
        longer = torch.ones(2, 41, device="meta") if masked else None
        cache = {CACHE_NAME: output[CACHE_NAME]}
        assert model(inputs["input_ids"][:, :1], attention_mask=longer, **cache).logits.shape == (2, 1, 50)


ADAPTERS = {
    "lora on words": {"target_modules": ["word_embeddings", "query"]},
    "lora on learned positions": {"target_modules": ["embedding"]},
    "some tokens": {"target_modules": ["query"], "trainable_token_indices": [3, 4]},
    "whole modules": {"target_modules": ["query"], "modules_to_save": ["word_embeddings", "position_embeddings"]},
}


@pytest.mark.parametrize(
    ("adapter", "settings"), [(name, {}) for name in ADAPTERS] + [("lora on words", TIED), ("whole modules", TIED)]
)
def test_embeddings_inside_an_adapter(adapter, settings):
    model = make_model(ReformerForCausalLM, axial_pos_embds="learned" not in adapter, **LAYERS, **settings)
    inputs = inputs_for(ReformerForCausalLM)
    with torch.no_grad():
        expected = model(**inputs).logits
    model = get_peft_model(model, LoraConfig(init_lora_weights=True, **ADAPTERS[adapter]))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**inputs).logits, expected)
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)
    with pytest.raises(ValueError, match="`input_ids` holds values from 50 to 50, but must lie between 0 and 49"):
        model(torch.tensor([[50]]))
    assert model.base_model.model.get_position_embeddings().shape == ((8, 16) if "learned" not in adapter else 128)


class Quantised(torch.Tensor):
    """Stands for the weights of torchao: a subclass that says it is floating-point and lacks most operations."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.isfinite:
            raise NotImplementedError("isfinite")
        return super().__torch_function__(function, types, args, kwargs or {})


def test_quantised_weights_pass_the_check_of_damaged_ones(tmp_path):
    model = make_model(ReformerForCausalLM)
    model.save_pretrained(tmp_path)

    class Loader:
        @classmethod
        def from_pretrained(cls, path, **kwargs):
            model.lm_head.decoder.weight = torch.nn.Parameter(
                model.lm_head.decoder.weight.detach().as_subclass(Quantised)
            )
            model.reformer.encoder.layer_norm.bias.data = torch.zeros(64, dtype=torch.float8_e4m3fn)
            return model

    class Checkpoint(CheckpointMixin, Loader):
        config_class = ReformerForCausalLM.config_class

    assert Checkpoint.from_pretrained(tmp_path) is model
    with torch.no_grad():
        model.reformer.embeddings.word_embeddings.weight[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        Checkpoint.from_pretrained(tmp_path)
