"""The models: who finds them, what they attend to, inputs of every kind and length, outputs, randomness, errors."""

import copy
import importlib
import json

import pytest
import torch
import transformers
from tiny_models import (
    DROPOUT,
    LONGEST,
    STACKS,
    VOCAB,
    assert_equal_tensors,
    gradients,
    make_model,
    random_ids,
    tiny_config,
)
from transformers import DynamicCache, set_seed
from transformers.models.auto import modeling_auto
from transformers.models.reformer import modeling_reformer as stock
from transformers.models.reformer.configuration_reformer import ReformerConfig as StockConfig

import hf_reformer
from hf_reformer import (
    ReformerConfig,
    ReformerForCausalLM,
    ReformerForConditionalGeneration,
    ReformerForMaskedLM,
    ReformerForMultipleChoice,
    ReformerForQuestionAnswering,
    ReformerForSequenceClassification,
    ReformerForTokenClassification,
    ReformerModel,
)


AUTO_CLASSES = {
    "AutoModel": ReformerModel,
    "AutoModelForCausalLM": ReformerForCausalLM,
    "AutoModelForMaskedLM": ReformerForMaskedLM,
    "AutoModelForMultipleChoice": ReformerForMultipleChoice,
    "AutoModelForPreTraining": ReformerForCausalLM,
    "AutoModelForQuestionAnswering": ReformerForQuestionAnswering,
    "AutoModelForSeq2SeqLM": ReformerForConditionalGeneration,
    "AutoModelForSequenceClassification": ReformerForSequenceClassification,
    "AutoModelForTextEncoding": ReformerModel,
    "AutoModelForTokenClassification": ReformerForTokenClassification,
}
# An encoder with a decoder has a file of its own, test_seq2seq.py.
MODEL_CLASSES = tuple(dict.fromkeys(each for name, each in AUTO_CLASSES.items() if name != "AutoModelForSeq2SeqLM"))
LANGUAGE_MODELS = (ReformerForCausalLM, ReformerForMaskedLM)
STOCK_CLASSES = {
    "AutoModel": stock.ReformerModel,
    "AutoModelForCausalLM": stock.ReformerModelWithLMHead,
    "AutoModelForMaskedLM": stock.ReformerForMaskedLM,
    "AutoModelForQuestionAnswering": stock.ReformerForQuestionAnswering,
    "AutoModelForSequenceClassification": stock.ReformerForSequenceClassification,
}


def logits_of(model, *args, **kwargs):
    with torch.no_grad():
        return model(*args, **kwargs).logits


# --- names ---


def test_public_names():
    assert hf_reformer.ReformerModelWithLMHead is ReformerForCausalLM
    for name in hf_reformer.__all__:
        assert getattr(hf_reformer, name).__module__.startswith("hf_reformer.")
    named = {name.removeprefix("Reformer") for name in hf_reformer.__all__ if name.startswith("ReformerFor")}
    tasks = named - {"ForConditionalGeneration"} | {"ForPreTraining", "ForSeq2SeqLM", "ForTextEncoding"}
    assert set(AUTO_CLASSES) - {"AutoModel"} == {f"AutoModel{task}" for task in tasks}


@pytest.mark.parametrize("name", [name for name in hf_reformer.__all__ if name.startswith("Reformer")])
def test_transformers_gives_our_class_of_a_name(name):
    assert getattr(transformers, name) is getattr(hf_reformer, name)


def test_no_auto_class_gives_stock_for_our_config():
    auto_classes = [value for name, value in vars(modeling_auto).items() if name.startswith("AutoModel")]
    assert len(auto_classes) > 30
    found = {auto.__name__: getattr(auto._model_mapping, "get", {}.get)(ReformerConfig, None) for auto in auto_classes}
    assert {name: model_class for name, model_class in found.items() if model_class is not None} == AUTO_CLASSES


@pytest.mark.parametrize("name", AUTO_CLASSES)
def test_auto_classes_give_our_models(name, tmp_path):
    auto_class, model_class = getattr(transformers, name), AUTO_CLASSES[name]
    changes = {"is_encoder_decoder": name == "AutoModelForSeq2SeqLM"}
    assert type(auto_class.from_config(tiny_config(**changes))) is model_class
    make_model(model_class, **changes).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    for architectures in (["ReformerModelWithLMHead"], None):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": architectures}))
        assert type(auto_class.from_pretrained(tmp_path)) is model_class


@pytest.mark.parametrize("name", STOCK_CLASSES)
def test_a_stock_config_object_gives_the_stock_model(name):
    is_causal = name == "AutoModelForCausalLM"
    config = StockConfig(attn_layers=["local"], is_decoder=is_causal)
    assert type(getattr(transformers, name).from_config(config)) is STOCK_CLASSES[name]


# --- direction ---


def change_at(ids, position):
    changed = ids.clone()
    changed[:, position] = (changed[:, position] - 3 + 7) % (VOCAB - 3) + 3
    return changed


@pytest.mark.parametrize("is_decoder", [True, False])
@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_the_class_decides_the_direction(model_class, is_decoder):
    """The other heads and the bare model follow the config. The config itself stays as its owner made it."""
    config = tiny_config(is_decoder=is_decoder)
    before = config.to_dict()
    model = model_class(config).eval()
    is_causal = {ReformerForCausalLM: True, ReformerForMaskedLM: False}.get(model_class, is_decoder)
    assert model.config.is_decoder is model.base_model.config.is_decoder is is_causal
    assert config.to_dict() == before
    base, ids = model.base_model, random_ids(1, 10)
    with torch.no_grad():
        past = [base(tokens).last_hidden_state[:, :5] for tokens in (ids, change_at(ids, 5))]
    assert torch.equal(*past) is is_causal


@pytest.mark.parametrize("model_class", LANGUAGE_MODELS)
def test_a_config_that_already_says_so_is_the_models_own(model_class):
    config = tiny_config(is_decoder=model_class is ReformerForCausalLM)
    assert model_class(config).config is config


# Lengths below, at and above a chunk. In hashed attention a future token may move others between chunks; with one
# bucket for all tokens it cannot.
CAUSAL_CASES = {
    "local": ({"attn_layers": STACKS["local"], "local_num_chunks_after": 1}, (5, 16, 33, 100)),
    "local, no circle": ({"attn_layers": STACKS["local"], "circular_look_around": False}, (33, 100)),
    "full": ({"attn_layers": STACKS["full"]}, (5, 33, 100)),
    "lsh, exact": ({"attn_layers": STACKS["lsh"], "full_attention_threshold": 64}, (5, 33, 64)),
    "lsh, one bucket": ({"attn_layers": STACKS["lsh"], "lsh_num_chunks_after": 1}, (33, 100)),
    "lsh, as in the paper": (
        {
            "attn_layers": STACKS["lsh"],
            "attend_across_buckets": False,
            "allow_duplicate_attention": False,
            "circular_look_around": False,
        },
        (33, 100),
    ),
    "lsh, successors, exact": (
        {"attn_layers": STACKS["lsh"], "lsh_value_shift": 1, "full_attention_threshold": 64},
        (5, 33, 64),
    ),
    "lsh, successors, one bucket": ({"attn_layers": STACKS["lsh"], "lsh_value_shift": 1}, (33, 100)),
    "mixed": ({"attn_layers": STACKS["mixed"], "lsh_num_chunks_after": 1}, (33, 100)),
}


@pytest.mark.parametrize("case", CAUSAL_CASES)
def test_the_future_has_no_influence(case, monkeypatch):
    layer = importlib.import_module("hf_reformer.modeling.layers.lsh_attention")
    hash_vectors = layer.hash_vectors
    one_bucket = staticmethod(lambda *args: torch.zeros_like(hash_vectors(*args)))
    monkeypatch.setattr(layer.LSHSelfAttention, "_hash", one_bucket)
    changes, lengths = CAUSAL_CASES[case]
    model = make_model(ReformerForCausalLM, **changes)
    for length in lengths:
        ids = random_ids(2, length)
        for position in (length // 2, length - 1):
            before, after = logits_of(model, ids), logits_of(model, change_at(ids, position))
            assert torch.equal(before[:, :position], after[:, :position])
            assert not torch.equal(before[:, position:], after[:, position:])


@pytest.mark.parametrize("stack", STACKS)
def test_bidirectional_attention_sees_the_future(stack):
    model = make_model(ReformerForMaskedLM, attn_layers=STACKS[stack])
    ids = random_ids(1, 16)
    before, after = logits_of(model, ids), logits_of(model, change_at(ids, 15))
    assert ((before - after).abs().amax(-1) > 1e-3).all()


# --- lengths ---


@pytest.mark.parametrize("reversible", [True, False])
@pytest.mark.parametrize("model_class", LANGUAGE_MODELS)
def test_any_length_in_training_and_evaluation(model_class, reversible):
    """Changing at each step, with nothing left over from one step to the next."""
    model = make_model(model_class, attn_layers=STACKS["mixed"], num_buckets=None, hash_seed=0, reversible=reversible)
    alone = {}
    for length in (1, 63, 64, 65, 100, 7, LONGEST):
        fresh = copy.deepcopy(model).train()
        ids = random_ids(2, length)
        fresh(ids, labels=ids).loss.backward()
        alone[length] = ids, logits_of(fresh.eval(), ids), gradients(fresh)
    for length in (100, 64, 1, LONGEST, 65, 63, 7):
        ids, logits, expected = alone[length]
        assert logits.shape == (2, length, VOCAB)
        assert logits.isfinite().all()
        assert torch.equal(logits_of(model.eval(), ids), logits)
        model.zero_grad()
        model.train()(ids, labels=ids).loss.backward()
        assert_equal_tensors(gradients(model), expected)
        # A single token has no label when labels are shifted: its loss is the mean over nothing.
        if length > 1:
            assert all(gradient.isfinite().all() for gradient in expected.values())
        assert expected.keys() == dict(model.named_parameters()).keys()


# --- positions, embeddings, masks ---


def test_positions_and_words_are_added():
    """Position p of a grid of shape (8, 16) has the vectors of row p // 16 and column p % 16."""
    for axes in ({}, {"axial_pos_embds": False}):
        model = make_model(ReformerModel, **axes)
        ids, positions = random_ids(3, 20), torch.randint(LONGEST, (3, 20))
        table = model.embeddings.position_embeddings
        if axes:
            expected = table.embedding.weight[positions]
        else:
            rows, columns = table.weights
            expected = torch.cat([rows[positions // 16, 0], columns[0, positions % 16]], dim=-1)
        expected = expected + model.embeddings.word_embeddings.weight[ids]
        for mode in (model.train(), model.eval()):
            assert torch.equal(mode.embeddings(ids, position_ids=positions), expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("axial", [True, False])
def test_position_ids_are_honoured(axial, training):
    model = make_model(ReformerForMaskedLM, axial_pos_embds=axial, hash_seed=0).train(training)
    for length in (5, 37, 64):
        ids, counted = random_ids(2, length), torch.arange(length)
        default = logits_of(model, ids)
        assert torch.equal(logits_of(model, ids, position_ids=counted.expand(2, -1)), default)
        assert torch.equal(logits_of(model, ids, position_ids=counted[None]), default)
        shifted = logits_of(model, ids, position_ids=counted[None] + 5)
        assert ((shifted - default).abs().amax(-1) > 1e-3).all()
        one_row = logits_of(model, ids, position_ids=torch.stack([counted, counted + 5]))
        torch.testing.assert_close(one_row, torch.stack([default[0], shifted[1]]))


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_inputs_embeds_are_honoured(model_class):
    model = make_model(model_class, attn_layers=STACKS["mixed"], hash_seed=0, pad_token_id=None)
    for length in (5, 37):
        ids = random_ids(4, length)
        mask = torch.arange(length) < torch.tensor([length, length - 2, length // 2, 1])[:, None]
        others = {"attention_mask": mask, "position_ids": torch.arange(length).expand(4, -1) + 3}
        if model_class is ReformerForMultipleChoice:
            ids, mask = ids.view(2, 2, length), mask.view(2, 2, length)
            others = {"attention_mask": mask, "position_ids": others["position_ids"].view(2, 2, length)}
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        for more in ({}, others):
            expected = model.train()(ids, **more).to_tuple()
            actual = model(inputs_embeds=embedded, **more).to_tuple()
            assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))
        actual[0].square().sum().backward()
        assert embedded.grad[mask].abs().sum(-1).gt(0).any()


@pytest.mark.parametrize("stack", STACKS)
def test_the_mask_may_be_of_any_type(stack):
    model = make_model(ReformerForCausalLM, attn_layers=STACKS[stack])
    ids = random_ids(2, 40)
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, :7], mask[1, 30:], mask[1, 3] = False, False, False
    expected = logits_of(model, ids, attention_mask=mask)
    assert not torch.equal(expected, logits_of(model, ids))
    for dtype in (torch.long, torch.int32, torch.uint8, torch.float32, torch.bfloat16):
        assert torch.equal(logits_of(model, ids, attention_mask=mask.to(dtype)), expected)
    everything = logits_of(model, ids, attention_mask=torch.ones_like(ids))
    assert torch.equal(everything, logits_of(model, ids))


# --- hashing rounds for one call ---


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("num_hashes", [1, 4])
def test_num_hashes_of_one_call(num_hashes, training):
    changes = {"attn_layers": ["lsh", "local", "lsh"], "hash_seed": 3}
    model = make_model(ReformerForCausalLM, **changes).train(training)
    other = make_model(ReformerForCausalLM, **changes, num_hashes=num_hashes).train(training)
    ids = random_ids(2, 50)
    usual = logits_of(model, ids)
    actual, expected = model(ids, labels=ids, num_hashes=num_hashes), other(ids, labels=ids)
    assert torch.equal(actual.logits, expected.logits)
    assert not torch.equal(actual.logits, usual)
    actual.loss.backward()
    expected.loss.backward()
    assert_equal_tensors(gradients(model), gradients(other))
    assert torch.equal(logits_of(model, ids), usual)


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_every_model_takes_num_hashes(model_class):
    model = make_model(model_class, attn_layers=["lsh"])
    ids = random_ids(4, 50)
    if model_class is ReformerForMultipleChoice:
        ids = ids.view(2, 2, 50)
    with torch.no_grad():
        outputs = [model(ids, num_hashes=number)[0] for number in (None, model.config.num_hashes, 5)]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


# --- outputs ---


@pytest.mark.parametrize("reversible", [True, False])
@pytest.mark.parametrize("length", [5, 16, 37])
@pytest.mark.parametrize("model_class", [ReformerForCausalLM, ReformerForMaskedLM])
def test_attention_maps_and_hidden_states(model_class, length, reversible):
    is_causal = model_class is ReformerForCausalLM
    model = make_model(model_class, attn_layers=STACKS["mixed"], reversible=reversible)
    ids = random_ids(2, length)
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[1, : length // 3] = False
    plain = logits_of(model, ids, attention_mask=mask)
    outputs = model(ids, attention_mask=mask, output_attentions=True, output_hidden_states=True)
    # Maps are computed by another implementation than the one in use.
    torch.testing.assert_close(outputs.logits, plain)

    assert len(outputs.attentions) == 3
    for weights in outputs.attentions:
        assert weights.shape == (2, 2, length, length)
        # What a masked token attends to means nothing.
        weights = weights * mask[:, None, :, None]
        torch.testing.assert_close(weights.sum(-1), mask[:, None].expand(2, 2, -1).float())
        assert not (weights * ~mask[:, None, None, :]).any()
        assert bool(weights.triu(1).any()) is not is_causal

    assert len(outputs.hidden_states) == 4
    assert all(hidden.shape == (2, length, 32) for hidden in outputs.hidden_states)
    positions = (torch.arange(length) - (~mask).sum(1)[:, None]).clamp(min=0)
    embedded = model.base_model.embeddings(ids, position_ids=positions)
    assert torch.equal(outputs.hidden_states[0][mask], embedded[mask])


def test_the_last_hidden_state_is_the_second_stream():
    """Before the final LayerNorm, whose second half belongs to it."""
    model = make_model(ReformerModel, attn_layers=STACKS["mixed"])
    ids = random_ids(2, 37)
    captured = []
    model.encoder.layer_norm.register_forward_pre_hook(lambda module, inputs: captured.append(inputs[0]))
    hidden_states = model(ids, output_hidden_states=True).hidden_states
    assert torch.equal(captured[0][..., 32:], hidden_states[-1])
    assert not torch.equal(captured[0][..., :32], hidden_states[-1])


def test_outputs_asked_for_in_the_config():
    model = make_model(ReformerModel, output_hidden_states=True, output_attentions=True, attn_implementation="eager")
    outputs = model(random_ids(1, 20))
    assert len(outputs.hidden_states) == 3 and len(outputs.attentions) == 2
    outputs = model(random_ids(1, 20), output_hidden_states=False, output_attentions=False)
    assert outputs.hidden_states is None and outputs.attentions is None


@pytest.mark.parametrize("asked", [[0, 2], [-1, 1], [], 0, -2, [7, 1]])
def test_hidden_states_by_index(asked):
    model, ids = make_model(ReformerModel), random_ids(2, 20)
    indices = [asked] if isinstance(asked, int) else asked
    kept = {index % 3 for index in indices if index < 3}
    mask = torch.tensor([[1] * 20, [0] * 5 + [1] * 15])
    for arguments in ({}, {"attention_mask": mask}):
        expected = model(ids, output_hidden_states=True, **arguments).hidden_states
        states = model(ids, output_hidden_states=asked, **arguments).hidden_states
        assert [state is not None for state in states or (None,) * 3] == [place in kept for place in range(3)]
        assert all(torch.equal(states[place], expected[place]) for place in kept)


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_tuples_have_the_order_of_the_named_outputs(model_class):
    model = make_model(model_class, num_labels=3)
    ids = random_ids(4, 20)
    arguments = {"input_ids": ids, "output_attentions": True, "output_hidden_states": True}
    names = ["loss", "logits", "hidden_states", "attentions"]
    labels = {"labels": ids}
    if model_class is ReformerModel:
        names, labels = ["last_hidden_state", "hidden_states", "attentions"], {}
    elif model_class is ReformerForQuestionAnswering:
        names = ["loss", "start_logits", "end_logits", "hidden_states", "attentions"]
        labels = {"start_positions": torch.tensor([1, 2, 3, 4]), "end_positions": torch.tensor([5, 6, 7, 8])}
    elif model_class is ReformerForSequenceClassification:
        labels = {"labels": torch.tensor([0, 1, 2, 0])}
    elif model_class is ReformerForTokenClassification:
        labels = {"labels": ids % 3}
    elif model_class is ReformerForMultipleChoice:
        arguments["input_ids"], labels = ids.view(2, 2, 20), {"labels": torch.tensor([0, 1])}
    with torch.no_grad():
        for more, expected_names in ((labels, names), ({}, [name for name in names if name != "loss"])):
            named = model(**arguments, **more)
            assert list(named) == expected_names
            tuples = [model(**arguments, **more, return_dict=False)]
            model.config.return_dict = False
            tuples.append(model(**arguments, **more))
            assert list(model(**arguments, **more, return_dict=True)) == expected_names
            model.config.return_dict = True
            for values in tuples:
                assert type(values) is tuple
                for name, value in zip(expected_names, values, strict=True):
                    pairs = [(named[name], value)] if torch.is_tensor(value) else zip(named[name], value, strict=True)
                    assert all(torch.equal(*pair) for pair in pairs)


# --- no hidden state ---


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_nothing_is_written_to_the_config(model_class):
    model = make_model(model_class, num_buckets=None, attn_layers=STACKS["mixed"], **DROPOUT)
    before = copy.deepcopy(model.config.__dict__)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for training in (True, False):
        for length in (5, 40, 100):
            ids = random_ids(2, length)
            ids = ids[:, None] if model_class is ReformerForMultipleChoice else ids
            model.train(training)(ids, output_attentions=True)[0].sum().backward()
    if model_class is ReformerForCausalLM:
        model.generate(random_ids(2, 30), max_new_tokens=3)
    assert model.config.__dict__ == before
    assert_equal_tensors(dict(model.named_buffers()), buffers)


@pytest.mark.parametrize("hash_seed", [None, 5])
def test_evaluation_leaves_the_global_generator_alone_and_repeats_itself(hash_seed):
    model = make_model(ReformerForCausalLM, attn_layers=["lsh", "lsh"], hash_seed=hash_seed, **DROPOUT)
    ids = random_ids(2, 70)
    state = torch.get_rng_state()
    first = model(ids, labels=ids)
    first.loss.backward()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    again = model(ids).logits
    assert torch.equal(again, first.logits)
    twin = make_model(ReformerForCausalLM, attn_layers=["lsh", "lsh"], hash_seed=hash_seed)
    assert torch.equal(twin(ids).logits, first.logits)
    assert torch.equal(logits_of(twin, ids), logits_of(model, ids))


def test_each_layer_has_rotations_of_its_own_in_evaluation():
    model = make_model(ReformerModel, attn_layers=["lsh", "lsh"])
    first, second = (
        layer.attention.self_attention.draw_rotations(64, 64, None, torch.device("cpu"))
        for layer in model.encoder.layers
    )
    assert not torch.equal(first, second)


def test_hash_seed_fixes_the_rotations_of_training():
    model = make_model(ReformerForCausalLM, attn_layers=["lsh", "lsh"], hash_seed=5)
    ids = random_ids(2, 70)
    state = torch.get_rng_state()
    assert torch.equal(logits_of(model.train(), ids), logits_of(model.eval(), ids))
    assert torch.equal(torch.get_rng_state(), state)
    other = make_model(ReformerForCausalLM, attn_layers=["lsh", "lsh"], hash_seed=6)
    assert not torch.equal(logits_of(other, ids), logits_of(model, ids))


def test_training_draws_fresh_rotations():
    model = make_model(ReformerForCausalLM, attn_layers=["lsh", "lsh"]).train()
    ids = random_ids(2, 70)
    assert not torch.equal(logits_of(model, ids), logits_of(model, ids))
    torch.manual_seed(3)
    first = logits_of(model, ids)
    torch.manual_seed(3)
    assert torch.equal(logits_of(model, ids), first)


@pytest.mark.parametrize("reversible", [True, False])
def test_set_seed_repeats_a_training_run(reversible):
    def train():
        set_seed(42)
        model = make_model(ReformerForCausalLM, attn_layers=STACKS["mixed"], reversible=reversible, **DROPOUT).train()
        set_seed(42)
        optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
        for length in (40, 70, 33, 70):
            ids = random_ids(2, length)
            loss = model(ids, labels=ids).loss
            state = torch.get_rng_state()
            loss.backward()
            assert torch.equal(torch.get_rng_state(), state)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        return {"losses": torch.stack(losses), **model.state_dict()}

    assert_equal_tensors(train(), train())


# --- errors ---


WITHOUT_TABLE_END = r"Shorten the input, or load the model with a larger `axial_pos_shape`"
ERRORS = {
    "id beyond the vocabulary": (
        {"input_ids": torch.tensor([[3, VOCAB]])},
        "`input_ids` holds values from 3 to 50, but must lie between 0 and 49. Use the model's own tokenizer",
    ),
    "negative id": ({"input_ids": torch.tensor([[-100, 4]])}, "`input_ids` holds values from -100 to 4, .* 0 and 49"),
    "position beyond the table": (
        {"input_ids": torch.tensor([[3, 4]]), "position_ids": torch.tensor([[0, 128]])},
        "`position_ids` holds values from 0 to 128, but must lie between 0 and 127",
    ),
    "negative position": (
        {"input_ids": torch.tensor([[3, 4]]), "position_ids": torch.tensor([[-1, 0]])},
        "`position_ids` holds values from -1 to 0, but must lie between 0 and 127",
    ),
    "positions of another shape": (
        {"input_ids": torch.ones(2, 9, dtype=torch.long), "position_ids": torch.arange(8)[None]},
        r"`position_ids` must have shape \[2, 9\] or \[1, 9\], but has \[1, 8\]",
    ),
    "too long": ({"input_ids": torch.ones(1, 129, dtype=torch.long)}, f"has 129 tokens, .* 128. {WITHOUT_TABLE_END}"),
    "too long, embedded": ({"inputs_embeds": torch.ones(1, 129, 32)}, "has 129 tokens, the position embeddings reach"),
    "empty": ({"input_ids": torch.ones(1, 0, dtype=torch.long)}, "no tokens: a sequence needs at least one"),
    "no rows": (
        {"input_ids": torch.ones(0, 9, dtype=torch.long)},
        r"The input, \[0, 9\], has no rows: a batch needs at least one",
    ),
    "no rows, embedded": ({"inputs_embeds": torch.ones(0, 9, 32)}, r"\[0, 9, 32\], has no rows"),
    "one row without a batch": (
        {"input_ids": torch.ones(9, dtype=torch.long)},
        r"`input_ids` must have shape \[batch, length\] .*, but got \[9\]",
    ),
    "vectors of another size": (
        {"inputs_embeds": torch.ones(1, 9, 31)},
        r"`inputs_embeds` \[batch, length, hidden size 32\], but got \[1, 9, 31\]",
    ),
    "mask of another shape": (
        {"input_ids": torch.ones(2, 9, dtype=torch.long), "attention_mask": torch.ones(2, 8)},
        r"`attention_mask` must have the input's shape \[2, 9\], but has \[2, 8\]",
    ),
    "neither": ({}, "Give exactly one of `input_ids` and `inputs_embeds`"),
    "both": (
        {"input_ids": torch.ones(1, 9, dtype=torch.long), "inputs_embeds": torch.ones(1, 9, 32)},
        "Give exactly one of `input_ids` and `inputs_embeds`",
    ),
    "cache": (
        {"input_ids": torch.ones(1, 9, dtype=torch.long), "cache": DynamicCache()},
        "is a DynamicCache; a Reformer takes a",
    ),
    "rounds": (
        {"input_ids": torch.ones(1, 9, dtype=torch.long), "num_hashes": 0},
        "`num_hashes` must be .* 1, but got 0",
    ),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", ERRORS)
def test_inputs_that_cannot_be_are_refused(case, training):
    arguments, message = ERRORS[case]
    for model_class in (ReformerForMaskedLM, ReformerForSequenceClassification):
        with pytest.raises(ValueError, match=message):
            make_model(model_class).train(training)(**arguments)


@pytest.mark.parametrize("wrong", ["position_ids", "length"])
def test_learned_positions_end_too(wrong):
    model = make_model(ReformerModel, axial_pos_embds=False, max_position_embeddings=40)
    if wrong == "length":
        with pytest.raises(ValueError, match=r"has 41 tokens, .* reach 40. .* \(or `max_position_embeddings`\)"):
            model(random_ids(1, 41))
    else:
        with pytest.raises(
            ValueError, match="`position_ids` holds values from 40 to 40, but must lie between 0 and 39"
        ):
            model(random_ids(1, 1), position_ids=torch.tensor([[40]]))


def test_multiple_choice_names_what_is_missing():
    model = make_model(ReformerForMultipleChoice)
    with pytest.raises(ValueError, match="Give exactly one of `input_ids` and `inputs_embeds`"):
        model(attention_mask=torch.ones(1, 2, 9))
    with pytest.raises(ValueError, match=r"\[batch, choices, length\].* got \[2, 9\]"):
        model(random_ids(2, 9))
    with pytest.raises(ValueError, match=r"\[2, 0, 9\], has no rows"):
        model(torch.ones(2, 0, 9, dtype=torch.long))


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_tied_embeddings_are_refused(model_class):
    with pytest.raises(ValueError, match=r"`tie_word_embeddings=True` is not possible: .* 64 numbers .* has 32"):
        model_class(tiny_config(tie_word_embeddings=True))
