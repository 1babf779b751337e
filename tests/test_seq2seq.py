"""Encoder and decoder: reversible on both sides, and what is read of the source."""

import copy

import pytest
import torch
from allocations import Allocations
from peft import LoraConfig, TaskType, get_peft_model
from reversible_models import relative_error
from seq2seq_models import ALL_DROPOUT, MASK, SAME_EACH_TIME, SOURCE, TARGET, inputs_of, make, train
from tiny_models import (
    STACKS,
    TIED,
    TINY,
    VOCAB,
    WINDOWS,
    assert_close,
    assert_equal_tensors,
    gradients,
    random_ids,
    tiny_config,
)

import hf_reformer
from hf_reformer import (
    ReformerConfig,
    ReformerForCausalLM,
    ReformerForConditionalGeneration,
)
from hf_reformer.modeling.layers import cross_attention
from hf_reformer.modeling.layers import reversible as reversible_module
from hf_reformer.modeling.layers.reversible import ReversibleTape


# Reversible.


CASES = {
    "exact": {},
    "dropout": ALL_DROPOUT,
    "eager": {"attn_implementation": "eager"},
    "eager with dropout": {"attn_implementation": "eager"} | ALL_DROPOUT,
    "pieces": {"chunk_size_feed_forward": 8} | ALL_DROPOUT,
    "loss in pieces": {"chunk_size_lm_head": 8},
    "tied, mean": TIED,
    "rotary, shifted": {"position_embedding_type": "rotary", "lsh_value_shift": 1},
    "stock's chunks": dict.fromkeys(WINDOWS, True) | {"lsh_sliding_window": False},
}


@pytest.fixture
def few_scores(monkeypatch):
    """Cross-attention of four target tokens at a time, where no kernel does it."""
    monkeypatch.setattr(cross_attention, "SCORES_AT_ONCE", 4 * 3 * TINY["num_attention_heads"] * SOURCE)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_ordinary_autograd(case, few_scores):
    expected = train(make(reversible=False, **CASES[case]))
    actual = train(make(**CASES[case]))
    model = make(**CASES[case])
    assert actual.keys() == {"loss", *(name for name, _ in model.named_parameters())}
    assert_close(actual, expected, within=1e-12)


@pytest.mark.parametrize("changes", [{}, ALL_DROPOUT], ids=["exact", "dropout"])
def test_in_float32(changes, few_scores):
    expected, actual = (train(make(reversible=each, **changes).float()) for each in (False, True))
    assert relative_error(actual, expected) < 1e-5


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_one_side_may_be_frozen(side):
    expected, model = train(make()), make()
    getattr(model.reformer, side).requires_grad_(False)
    actual = train(model)
    assert_equal_tensors(
        actual, {name: grad for name, grad in expected.items() if not name.startswith(f"reformer.{side}.")}
    )


def with_adapters(task_type=None, **changes):
    """A model with adapters in its cross-attention."""
    projections = r".*cross_attention\.(query|key|value)"
    config = LoraConfig(
        task_type=task_type, r=2, lora_dropout=0.3, target_modules=projections, init_lora_weights=False
    )
    torch.manual_seed(5)
    return get_peft_model(make(**changes), config)


@pytest.mark.parametrize("task_type", [None, TaskType.SEQ_2_SEQ_LM])
def test_adapters_on_cross_attention(task_type):
    expected = train(with_adapters(task_type, reversible=False))
    assert len(expected) == 1 + 6 * len(STACKS["mixed"])
    assert_close(train(with_adapters(task_type)), expected)


def test_a_model_with_adapters_writes_what_the_merged_one_writes():
    model, source = with_adapters(TaskType.SEQ_2_SEQ_LM).eval(), random_ids(2, SOURCE)
    written = model.generate(input_ids=source, max_new_tokens=5, do_sample=False)
    with model.disable_adapter():
        without = model.generate(input_ids=source, max_new_tokens=5, do_sample=False)
    merged = model.merge_and_unload().generate(input_ids=source, max_new_tokens=5, do_sample=False)
    assert torch.equal(written, merged) and not torch.equal(written, without)


def test_accumulated_batches_equal_the_whole_one():
    inputs, model = inputs_of(), make(**SAME_EACH_TIME)
    expected, items = train(make(**SAME_EACH_TIME), **inputs), (inputs["labels"] != -100).sum()
    losses = []
    for row in range(3):
        its = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        losses.append(train(model, **its, num_items_in_batch=items)["loss"])
    assert_close({"loss": sum(losses)} | gradients(model), expected)


def test_inversion_recovers_the_very_bits(monkeypatch):
    """Through three halves a layer, in bfloat16, eight layers deep."""
    taken, recovered = {}, {}
    verify_input, invert = ReversibleTape.verify_input, reversible_module._invert

    def take(tape, layer_idx, streams):
        streams = verify_input(tape, layer_idx, streams)
        taken[id(tape), layer_idx] = torch.stack(streams).detach()
        return streams

    def watch(call, half, *args):
        streams, *rest = invert(call, half, *args)
        if half is call.halves[0]:
            recovered[id(call.tape), call.layer_idx] = torch.stack(streams)
        return streams, *rest

    monkeypatch.setattr(ReversibleTape, "verify_input", take)
    monkeypatch.setattr(reversible_module, "_invert", watch)
    model = make(decoder_attn_layers=["local", "lsh"] * 4, **ALL_DROPOUT).float()
    with torch.autocast("cpu", torch.bfloat16):
        train(model)
    assert len(recovered) == 2 + 8
    for place, streams in recovered.items():
        assert torch.equal(streams, taken[place])


@pytest.mark.parametrize("reentrant", [True, False])
def test_ordinary_layers_may_be_checkpointed(reentrant):
    expected, model = train(make(reversible=False, **ALL_DROPOUT)), make(reversible=False, **ALL_DROPOUT)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_close(train(model), expected)


def test_what_is_kept_does_not_grow_with_depth():
    def kept(depth):
        seen = {}
        model, inputs = make(decoder_attn_layers=["local", "lsh"] * depth), inputs_of()

        def keep(tensor):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model.train()(**inputs).loss
        loss.backward()
        return sum(size for place, size in seen.items() if place not in weights)

    assert kept(1) == kept(4)


@pytest.mark.parametrize("changes", [{}, {"cross_attention_probs_dropout_prob": 0.1}], ids=["kernel", "pieces"])
def test_nothing_has_the_size_of_target_times_source(changes, monkeypatch):
    monkeypatch.setattr(cross_attention, "SCORES_AT_ONCE", 2**12)
    model = make(**changes, axial_pos_shape=[32, 32], max_position_embeddings=1024).float().train()
    ids = random_ids(1, 1000)
    with Allocations() as allocations:
        model(ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    # A row of what is widest: both projections of the feed-forward.
    assert allocations.largest < 1000 * 100 < 1000 * 1000


def test_a_changed_source_is_noticed():
    model, inputs = make(), inputs_of()
    source = torch.randn(3, SOURCE, model.config.output_size, dtype=torch.float64, requires_grad=True)
    outputs = source * 1
    loss = model(encoder_outputs=(outputs,), attention_mask=MASK, labels=inputs["labels"]).loss
    outputs.data.add_(0)
    with torch.no_grad():
        outputs.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_as_one_program():
    torch._dynamo.reset()
    expected, model = train(make()), make()
    torch.manual_seed(3)
    loss = torch.compile(model.train(), backend="aot_eager")(**inputs_of()).loss
    loss.backward()
    assert_close({"loss": loss.detach()} | gradients(model), expected)


# What reads what.


def logits_of(model, ids, mask=None, target=None):
    with torch.no_grad():
        return model(ids, attention_mask=mask, decoder_input_ids=target).logits


def test_a_masked_source_token_changes_nothing():
    model, target, ids = make(), random_ids(3, TARGET), random_ids(3, SOURCE)
    others = torch.where(MASK.bool(), ids, ids.flip(0) + 1)
    assert not torch.equal(others, ids)
    assert torch.equal(logits_of(model, ids, MASK, target), logits_of(model, others, MASK, target))


def test_every_other_source_token_changes_all():
    model, target, ids = make(), random_ids(1, TARGET), random_ids(1, SOURCE)
    for place in (0, SOURCE - 1):
        other = ids.clone()
        other[0, place] = (ids[0, place] + 1) % VOCAB
        assert (logits_of(model, ids, None, target) != logits_of(model, other, None, target)).any(-1).all()


def test_a_later_target_token_changes_no_earlier_logit():
    model, target, ids = make(), random_ids(1, TARGET), random_ids(1, SOURCE)
    before = logits_of(model, ids, None, target)
    target[0, 20:] = random_ids(1, TARGET - 20)
    after = logits_of(model, ids, None, target)
    torch.testing.assert_close(after[:, :20], before[:, :20], rtol=1e-12, atol=1e-12)
    assert (after[:, 20:] != before[:, 20:]).any(-1).all()


def test_a_padded_row_is_the_row_alone():
    model, target, ids = make(), random_ids(3, TARGET), random_ids(3, SOURCE)
    together = logits_of(model, ids, MASK, target)
    for row, is_real in enumerate(MASK.bool()):
        alone = logits_of(model, ids[row : row + 1, is_real], None, target[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-10, atol=1e-10)


def test_columns_behind_the_last_label_are_padding():
    """So a row's loss does not depend on how long the others are, with stock's chunks either."""
    inputs, model = (
        inputs_of(),
        make(**(CASES["stock's chunks"] | {"circular_look_around": False, "chunk_size_lm_head": 16})),
    )
    row = {name: tensor[2:] for name, tensor in inputs.items()}
    alone = row | {"labels": row["labels"][:, : TARGET // 2]}
    torch.testing.assert_close(model(**row).loss, model(**alone).loss, rtol=1e-12, atol=0)


def test_a_source_without_real_tokens_is_read_as_zeros():
    target, ids, mask = random_ids(3, TARGET), random_ids(3, SOURCE), MASK.clone()
    mask[1] = 0
    fused, eager = make(), make(attn_implementation="eager")
    found = [logits_of(model, ids, mask, target) for model in (fused, eager)]
    assert found[0].isfinite().all()
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-10)


def test_labels_are_not_shifted():
    model, inputs = make(), inputs_of()
    read = model.prepare_decoder_input_ids_from_labels(inputs["labels"])
    assert read[:, 0].tolist() == [0, 0, 0]
    assert torch.equal(read[0, 1:], inputs["labels"][0, :-1])
    assert read[2, TARGET // 2 + 1 :].eq(0).all()
    mask = inputs["labels"] != -100
    logits = model(inputs["input_ids"], MASK, decoder_input_ids=read, decoder_attention_mask=mask).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten())
    torch.testing.assert_close(model(**inputs).loss.double(), expected, rtol=1e-6, atol=0)


# Attention maps.


def test_maps_are_what_is_read():
    model, inputs = make(), inputs_of()
    plain = model(**inputs)
    shown = model(**inputs, output_attentions=True)
    torch.testing.assert_close(shown.logits, plain.logits, rtol=1e-10, atol=1e-10)
    for crossed in shown.cross_attentions:
        assert crossed.shape == (3, TINY["num_attention_heads"], TARGET, SOURCE)
        assert (crossed[:, :, : TARGET // 2] * ~MASK.bool()[:, None, None]).eq(0).all()
        torch.testing.assert_close(crossed.sum(-1)[:2], torch.ones_like(crossed.sum(-1)[:2]))
    shown.cross_attentions[0].retain_grad()
    shown.loss.backward()
    assert shown.cross_attentions[0].grad.abs().sum() > 0
    assert len(shown.encoder_attentions) == 2
    assert len(shown.decoder_attentions) == len(shown.cross_attentions) == 3


def test_hidden_states_of_both_sides():
    model, inputs = make(), inputs_of()
    outputs = model(**inputs, output_hidden_states=True)
    assert [state.shape[1] for state in outputs.encoder_hidden_states] == [SOURCE] * 3
    assert [state.shape[1] for state in outputs.decoder_hidden_states] == [TARGET] * 4
    outputs.decoder_hidden_states[1].retain_grad()
    outputs.loss.backward()
    assert outputs.decoder_hidden_states[1].grad.abs().sum() > 0


# Packed rows.


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_packed_documents_are_each_as_alone(implementation, few_scores):
    same = SAME_EACH_TIME | {"attn_implementation": implementation}
    model = make(**same)
    sources, targets = [[12, 5, 20], [30]], [[7, 16, 3], [25]]
    torch.manual_seed(4)

    def packed(lengths, width):
        rows, numbers = (
            torch.zeros(len(lengths), width, dtype=torch.long),
            torch.zeros(len(lengths), width, dtype=torch.long),
        )
        for row, counts in enumerate(lengths):
            start = 0
            for number, count in enumerate(counts, start=1):
                rows[row, start : start + count] = random_ids(1, count)
                numbers[row, start : start + count] = number
                start += count
        return rows, numbers

    (ids, mask), (labels, target_mask) = packed(sources, 40), packed(targets, 28)
    labels = labels.masked_fill(target_mask == 0, -100)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels, "decoder_attention_mask": target_mask}
    actual = train(model, **inputs)
    alone, items = make(**same).train(), (labels != -100).sum()
    for row, counts in enumerate(sources):
        for number in range(1, len(counts) + 1):
            source, target = ids[row, mask[row] == number], labels[row, target_mask[row] == number]
            alone(source[None], labels=target[None], num_items_in_batch=items).loss.backward()
    assert_close(gradients(model), gradients(alone))
    maps = make().train()(**inputs, output_attentions=True).cross_attentions
    same = mask[:, None, None] == target_mask[:, None, :, None]
    for crossed in maps:
        assert (crossed * ~same).eq(0).all()
        is_real = (target_mask > 0)[:, None].expand_as(crossed.sum(-1))
        torch.testing.assert_close(crossed.sum(-1)[is_real], torch.ones_like(crossed.sum(-1)[is_real]))
    assert actual["loss"].isfinite()
    with pytest.raises(ValueError, match=r"other documents than the target: \{0: 3, 1: 1\} and one in each row"):
        model(ids, attention_mask=mask, labels=labels)
    with pytest.raises(ValueError, match="would read each other"):
        model.eval().generate(ids, attention_mask=mask, max_new_tokens=2)


def test_projections_may_hold_other_numbers_than_they_compute_in():
    """As quantised ones do."""

    class Whole(torch.nn.Linear):
        def forward(self, inputs):
            return torch.nn.functional.linear(inputs, self.weight.to(inputs.dtype) / 64)

    model, inputs = make().requires_grad_(False), inputs_of()
    rounded = copy.deepcopy(model)
    for each in (model, rounded):
        for layer in each.reformer.decoder.encoder.layers:
            for name in ("key", "value"):
                project = getattr(layer.cross_attention, name)
                project.weight.data = (project.weight * 64).round() / 64
                if each is rounded:
                    whole = Whole(project.in_features, project.out_features, bias=False)
                    whole.weight = torch.nn.Parameter((project.weight * 64).to(torch.int8), requires_grad=False)
                    setattr(layer.cross_attention, name, whole)
    torch.testing.assert_close(rounded(**inputs).logits, model(**inputs).logits)


def test_layers_stay_whole_where_models_are_spread():
    model = make()
    assert set(model._no_split_modules) == {"ReformerLayer", "ReformerDecoderLayer"}
    assert set(ReformerForCausalLM(tiny_config())._no_split_modules) == {"ReformerLayer"}
    assert {"reformer.encoder.encoder.layers.*", "reformer.decoder.encoder.layers.*"} <= model._fsdp_plan.keys()


# Mistakes.


def test_configs_that_contradict_themselves():
    for changes, message in (
        ({"is_encoder_decoder": True, "is_decoder": True}, "is for one stack"),
        ({"decoder_attn_layers": ["lsh"]}, "needs `is_encoder_decoder=True`"),
        ({"is_encoder_decoder": True, "decoder_attn_layers": ["dense"]}, "`decoder_attn_layers` must name"),
        ({"is_encoder_decoder": True, "decoder_attn_layers": []}, "`decoder_attn_layers` must name"),
        ({"is_encoder_decoder": True, "cross_attention_probs_dropout_prob": 2}, "is a probability"),
    ):
        with pytest.raises(Exception, match=message):
            ReformerConfig(**changes)
    config = tiny_config(is_encoder_decoder=True)
    assert config.decoder_attn_layers == config.attn_layers
    later = tiny_config(pad_token_id=None, bos_token_id=5)
    later.is_encoder_decoder = True
    assert ReformerForConditionalGeneration(later).config.decoder_start_token_id == 5
    # As in a file of a stock model, which ignores it.
    untied = ReformerConfig.from_dict(config.to_dict() | {"tie_word_embeddings": True})
    assert not ReformerForConditionalGeneration(untied).config.tie_word_embeddings
    assert config.decoder_start_token_id == 0
    assert ReformerConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert config.get_text_config(decoder=True).attn_layers == config.decoder_attn_layers


def test_arguments_that_contradict_each_other():
    model, inputs = make(), inputs_of()
    ids, target = inputs["input_ids"], random_ids(3, TARGET)
    for arguments, message in (
        ({"input_ids": ids}, "`decoder_input_ids`"),
        ({"input_ids": ids, "decoder_input_ids": target[:2]}, "The source has 3 rows, the target 2"),
        ({"input_ids": ids, "decoder_input_ids": target, "seq_idx": torch.ones_like(ids)}, "whose documents"),
        ({"input_ids": ids, "labels": target + VOCAB}, "`labels` holds values from"),
        ({"input_ids": ids, "labels": target[0]}, "`labels` must have shape"),
        (
            {"input_ids": ids, "decoder_input_ids": target, "decoder_attention_mask": MASK},
            "`decoder_attention_mask` must have the target's shape",
        ),
        (
            {
                "encoder_outputs": (torch.zeros(3, SOURCE, 64).double(),),
                "decoder_input_ids": target,
                "attention_mask": MASK[:, 1:],
            },
            "that of the source",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            model(**arguments)
    given = {"decoder_input_ids": target, "ignore_index": -1}
    torch.testing.assert_close(
        model(ids, labels=inputs["labels"].masked_fill(inputs["labels"] < 0, -1), **given).loss,
        model(ids, labels=inputs["labels"], decoder_input_ids=target).loss,
    )
    with pytest.raises(ValueError, match=r"hf_reformer\.ReformerSeq2SeqCache"):
        model(ids, decoder_input_ids=target, cache=hf_reformer.ReformerCache(model.get_decoder().config))
    with pytest.raises(ValueError, match="needs a config with `is_encoder_decoder=True`"):
        ReformerForConditionalGeneration(tiny_config())
