"""A seed decides a training run, bit by bit; the stack draws what ordinary autograd draws, and nothing reseeds."""

import itertools
import json
import random
import sysconfig
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import run_python
from reversible_models import layers_of, make, make_inputs
from safetensors.torch import load_file
from tiny_models import DROPOUT, STACKS, TINY, assert_equal_tensors, gradients
from two_ranks import can_resume_on_two_cpus

from hf_reformer.training import corpus
from scripts.figures import stability


TESTS = Path(__file__).parent


STEPS, CHECKPOINT = 6, "checkpoint-3"


# Whole runs of scripts/train.py in fresh processes: the Trainer and the recipe on real text, with dropout everywhere
# and fresh rotations in each step.

SETTINGS = {
    "text_path": Path(sysconfig.get_path("stdlib")) / "json",
    "file_pattern": "*.py",
    "context_length": 64,
    "max_held_out_windows": 1,
    "attn_layers": ["local", "lsh", "full"],
    "lsh_attn_chunk_length": 16,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "attention_head_size": 16,
    "feed_forward_size": 64,
    "dropout": 0.1,
    "max_steps": STEPS,
    "save_steps": 3,
    "logging_steps": 1,
    "eval_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
}
FIRST_RUNS = {"float32": {}, "bfloat16": {"bf16": True}, "another seed": {"seed": 43}}
# The other way round, so that each stands first in one of the two processes and nothing can come from the run before.
SECOND_RUNS = {"bfloat16": {"bf16": True}, "float32": {}}
# What stands before the script on the command line, and what it needs.
LAUNCHERS = {
    "one process": ([], {}),
    "two ranks": (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
        {"ddp_backend": "gloo"},
    ),
}


@dataclass
class Run:
    """What a run has left behind. Neither the Trainer nor JSON rounds what is logged."""

    folder: Path

    @property
    def log(self):
        return json.loads((self.folder / "training_log.json").read_text())

    def logged(self, name):
        return [row[name] for row in self.log["log_history"] if name in row]

    @property
    def weights(self):
        return load_file(self.folder / "model.safetensors")


def train(launch, folder, runs):
    """All `runs`, one after the other, in one fresh process (on each rank)."""
    launcher, common = LAUNCHERS[launch]
    command_lines = [
        [
            word
            for name, value in (SETTINGS | common | settings | {"output_dir": folder / run}).items()
            for word in (f"--{name}", *map(str, value if isinstance(value, list) else [value]))
        ]
        for run, settings in runs.items()
    ]
    done = run_python(*launcher, TESTS / "several_runs.py", json.dumps(command_lines))
    assert done.returncode == 0, done.stderr
    return {run: Run(folder / run) for run in runs}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("one process", marks=pytest.mark.slow),
        pytest.param("two ranks", marks=[pytest.mark.distributed, can_resume_on_two_cpus]),
    ],
)
def two_processes(request, tmp_path_factory):
    """The runs of two fresh processes; the second also resumes those of the first from the checkpoint half-way."""
    launch, folder = request.param, tmp_path_factory.mktemp("runs")
    first = train(launch, folder / "first", FIRST_RUNS)
    resumed = {
        f"{run}, resumed": settings | {"resume_from_checkpoint": first[run].folder / CHECKPOINT}
        for run, settings in SECOND_RUNS.items()
    }
    return first, train(launch, folder / "second", SECOND_RUNS | resumed)


@pytest.mark.parametrize("again", ["{}", "{}, resumed"], ids=["repeated", "resumed"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_repeats_bit_by_bit(precision, again, two_processes):
    first, second = two_processes
    expected, actual = first[precision], second[again.format(precision)]
    assert len(expected.logged("loss")) == STEPS
    for name in ("loss", "grad_norm"):
        assert actual.logged(name) == expected.logged(name)
    assert actual.log["figures"] == expected.log["figures"]
    assert_equal_tensors(actual.weights, expected.weights)


def test_a_checkpoint_has_the_random_numbers_of_each_rank(two_processes):
    runs, _ = two_processes
    paths = [*(runs["float32"].folder / CHECKPOINT).glob("rng_state*.pth")]
    states = {torch.load(path, weights_only=False)["cpu"].numpy().tobytes() for path in paths}
    assert len(states) == len(paths) > 0


@pytest.mark.parametrize("other", ["another seed", "bfloat16"])
def test_another_run_has_another_curve(other, two_processes):
    """The comparison is exact enough to see what differs, from the first step on."""
    runs, _ = two_processes
    for name in ("loss", "grad_norm"):
        pairs = zip(runs["float32"].logged(name), runs[other].logged(name), strict=True)
        assert all(one != another for one, another in pairs)


# The global generator.


def three_steps(reversible, bf16, training, settings):
    """The generator's state between the parts of each step, and what somebody else draws there."""
    model, other = (make(reversible, dtype=torch.float32, **settings).train(training) for _ in range(2))
    torch.manual_seed(3)
    seen = {}
    for step in range(3):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = model(**make_inputs(dtype=torch.float32))
            seen[f"{step}: state after forward"] = torch.get_rng_state()
            seen[f"{step}: dropout behind the model"] = torch.nn.functional.dropout(output.logits).detach()
            loss = other(**make_inputs(dtype=torch.float32)).loss
        seen[f"{step}: loss of another model"] = loss.detach()
        before_backward = torch.get_rng_state()
        (output.loss + loss).backward()
        seen[f"{step}: state after backward"] = torch.get_rng_state()
        assert torch.equal(seen[f"{step}: state after backward"], before_backward)
        seen[f"{step}: numbers after backward"] = torch.rand(3)
    return seen


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("settings", [{}, DROPOUT | {"chunk_size_feed_forward": 8}], ids=["no dropout", "dropout"])
def test_everybody_draws_what_they_draw_with_ordinary_autograd(settings, training, bf16):
    settings = {"attn_layers": STACKS["mixed"]} | settings
    expected, actual = (three_steps(reversible, bf16, training, settings) for reversible in (False, True))
    assert_equal_tensors(actual, expected)


@pytest.mark.parametrize("hash_seed", [None, 5])
@pytest.mark.parametrize("kinds", STACKS.values(), ids=STACKS)
def test_without_dropout_a_step_draws_fresh_rotations_and_nothing_else(kinds, hash_seed):
    model = make(True, attn_layers=kinds, hash_seed=hash_seed)
    torch.manual_seed(4)
    for _ in range(2):
        model(**make_inputs()).loss.backward()
    state = torch.get_rng_state()

    torch.manual_seed(4)
    rotations = [TINY[name] for name in ("num_attention_heads", "attention_head_size", "num_hashes")]
    for kind in kinds * 2:
        if kind == "lsh" and hash_seed is None:
            torch.randn(*rotations, TINY["num_buckets"] // 2)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("reversible", [True, False])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_nothing_seeds_and_only_torch_draws(training, reversible, monkeypatch):
    """Setting `torch.default_generator` itself would show in the states that the other tests compare."""
    model, inputs = make(reversible, attn_layers=STACKS["mixed"], **DROPOUT).train(training), make_inputs()
    python_state, numpy_state = random.getstate(), np.random.get_state()[1].copy()
    for module, name in itertools.product((torch, torch.random, np.random, random), ("manual_seed", "seed")):
        monkeypatch.setattr(module, name, lambda *args, name=name: pytest.fail(f"called {name}{args}"), raising=False)
    model(**inputs).loss.backward()
    assert random.getstate() == python_state
    assert np.array_equal(np.random.get_state()[1], numpy_state)


def test_what_hooks_draw_in_backward_stays_drawn():
    """Such as noise on gradients: the recomputation gives its own random numbers back, and nobody else's."""
    noise, states = {}, []
    for reversible in (False, True):
        model = make(reversible, attn_layers=STACKS["mixed"], **DROPOUT)
        for name, parameter in model.named_parameters():
            parameter.register_hook(lambda gradient, name=name: noise.update({name: torch.rand(()).item()}))
        torch.manual_seed(3)
        model(**make_inputs()).loss.backward()
        states.append(torch.get_rng_state())
    # The word embeddings take no part.
    assert len(set(noise.values())) == len(list(model.parameters())) - 1
    assert torch.equal(*states)


def test_a_backward_that_fails_leaves_the_state_alone():
    model, calls = make(True, attn_layers=STACKS["mixed"], **DROPOUT), []

    def fail_in_recomputation(module, args):
        calls.append(module)
        if len(calls) == 2:
            raise MemoryError("too much")

    layers_of(model)[1].attention.output.register_forward_pre_hook(fail_in_recomputation)
    loss = model(**make_inputs()).loss
    state = torch.get_rng_state()
    with pytest.raises(MemoryError, match="too much"):
        loss.backward()
    assert torch.equal(torch.get_rng_state(), state)


# Dropout that is switched off.


def switch_dropout_off(model):
    """As TRL does for DPO."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0


@pytest.mark.parametrize("implementation", ["eager", None])
@pytest.mark.parametrize("axial", [True, False])
def test_dropout_is_in_modules_that_can_be_switched_off(axial, implementation):
    """Then training is that of a model without dropout, bit by bit, its random numbers too."""
    settings = {"attn_layers": STACKS["mixed"], "axial_pos_embds": axial, "attn_implementation": implementation}
    results = []
    for dropout in ({}, DROPOUT):
        model = make(True, **settings)
        model = type(model)(type(model.config).from_dict(model.config.to_dict() | dropout)).train().double()
        model.load_state_dict(make(True, **settings).state_dict())
        switch_dropout_off(model)
        torch.manual_seed(4)
        output = model(**make_inputs())
        output.loss.backward()
        results.append({"logits": output.logits.detach(), "state": torch.get_rng_state()} | gradients(model))
    assert_equal_tensors(*results)


def test_without_dropout_a_seed_for_hashing_fixes_what_training_computes():
    """So that a model and its copy agree in training mode, as preference losses want it at their start."""
    for hash_seed in (5, None):
        model = make(True, attn_layers=STACKS["mixed"], hash_seed=hash_seed, **DROPOUT)
        switch_dropout_off(model)
        first, second = (model(**make_inputs()).logits for _ in range(2))
        assert torch.equal(first, second) == (hash_seed is not None)


# scripts/figures/stability.py.


@pytest.fixture
def small_stability(monkeypatch):
    """The same with a small model and little text."""
    text = {"text_path": str(SETTINGS["text_path"]), "file_pattern": SETTINGS["file_pattern"]}
    monkeypatch.setattr(stability, "DataArguments", partial(corpus.DataArguments, **text))
    monkeypatch.setattr(stability, "CONTEXT_LENGTH", SETTINGS["context_length"])
    monkeypatch.setattr(stability, "HELD_OUT_WINDOWS", SETTINGS["max_held_out_windows"])
    monkeypatch.setattr(stability, "MODEL", {name: SETTINGS[name] for name in stability.MODEL})
    stability.read_corpus.cache_clear()
    yield
    stability.read_corpus.cache_clear()


@pytest.mark.slow
def test_stability_measures_every_variant_on_the_same_text(small_stability, tmp_path, monkeypatch, capsys):
    built, make_trainer = [], stability.BitsPerByteTrainer

    def noted(model, args, **kwargs):
        built.append((args.bf16, model.config.exact_inversion, model.config.reversible))
        return make_trainer(model=model, args=args, **kwargs)

    monkeypatch.setattr(stability, "BitsPerByteTrainer", noted)
    runs = [stability.measure(variant, 0, 5) for variant in stability.VARIANTS]
    assert built == [
        (False, None, True),
        (False, False, True),
        (True, None, True),
        (True, False, True),
        (True, None, False),
    ]
    assert all(run["not_finite"] == 0 and len(run["losses"]) == 5 for run in runs)
    first_losses = [run["losses"][0] for run in runs]
    # Another text or another start makes a difference of 0.05. bfloat16 keeps 8 bits; ordinary autograd makes none.
    assert first_losses == pytest.approx(first_losses[:1] * len(runs), abs=2**-8)
    assert first_losses[2] == first_losses[4]
    # In five steps the rounded losses may not show what exact inversion changes; bfloat16 they do.
    assert all(runs[i]["losses"] != runs[0]["losses"] for i in (2, 3, 4))

    arguments = ["--steps", "5", "--seeds", "1", "--output_dir", str(tmp_path)]
    settings = {"steps": 5, "context_length": stability.CONTEXT_LENGTH, **stability.MODEL}
    stability.write_results(tmp_path / "stability.json", settings, runs)
    # All runs are there, so none is made.
    stability.main(arguments)
    printed = capsys.readouterr().out
    assert all(
        f"{variant:<28} | {runs[i]['held_out']:>16.4f} |" in printed for i, variant in enumerate(stability.VARIANTS)
    )
    assert f"{runs[2]['held_out'] - runs[0]['held_out']:+.4f}" in printed
    assert (tmp_path / "stability.png").is_file()
    with pytest.raises(ValueError, match=r"holds runs with the settings .* Give another --output_dir"):
        stability.main([*arguments, "--steps", "6"])


def test_stability_sees_what_is_not_finite(small_stability, monkeypatch):
    monkeypatch.setattr(stability, "MODEL", stability.MODEL | {"initializer_range": 1e30})
    # In each step the loss and the norm of the gradient.
    assert stability.measure(stability.BASELINE, 0, 3)["not_finite"] == 2 * 3
