"""
Predicts the memory of a training step, or of reading a text, without allocating it.

The model's own step runs with fake tensors, which have shapes and no memory, while a ledger keeps account of them. So
the prediction follows what the code does; there is no formula to keep up to date.
"""

import re
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from ...configuration.configuration_reformer import ReformerConfig
from .allocations import Allocation, AllocationLedger


OPTIMIZERS = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD, "none": None}

PARAMETERS, GRADIENTS, ACTIVATIONS = "parameters", "gradients", "activations"
OPTIMIZER_STATE, OPTIMIZER_STEP = "optimizer state", "optimizer step"
MODES = ("training", "forward", "prefill")
KIND_OF_ATTENTION = {"lsh": "LSH", "local": "local", "full": "full"}


# trf-ignore: TRF031 these options go in, they are no output
@dataclass(frozen=True)
class TrainingSetup:
    """
    How a language model is trained or used, as far as memory depends on it.

    Attributes:
        mode: "training"; "forward", a pass without gradients of which the last token's logits are kept, or a masked
            model's all; or "prefill", the same into a cache, as `generate` begins. The latter two have no optimizer.
        batch_size, length: Rows of a batch, and tokens of each; by default as many as the config allows.
            Without a bound it is `max_position_embeddings`.
        target_length: Tokens of each row's target, where an encoder reads the `length` of the source; by default as
            many.
        dtype: Of the parameters.
        autocast_dtype: What autocast computes in, or None without it.
        optimizer: One of `OPTIMIZERS`, or a function that makes a `torch.optim.Optimizer` for a model.
        gradient_accumulation_steps: Batches per step of the optimizer.
        device: Type of the device. Memory is predicted for the operators that run there, so it must be there.

    Raises:
        ValueError: A value that cannot be trained with.
    """

    batch_size: int = 1
    length: int | None = None
    target_length: int | None = None
    mode: str = "training"
    dtype: torch.dtype = torch.float32
    autocast_dtype: torch.dtype | None = None
    optimizer: str | Callable[[nn.Module], torch.optim.Optimizer] = "adamw"
    gradient_accumulation_steps: int = 1
    device: str = "cpu"

    def __post_init__(self):
        for name in ("batch_size", "length", "target_length", "gradient_accumulation_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, but got {value}.")
        if self.mode not in MODES:
            raise ValueError(f"`mode` must be one of {list(MODES)}, but got {self.mode!r}.")
        if not self.dtype.is_floating_point:
            raise ValueError(f"`dtype` must be a floating-point type, but got {self.dtype}.")
        if self.autocast_dtype not in (None, torch.bfloat16, torch.float16):
            raise ValueError(
                f"`autocast_dtype` must be torch.bfloat16, torch.float16 or None, but got {self.autocast_dtype}."
            )
        if not callable(self.optimizer) and self.optimizer not in OPTIMIZERS:
            raise ValueError(
                f"`optimizer` must be one of {sorted(OPTIMIZERS)} or a function of the model, but got "
                f"{self.optimizer!r}."
            )
        if self.device != "cpu" and not _is_available(self.device):
            raise ValueError(f"`device` is {self.device!r}, which this machine does not have. Give 'cpu'.")


def _is_available(device: str) -> bool:
    try:
        return torch.get_device_module(device).is_available()
    except RuntimeError:
        # It is no device of any machine.
        return False


class TrainingStep:
    """
    A language model, its optimizer and a batch of random tokens; calling it makes one step, like any but the first.

    A step of another `mode` than "training" reads the tokens. The model is an encoder with a decoder, or causal, as
    the config says, else masked.
    Runs with real tensors, or under `FakeTensorMode` with fake ones.
    """

    def __init__(self, config: ReformerConfig, setup: TrainingSetup):
        self.setup = setup
        if setup.target_length is not None and not config.is_encoder_decoder:
            raise ValueError("`target_length` is for `is_encoder_decoder=True`. One stack has `length`.")
        if setup.mode == "prefill" and not (config.is_decoder or config.is_encoder_decoder):
            raise ValueError("`mode='prefill'` is for causal models, which have a cache. Take 'forward'.")
        auto_class: Any = AutoModelForCausalLM if config.is_decoder else AutoModelForMaskedLM
        if config.is_encoder_decoder:
            auto_class = AutoModelForSeq2SeqLM
        with torch.device(setup.device):
            self.model = auto_class.from_config(deepcopy(config), dtype=setup.dtype)
        self.model.train(setup.mode == "training")
        length = cast(int, setup.length or config.max_sequence_length or config.max_position_embeddings)
        self.batch = {"input_ids": self._random_ids(length)}
        if setup.mode == "training":
            is_target = config.is_encoder_decoder
            self.batch["labels"] = (
                self._random_ids(setup.target_length or length) if is_target else self.batch["input_ids"]
            )
        elif config.is_encoder_decoder:
            self.batch["decoder_input_ids"] = self._random_ids(setup.target_length or length)
        self.optimizer = None

    def _random_ids(self, length):
        shape = self.setup.batch_size, length
        return torch.randint(self.model.config.vocab_size, shape, device=self.setup.device)

    def make_optimizer(self):
        """Make the optimizer and let it allocate its state."""
        make = OPTIMIZERS.get(self.setup.optimizer, self.setup.optimizer)
        if make is None or self.setup.mode != "training":
            return
        self.optimizer = make(self.model if make is self.setup.optimizer else self.model.parameters())
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def __call__(self):
        self.compute()
        self.update_parameters()

    def compute(self):
        """Forward and backward, for as many batches as make a difference; or read the tokens."""
        setup = self.setup
        enabled = setup.autocast_dtype is not None
        if setup.mode != "training":
            writes = self.model.config.is_decoder or self.model.config.is_encoder_decoder
            how = {"use_cache": setup.mode == "prefill", "logits_to_keep": 1} if writes else {}
            with torch.no_grad(), torch.autocast(setup.device, setup.autocast_dtype, enabled=enabled):
                return self.model(**self.batch, **how)
        for _ in range(min(setup.gradient_accumulation_steps, 2)):
            with torch.autocast(setup.device, setup.autocast_dtype, enabled=enabled):
                loss = self.model(**self.batch).loss
            loss.backward()
        return None

    def update_parameters(self):
        """What the optimizer does once the gradients are there."""
        if self.optimizer is not None:
            self.optimizer.step()
        self.model.zero_grad()


@dataclass(frozen=True)
class TensorGroup:
    """
    Tensors alike that are in memory at the peak.

    Attributes:
        purpose: "parameters", "gradients", "optimizer state", "activations" or "optimizer step".
        place: The part of the model that made them, in words.
        name: What they are called in the code, or the operation that made them.
        shape, dtype: Of each.
        count, nbytes: Of all together.
    """

    purpose: str
    place: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    count: int
    nbytes: int


@dataclass(frozen=True)
class MemoryEstimate:
    """
    The memory of a step at its peak, in bytes.

    Attributes:
        peak: All of it, the sum of the following four.
        parameters: Of the model, with its buffers.
        gradients: Of the parameters, as far as they are there at the peak.
        optimizer_state: What the optimizer keeps from step to step.
        activations: Everything else.
        groups: The tensors, largest group first.
    """

    peak: int
    parameters: int
    gradients: int
    optimizer_state: int
    activations: int
    groups: tuple[TensorGroup, ...]


def estimate_memory(config: ReformerConfig, **setup) -> MemoryEstimate:
    """
    Predict the peak memory of a training step of a language model, or of reading a text, without allocating it.

    Args:
        config: Of an encoder with a decoder or of a causal language model if `is_encoder_decoder` or `is_decoder` is
            set, else of a masked one.
        **setup: The attributes of `TrainingSetup`.

    Returns:
        The peak, what it is made of, and the tensors in it. What PyTorch's kernels need for themselves, the memory
        that an allocator does not give back, and Python's own are not part of it.

    Raises:
        ValueError: A value of the setup that cannot be trained with, or an input longer than the model takes.

    Example:

    >>> from hf_reformer import ReformerConfig, estimate_memory
    >>> config = ReformerConfig(is_decoder=True, attn_layers=["local", "lsh"], chunk_size_lm_head=1024)
    >>> estimate = estimate_memory(config, length=4096, optimizer="adamw")
    >>> estimate.peak / 2**20 < 400
    True
    >>> reading = estimate_memory(config, length=4096, mode="forward")
    >>> reading.peak < estimate.peak / 2
    True
    """
    training = TrainingSetup(**setup)
    with FakeTensorMode(), AllocationLedger(PARAMETERS) as ledger:
        step = TrainingStep(config, training)
        for given in step.batch.values():
            ledger.find(given).purpose = ACTIVATIONS
        ledger.purpose = OPTIMIZER_STATE
        step.make_optimizer()
        ledger.purpose = ACTIVATIONS
        ledger.restart_peak()
        with ledger.watch_modules(step.model):
            step.compute()
        for name, parameter in step.model.named_parameters():
            ledger.find(parameter).module = name
            if parameter.grad is not None:
                gradient = ledger.find(parameter.grad)
                gradient.module, gradient.purpose = name, GRADIENTS
        ledger.purpose = OPTIMIZER_STEP
        step.update_parameters()
    groups = _group(ledger.at_peak(), step.model.config)
    standing = [
        sum(group.nbytes for group in groups if group.purpose == purpose)
        for purpose in (PARAMETERS, GRADIENTS, OPTIMIZER_STATE)
    ]
    parameters, gradients, optimizer_state = standing
    return MemoryEstimate(ledger.peak, parameters, gradients, optimizer_state, ledger.peak - sum(standing), groups)


def _group(allocations: Iterable[Allocation], config: ReformerConfig) -> tuple[TensorGroup, ...]:
    groups: dict[tuple, list[int]] = {}
    layers: dict[tuple, set[int | None]] = {}
    for allocation in allocations:
        part, layer = _part_of_model(allocation, config)
        key = allocation.purpose, part, allocation.name, allocation.shape, allocation.dtype
        groups.setdefault(key, []).append(allocation.nbytes)
        layers.setdefault(key, set()).add(layer)
    return tuple(
        TensorGroup(purpose, part + _of_layers(layers[key]), name, shape, dtype, len(sizes), sum(sizes))
        for key, sizes in sorted(groups.items(), key=lambda item: -sum(item[1]))
        for purpose, part, name, shape, dtype in [key]
    )


def _part_of_model(allocation: Allocation, config: ReformerConfig) -> tuple[str, int | None]:
    """The part of the model that a module belongs to, and the number of the layer it is in, if any."""
    module = allocation.module
    if not module:
        return "input and loss" if allocation.purpose == ACTIVATIONS else "", None
    side = re.search(r"^reformer\.(encoder|decoder)\.", module) if config.is_encoder_decoder else None
    whose, kinds = f"{side[1]}'s " if side else "", config.attn_layers
    if whose == "decoder's ":
        kinds = cast(tuple, config.decoder_attn_layers)
    in_layer = re.search(r"encoder\.layers\.(\d+)\.?(\w*)", module)
    if in_layer is None:
        parts = {"lm_head": "head", "embeddings": "embeddings", "encoder": "end of the stack"}
        return whose + next((words for name, words in parts.items() if name in module.split(".")), "model"), None
    layer, part = int(in_layer[1]), in_layer[2]
    if part == "attention":
        return f"{whose}{KIND_OF_ATTENTION[kinds[layer]]} attention", layer
    words = {"": "reversible residuals", "cross_attention": "attention to the encoder"}.get(part, "feed-forward")
    return whose + words, layer


def _of_layers(layers: set[int | None]) -> str:
    numbers = sorted(layer for layer in layers if layer is not None)
    if None in layers:
        return ""
    return f" of layer{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
