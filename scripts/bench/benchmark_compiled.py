"""
What `torch.compile` makes of a model: seconds of a step, beside the same step uncompiled.

    python -m scripts.bench.benchmark_compiled                  # 1K, 4K and 16K tokens
    python -m scripts.bench.benchmark_compiled --lengths 4096    # five minutes on two cores
    python -m scripts.bench.benchmark_compiled --cases decoding  # five minutes on two cores

The model of the other benchmarks, with local and LSH layers; training steps and forward passes without gradients.
Gradients are compared before anything is timed. `decoding` takes the recipe's model of the same size, and a token at a
time with a cache, uncompiled and compiled in turn; logits are compared in each step.

Writes compiled.json, where cases that are not asked for stay. Nothing else should run meanwhile.
"""

import argparse
import copy
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.benchmark import Timer

from hf_reformer import ReformerCache, ReformerConfig, ReformerForCausalLM
from hf_reformer.training import recipe_config
from hf_reformer.training.provenance import machine, versions

from .shape import Shape


DOCS = Path(__file__).parents[2] / "docs"
LEAST_SECONDS = 10
CHECKED_LENGTH = 256
TOLERANCE = 1e-4
# Of logits in float32.
STEP_TOLERANCE = 1e-4
WARM_STEPS, BLOCK = 3, 8


def build(shape: Shape, reversible: bool) -> nn.Module:
    """A language model; seeds decide the buckets, because compiled code draws random numbers of its own."""
    settings = shape.reformer_settings(seed=0) | {
        "attn_layers": ["local", "lsh"] * (shape.num_layers // 2),
        "local_attn_chunk_length": shape.chunk_length,
        "local_attention_probs_dropout_prob": 0.0,
        "circular_look_around": False,
        "reversible": reversible,
    }
    torch.manual_seed(0)
    return ReformerForCausalLM(ReformerConfig(**settings))


def train_step(model: nn.Module, call: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Loss and gradients of one step."""
    model.zero_grad()
    loss = call(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach()


@torch.no_grad()
def infer(model: nn.Module, call: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits."""
    return call(input_ids=ids).logits


def check(shape: Shape, reversible: bool) -> float:
    """
    The largest relative difference of the gradients, on a short text; SystemExit if it is no rounding.

    In float64: where vectors differ in the last digit of float32, some fall into other buckets.
    """
    shape, gradients = replace(shape, length=CHECKED_LENGTH), []
    model = build(shape, reversible).double()
    compiled = torch.compile(model, fullgraph=True)
    ids = torch.randint(shape.vocab_size, (1, CHECKED_LENGTH))
    for call in (model, compiled):
        train_step(model, call, ids)
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    error = max(((one - other).norm() / one.norm()).item() for one, other in zip(*gradients, strict=True))
    if not error <= TOLERANCE:
        raise SystemExit(f"Compiled gradients are off by {error:.1e}, {TOLERANCE:.0e} is allowed. Nothing was timed.")
    return error


def measure(length: int, reversible: bool) -> list[dict]:
    """A row for training and one for inference."""
    shape, rows = Shape(length, rounds=1), []
    model = build(shape, reversible)
    ids = torch.randint(shape.vocab_size, (1, length))
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    error = check(shape, reversible)
    start = time.perf_counter()
    train_step(model, compiled, ids)
    compile_seconds = time.perf_counter() - start
    for step, training in ((train_step, True), (infer, False)):
        model.train(training)
        row = {"length": length, "reversible": reversible, "step": step.__name__, "error": error}
        row["first_step_s"] = compile_seconds if training else None
        for name, call in (("uncompiled_s", model), ("compiled_s", compiled)):
            step(model, call, ids)
            timer = Timer(
                "step(model, call, ids)",
                globals={"step": step, "model": model, "call": call, "ids": ids},
                num_threads=torch.get_num_threads(),
            )
            row[name] = timer.blocked_autorange(min_run_time=LEAST_SECONDS).median
        rows.append(row)
        print(
            f"{length:>7,} {'reversible' if reversible else 'ordinary':>10} {step.__name__:>10}: "
            f"{row['uncompiled_s']:.3f} s, compiled {row['compiled_s']:.3f} s",
            flush=True,
        )
    return rows


def decoding_model(shape: Shape, layers: list[str], longest: int) -> nn.Module:
    """A language model as the recipe makes it."""
    torch.manual_seed(0)
    config = recipe_config(
        longest,
        attn_layers=layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_heads,
        attention_head_size=shape.hidden_size // shape.num_heads,
        feed_forward_size=shape.feed_forward_size,
    )
    return ReformerForCausalLM(config).eval()


@torch.no_grad()
def measure_decoding(layers: list[str], contexts: list[int], steps: int) -> list[dict]:
    """A row for each context. One compiled program serves all."""
    shape, longest = Shape(max(contexts)), max(contexts) + steps + WARM_STEPS
    model = decoding_model(shape, layers, longest)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    rows = []
    for context in contexts:
        ids = torch.randint(3, model.config.vocab_size, (1, context + steps + WARM_STEPS))
        cache = ReformerCache(model.config, max_length=longest)
        model(ids[:, :context], cache=cache, logits_to_keep=1)
        caches = {"uncompiled": cache, "compiled": copy.deepcopy(cache)}
        seconds, logits = {name: [] for name in caches}, {name: [] for name in caches}
        start = time.perf_counter()
        # In short blocks, because other work comes and goes.
        for first in range(context, ids.shape[1], BLOCK):
            for (name, cache), call in zip(caches.items(), (model, compiled), strict=True):
                for token in ids[:, first : first + BLOCK].split(1, dim=1):
                    begin = time.perf_counter()
                    logits[name].append(call(token, cache=cache).logits)
                    seconds[name].append(time.perf_counter() - begin)
        outputs = [torch.cat(found, dim=1) for found in logits.values()]
        error = ((outputs[0] - outputs[1]).norm() / outputs[0].norm()).item()
        if not error <= STEP_TOLERANCE:
            raise SystemExit(f"Compiled logits are off by {error:.1e}, {STEP_TOLERANCE:.0e} is allowed.")
        row = {"layers": layers, "context": context, "error": error, "wall_s": time.perf_counter() - start}
        for name, found in seconds.items():
            row |= {f"{name}_ms": 1e3 * statistics.median(found[WARM_STEPS:]), f"{name}_first_s": found[0]}
            row[f"{name}_tenth_ms"] = 1e3 * sorted(found[WARM_STEPS:])[len(found) // 10]
        rows.append(row)
        print(
            f"{context:>7,} {'+'.join(dict.fromkeys(layers)):>10} decoding: {row['uncompiled_ms']:.2f} ms, compiled "
            f"{row['compiled_ms']:.2f} ms ({row['uncompiled_ms'] / row['compiled_ms']:.2f} times)",
            flush=True,
        )
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--cases", nargs="+", choices=["steps", "decoding"], default=["steps", "decoding"])
    parser.add_argument("--layers", nargs="+", default=["local", "lsh", "local", "lsh"], help="Of decoding models.")
    parser.add_argument("--tokens", type=int, default=200, help="Decoded after each context.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=DOCS / "compiled.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    facts = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    where = {"machine": machine(), "versions": versions(), "threads": torch.get_num_threads()}
    if "steps" in options.cases:
        rows = [row for length in options.lengths for kind in (True, False) for row in measure(length, kind)]
        facts |= where | {"rows": rows}
    if "decoding" in options.cases:
        found = measure_decoding(options.layers, options.lengths, options.tokens)
        others = [row for row in facts.get("decoding", {}).get("rows", []) if row["layers"] != options.layers]
        facts["decoding"] = where | {"rows": others + found}
    options.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
