"""The heads: which token speaks for a row, every loss by hand, embeddings that change size."""

import pytest
import torch
from tiny_models import (
    MODEL_CLASSES,
    TIED,
    VOCAB,
    assert_close,
    assert_equal_tensors,
    gradients,
    make_model,
    random_ids,
    tiny_config,
)

from hf_reformer import (
    ReformerForCausalLM,
    ReformerForMaskedLM,
    ReformerForMultipleChoice,
    ReformerForQuestionAnswering,
    ReformerForSequenceClassification,
    ReformerForTokenClassification,
)


LANGUAGE_MODELS = (ReformerForCausalLM, ReformerForMaskedLM)
LENGTH = 40
with_tied_embeddings = pytest.mark.parametrize("settings", [{}, TIED], ids=["untied", "tied"])


# --- pooling ---


def pooled_positions(model, ids, **kwargs):
    """Where the vector that the head of a sequence classifier gets stands in the last hidden state."""
    captured = []
    with torch.no_grad():
        handle = model.classifier.register_forward_pre_hook(lambda module, inputs: captured.append(inputs[0]))
        model(ids, **kwargs)
        handle.remove()
        hidden = model.reformer(ids, **kwargs).last_hidden_state
    same = (hidden == captured[0][:, None]).all(-1)
    # Padding behind a token shows that token's.
    is_real = kwargs.get("attention_mask", torch.ones_like(same)).bool()
    same = same & is_real
    assert (same.sum(1) == 1).all()
    return same.int().argmax(1).tolist()


@pytest.mark.parametrize(("is_decoder", "expected"), [(True, [9, 9, 6, 7]), (False, [0, 4, 0, 2])])
def test_pooling_by_the_mask(is_decoder, expected):
    """Rows without padding, padded on the left, on the right, on both sides; token 0 of the vocabulary counts."""
    model = make_model(ReformerForSequenceClassification, is_decoder=is_decoder)
    mask = torch.ones(4, 10, dtype=torch.long)
    mask[1, :4], mask[2, 7:], mask[3, :2], mask[3, 8:] = 0, 0, 0, 0
    ids = random_ids(4, 10)
    ids[:, [0, 4, 6, 9]] = 0
    assert pooled_positions(model, ids, attention_mask=mask) == expected
    embedded = model.get_input_embeddings()(ids)
    assert pooled_positions(model, None, inputs_embeds=embedded, attention_mask=mask.bool()) == expected


@pytest.mark.parametrize(("is_decoder", "expected"), [(True, [9, 9, 6]), (False, [0, 4, 0])])
def test_pooling_by_the_padding_token(is_decoder, expected):
    model = make_model(ReformerForSequenceClassification, is_decoder=is_decoder, pad_token_id=2)
    ids = random_ids(3, 10)
    ids[1, :4], ids[2, 7:] = 2, 2
    # One inside the row is no padding.
    ids[:, 5] = 2
    assert pooled_positions(model, ids) == expected
    for settings, inputs in (({"pad_token_id": None}, ids), ({"pad_token_id": 1}, ids)):
        other = make_model(ReformerForSequenceClassification, is_decoder=is_decoder, **settings)
        assert pooled_positions(other, inputs) == [9 if is_decoder else 0] * 3
    assert pooled_positions(model, None, inputs_embeds=torch.randn(3, 10, 32)) == [9 if is_decoder else 0] * 3


@pytest.mark.parametrize("is_decoder", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_class(side, is_decoder):
    """Each choice and each sequence scores what it scores alone; float64, so that nothing but an error shows."""
    changes = {"is_decoder": is_decoder, "circular_look_around": False, "num_labels": 3}
    ids, mask = random_ids(4, LENGTH), torch.ones(4, LENGTH, dtype=torch.bool)
    lengths = (LENGTH, 20, 11, 1)
    for row, length in enumerate(lengths):
        mask[row, : LENGTH - length] = side != "left"
        mask[row, length:] &= side == "left"
    assert mask.sum(1).tolist() == list(lengths)
    rows = [ids[row, mask[row]][None] for row in range(4)]
    classifier = make_model(ReformerForSequenceClassification, **changes).double()
    chooser = make_model(ReformerForMultipleChoice, **changes).double()
    with torch.no_grad():
        together, alone = classifier(ids, attention_mask=mask).logits, [classifier(row).logits for row in rows]
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-10, atol=1e-10)
        together = chooser(ids.view(2, 2, -1), attention_mask=mask.view(2, 2, -1)).logits
        alone = torch.cat([chooser(row[None]).logits for row in rows])
    assert together.shape == (2, 2)
    torch.testing.assert_close(together.flatten(), alone.flatten(), rtol=1e-10, atol=1e-10)


# --- losses ---


def log_likelihoods(logits, labels):
    """Of the labels that count, one by one."""
    counts = labels != -100
    return logits.log_softmax(-1)[counts].gather(-1, labels[counts][:, None]).squeeze(-1)


def with_gaps(labels):
    labels = labels.clone()
    labels[0, ::3], labels[1, -5:] = -100, -100
    return labels


@pytest.mark.parametrize("items", [None, 17, torch.tensor(17)], ids=["mean", "items", "items as tensor"])
@pytest.mark.parametrize("chunk_size", [0, 1, 7, LENGTH, 1000])
@pytest.mark.parametrize("model_class", LANGUAGE_MODELS)
def test_loss_of_language_models(model_class, chunk_size, items):
    """
    In pieces or in one, the value and every gradient, against the formula. The library takes the one-piece loss in
    float32 and float32 sums of 80 terms differ by some 1e-6 of their size. In pieces there are logits in evaluation
    only.
    """
    models = [make_model(model_class, chunk_size_lm_head=size, hash_seed=2).train() for size in (chunk_size, 0)]
    ids = random_ids(2, LENGTH)
    labels = with_gaps(ids)
    outputs = models[0](ids, labels=labels, num_items_in_batch=items)
    assert (outputs.logits is None) is (chunk_size > 0)
    logits, targets = models[1](ids).logits, labels
    evaluated = models[0].eval()(ids, labels=labels, num_items_in_batch=items)
    assert torch.equal(evaluated.logits, logits)
    assert torch.equal(evaluated.loss, outputs.loss)
    if model_class is ReformerForCausalLM:
        logits, targets = logits[:, :-1], labels[:, 1:]
    likelihoods = log_likelihoods(logits, targets)
    expected = -likelihoods.sum() / (len(likelihoods) if items is None else items)
    torch.testing.assert_close(outputs.loss, expected)
    outputs.loss.backward()
    expected.backward()
    expected = gradients(models[1])
    assert "lm_head.decoder.bias" in expected
    for name, gradient in gradients(models[0]).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("chunk_size", [0, 7])
def test_shift_labels_are_taken_as_they_are(chunk_size):
    model = make_model(ReformerForCausalLM, chunk_size_lm_head=chunk_size)
    ids = random_ids(2, LENGTH)
    shifted = with_gaps(random_ids(2, LENGTH))
    with torch.no_grad():
        loss = model(ids, labels=ids, shift_labels=shifted).loss
        expected = -log_likelihoods(model(ids).logits, shifted).mean()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("chunk_size", [0, 7])
@pytest.mark.parametrize("model_class", LANGUAGE_MODELS)
def test_another_label_may_be_the_one_that_does_not_count(model_class, chunk_size):
    model = make_model(model_class, chunk_size_lm_head=chunk_size)
    ids = random_ids(2, LENGTH)
    labels = with_gaps(ids)
    with torch.no_grad():
        expected = model(ids, labels=labels).loss
        actual = model(ids, labels=labels.masked_fill(labels == -100, 0), ignore_index=0).loss
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("model_class", LANGUAGE_MODELS)
def test_the_bias_of_the_head_is_added(model_class):
    model = make_model(model_class)
    ids = random_ids(2, LENGTH)
    with torch.no_grad():
        before = model(ids).logits
        bias = torch.randn(VOCAB)
        model.lm_head.bias.add_(bias)
        torch.testing.assert_close(model(ids).logits, before + bias)


@with_tied_embeddings
@pytest.mark.parametrize("model_class", LANGUAGE_MODELS)
def test_output_embeddings_are_the_whole_head(model_class, settings):
    """Who computes the loss from them gets the loss and every gradient of the head, as TRL's trainers do."""
    model = make_model(model_class, **settings)
    ids = random_ids(2, LENGTH)
    outputs = model(ids)
    hidden_states, head = model.reformer(ids).last_hidden_state, model.get_output_embeddings()
    logits = torch.nn.functional.linear(hidden_states, head.weight, head.bias)
    assert torch.equal(logits, outputs.logits)
    outputs.logits.square().mean().backward()
    expected = gradients(model)
    model.zero_grad()
    logits.square().mean().backward()
    assert_equal_tensors(gradients(model), expected)
    assert model.lm_head.bias.grad.any()


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("size", [VOCAB - 3, VOCAB + 3])
def test_other_output_embeddings(size, has_bias):
    """Their own bias counts; without one they take over what they had."""
    model = make_model(ReformerForCausalLM)
    old = model.lm_head.bias.detach().clone()
    head = torch.nn.Linear(64, size, bias=has_bias)
    expected = head.bias if has_bias else torch.cat([old, torch.zeros(3)])[:size]
    model.set_output_embeddings(head)
    assert model.get_output_embeddings() is head
    assert model.lm_head.bias is head.bias
    assert torch.equal(head.bias, expected)


@pytest.mark.parametrize("items", [None, 5])
def test_loss_of_token_classification(items):
    model = make_model(ReformerForTokenClassification, num_labels=3)
    ids = random_ids(2, LENGTH)
    labels = with_gaps(ids % 3)
    outputs = model(ids, labels=labels, num_items_in_batch=items)
    likelihoods = log_likelihoods(outputs.logits, labels)
    torch.testing.assert_close(outputs.loss, -likelihoods.sum() / (items or len(likelihoods)))


PROBLEMS = {
    "regression": (1, torch.tensor([0.5, -1.0, 2.0])),
    "regression, column": (1, torch.tensor([[0.5], [-1.0], [2.0]])),
    "regression, several": (2, torch.randn(3, 2, generator=torch.Generator().manual_seed(0))),
    "single_label_classification": (4, torch.tensor([1, 3, 0])),
    "single_label_classification, column": (4, torch.tensor([[1], [3], [0]])),
    "multi_label_classification": (4, torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0]])),
}


def loss_by_hand(problem, logits, labels):
    """Summed, and the number of items."""
    if problem == "single_label_classification":
        return -log_likelihoods(logits, labels.flatten()).sum(), len(logits)
    labels = labels.view_as(logits)
    if problem == "regression":
        return (logits - labels).square().sum(), labels.numel()
    chances = logits.sigmoid()
    return -torch.where(labels > 0, chances, 1 - chances).log().sum(), labels.numel()


@pytest.mark.parametrize("items", [None, 11])
@pytest.mark.parametrize("stated", [True, False], ids=["problem stated", "problem inferred"])
@pytest.mark.parametrize("case", PROBLEMS)
def test_loss_of_sequence_classification(case, stated, items):
    num_labels, labels = PROBLEMS[case]
    problem = case.split(",")[0]
    if case == "regression, several" and not stated:
        # Several real numbers are taken for several labels.
        problem = "multi_label_classification"
        labels = (labels > 0).float()
    model = make_model(
        ReformerForSequenceClassification, num_labels=num_labels, problem_type=problem if stated else None
    )
    outputs = model(random_ids(3, 20), labels=labels, num_items_in_batch=items)
    summed, count = loss_by_hand(problem, outputs.logits, labels)
    torch.testing.assert_close(outputs.loss, summed / (items or count))
    assert model.config.problem_type == (problem if stated else None)


@pytest.mark.parametrize("items", [None, 7])
def test_loss_of_multiple_choice(items):
    model = make_model(ReformerForMultipleChoice)
    labels = torch.tensor([2, 0, 1])
    outputs = model(random_ids(9, 20).view(3, 3, 20), labels=labels, num_items_in_batch=items)
    assert outputs.logits.shape == (3, 3)
    torch.testing.assert_close(outputs.loss, -log_likelihoods(outputs.logits, labels).sum() / (items or 3))
    assert model.config.problem_type is None
    assert model.config.num_labels == 2


@pytest.mark.parametrize("items", [None, 7])
@pytest.mark.parametrize("column", [True, False])
def test_loss_of_question_answering(column, items):
    """A position beyond the input does not count."""
    model = make_model(ReformerForQuestionAnswering)
    start, end = torch.tensor([3, 0, 19]), torch.tensor([7, 30, 19])
    shaped = (start[:, None], end[:, None]) if column else (start, end)
    outputs = model(random_ids(3, 20), start_positions=shaped[0], end_positions=shaped[1], num_items_in_batch=items)
    end[1] = -100
    losses = [
        -log_likelihoods(logits, positions).sum() / (items or (positions >= 0).sum())
        for logits, positions in ((outputs.start_logits, start), (outputs.end_logits, end))
    ]
    torch.testing.assert_close(outputs.loss, sum(losses) / 2)


LABEL_ERRORS = {
    "causal": (
        ReformerForCausalLM,
        {"labels": torch.ones(2, 19, dtype=torch.long)},
        r"`labels` must have shape \[2, 20\], but has \[2, 19\]",
    ),
    "masked": (
        ReformerForMaskedLM,
        {"labels": torch.ones(1, 20, dtype=torch.long)},
        r"shape \[2, 20\], but has \[1, 20\]",
    ),
    "tokens": (
        ReformerForTokenClassification,
        {"labels": torch.ones(2, 19, dtype=torch.long)},
        r"\[2, 20\], but has \[2, 19\]",
    ),
    "sequence": (ReformerForSequenceClassification, {"labels": torch.tensor([0, 1, 0])}, r"\[2\], but has \[3\]"),
    "single label in a row": (
        ReformerForSequenceClassification,
        {"labels": torch.tensor([[0, 1], [1, 0]])},
        r"`labels` must have shape \[2\], but has \[2, 2\]",
    ),
    "several labels": (
        ReformerForSequenceClassification,
        {"labels": torch.ones(2, 3)},
        r"`labels` must have shape \[2, 2\], but has \[2, 3\]",
    ),
    "choices": (ReformerForMultipleChoice, {"labels": torch.tensor([[0], [1]])}, r"\[1\], but has \[2, 1\]"),
    "start": (
        ReformerForQuestionAnswering,
        {"start_positions": torch.tensor([1]), "end_positions": torch.tensor([1, 2])},
        r"`start_positions` must have shape \[2\], but has \[1\]",
    ),
    "end": (
        ReformerForQuestionAnswering,
        {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([1, 2, 3])},
        r"`end_positions` must have shape \[2\], but has \[3\]",
    ),
}


def with_value(value, *shape):
    labels = torch.ones(shape, dtype=torch.as_tensor(value).dtype)
    labels[-1] = value
    return labels


# Three classes; of the heads for tokens the last label of the second row is out of range.
VALUE_ERRORS = {
    "causal": (ReformerForCausalLM, {"labels": with_value(VOCAB, 2, 20)}, "from 1 to 50, .* 0 and 49, or be -100"),
    "causal, negative": (ReformerForCausalLM, {"labels": with_value(-1, 2, 20)}, "`labels` holds values from -1 to 1"),
    "causal, ignored otherwise": (
        ReformerForCausalLM,
        {"labels": with_value(-100, 2, 20), "ignore_index": -1},
        "from -100 to 1, but must lie between 0 and 49, or be -1 where",
    ),
    "causal, shifted": (
        ReformerForCausalLM,
        {"labels": with_value(1, 2, 20), "shift_labels": with_value(VOCAB, 2, 20)},
        "`shift_labels` holds values from 1 to 50",
    ),
    "causal, shifted, of another shape": (
        ReformerForCausalLM,
        {"labels": with_value(1, 2, 20), "shift_labels": with_value(1, 2, 19)},
        r"`shift_labels` must have shape \[2, 20\], but has \[2, 19\]",
    ),
    "masked": (
        ReformerForMaskedLM,
        {"labels": with_value(VOCAB, 2, 20)},
        "from 1 to 50, but must lie between 0 and 49",
    ),
    "tokens": (
        ReformerForTokenClassification,
        {"labels": with_value(3, 2, 20)},
        "from 1 to 3, .* 0 and 2, or",
    ),
    "sequence": (
        ReformerForSequenceClassification,
        {"labels": torch.tensor([1, 3])},
        "from 1 to 3, .* 0 and 2, or",
    ),
    "sequence, column": (ReformerForSequenceClassification, {"labels": torch.tensor([[-1], [1]])}, "from -1 to 1"),
    "several labels": (
        ReformerForSequenceClassification,
        {"labels": with_value(2.5, 2, 3)},
        "from 1.0 to 2.5, but must lie between 0 and 1, .* set `problem_type='regression'`",
    ),
    "choices": (ReformerForMultipleChoice, {"labels": torch.tensor([2])}, "from 2 to 2, but must lie between 0 and 1"),
    "start": (
        ReformerForQuestionAnswering,
        {"start_positions": torch.tensor([-1, 2]), "end_positions": torch.tensor([1, 2])},
        "`start_positions` holds values from -1 to 2, but must not be negative. Without an answer give",
    ),
    "end": (
        ReformerForQuestionAnswering,
        {"start_positions": torch.tensor([[1], [2]]), "end_positions": torch.tensor([[1], [-100]])},
        "`end_positions` holds values from -100 to 1, but must not be negative",
    ),
}


@pytest.mark.parametrize("case", VALUE_ERRORS)
def test_labels_out_of_range_are_refused(case):
    model_class, labels, message = VALUE_ERRORS[case]
    ids = random_ids(2, 20)
    ids = ids[None] if model_class is ReformerForMultipleChoice else ids
    for training in (True, False):
        for chunk_size in (0, 8):
            model = make_model(model_class, chunk_size_lm_head=chunk_size, num_labels=3).train(training)
            with pytest.raises(ValueError, match=message):
                model(ids, **labels)


@pytest.mark.parametrize("case", LABEL_ERRORS)
def test_labels_of_the_wrong_shape_are_refused(case):
    model_class, labels, message = LABEL_ERRORS[case]
    ids = random_ids(2, 20)
    ids = ids[None] if model_class is ReformerForMultipleChoice else ids
    for chunk_size in (0, 8):
        with pytest.raises(ValueError, match=message):
            make_model(model_class, chunk_size_lm_head=chunk_size)(ids, **labels)


@pytest.mark.parametrize(
    "model_class", [ReformerForMultipleChoice, ReformerForSequenceClassification, ReformerForTokenClassification]
)
def test_dropout_of_the_head(model_class):
    """`classifier_dropout`, or else `hidden_dropout_prob`."""
    for settings, expected in (
        ({"hidden_dropout_prob": 0.25}, 0.25),
        ({"hidden_dropout_prob": 0.25, "classifier_dropout": 0.5}, 0.5),
        ({"hidden_dropout_prob": 0.25, "classifier_dropout": 0}, 0),
    ):
        model = model_class(tiny_config(**settings))
        head = [module for name, module in model.named_modules() if not name.startswith("reformer")]
        assert {module.p for module in head if isinstance(module, torch.nn.Dropout)} == {expected}


# --- embeddings ---


@with_tied_embeddings
@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_input_and_output_embeddings(model_class, settings):
    model = make_model(model_class, **settings)
    words = model.get_input_embeddings()
    assert words is model.base_model.embeddings.word_embeddings
    doubled = torch.nn.Embedding.from_pretrained(2 * words.weight.detach())
    ids = random_ids(2, 5)
    embed = model.base_model.embeddings
    before = embed(ids)
    model.set_input_embeddings(doubled)
    assert model.get_input_embeddings() is doubled
    torch.testing.assert_close(embed(ids), before + words(ids))
    if model_class in LANGUAGE_MODELS:
        assert model.get_output_embeddings() is model.lm_head.decoder
        assert model.get_output_embeddings().weight.shape == (VOCAB, model.config.output_size)
        assert (model.get_output_embeddings().weight is words.weight) is (settings == TIED)
    else:
        assert model.get_output_embeddings() is None


@with_tied_embeddings
@pytest.mark.parametrize("new_size", [VOCAB - 13, VOCAB + 13])
@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_resizing_keeps_what_stays(model_class, new_size, settings, tmp_path):
    model = make_model(model_class, **settings)
    kept = min(new_size, VOCAB)
    words = model.get_input_embeddings().weight.detach().clone()
    ids = random_ids(2, 20).clamp(max=kept - 1)
    ids = ids[:, None] if model_class is ReformerForMultipleChoice else ids
    with torch.no_grad():
        before = model(ids)[0]
        model.resize_token_embeddings(new_size)
        after = model(ids)[0]
    assert model.get_input_embeddings().weight.shape == (new_size, 32)
    assert torch.equal(model.get_input_embeddings().weight[:kept], words[:kept])
    assert model.config.vocab_size == model.base_model.config.vocab_size == new_size
    if model_class in LANGUAGE_MODELS:
        assert after.shape == (2, 20, new_size)
        torch.testing.assert_close(after[..., :kept], before[..., :kept])
        assert model.lm_head.bias.shape == (new_size,)
        assert not model.lm_head.bias[kept:].any()
        assert model.get_output_embeddings().weight.shape == (new_size, model.config.output_size)
    else:
        assert torch.equal(after, before)

    model.save_pretrained(tmp_path)
    loaded, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_equal_tensors(loaded.state_dict(), model.state_dict())
    assert len(list(loaded.parameters())) == len(list(model.parameters()))
    # Loaded weights are aligned differently in memory, which can change the order of a sum.
    torch.testing.assert_close(loaded(ids)[0].detach(), after)


@with_tied_embeddings
@pytest.mark.parametrize("chunk_size", [0, 8])
@pytest.mark.parametrize("new_size", [VOCAB - 13, VOCAB + 13])
@pytest.mark.parametrize("model_class", LANGUAGE_MODELS)
def test_a_resized_model_trains(model_class, new_size, chunk_size, settings):
    model = make_model(model_class, chunk_size_lm_head=chunk_size, **settings).train()
    model.resize_token_embeddings(new_size)
    ids = torch.randint(new_size, (2, 20))
    ids[0, 7] = new_size - 1
    model(ids, labels=ids).loss.backward()
    for parameter in (model.lm_head.bias, model.lm_head.decoder.weight, model.get_input_embeddings().weight):
        assert parameter.grad.shape[0] == new_size
        assert parameter.grad[new_size - 1].any()


def test_resizing_keeps_frozen_what_is_frozen():
    model = make_model(ReformerForCausalLM).requires_grad_(False)
    model.resize_token_embeddings(VOCAB + 5)
    assert not model.lm_head.bias.requires_grad


# --- one matrix for both ends ---


@pytest.mark.parametrize("chunk_size", [0, 7])
@pytest.mark.parametrize("model_class", LANGUAGE_MODELS)
def test_the_gradient_of_tied_embeddings_is_that_of_both_uses(model_class, chunk_size):
    tied, untied = (
        make_model(model_class, chunk_size_lm_head=chunk_size, hash_seed=2, **TIED | changes).double().train()
        for changes in ({}, {"tie_word_embeddings": False})
    )
    untied.load_state_dict(tied.state_dict())
    ids = random_ids(2, LENGTH)
    for model in (tied, untied):
        model(ids, labels=ids).loss.backward()
    expected = gradients(untied)
    head = expected.pop("lm_head.decoder.weight")
    assert head.any(dim=0).all()
    expected["reformer.embeddings.word_embeddings.weight"] += head
    assert_close(gradients(tied), expected)
    assert untied.num_parameters() - tied.num_parameters() == head.numel()
