"""
What the benchmarks of a trained model share: held-out text, generation that is timed, figures in a file.

Time is that of the process on the CPU: with one thread what it takes on a machine that has nothing else to do, and the
same, but for caches that others fill, on one that has.
"""

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from hf_reformer.training.context_gain import read_held_out
from hf_reformer.training.corpus import TextArguments
from hf_reformer.training.provenance import machine, versions

from ..experiments.resumable import write_json


ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SEED = 0


def held_out(tokenizer: PreTrainedTokenizerBase, length: int, count: int) -> torch.Tensor:
    """Windows of the standard library that training leaves out, `[count, length]`."""
    reading = read_held_out(tokenizer, TextArguments(), length, num_windows=count, mask_share=None)
    if len(reading.input_ids) < count:
        raise ValueError(f"{count} windows of {length} tokens were asked for; there are {len(reading.input_ids)}.")
    return reading.input_ids


@dataclass(frozen=True)
class Written:
    """
    What `generate` wrote, and how.

    Attributes:
        ids: New tokens alone.
        steps: Calls of the model after the one that read the prompt.
        prefill_s: Seconds of this process on the CPU until the prompt was read; an assistant has read it, too.
        decode_s: The same for the rest.
    """

    ids: list[int]
    steps: int
    prefill_s: float
    decode_s: float

    @property
    def tokens_per_s(self) -> float:
        """Of all but the first token, which the prompt's call gives."""
        return (len(self.ids) - 1) / self.decode_s

    @property
    def tokens_per_step(self) -> float:
        """1 without assistance."""
        return (len(self.ids) - 1) / self.steps


def write(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int, **settings: Any) -> Written:
    """Continue a prompt `[1, L]` by exactly so many tokens."""
    ends: list[float] = []

    def note(module: nn.Module, arguments: Any, output: Any) -> None:
        ends.append(time.process_time())

    hook = model.register_forward_hook(note)
    set_seed(SEED)
    try:
        begun = time.process_time()
        output = model.generate(prompt, max_new_tokens=new_tokens, min_new_tokens=new_tokens, **settings)
        ended = time.process_time()
    finally:
        hook.remove()
    new = output[0, prompt.shape[1] :].tolist()
    return Written(new, len(ends) - 1, ends[0] - begun, ended - ends[0])


class Figures:
    """A file of figures with an entry for each case; what is there is not measured again."""

    def __init__(self, path: Path, about: dict[str, Any]):
        self.path = path
        # Text, so that what is read compares with what was written.
        self.about = json.loads(json.dumps(about | {"machine": machine(), "versions": versions()}))
        self.cases: dict[str, Any] = {}
        if path.is_file():
            self.cases = json.loads(path.read_text(encoding="utf-8"))["cases"]

    def measure(self, cases: Iterable[str], run: Callable[[str], Any], again: bool) -> None:
        """Run each case that has no figures, and write them down; print what came of it."""
        print(json.dumps(self.about, indent=1))
        for case in cases:
            if again or case not in self.cases:
                self.cases[case] = run(case)
                write_json(self.path, {"about": self.about, "cases": self.cases})
            print(case, json.dumps(self.cases[case]), flush=True)


def print_table(head: list[str], rows: Iterable[Iterable[Any]]) -> None:
    """A table in Markdown, the first column to the left and the others to the right."""
    print("| " + " | ".join(head) + " |")
    print("|---|" + "---:|" * (len(head) - 1))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")
