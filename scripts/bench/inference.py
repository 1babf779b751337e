"""
What quantised weights, offloaded layers and ONNX cost and keep of a trained model; docs/inference.md has the table.

    make demo
    make .venv-integrations/integrations.stamp   # torchao and bitsandbytes; some minutes
    .venv-integrations/bin/python -m scripts.bench.inference
    .venv-integrations/bin/python -m scripts.bench.inference --report   # the table alone

Each case stands beside the whole model in float32, measured in turn with it: bits per byte of held-out text in windows
of the training context, and tokens per second behind a prompt of that length. Writes docs/inference.json after each
case, and goes on from there. What cannot work is tried, too, and the errors are written down.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DynamicCache,
    PreTrainedModel,
    TorchAoConfig,
)

from hf_reformer.training.compression import bits_per_byte

from .trained import DOCS, ROOT, Figures, held_out, print_table, write


CONTEXT, WINDOWS, NEW_TOKENS, TURNS = 4096, 16, 128, 3
MIB = 2**20
LONGEST_MESSAGE = 300


def load(folder: Path, **settings: Any) -> PreTrainedModel:
    """A model for evaluation; float32 without other settings."""
    return AutoModelForCausalLM.from_pretrained(folder, **({"dtype": torch.float32} | settings)).eval()


def torchao(name: str, **settings: Any) -> dict[str, Any]:
    """Arguments of `from_pretrained` for one of torchao's configs."""
    from torchao import quantization

    return {"quantization_config": TorchAoConfig(getattr(quantization, name)(**settings)), "device_map": "cpu"}


def torchao_four_bits() -> dict[str, Any]:
    """The same for 4 bits in groups of 64 weights, each kept in 8; torchao packs two into a byte on a GPU alone."""
    from torchao.quantization import PerGroup

    return torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=PerGroup(64))


def bitsandbytes(**settings: Any) -> dict[str, Any]:
    """The same for bitsandbytes."""
    return {"quantization_config": BitsAndBytesConfig(**settings), "device_map": "cpu"}


def offloaded(where: str, folder: Path) -> dict[str, Any]:
    """The same for layers that are fetched when they are needed, from memory of the CPU or from a disk."""
    whole = load(folder)
    places: dict[str, str] = {"reformer.embeddings": "cpu", "reformer.encoder.layer_norm": "cpu", "lm_head": "cpu"}
    places |= {f"reformer.encoder.layers.{index}": where for index in range(len(whole.reformer.encoder.layers))}
    return {"device_map": places, "offload_folder": mkdtemp()}


FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
# Arguments of `from_pretrained`, made when they are needed: a tool that is missing costs its own cases.
CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "bfloat16": lambda folder: {"dtype": torch.bfloat16},
    "int8 weights, torchao": lambda folder: torchao("Int8WeightOnlyConfig"),
    "int8 weights and activations, torchao": lambda folder: torchao("Int8DynamicActivationInt8WeightConfig"),
    "int4 weights, torchao": lambda folder: torchao_four_bits(),
    "int8, bitsandbytes": lambda folder: bitsandbytes(load_in_8bit=True),
    "nf4, bitsandbytes": lambda folder: bitsandbytes(**FOUR_BITS),
    "layers on a disk, accelerate": partial(offloaded, "disk"),
}


@torch.no_grad()
def bits(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Bits per byte of windows of bytes."""
    losses = [model(window[None], labels=window[None]).loss.float().item() for window in ids]
    return bits_per_byte(sum(losses) / len(losses))


def checkpoint_bytes(model: PreTrainedModel) -> int:
    """What the weights take in files."""
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def measure(folder: Path, ids: torch.Tensor, case: str) -> dict[str, Any]:
    """The figures of one way of loading, beside the whole model's."""
    whole = load(folder)
    try:
        model = load(folder, **CASES[case](folder))
        # Before the first call, which packs weights of 4 bits anew for a CPU.
        size = None if "disk" in case else checkpoint_bytes(model)
        figures = {"bits_per_byte": bits(model, ids)}
        speeds: dict[str, list[float]] = {"whole": [], "this": []}
        for _ in range(TURNS):
            for name, subject in (("whole", whole), ("this", model)):
                written = write(subject, ids[:1], NEW_TOKENS, do_sample=False)
                speeds[name].append(written.tokens_per_s)
    except (ImportError, RuntimeError, ValueError, NotImplementedError, AssertionError, TypeError) as error:
        return {"error": said(error)}
    return figures | {
        "checkpoint_bytes": size,
        "tokens_per_s": median(speeds["this"]),
        "whole_tokens_per_s": median(speeds["whole"]),
        "whole_bits_per_byte": bits(whole, ids),
        "whole_checkpoint_bytes": checkpoint_bytes(whole),
    }


def cpu_seconds(call: Callable[[], Any]) -> float:
    """What a call takes of this process."""
    begun = time.process_time()
    call()
    return time.process_time() - begun


def onnx(folder: Path, ids: torch.Tensor) -> dict[str, Any]:
    """A forward pass by onnxruntime beside the model's own."""
    import onnxruntime

    model, window = load(folder), ids[:1]
    with TemporaryDirectory() as place:
        path = Path(place) / "model.onnx"
        length = torch.export.Dim("length", min=model.config.lsh_attn_chunk_length + 1)
        exported = {"input_ids": {1: length}}
        torch.onnx.export(
            model, (), path, kwargs={"input_ids": window}, dynamo=True, dynamic_shapes=exported, verbose=False
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        size = sum(file.stat().st_size for file in Path(place).iterdir())
    with torch.no_grad():
        expected = model(window).logits
        actual = torch.as_tensor(session.run(None, {"input_ids": window.numpy()})[0])
        calls = (lambda: session.run(None, {"input_ids": window.numpy()}), lambda: model(window))
        turns = [[cpu_seconds(call) for call in calls] for _ in range(TURNS)]
    return {
        "largest_difference": (actual - expected).abs().max().item(),
        "largest_logit": expected.abs().max().item(),
        "same_likeliest": (actual.argmax(-1) == expected.argmax(-1)).float().mean().item(),
        "onnx_s": median(seconds for seconds, _ in turns),
        "whole_s": median(seconds for _, seconds in turns),
        "file_bytes": size,
    }


def said(error: Exception) -> str:
    """An error in one line."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:LONGEST_MESSAGE]}"


def refusals(folder: Path, ids: torch.Tensor) -> dict[str, str]:
    """What cannot work, and the error that says so."""
    model, prompt = load(folder), ids[:1, :100]

    def export_with_cache() -> None:
        torch.export.export(model, (), {"input_ids": prompt, "use_cache": True})

    def pack_four_bits() -> None:
        from torchao.quantization import Int4WeightOnlyConfig, quantize_

        quantize_(load(folder, dtype=torch.bfloat16), Int4WeightOnlyConfig(group_size=64))

    attempts: dict[str, Callable[[], Any]] = {
        'cache_implementation="static"': lambda: model.generate(prompt, cache_implementation="static"),
        'cache_implementation="quantized"': lambda: model.generate(prompt, cache_implementation="quantized"),
        'cache_implementation="offloaded"': lambda: model.generate(prompt, cache_implementation="offloaded"),
        "cache=DynamicCache()": lambda: model.generate(prompt, cache=DynamicCache()),
        "generate_batch (continuous batching)": lambda: model.generate_batch(prompt.tolist()),
        "torch.export with a cache": export_with_cache,
        "torchao's Int4WeightOnlyConfig on a CPU": pack_four_bits,
        'attn_implementation="flash_attention_2"': lambda: load(folder, attn_implementation="flash_attention_2"),
    }
    errors = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except (ImportError, ValueError, RuntimeError, NotImplementedError, AssertionError) as error:
            errors[name] = said(error)
        else:
            errors[name] = "no error"
    return errors


def report(cases: dict[str, Any]) -> None:
    """Print the tables."""
    rows = []
    for name, figures in cases.items():
        if "error" in figures:
            rows.append([name, figures["error"], "", "", ""])
        elif "bits_per_byte" in figures:
            size, whole = figures["checkpoint_bytes"], figures["whole_checkpoint_bytes"]
            speed, beside = figures["tokens_per_s"], figures["whole_tokens_per_s"]
            rows.append(
                [
                    name,
                    f"{figures['bits_per_byte']:.4f} ({figures['whole_bits_per_byte']:.4f})",
                    "" if size is None else f"{size / MIB:.2f} ({whole / MIB:.2f})",
                    f"{speed:.1f} ({beside:.1f})",
                    f"{speed / beside:.2f}",
                ]
            )
    print_table(["(whole model)", "bits per byte", "checkpoint, MiB", "tokens/s", "against whole"], rows)
    for name in ("ONNX", "refusals"):
        for figure, value in cases.get(name, {}).items():
            print(f"{name}, {figure}: {value}")


def main(argv: list[str] | None = None) -> None:
    """Measure what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "runs" / "demo", help="(default runs/demo)")
    parser.add_argument("--only", nargs="+", choices=[*CASES, "ONNX", "refusals"], metavar="CASE")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="held-out windows (default %(default)s)")
    parser.add_argument("--output", type=Path, default=DOCS / "inference.json", help="(default docs/inference.json)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default %(default)s)")
    parser.add_argument("--again", action="store_true", help="measure what is in the file, too")
    parser.add_argument("--report", action="store_true", help="measure nothing: print the tables")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    about = {"context": CONTEXT, "windows": arguments.windows, "new_tokens": NEW_TOKENS}
    figures = Figures(arguments.output, about)
    if not arguments.report:
        ids = held_out(AutoTokenizer.from_pretrained(arguments.model), CONTEXT, arguments.windows)
        run: dict[str, Callable[[], Any]] = {case: partial(measure, arguments.model, ids, case) for case in CASES}
        run |= {"ONNX": partial(onnx, arguments.model, ids), "refusals": partial(refusals, arguments.model, ids)}
        figures.measure(arguments.only or run, lambda case: run[case](), arguments.again)
    report(figures.cases)


if __name__ == "__main__":
    main()
