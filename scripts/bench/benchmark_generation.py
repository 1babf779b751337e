"""
What a token costs in cached generation, in time and in memory, against the length of the text before it.

    python -m scripts.bench.benchmark_generation             # contexts of 1K, 4K, 16K and 64K tokens; some minutes
    python -m scripts.bench.benchmark_generation --quick     # 1K and 4K, few steps

Contenders are models of one size with random weights, batch 1, fed random tokens; they take turns, a few steps each.
Only hf_reformer reads the whole text. The caches of the others are filled with random numbers instead: the work of a
step does not depend on them, and Llama would take O(L^2) time to read. That such a cache has the very shapes that
reading a text gives is checked first, as is that hf_reformer computes the same with its cache as without. Writes
generation.json and generation.png; nothing else should run meanwhile.
"""

import argparse
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, median

import matplotlib


matplotlib.use("Agg")

import torch
from matplotlib import pyplot as plt
from torch import nn
from tqdm import tqdm
from transformers import DynamicCache, LlamaForCausalLM
from transformers.models.reformer.configuration_reformer import ReformerConfig as StockConfig
from transformers.models.reformer.modeling_reformer import ReformerDynamicCache
from transformers.models.reformer.modeling_reformer import ReformerModelWithLMHead as StockReformer

from hf_reformer import ReformerCache, ReformerConfig, ReformerForCausalLM
from hf_reformer.modeling.decoding.cache_naming import CACHE_NAME
from hf_reformer.modeling.memory.allocations import AllocationLedger
from hf_reformer.training.provenance import machine, versions

from .language_models import llama_config


DOCS = Path(__file__).parents[2] / "docs"
CONTEXTS = [1024, 4096, 16384, 65536]
CHUNK = 64
PIECE = 65536  # tokens that hf_reformer reads at once
WARM_UP, STEPS_IN_TURN, MEASURED_FOR_MEMORY = 3, 4, 2
TOLERANCE = 1e-4
MIB = 2**20


@dataclass(frozen=True)
class Shape:
    """
    What all contenders have in common.

    Attributes:
        context: Tokens in the cache before the first step.
        new_tokens: Tokens that positions are needed for beyond.
    """

    context: int
    new_tokens: int
    hidden_size: int = 512
    num_heads: int = 8
    num_layers: int = 4
    feed_forward_size: int = 2048
    vocab_size: int = 320
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def factory(self) -> dict:
        """For tensors like those of the model."""
        return {"dtype": getattr(torch, self.dtype), "device": self.device}

    @property
    def num_buckets(self) -> int | list[int]:
        """The power of two at 2 * context / CHUNK, in two factors where stock factorizes it."""
        power = (2 * self.context // CHUNK).bit_length() - 1
        return 2**power if 2**power <= 2 * CHUNK else [2 ** (power // 2), 2 ** (power - power // 2)]

    @property
    def reformer_settings(self) -> dict:
        """For our config and for stock's."""
        rows = -(-(self.context + self.new_tokens) // CHUNK)
        return {
            "attn_layers": ["lsh"] * self.num_layers,
            "attention_head_size": self.hidden_size // self.num_heads,
            "axial_pos_shape": [rows, CHUNK],
            "axial_pos_embds_dim": [self.hidden_size // 4, self.hidden_size - self.hidden_size // 4],
            "feed_forward_size": self.feed_forward_size,
            "hidden_size": self.hidden_size,
            "is_decoder": True,
            "lsh_attn_chunk_length": CHUNK,
            "max_position_embeddings": rows * CHUNK,
            "num_attention_heads": self.num_heads,
            "num_buckets": self.num_buckets,
            "vocab_size": self.vocab_size,
            # Stock would hash every new token with rotations of its own.
            "hash_seed": 0,
        }


class Contender(ABC):
    """A model with a cache, and the text that it is to read and to continue."""

    how_filled = "random numbers"

    def __init__(self, shape: Shape):
        self.shape = shape
        torch.manual_seed(0)
        self.model = self.build().to(**shape.factory).eval()
        self.ids = torch.randint(3, shape.vocab_size, (1, shape.context + shape.new_tokens), device=shape.device)
        self.position = shape.context
        self.cache = None

    @abstractmethod
    def build(self) -> nn.Module:
        """The model."""

    @abstractmethod
    def read(self) -> None:
        """Fill the cache by reading the text, up to the context."""

    @abstractmethod
    def fill(self) -> None:
        """Fill the cache as the benchmark does."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Read on with the cache; logits of the last token."""
        return self.model(ids, **{CACHE_NAME: self.cache}, use_cache=True, logits_to_keep=1).logits

    @torch.no_grad()
    def step(self) -> torch.Tensor:
        """Read one more token; logits of it."""
        self.position += 1
        return self.forward(self.ids[:, self.position - 1 : self.position])


class OwnReformer(Contender):
    """Ours, as a new model would be set up for generation."""

    how_filled = f"the text, read in pieces of {PIECE} tokens"

    def __init__(self, shape: Shape, num_hashes: int = 1, piece: int = PIECE, **changes):
        self.num_hashes, self.piece, self.changes = num_hashes, piece, changes
        super().__init__(shape)

    def build(self):
        settings = {
            "num_hashes": self.num_hashes,
            "lsh_sliding_window": True,
            "circular_look_around": False,
            "attend_across_buckets": False,
            "chunk_size_feed_forward": 1024,
        }
        self.config = ReformerConfig(**self.shape.reformer_settings | settings | self.changes)
        return ReformerForCausalLM(self.config)

    @torch.no_grad()
    def read(self):
        self.cache = ReformerCache(self.config)
        for piece in self.ids[:, : self.shape.context].split(self.piece, dim=1):
            self.forward(piece)

    fill = read


class StockContender(Contender):
    """The Reformer of transformers, whose cache holds hidden states and buckets."""

    def build(self):
        return StockReformer(StockConfig(num_hashes=1, **self.shape.reformer_settings))

    def forward(self, ids):
        return self.model(ids, past_buckets_states=self.cache, use_cache=True, logits_to_keep=1).logits

    @torch.no_grad()
    def read(self):
        self.cache = ReformerDynamicCache()
        self.forward(self.ids[:, : self.shape.context])

    def fill(self):
        shape, self.cache = self.shape, ReformerDynamicCache()
        num_buckets = torch.tensor(shape.num_buckets).prod().item()
        for layer in range(shape.num_layers):
            buckets = torch.randint(num_buckets, (1, shape.num_heads, 1, shape.context), device=shape.device)
            states = torch.randn(1, shape.context, shape.hidden_size, **shape.factory)
            self.cache.update(buckets, states, layer)


class LlamaContender(Contender):
    """Full attention, with as many weights in each layer."""

    def build(self):
        self.config = llama_config(self.shape, self.shape.context + self.shape.new_tokens)
        return LlamaForCausalLM(self.config)

    @torch.no_grad()
    def read(self):
        self.cache = DynamicCache(config=self.config)
        self.forward(self.ids[:, : self.shape.context])

    def fill(self):
        shape, self.cache = self.shape, DynamicCache(config=self.config)
        size = (1, shape.num_heads, shape.context, shape.hidden_size // shape.num_heads)
        for layer in range(shape.num_layers):
            self.cache.update(torch.randn(size, **shape.factory), torch.randn(size, **shape.factory), layer)


OURS = "hf_reformer"
CONTENDERS = {
    OURS: OwnReformer,
    "hf_reformer, 4 rounds": lambda shape, **settings: OwnReformer(shape, num_hashes=4, **settings),
    "transformers Reformer": StockContender,
    "Llama, SDPA": LlamaContender,
}


def tensors_held_by(thing: object, seen: set[int] | None = None) -> Iterator[torch.Tensor]:
    """All tensors that can be reached from an object through attributes and containers, one for each storage."""
    seen = set() if seen is None else seen
    is_tensor = isinstance(thing, torch.Tensor)
    key = thing.untyped_storage().data_ptr() if is_tensor else id(thing)
    if key in seen or isinstance(thing, type):
        return
    seen.add(key)
    if is_tensor:
        yield thing
        return
    if isinstance(thing, (list, tuple, set)):
        parts = list(thing)
    else:
        # A dict may have attributes, too.
        parts = list(thing.values()) if isinstance(thing, dict) else []
        parts += getattr(thing, "__dict__", {}).values()
    for part in parts:
        yield from tensors_held_by(part, seen)


def bytes_held_by(thing: object) -> int:
    """Memory of these tensors."""
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors_held_by(thing))


def check(names: list[str], shape: Shape) -> dict[str, float]:
    """
    Whether what is measured is worth measuring, on a short text.

    Returns:
        For each of ours, the largest error of cached logits, relative to the largest logit.

    Raises:
        SystemExit: cached and uncached logits differ, or a cache filled at random is not like one of a text.
    """
    shape, errors = replace(shape, context=512, new_tokens=16, dtype="float32"), {}
    for name in names:
        if name.startswith(OURS):
            # Pieces that no chunk length divides.
            errors[name] = cache_error(CONTENDERS[name](shape, piece=200))
            if not errors[name] <= TOLERANCE:
                raise SystemExit(
                    f"{name}: logits with a cache are off by {errors[name]:.1e} of the largest, {TOLERANCE:.0e} is "
                    "allowed. Nothing was measured, because times of wrong results mean nothing."
                )
            continue
        contender, kinds = CONTENDERS[name](shape), []
        for prepare in (contender.read, contender.fill):
            prepare()
            kinds.append([(tuple(tensor.shape), tensor.dtype) for tensor in tensors_held_by(contender.cache)])
        if kinds[0] != kinds[1]:
            raise SystemExit(f"{name}: reading a text leaves {kinds[0]} in the cache, it was filled with {kinds[1]}.")
    return errors


@torch.no_grad()
def cache_error(contender: OwnReformer) -> float:
    """Largest difference to the logits of one pass over the whole text, relative to the largest logit."""
    contender.read()
    cached = torch.cat([contender.step() for _ in range(contender.shape.new_tokens)], dim=1)
    whole = contender.model(contender.ids, logits_to_keep=contender.shape.new_tokens).logits
    return ((cached - whole).abs().max() / whole.abs().max()).item()


def synchronize(device: str) -> None:
    """Wait until all work is done."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(call, device: str) -> float:
    """How long a call takes."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def peak_of_step(contender: Contender) -> int:
    """
    Bytes that an ordinary step takes at its peak, beyond weights and cache; two steps are made.

    On a CPU, what kernels allocate for themselves is not seen. Now and then a step of ours takes more, to merge the
    order of buckets or to enlarge the cache.
    """
    if contender.shape.device == "cuda":
        contender.step()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        contender.step()
        return torch.cuda.max_memory_allocated() - before
    with AllocationLedger() as ledger:
        # Afterwards the ledger knows those tensors of the cache that every step replaces, and sees them go.
        contender.step()
        before = ledger.alive
        ledger.restart_peak()
        contender.step()
        return ledger.peak - before


def time_in_turn(contenders: dict[str, Contender], steps: int, budget: float) -> dict[str, list[float]]:
    """
    Seconds of each step of each contender, a few steps of each in turn.

    Args:
        steps: For each contender.
        budget: Seconds after which a contender makes no more steps.
    """
    for contender in contenders.values():
        for _ in range(WARM_UP):
            contender.step()
    taken = {name: [] for name in contenders}
    with tqdm(total=steps * len(contenders), desc="steps", unit="step", leave=False) as progress:
        while waiting := [name for name in taken if len(taken[name]) < steps and sum(taken[name]) < budget]:
            for name in waiting:
                for _ in range(min(STEPS_IN_TURN, steps - len(taken[name]))):
                    taken[name].append(seconds_of(contenders[name].step, contenders[name].shape.device))
                    progress.update()
    return taken


def measure(names: list[str], shape: Shape, steps: int, budget: float) -> list[dict]:
    """A row for each contender at one context."""
    contenders, filled = {}, {}
    for name in tqdm(names, desc=f"caches of {shape.context:,} tokens", unit="cache", leave=False):
        contenders[name] = CONTENDERS[name](shape)
        filled[name] = seconds_of(contenders[name].fill, shape.device)
    taken = time_in_turn(contenders, steps, budget)
    rows = []
    for name, contender in contenders.items():
        milliseconds = [1000 * seconds for seconds in taken[name]]
        rows.append(
            {
                "context": shape.context,
                "contender": name,
                "steps": len(milliseconds),
                "median_ms": round(median(milliseconds), 3),
                "mean_ms": round(mean(milliseconds), 3),
                "least_ms": round(min(milliseconds), 3),
                "most_ms": round(max(milliseconds), 3),
                "prefill_seconds": round(filled[name], 3) if isinstance(contender, OwnReformer) else None,
                "cache_filled_with": contender.how_filled,
                "parameters": sum(parameter.numel() for parameter in contender.model.parameters()),
                "weights_bytes": sum(parameter.nbytes for parameter in contender.model.parameters()),
                "cache_bytes": bytes_held_by(contender.cache),
                "step_peak_bytes": peak_of_step(contender),
            }
        )
    return rows


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    ours = {row["context"]: row["median_ms"] for row in rows if row["contender"] == OURS}
    lines = [
        "| context | | ms per token: median (least to most) | mean | × ours | cache, MiB | peak of a step, MiB "
        "| prefill, s |",
        "|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        ratio = f"{row['median_ms'] / ours[row['context']]:.2f}" if row["context"] in ours else ""
        prefill = "" if row["prefill_seconds"] is None else f"{row['prefill_seconds']:.2f}"
        lines.append(
            f"| {row['context']:,} | {row['contender']} | {row['median_ms']:.2f} ({row['least_ms']:.2f} to "
            f"{row['most_ms']:.2f}) | {row['mean_ms']:.2f} | {ratio} | {row['cache_bytes'] / MIB:,.1f} | "
            f"{row['step_peak_bytes'] / MIB:,.1f} | {prefill} |"
        )
    return "\n".join(lines)


def draw(rows: list[dict], path: Path) -> None:
    """Time per token, and memory of the cache, against the context."""
    figure, (times, caches) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    contexts = sorted({row["context"] for row in rows})
    for name, color in zip(CONTENDERS, ("#1f5fa8", "#4fa3d9", "#b5451b", "#5a8f3c"), strict=True):
        chosen = [row for row in rows if row["contender"] == name]
        if chosen:
            line = {"color": color, "marker": "o", "markersize": 5, "label": name}
            lengths = [row["context"] for row in chosen]
            times.plot(lengths, [row["median_ms"] for row in chosen], **line)
            caches.plot(lengths, [row["cache_bytes"] / MIB for row in chosen], **line)
    times.set(title="time per token", ylabel="ms, median")
    caches.set(title="memory of the cache", ylabel="MiB")
    for axes in (times, caches):
        axes.set(xlabel="tokens of context", xscale="log", yscale="log")
        axes.set_xticks(contexts, [f"{context / 1024:g}K" for context in contexts])
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS, help="tokens (default %(default)s)")
    # Every 65th token ours merges what it has collected: 64 steps and the warm-up meet that once.
    parser.add_argument("--steps", type=int, default=64, help="timed steps of each contender (default %(default)s)")
    parser.add_argument(
        "--budget", type=float, default=120.0, help="seconds of steps per contender and context (default %(default)s)"
    )
    parser.add_argument(
        "--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME", help="some of them"
    )
    parser.add_argument("--alone", action="store_true", help="one after the other, where memory does not hold all")
    for name in ("hidden_size", "num_heads", "num_layers", "feed_forward_size"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Shape, name), help="(default %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output_dir", type=Path, default=DOCS, help="where the files go (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="contexts of 1K and 4K, 5 steps")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.contexts, arguments.steps = CONTEXTS[:2], 5
    if any(context < 2 * CHUNK or context % CHUNK for context in arguments.contexts):
        parser.error(f"--contexts must be multiples of {CHUNK}, {2 * CHUNK} at least, but are {arguments.contexts}")
    if arguments.steps < 1 or arguments.budget <= 0:
        parser.error(f"--steps and --budget must be above 0, but are {arguments.steps} and {arguments.budget}")
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Check, measure, print, and write it all down."""
    arguments = parse_arguments(argv)
    new_tokens = WARM_UP + arguments.steps + MEASURED_FOR_MEMORY
    sizes = ("hidden_size", "num_heads", "num_layers", "feed_forward_size", "dtype", "device")
    shape = Shape(0, new_tokens, **{name: getattr(arguments, name) for name in sizes})
    sizes = {name: value for name, value in asdict(shape).items() if name not in ("context", "new_tokens")}
    figures = {**machine(), **versions(), "shape": {"batch": 1, "chunk_length": CHUNK, **sizes}}
    if arguments.device == "cuda":
        figures["accelerator"] = torch.cuda.get_device_name()
    print(json.dumps(figures, indent=2))
    figures["cache_error"] = check(arguments.contenders, shape)
    print("Relative error of cached logits:", figures["cache_error"])
    groups = [[name] for name in arguments.contenders] if arguments.alone else [arguments.contenders]
    figures |= {"in_turn": not arguments.alone, "rows": []}
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    path = arguments.output_dir / "generation.json"
    for context in tqdm(arguments.contexts, desc="contexts", unit="context"):
        for group in groups:
            figures["rows"] += measure(group, replace(shape, context=context), arguments.steps, arguments.budget)
        path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(table(figures["rows"]))
    draw(figures["rows"], path.with_suffix(".png"))


if __name__ == "__main__":
    main()
