"""
Speculative and prompt-lookup decoding of a trained model behind long prompts, beside plain generation.

    make demo
    hf-reformer train --attn_layers local lsh --hidden_size 128 --num_attention_heads 2 --feed_forward_size 512 \
        --context_length 4096 --max_steps 500 --output_dir runs/draft
    python -m scripts.bench.benchmark_assisted
    python -m scripts.bench.benchmark_assisted --report   # the table alone

Prompts are files of the standard library that training leaves out. Greedy and sampled (temperature 1, top_p 0.9); each
way of decoding takes its turn at each prompt. Writes docs/assisted.json after each prompt, and goes on from there.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from .trained import DOCS, ROOT, Figures, Written, held_out, print_table, write


# Prompts of each length, in bytes: as many as one run has patience for.
PROMPTS = {4096: 4, 16384: 2, 65536: 1}
NEW_TOKENS = 256
WAYS = ("plain", "draft model", "prompt lookup")
LOOKED_UP = 10
DRAWS = {"greedy": {"do_sample": False}, "sampled": {"do_sample": True, "temperature": 1.0, "top_p": 0.9}}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "runs" / "demo", help="(default runs/demo)")
    parser.add_argument("--draft", type=Path, default=ROOT / "runs" / "draft", help="(default runs/draft)")
    parser.add_argument("--contexts", type=int, nargs="+", default=list(PROMPTS), help="(default %(default)s)")
    parser.add_argument("--new_tokens", type=int, default=NEW_TOKENS, help="(default %(default)s)")
    parser.add_argument("--output", type=Path, default=DOCS / "assisted.json", help="(default docs/assisted.json)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default %(default)s)")
    parser.add_argument("--again", action="store_true", help="measure what is in the file, too")
    parser.add_argument("--report", action="store_true", help="measure nothing: print the table")
    return parser.parse_args(argv)


def first_difference(model: PreTrainedModel, prompt: torch.Tensor, plain: list[int], other: list[int]) -> Any:
    """Where two continuations part, and how far apart the model's two likeliest logits are there; None if nowhere."""
    places = [place for place, (one, two) in enumerate(zip(plain, other, strict=True)) if one != two]
    if not places:
        return None
    ids = torch.cat([prompt, prompt.new_tensor([plain[: places[0]]])], dim=1)
    with torch.no_grad():
        best = model(ids, logits_to_keep=1).logits[0, -1].topk(2).values
    return {"place": places[0], "logits_apart": (best[0] - best[1]).item()}


def figures_of(written: Written) -> dict[str, float]:
    """For the file."""
    return {
        "tokens_per_s": written.tokens_per_s,
        "tokens_per_step": written.tokens_per_step,
        "prefill_s": written.prefill_s,
        "decode_s": written.decode_s,
    }


def compare(
    model: PreTrainedModel, draft: PreTrainedModel, prompts: dict[str, Any], new_tokens: int, case: str
) -> Any:
    """Each way of decoding behind one prompt."""
    prompt, draw = prompts[case.rpartition(", ")[0]], DRAWS[case.rpartition(", ")[2]]
    extras: dict[str, dict[str, Any]] = {
        "plain": {},
        "draft model": {"assistant_model": draft},
        "prompt lookup": {"prompt_lookup_num_tokens": LOOKED_UP},
    }
    done = {way: write(model, prompt, new_tokens, **draw, **extras[way]) for way in WAYS}
    figures: dict[str, Any] = {way: figures_of(written) for way, written in done.items()}
    if not draw["do_sample"]:
        for way in WAYS[1:]:
            figures[way]["differs"] = first_difference(model, prompt, done["plain"].ids, done[way].ids)
    return figures


def rows(cases: dict[str, Any]) -> Iterator[list[str]]:
    """A line for each length, draw and way: means over the prompts."""
    groups: dict[tuple[int, str], list[Any]] = {}
    for name, figures in cases.items():
        length, _, draw = name.split(", ")
        groups.setdefault((int(length), draw), []).append(figures)
    for (length, draw), prompts in sorted(groups.items()):
        for way in WAYS:
            speed, accepted = (
                mean(prompt[way][figure] for prompt in prompts) for figure in ("tokens_per_s", "tokens_per_step")
            )
            plain = mean(prompt["plain"]["tokens_per_s"] for prompt in prompts)
            equal = sum(prompt[way].get("differs") is None for prompt in prompts)
            same = f"{equal} of {len(prompts)}" if draw == "greedy" and way != "plain" else ""
            prefill = mean(prompt[way]["prefill_s"] for prompt in prompts)
            times = f"{speed / plain:.2f}"
            yield [f"{length:,}", draw, way, f"{speed:.1f}", times, f"{accepted:.2f}", same, f"{prefill:.1f}"]


def main(argv: list[str] | None = None) -> None:
    """Measure what is missing, and print the table."""
    arguments = parse_arguments(argv)
    torch.set_num_threads(arguments.threads)
    about = {"new_tokens": arguments.new_tokens, "looked_up": LOOKED_UP, "dtype": "float32"}
    figures = Figures(arguments.output, about)
    if not arguments.report:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        model, draft = (
            AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (arguments.model, arguments.draft)
        )
        for name, subject in (("model", model), ("draft", draft)):
            config = subject.config
            shape = {"layers": config.attn_layers, "hidden_size": config.hidden_size}
            figures.about[name] = shape | {"parameters": subject.num_parameters()}
        prompts = {
            f"{length}, {index}": ids[None]
            for length in arguments.contexts
            for index, ids in enumerate(held_out(tokenizer, length, PROMPTS.get(length, 1)))
        }
        names = [f"{prompt}, {draw}" for prompt in prompts for draw in DRAWS]
        figures.measure(names, partial(compare, model, draft, prompts, arguments.new_tokens), arguments.again)
    head = ["prompt, bytes", "", "", "tokens/s", "against plain", "tokens a step", "same text", "prompt read, s"]
    print_table(head, rows(figures.cases))


if __name__ == "__main__":
    main()
