"""Accelerate's FSDP2, the Trainer and Muon on two real processes, against one process with the whole batch."""

import os

import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from reversible_models import layers_of
from tiny_models import STACKS, VOCAB, assert_close, assert_equal_tensors, make_model
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, TrainingArguments
from two_ranks import WORLD_SIZE, can_resume_on_two_cpus, full

from hf_reformer import ReformerForCausalLM
from hf_reformer.training import MuonWithAdamW


pytestmark = pytest.mark.distributed


MODEL = {"attn_layers": STACKS["mixed"], "hash_seed": 3, "chunk_size_lm_head": 16}
ROWS = torch.randint(VOCAB, (16, 37), generator=torch.Generator().manual_seed(0))


def build(dtype=torch.float64, reversible=True):
    return make_model(ReformerForCausalLM, reversible=reversible, **MODEL).train().to(dtype)


def parameters_of(model):
    return {name: full(parameter) for name, parameter in model.named_parameters()}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


# Accelerate.


def join(rank):
    """Let accelerate begin anew in this process, as one of two."""
    world_size = str(WORLD_SIZE)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=world_size, LOCAL_WORLD_SIZE=world_size)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState(cpu=True)


def allow_fsdp():
    """
    Let accelerate's FSDP run on a CPU.

    It looks at its plugin only where the processes have accelerators, though all that follows runs on gloo, too.
    """
    PartialState().distributed_type = DistributedType.MULTI_GPU


def make_accelerator(rank, **options):
    join(rank)
    allow_fsdp()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", state_dict_type="SHARDED_STATE_DICT"
    )
    return Accelerator(cpu=True, fsdp_plugin=plugin, **options)


def train_steps(accelerator, model, optimizer, rows, steps):
    """Each step in two micro-batches; returns the norms of the gradients before they are clipped."""
    norms = []
    for _ in range(steps):
        for ids in rows.chunk(2):
            with accelerator.accumulate(model):
                with accelerator.autocast():
                    loss = model(ids, labels=ids).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norms.append(full(accelerator.clip_grad_norm_(model.parameters(), 1.0)))
                optimizer.step()
                optimizer.zero_grad()
    return norms


def with_accelerate(rank, folder, mixed_precision, dtype, reversible):
    """Two steps, a checkpoint, a third step; then the third step again, from the checkpoint."""
    accelerator = make_accelerator(rank, mixed_precision=mixed_precision, gradient_accumulation_steps=2)
    model = build(dtype, reversible)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    rows, results = ROWS[:8][rank::WORLD_SIZE], {}
    results["sharded"] = [type(layer).__name__ for layer in layers_of(model) if isinstance(layer, FSDPModule)]
    results["norms"] = train_steps(accelerator, model, optimizer, rows, steps=2)
    accelerator.save_state(folder)
    results["saved"] = parameters_of(model)
    results["norms"] += train_steps(accelerator, model, optimizer, rows, steps=1)
    results["trained"] = parameters_of(model)
    accelerator.load_state(folder)
    results["loaded"] = parameters_of(model)
    train_steps(accelerator, model, optimizer, rows, steps=1)
    results["trained again"] = parameters_of(model)
    results["dtype"] = model(rows).logits.dtype
    return results


def in_one_process():
    model = build(reversible=False)
    optimizer, norms = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(3):
        optimizer.zero_grad()
        model(ROWS[:8], labels=ROWS[:8]).loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
    return norms, parameters_of(model)


def check_checkpoint(results):
    assert_equal_tensors(results["loaded"], results["saved"])
    assert_equal_tensors(results["trained again"], results["trained"])


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_accelerate_trains_shards_as_one_process_trains_the_whole(two_ranks, tmp_path):
    for results in two_ranks.run(with_accelerate, tmp_path, "no", torch.float64, True):
        assert len(results["sharded"]) == len(MODEL["attn_layers"])
        norms, trained = in_one_process()
        assert_close(results["trained"], trained)
        assert_close(dict(enumerate(results["norms"])), dict(enumerate(norms)))
        check_checkpoint(results)

    model = build()
    torch.nn.init.zeros_(model.lm_head.decoder.weight)
    dcp.load({"model": model.state_dict()}, checkpoint_id=tmp_path / "pytorch_model_fsdp_0")
    assert_equal_tensors(parameters_of(model), results["saved"])


def test_accelerate_trains_in_mixed_precision_as_ordinary_autograd(two_ranks, tmp_path):
    arguments = [(tmp_path / str(reversible), "bf16", torch.float32, reversible) for reversible in (True, False)]
    actual, expected = (two_ranks.run(with_accelerate, *some)[0] for some in arguments)
    assert_equal_tensors(actual["trained"], expected["trained"])
    assert actual["norms"] == expected["norms"]
    assert actual["dtype"] == torch.bfloat16
    check_checkpoint(actual)


def without_permission(rank):
    join(rank)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    return type(Accelerator(cpu=True, fsdp_plugin=plugin).prepare(build())).__name__


def test_accelerate_turns_fsdp_on_a_cpu_into_ddp(two_ranks):
    """If this fails, accelerate has learnt it: `allow_fsdp` can go."""
    assert two_ranks.run(without_permission) == ["DistributedDataParallel"] * 2


# The Trainer.


STEPS, SAVED_AT = 4, 2


MUON = {"lr": 1e-2, "weight_decay": 0.0, "betas": (0.9, 0.98)}


class MuonTrainer(Trainer):
    def __init__(self, model, **kwargs):
        super().__init__(model, optimizer_cls_and_kwargs=(MuonWithAdamW, {"model": model} | MUON), **kwargs)


def train_with(trainer_class, folder, batch_size, resume, **options):
    arguments = TrainingArguments(
        str(folder),
        use_cpu=True,
        per_device_train_batch_size=batch_size,
        max_steps=STEPS,
        save_steps=SAVED_AT,
        logging_steps=1,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    rows = [{"input_ids": row, "labels": row} for row in ROWS]
    trainer = trainer_class(model=build(), args=arguments, train_dataset=rows)
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-{SAVED_AT}" if resume else None)
    trainer.save_model(f"{folder}/final")
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return losses, parameters_of(trainer.model), isinstance(trainer.model, FSDPModule)


def with_trainer(rank, trainer_class, folder, fsdp):
    """Trained through, and from its checkpoint in the middle."""
    results = []
    for resume in (False, True):
        join(rank)
        options = {"accelerator_config": {"use_configured_state": True}}
        if fsdp:
            allow_fsdp()
            options |= {"fsdp": True, "fsdp_config": {"state_dict_type": fsdp}}
        results.append(train_with(trainer_class, folder, 2, resume, **options))
    return results


@pytest.fixture(scope="module")
def trainer_of_one_process(tmp_path_factory):
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    return train_with(Trainer, tmp_path_factory.mktemp("one"), 4, resume=False)


@pytest.mark.parametrize(
    "fsdp",
    [pytest.param(None, marks=can_resume_on_two_cpus), "FULL_STATE_DICT", "SHARDED_STATE_DICT"],
    ids=["ddp", "full", "sharded"],
)
def test_trainer_on_two_processes_equals_one(two_ranks, trainer_of_one_process, tmp_path, fsdp):
    (losses, trained, sharded), resumed = two_ranks.run(with_trainer, Trainer, tmp_path, fsdp)[0]
    expected_losses, expected, _ = trainer_of_one_process
    assert sharded == (fsdp is not None)
    # The Trainer adds losses up in float32.
    assert losses == pytest.approx(expected_losses, rel=2 * torch.finfo(torch.float32).eps)
    assert_close(trained, expected)
    assert resumed[0] == losses
    assert_equal_tensors(resumed[1], trained)
    # The Trainer saves no model to load where it was told to keep its state in shards.
    assert (tmp_path / "final").exists() == (fsdp != "SHARDED_STATE_DICT")
    if fsdp != "SHARDED_STATE_DICT":
        final = ReformerForCausalLM.from_pretrained(tmp_path / "final", dtype=torch.float64)
        assert_equal_tensors(parameters_of(final), trained)


# Muon.


def test_muon_resumes_on_shards(two_ranks, tmp_path):
    trained, resumed = two_ranks.run(with_trainer, MuonTrainer, tmp_path, "SHARDED_STATE_DICT")[0]
    assert trained[2]
    assert resumed[0] == trained[0]
    assert_equal_tensors(resumed[1], trained[1])


def one_step_of_muon(model, rows, prepare=lambda *both: both):
    optimizer = MuonWithAdamW(model, **MUON)
    optimizer.parts[0].dtype = torch.float64
    model, optimizer = prepare(model, optimizer)
    before = parameters_of(model)
    model(rows, labels=rows).loss.backward()
    grads = {name: full(parameter.grad) for name, parameter in model.named_parameters()}
    optimizer.step()
    return {name: parameter - before[name] for name, parameter in parameters_of(model).items()}, grads


def one_step_on_shards(rank):
    accelerator = make_accelerator(rank)
    return one_step_of_muon(build(), ROWS[:8][rank::WORLD_SIZE], accelerator.prepare)[0]


def muon_in_float64(gradient, learning_rate=1e-2):
    """The first update of a matrix, written out."""
    update = gradient.T if gradient.shape[0] > gradient.shape[1] else gradient
    update = update / update.norm()
    for _ in range(5):
        gram = update @ update.T
        update = 3.4445 * update + (-4.7750 * gram + 2.0315 * gram @ gram) @ update
    update = update.T if gradient.shape[0] > gradient.shape[1] else update
    return -learning_rate * 0.2 * max(gradient.shape) ** 0.5 * update


def test_muon_on_shards_is_muon_on_the_whole(two_ranks):
    sharded = two_ranks.run(one_step_on_shards)[0]
    whole, gradients = one_step_of_muon(build(reversible=False), ROWS[:8])
    assert_close(sharded, whole)
    matrices = {name: update for name, update in whole.items() if "encoder.layers." in name and update.ndim == 2}
    assert matrices
    assert_close(matrices, {name: muon_in_float64(gradients[name]) for name in matrices})


def test_muon_takes_no_state_of_another_optimizer():
    model = build()
    other = torch.optim.AdamW([{"params": part["params"]} for part in MuonWithAdamW(model, **MUON).param_groups])
    with pytest.raises(ValueError, match=r"of another optimizer.*muon"):
        MuonWithAdamW(model, **MUON).load_state_dict(other.state_dict())
