"""The heads in the Trainer: accumulated steps, label smoothing, gradient checkpointing."""

import copy
import logging as python_logging

import pytest
import torch
from tiny_models import DROPOUT, STACKS, assert_equal_tensors, gradients, make_model, random_ids
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from hf_reformer import (
    ReformerForCausalLM,
    ReformerForMaskedLM,
    ReformerForMultipleChoice,
    ReformerForQuestionAnswering,
    ReformerForSequenceClassification,
    ReformerForTokenClassification,
)


# More than a chunk of 16.
LENGTH = 24
EXAMPLES = 8


class Gradients(TrainerCallback):
    """What the optimizer is about to use."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = gradients(model)


def make_trainer(model, examples, folder, **arguments):
    defaults = {"max_steps": 1, "max_grad_norm": 0, "learning_rate": 1e-3, "save_strategy": "no"}
    return Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            optim="sgd",
            **(defaults | arguments),
        ),
        train_dataset=examples,
    )


def gradients_of_one_step(model, examples, folder, **arguments):
    trainer, recorder = make_trainer(model, examples, folder, **arguments), Gradients()
    trainer.add_callback(recorder)
    trainer.train()
    return recorder.gradients


def token_labels(ids, num_labels=None):
    """Example i has 3 * i + 1 labels that count, so micro-batches have very unequal numbers of them."""
    labels = ids if num_labels is None else ids % num_labels
    return labels.masked_fill(torch.arange(LENGTH) > 3 * torch.arange(EXAMPLES)[:, None], -100)


def make_examples(model_class, make_labels):
    ids = random_ids(EXAMPLES, LENGTH)
    mask = torch.arange(LENGTH) < torch.arange(LENGTH, LENGTH - EXAMPLES, -1)[:, None]
    columns = {"input_ids": ids, "attention_mask": mask.long()} | make_labels(ids)
    if model_class is ReformerForMultipleChoice:
        columns["input_ids"] = torch.stack([ids, ids.flip(1), ids.roll(1, 1)], dim=1)
        columns["attention_mask"] = mask.long()[:, None].expand(-1, 3, -1)
    return [{name: column[i] for name, column in columns.items()} for i in range(EXAMPLES)]


# Model, its settings, its labels.
TASKS = {
    "causal": (ReformerForCausalLM, {}, lambda ids: {"labels": token_labels(ids)}),
    "causal in pieces": (
        ReformerForCausalLM,
        {"chunk_size_lm_head": 5},
        lambda ids: {"labels": token_labels(ids)},
    ),
    "causal, shifted": (
        ReformerForCausalLM,
        {},
        lambda ids: {"labels": ids, "shift_labels": token_labels(ids)},
    ),
    "masked": (ReformerForMaskedLM, {}, lambda ids: {"labels": token_labels(ids)}),
    "masked in pieces": (
        ReformerForMaskedLM,
        {"chunk_size_lm_head": 5},
        lambda ids: {"labels": token_labels(ids)},
    ),
    "tokens": (
        ReformerForTokenClassification,
        {"num_labels": 3},
        lambda ids: {"labels": token_labels(ids, 3)},
    ),
    "sequence": (
        ReformerForSequenceClassification,
        {"num_labels": 3},
        lambda ids: {"labels": torch.tensor([0, 1, -100, -100, 2, 1, -100, 0])},
    ),
    "regression": (ReformerForSequenceClassification, {"num_labels": 1}, lambda ids: {"labels": ids[:, 0] / 50}),
    "several numbers": (
        ReformerForSequenceClassification,
        {"num_labels": 3, "problem_type": "regression"},
        lambda ids: {"labels": ids[:, :3] / 50},
    ),
    "several labels": (
        ReformerForSequenceClassification,
        {"num_labels": 3},
        lambda ids: {"labels": (ids[:, :3] % 2).float()},
    ),
    "choice": (ReformerForMultipleChoice, {}, lambda ids: {"labels": ids[:, 0] % 3}),
    "answers": (
        ReformerForQuestionAnswering,
        {},
        lambda ids: {"start_positions": ids[:, 0] % 5, "end_positions": 6 + ids[:, 1] % 5},
    ),
}


def assert_accumulated_steps_equal_one_big_batch(model_class, settings, examples, folder, **arguments):
    whole, parts = (
        gradients_of_one_step(
            make_model(model_class, **{"hash_seed": 2, "is_decoder": True} | settings),
            examples,
            folder,
            per_device_train_batch_size=EXAMPLES // steps,
            gradient_accumulation_steps=steps,
            **arguments,
        )
        for steps in (1, 4)
    )
    assert whole.keys() == parts.keys()
    for name, gradient in whole.items():
        # Sums of float32 gradients in another order.
        assert (parts[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_accumulated_steps_equal_one_big_batch(task, tmp_path):
    model_class, settings, make_labels = TASKS[task]
    examples = make_examples(model_class, make_labels)
    assert_accumulated_steps_equal_one_big_batch(model_class, settings, examples, tmp_path)


def test_accumulated_steps_with_label_smoothing(tmp_path):
    model_class, settings, make_labels = TASKS["causal"]
    examples = make_examples(model_class, make_labels)
    assert_accumulated_steps_equal_one_big_batch(model_class, settings, examples, tmp_path, label_smoothing_factor=0.1)


@pytest.mark.parametrize(
    ("model_class", "shifts"),
    [(ReformerForCausalLM, True), (ReformerForMaskedLM, False), (ReformerForTokenClassification, False)],
)
def test_label_smoothing(model_class, shifts, tmp_path):
    """Of the Trainer, which is to shift the labels of the causal model and of no other."""
    epsilon = 0.1
    model = make_model(model_class, num_labels=3)
    ids = random_ids(2, LENGTH)
    labels = ids.clone() if model_class is not ReformerForTokenClassification else ids % 3
    labels[0, :7] = -100
    trainer = make_trainer(model, [], tmp_path, label_smoothing_factor=epsilon)
    with torch.no_grad():
        loss = trainer.compute_loss(model, {"input_ids": ids, "labels": labels.clone()})
        scores = model(ids).logits.log_softmax(-1)
    if shifts:
        scores, labels = scores[:, :-1], labels[:, 1:]
    counts = labels != -100
    scores, labels = scores[counts], labels[counts]
    expected = -(1 - epsilon) * scores.gather(1, labels[:, None]).mean() - epsilon * scores.mean()
    torch.testing.assert_close(loss, expected)


def test_training_and_evaluation_write_nothing_to_the_config(tmp_path):
    examples = make_examples(ReformerForSequenceClassification, lambda ids: {"labels": ids[:, 0] % 2})
    model = make_model(ReformerForSequenceClassification, num_buckets=None, **DROPOUT)
    before = model.config.to_dict()
    trainer = make_trainer(model, examples, tmp_path, max_steps=2, use_cache=True)
    trainer.train()
    metrics = trainer.evaluate(examples)
    assert metrics["eval_loss"] > 0
    assert model.config.to_dict() == before


@pytest.mark.parametrize("model_class", [ReformerForCausalLM, ReformerForMaskedLM])
def test_predictions_with_the_loss_in_pieces(model_class, tmp_path):
    """Metrics and `predict` get every logit; the loss is that of one piece."""
    examples = make_examples(model_class, lambda ids: {"labels": token_labels(ids)})
    found = []
    for chunk_size in (0, 5):
        model = make_model(model_class, chunk_size_lm_head=chunk_size)
        trainer = make_trainer(model, [], tmp_path, per_device_eval_batch_size=EXAMPLES)
        trainer.compute_metrics = lambda p: {"hits": (p.predictions.argmax(-1) == p.label_ids).mean()}
        found.append((trainer.evaluate(examples), trainer.predict(examples).predictions))
    assert found[0][1].shape == (EXAMPLES, LENGTH, 50)
    assert (found[0][1] == found[1][1]).all()
    assert found[0][0]["eval_hits"] == found[1][0]["eval_hits"]
    assert found[0][0]["eval_loss"] == pytest.approx(found[1][0]["eval_loss"], rel=1e-5)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    """With dropout, fresh rotations at each step, and a config file that stock cannot read."""
    examples = make_examples(ReformerForCausalLM, lambda ids: {"labels": token_labels(ids)})
    arguments = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2}
    finished = []
    for checkpoint in (None, str(tmp_path / "checkpoint-2")):
        model = make_model(ReformerForCausalLM, circular_look_around=False, full_attention_threshold=20, **DROPOUT)
        make_trainer(model, examples, tmp_path, **arguments).train(resume_from_checkpoint=checkpoint)
        finished.append(model.state_dict())
    assert_equal_tensors(*finished)


# --- gradient checkpointing ---


@pytest.fixture
def warn_again():
    """Lets a warning that is given once per process be given in this test too."""
    python_logging.Logger.warning_once.cache_clear()
    logging.set_verbosity_warning()


def switch_checkpointing(model, how):
    """The method under its name of today, or that of transformers before 5.20."""
    return getattr(model, f"activation_checkpointing_{how}", None) or getattr(model, f"gradient_checkpointing_{how}")


def recomputed_layers(model):
    """How many layers a training step runs forward more than once."""
    calls = {}
    for layer in model.base_model.encoder.layers:
        layer.attention.layer_norm.register_forward_hook(
            lambda module, inputs, output: calls.update({module: calls.get(module, 0) + 1})
        )
    ids = random_ids(2, 40)
    model.zero_grad()
    model.train()(ids, labels=ids).loss.backward()
    return sum(count > 1 for count in calls.values())


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("settings", [{}, DROPOUT], ids=["no dropout", "dropout"])
def test_gradient_checkpointing_changes_no_gradient(settings, use_reentrant):
    model = make_model(ReformerForCausalLM, attn_layers=STACKS["mixed"], reversible=False, **settings).train()
    ids, found = random_ids(2, 40), []
    for enable in (False, True):
        if enable:
            switch_checkpointing(model, "enable")({"use_reentrant": use_reentrant})
        model.zero_grad()
        torch.manual_seed(11)
        model(ids, labels=ids).loss.backward()
        found.append(gradients(model))
    # Reentrant checkpoints add the gradients of the two streams in another order.
    torch.testing.assert_close(found[1], found[0])
    assert len(found[0]) == len(list(model.parameters()))
    assert recomputed_layers(model) == 3
    switch_checkpointing(model, "disable")()
    assert recomputed_layers(model) == 0


def is_checkpointing(model):
    """As the property of transformers 5.20 and later says it."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_gradient_checkpointing_of_reversible_layers_changes_nothing_and_says_so_once(caplog, warn_again):
    model, ids, found, calls = make_model(ReformerForCausalLM, attn_layers=STACKS["mixed"]), random_ids(2, 40), [], []
    layers = model.base_model.encoder.layers
    for layer in layers:
        layer.register_forward_hook(lambda module, args, output: calls.append(module.layer_idx))
    with caplog.at_level("INFO"):
        for _ in range(3):
            model.zero_grad()
            torch.manual_seed(11)
            model.train()(ids, labels=ids).loss.backward()
            found.append(gradients(model))
            switch_checkpointing(model, "enable")()
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("hf_reformer")]
    assert ours == ["Reversible layers already recompute their activations: gradient checkpointing changes nothing."]
    assert calls == [0, 1, 2] * 3
    for later in found[1:]:
        assert_equal_tensors(later, found[0])
    switch_checkpointing(model, "disable")()
    assert not is_checkpointing(model)


@pytest.mark.parametrize("reversible", [True, False])
def test_the_state_of_gradient_checkpointing_is_what_others_look_for(reversible):
    model = make_model(ReformerForCausalLM, reversible=reversible)
    assert not is_checkpointing(model)
    switch_checkpointing(model, "enable")()
    assert is_checkpointing(model)
    for layer in model.base_model.encoder.layers:
        assert layer.gradient_checkpointing
        assert callable(layer._gradient_checkpointing_func)
    assert is_checkpointing(copy.deepcopy(model))
    switch_checkpointing(model, "disable")()
    assert not is_checkpointing(model)
    assert is_checkpointing(make_model(ReformerForCausalLM, reversible=reversible, gradient_checkpointing=True))


@pytest.mark.parametrize("reversible", [True, False])
def test_gradient_checkpointing_in_the_trainer(reversible, tmp_path, caplog, warn_again):
    examples = make_examples(ReformerForCausalLM, lambda ids: {"labels": token_labels(ids)})
    settings = {"attn_layers": STACKS["mixed"], "reversible": reversible, "hash_seed": 2}
    found = [
        gradients_of_one_step(
            make_model(ReformerForCausalLM, **settings),
            examples,
            tmp_path,
            per_device_train_batch_size=EXAMPLES,
            gradient_checkpointing=enable,
        )
        for enable in (False, True)
    ]
    assert_equal_tensors(found[1], found[0])
    lines = [record for record in caplog.records if "gradient checkpointing changes nothing" in record.getMessage()]
    assert len(lines) == reversible
