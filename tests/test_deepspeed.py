"""DeepSpeed's ZeRO on two real processes, all three stages, trains as one process does with the whole batch."""

import os
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from deepspeed_on_cpu import compile_nothing
from peft import LoraConfig, get_peft_model
from tiny_models import STACKS, VOCAB, assert_equal_tensors, make_model
from two_ranks import WORLD_SIZE, TwoRanks

from hf_reformer import ReformerForCausalLM


pytestmark = pytest.mark.distributed


STEPS, LEARNING_RATE = 2, 0.125


@dataclass
class Case:
    """A model, and how DeepSpeed trains it."""

    stage: int
    settings: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    micro_batches: int = 1
    lora: bool = False
    frozen: tuple[str, ...] = ()

    @property
    def dtype(self):
        return torch.bfloat16 if "bf16" in self.settings else torch.float32

    def build(self):
        model = make_model(ReformerForCausalLM, attn_layers=STACKS["mixed"], hash_seed=3, **self.changes)
        if self.lora:
            # With its usual weights an adapter computes 0.
            model = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
        for name, parameter in model.named_parameters():
            if any(part in name for part in self.frozen):
                parameter.requires_grad_(False)
        return model.train()

    def rows(self, step, rank):
        """The micro-batches of a rank."""
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(VOCAB, (WORLD_SIZE * self.micro_batches * 2, 37), generator=generator)
        return ids[rank::WORLD_SIZE].chunk(self.micro_batches)

    def deepspeed_config(self):
        stage = {"stage": self.stage} | ({"stage3_param_persistence_threshold": 0} if self.stage == 3 else {})
        return self.settings | {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": self.micro_batches,
            # DeepSpeed clips to 1 where nothing is said.
            "gradient_clipping": 0.0,
            "zero_optimization": stage,
            "zero_allow_untested_optimizer": True,
        }


BFLOAT16 = {"bf16": {"enabled": True}}
CHUNKED = {"chunk_size_feed_forward": 8, "chunk_size_lm_head": 16}
CASES = {
    "stage 1": Case(1),
    "stage 2": Case(2),
    "stage 3": Case(3),
    "stage 3, chunked": Case(3, changes=CHUNKED),
    "stage 3, frozen embeddings": Case(3, frozen=("embeddings",)),
    "stage 3, frozen start": Case(3, frozen=("embeddings", "layers.0.")),
    "stage 2, lora": Case(2, lora=True),
    "stage 3, lora": Case(3, lora=True),
    "stage 2, accumulation": Case(2, micro_batches=2),
    "stage 3, accumulation": Case(3, micro_batches=2),
    "stage 2, bfloat16": Case(2, BFLOAT16),
    "stage 3, bfloat16": Case(3, BFLOAT16),
}


def train_on_ranks(rank, cases):
    """
    By case: the parameters that DeepSpeed ends with, those that one process ends with, and how many of their numbers
    the rank holds between steps.
    """
    # Here and not above, because it changes functions of torch for the whole process.
    import deepspeed

    compile_nothing()
    os.environ["LOCAL_RANK"] = str(rank)
    deepspeed.init_distributed("gloo")
    results = {}
    for name, case in cases.items():
        engine = train_engine(case, rank)
        parameters = dict(engine.module.named_parameters())
        held = sum(parameter.numel() for parameter in parameters.values())
        with deepspeed.zero.GatheredParameters(list(parameters.values())):
            whole = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        # In this process, too: stage 3 puts a linear map in the place of torch's that rounds in another way.
        results[name] = whole, train_rank_after_rank(case), held
    return results


def train_engine(case, rank):
    import deepspeed

    model = case.build()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=LEARNING_RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=case.deepspeed_config())
    for step in range(STEPS):
        for ids in case.rows(step, rank):
            engine.backward(engine(ids, labels=ids).loss)
            engine.step()
    return engine


def train_rank_after_rank(case):
    """One process computes what each rank does, takes the mean, and updates float32 copies of the parameters."""
    model = case.build().to(case.dtype)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    master = {name: parameter.detach().to(torch.float32, copy=True) for name, parameter in trained.items()}
    for step in range(STEPS):
        sums = {}
        for micro_batch in zip(*(case.rows(step, rank) for rank in range(WORLD_SIZE)), strict=True):
            means = {}
            for ids in micro_batch:
                loss = model(ids, labels=ids).loss / case.micro_batches
                for name, gradient in zip(trained, torch.autograd.grad(loss, trained.values()), strict=True):
                    means[name] = means.get(name, 0) + gradient / WORLD_SIZE
            sums = {name: sums.get(name, 0) + mean.float() for name, mean in means.items()}
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(master[name].add_(sums[name], alpha=-LEARNING_RATE))
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    # Processes of its own, so that no other test runs where DeepSpeed was.
    # It asks for gigabytes that it never touches: filled, they would not fit into memory.
    ranks = TwoRanks(tmp_path_factory.mktemp("deepspeed"), fill_memory=False)
    yield ranks.run(train_on_ranks, CASES)
    ranks.close()


@pytest.mark.parametrize("name", CASES)
def test_parameters_are_bit_equal_to_those_of_one_process(trained, name):
    start = dict(CASES[name].build().to(CASES[name].dtype).named_parameters())
    frozen = {key for key, parameter in start.items() if not parameter.requires_grad}
    for actual, expected, _ in (rank[name] for rank in trained):
        assert_equal_tensors(actual, expected)
        assert frozen == {key for key, parameter in start.items() if torch.equal(parameter, actual[key])}


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.stage == 3])
def test_stage_3_keeps_no_parameter_whole(trained, name):
    assert [rank[name][2] for rank in trained] == [0, 0]
