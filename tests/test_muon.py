"""Muon: PyTorch's, in a precision that the device multiplies fast; with AdamW, in the Trainer and without it."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from tiny_models import assert_equal_tensors, make_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, get_cosine_schedule_with_warmup

from hf_reformer import ReformerForCausalLM
from hf_reformer.training import Muon, MuonWithAdamW, ReformerTrainingArguments, multiplies_in_bfloat16


SETTINGS = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9}
SHAPES = [(24, 24), (16, 40), (40, 16)]
STEPS = 3


def weights():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in SHAPES]


def after_steps(make_optimizer, steps=STEPS):
    """Weights and optimizer after `steps` steps with gradients that depend on the weights."""
    trained = weights()
    optimizer = make_optimizer(trained)
    for _ in range(steps):
        sum(weight.sin().square().sum() for weight in trained).backward()
        optimizer.step()
        optimizer.zero_grad()
    return trained, optimizer


def stock(params, **settings):
    return torch.optim.Muon(params, adjust_lr_fn="match_rms_adamw", **SETTINGS | settings)


def ours(params, **settings):
    return Muon(params, **SETTINGS | settings)


@pytest.mark.parametrize("nesterov", [True, False])
def test_in_bfloat16_it_is_stock_muon(nesterov):
    expected, _ = after_steps(lambda params: stock(params, nesterov=nesterov))
    actual, _ = after_steps(lambda params: ours(params, nesterov=nesterov, dtype=torch.bfloat16))
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


def test_in_float32_it_is_nearer_to_float64_than_stock_muon_is():
    exact, single, half = (
        [weight - start for weight, start in zip(after_steps(make, steps=1)[0], weights(), strict=True)]
        for make in (
            lambda params: ours(params, dtype=torch.float64),
            lambda params: ours(params, dtype=torch.float32),
            stock,
        )
    )
    for expected, actual, theirs in zip(exact, single, half, strict=True):
        error, their_error = ((update - expected).norm() / expected.norm() for update in (actual, theirs))
        # Rounding to float32 and to bfloat16 differ by a factor of 65,536.
        assert error < their_error / 1000 and their_error < 0.05


def test_state_goes_both_ways():
    theirs, ours_half = after_steps(stock)[1], after_steps(lambda params: ours(params, dtype=torch.bfloat16))[1]
    assert ours_half.state_dict()["param_groups"] == theirs.state_dict()["param_groups"]
    stock(weights()).load_state_dict(ours_half.state_dict())
    ours(weights()).load_state_dict(theirs.state_dict())


def test_on_a_cpu_that_emulates_bfloat16_it_multiplies_in_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not multiplies_in_bfloat16("cpu")
    expected, _ = after_steps(lambda params: ours(params, dtype=torch.float32))
    actual, _ = after_steps(ours)
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


@pytest.mark.parametrize(("major", "native"), [(7, False), (8, True)], ids=["V100, T4", "A100"])
def test_gpus_that_emulate_bfloat16(major, native, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))
    assert multiplies_in_bfloat16("cuda") == native


@pytest.mark.parametrize("macos", [13, 14])
def test_mps_multiplies_in_bfloat16_from_macos_14_on(macos, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: (macos, 0) >= (major, minor))
    assert multiplies_in_bfloat16("mps") == (macos == 14)


# With AdamW.


def llama():
    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize(
    "make",
    [lambda: make_model(ReformerForCausalLM), lambda: make_model(ReformerForCausalLM, axial_pos_embds=False), llama],
    ids=["axial", "learned", "Llama"],
)
def test_muon_has_the_matrices_inside_layers(make):
    model = make()
    model.lm_head.requires_grad_(False)
    muon, adamw = MuonWithAdamW(model, lr=0.5, weight_decay=0.3, betas=(0.1, 0.2)).param_groups
    names = {id(weight): name for name, weight in model.named_parameters() if weight.requires_grad}
    inside = {name for name in names.values() if ".layers.0." in name or ".layers.1." in name}
    vectors = {name for name in inside if model.get_parameter(name).ndim == 1}
    assert {names.pop(id(weight)) for weight in muon["params"]} == inside - vectors
    assert {id(weight) for weight in adamw["params"]} == names.keys() and vectors < set(names.values())
    assert (muon["lr"], muon["weight_decay"]) == (0.5, 0.3)
    assert (adamw["lr"], adamw["weight_decay"], adamw["betas"]) == (0.5, 0.0, (0.1, 0.2))


def test_a_group_that_is_added_is_trained_by_adamw():
    model = make_model(ReformerForCausalLM)
    model.lm_head.requires_grad_(False)
    optimizer = MuonWithAdamW(model, lr=0.1)
    head = model.lm_head.decoder.weight.requires_grad_()
    optimizer.add_param_group({"params": [head], "lr": 0.01})
    before, head.grad = head.detach().clone(), torch.ones_like(head)
    optimizer.step()
    # The first step of AdamW is one of its learning rate.
    assert torch.allclose(before - head, torch.tensor(0.01), atol=1e-6)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_of_model_and_optimizer_goes_on_alike(copied):
    """Copied together, because an optimizer trains the weights that it was given."""
    model = make_model(ReformerForCausalLM, hash_seed=1)
    both = model, MuonWithAdamW(model, lr=0.1)
    both[1].parts[0].dtype = torch.float64

    def step(model, optimizer):
        model.zero_grad()
        model(ROWS[:2], labels=ROWS[:2]).loss.backward()
        optimizer.step()

    step(*both)
    other = copied(both)
    for each in (both, other):
        step(*each)
    assert_equal_tensors(other[0].state_dict(), model.state_dict())
    assert other[1].parts[0].dtype is torch.float64


STEPS_OF_TRAINER, SAVED_AT, BATCH = 4, 2, 2
ROWS = torch.randint(3, 50, (STEPS_OF_TRAINER * BATCH, 32), generator=torch.Generator().manual_seed(0))


def train(folder, resume=False, choose=ReformerTrainingArguments.optimizer_cls_and_kwargs, **settings):
    arguments = ReformerTrainingArguments(
        str(folder),
        use_cpu=True,
        per_device_train_batch_size=BATCH,
        max_steps=STEPS_OF_TRAINER,
        save_steps=SAVED_AT,
        warmup_steps=1,
        eval_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **settings,
    )
    model = make_model(ReformerForCausalLM, hash_seed=1)
    trainer = Trainer(
        model,
        arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in ROWS],
        optimizer_cls_and_kwargs=choose(arguments, model),
    )
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{SAVED_AT}") if resume else None)
    return trainer


def test_the_trainer_does_what_a_plain_loop_does(tmp_path):
    settings = {"learning_rate": 0.02, "weight_decay": 0.2, "adam_beta1": 0.8, "max_grad_norm": 0.5}
    trained = train(tmp_path, train_sampling_strategy="sequential", **settings).model

    model = make_model(ReformerForCausalLM, hash_seed=1).train()
    optimizer = MuonWithAdamW(model, lr=0.02, weight_decay=0.2, betas=(0.8, 0.98))
    schedule = get_cosine_schedule_with_warmup(optimizer, 1, STEPS_OF_TRAINER)
    for rows in ROWS.split(BATCH):
        model(rows, labels=rows, num_items_in_batch=rows[:, 1:].numel()).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step(), schedule.step(), optimizer.zero_grad()
    assert_equal_tensors(trained.state_dict(), model.state_dict())


def test_the_trainer_resumes_with_muon(tmp_path):
    whole = train(tmp_path)
    resumed = train(tmp_path, resume=True)
    assert len(resumed.optimizer.state) == len(list(whole.model.parameters()))
    assert_equal_tensors(resumed.model.state_dict(), whole.model.state_dict())


def test_without_muon_the_trainer_takes_optim(tmp_path):
    assert isinstance(train(tmp_path, muon=False).optimizer.optimizer, torch.optim.AdamW)


def test_parameters_do_not_say_where_they_belong(tmp_path):
    with pytest.raises(ValueError, match=r"takes the model.*got parameters.*optimizer_cls_and_kwargs"):
        train(tmp_path, choose=lambda arguments, model: (MuonWithAdamW, {"lr": 0.1}))
    with pytest.raises(ValueError, match="Linear trains no weight matrices in layers; use AdamW"):
        MuonWithAdamW(nn.Linear(2, 2))
