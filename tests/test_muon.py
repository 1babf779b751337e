"""Muon: PyTorch's, in a precision that the device multiplies fast."""

from types import SimpleNamespace

import muon
import pytest
import torch
from bfloat16 import multiplies_in_bfloat16


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
    return muon.Muon(params, **SETTINGS | settings)


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
