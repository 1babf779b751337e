"""
Small language models trained on text, alike in everything but what is compared.

With one seed every contender sees the same windows in the same order, for the same steps, under the same schedule.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from corpus import Corpus, DataArguments, Windows, build_corpus
from report import machine, versions
from torch import nn
from tqdm.auto import tqdm

from hf_reformer import ReformerByteTokenizer
from hf_reformer.training import MuonWithAdamW, multiplies_in_bfloat16


ROOT = Path(__file__).parents[2]
WARM_UP = 0.05
WEIGHT_DECAY, BETAS, LARGEST_NORM = 0.1, (0.9, 0.98), 1.0
# A byte counts as repeated if the bytes before it, so many, stood together before, further back than local layers see.
REPEATED_BYTES, FAR_BACK = 6, 128


@dataclass(frozen=True)
class TextRun:
    """
    One training.

    Attributes:
        contender: Name of the model.
        seed: Of weights, rotations and the order of windows.
        learning_rate: Its peak, after a warm-up of 5% of the steps; then it falls along a cosine to 0.
        num_steps: Steps of one window each.
        context_length: Bytes in a window.
        eval_every: Steps between evaluations, which are checkpoints, too.
        eval_windows: Held-out windows, evenly spaced.
        text_path: Another text than the standard library's source.
    """

    contender: str
    seed: int
    learning_rate: float
    num_steps: int
    context_length: int
    eval_every: int
    eval_windows: int = 24
    text_path: str | None = None

    @property
    def name(self) -> str:
        """A file's name."""
        words = [self.contender, f"{self.context_length}", f"{self.num_steps}", f"lr{self.learning_rate:g}"]
        words += [Path(self.text_path).name] if self.text_path else []
        return " ".join([*words, f"seed{self.seed}"]).replace(", ", "-").replace(" ", "_")


def read_corpus(run: TextRun) -> Corpus:
    """Windows of bytes for training, and those held out."""
    arguments = DataArguments(
        context_length=run.context_length, max_held_out_windows=run.eval_windows, text_path=run.text_path
    )
    return build_corpus(arguments, ReformerByteTokenizer())


def order_of_windows(count: int, seed: int) -> Iterator[int]:
    """All windows in random order, again and again."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def share_of_rate(step: int, num_steps: int) -> float:
    """The learning rate of a step, counted from 0, in units of its peak."""
    warm_up = max(1, round(WARM_UP * num_steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return (1 + math.cos(math.pi * (step - warm_up) / max(1, num_steps - warm_up))) / 2


def repeated(window: np.ndarray) -> np.ndarray:
    """`[L]`, bool: bytes after `REPEATED_BYTES` that stood together, and more than `FAR_BACK` places before."""
    seen, found = {}, np.zeros(len(window), dtype=bool)
    for i in range(REPEATED_BYTES, len(window)):
        key = window[i - REPEATED_BYTES : i].tobytes()
        found[i] = i - seen.setdefault(key, i) > FAR_BACK
    return found


def bits_of_tokens(model: nn.Module, ids: torch.Tensor, bf16: bool) -> torch.Tensor:
    """What each token but the first costs, `[B, L - 1]`, of windows `[B, L]`."""
    with torch.no_grad(), torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
        logits = model(input_ids=ids, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].float().mT, ids[:, 1:], reduction="none") / math.log(2)


def tokens_of(windows: Windows) -> torch.Tensor:
    """All windows of one side, `[N, L]`."""
    return torch.stack(list(windows.dataset["input_ids"])).long()


def evaluate(model: nn.Module, corpus: Corpus, bf16: bool) -> dict[str, float | list[float]]:
    """Held-out bits per byte: of all, of each quarter of the context, of what is repeated from afar."""
    model.eval()
    windows = tokens_of(corpus.held_out)
    bits = torch.cat([bits_of_tokens(model, window[None].to(model.device), bf16).cpu() for window in windows]).numpy()
    far = np.stack([repeated(window)[1:] for window in windows.numpy().astype(np.int32)])
    widths = corpus.held_out.token_bytes[:, 1:]
    quarters = np.array_split(np.arange(bits.shape[1]), 4)
    return {
        "bits_per_byte": float(bits.sum() / widths.sum()),
        "quarters": [float(bits[:, part].sum() / widths[:, part].sum()) for part in quarters],
        "repeated": float(bits[far].mean()) if far.any() else None,
        "share_repeated": float(far.mean()),
    }


def make_optimizer(model: nn.Module, learning_rate: float) -> MuonWithAdamW:
    """The optimizer of every contender."""
    return MuonWithAdamW(model, lr=learning_rate, weight_decay=WEIGHT_DECAY, betas=BETAS)


def take_step(
    model: nn.Module, optimizer: MuonWithAdamW, loss_of: Callable[[], torch.Tensor], learning_rate: float, bf16: bool
) -> float:
    """
    One step of the optimizer.

    Args:
        loss_of: What it makes smaller, in nats.

    Returns:
        The loss in bits.

    Raises:
        ValueError: it is no number.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        loss = loss_of()
    if not loss.isfinite():
        raise ValueError(f"the loss is {loss.item()}.")
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), LARGEST_NORM)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item() / math.log(2)


def write_json(path: Path, content: dict) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}")
    aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    aside.replace(path)


class Training:
    """
    A run that can be stopped and gone on with.

    Args:
        run: What to do.
        make_model: Builds the model for a context length, of random weights.
        results: Folder for the record.
        measure: What else to put into the record, of the trained model, the text, and whether to use bfloat16.
    """

    def __init__(
        self,
        run: TextRun,
        make_model: Callable[[int], nn.Module],
        results: Path,
        measure: Callable[[nn.Module, Corpus, bool], dict] | None = None,
    ):
        self.run, self.path = run, results / f"{run.name}.json"
        self.checkpoint = ROOT / "runs" / "experiments" / f"{run.name}.pt"
        self._make_model, self._measure = make_model, measure
        self.bf16 = multiplies_in_bfloat16("cpu")

    @cached_property
    def corpus(self) -> Corpus:
        """What is read."""
        return read_corpus(self.run)

    def window(self, batch: int) -> torch.Tensor:
        """A window to train on, `[1, L]`, by its number."""
        return self.corpus.train.dataset[batch]["input_ids"].long()[None]

    def loss(self, model: nn.Module, batch: int) -> torch.Tensor:
        """What a step makes smaller, in nats."""
        ids = self.window(batch)
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    def evaluate(self, model: nn.Module) -> dict[str, float | list[float]]:
        """Measured every `eval_every` steps and after the last one."""
        return evaluate(model, self.corpus, self.bf16)

    def __call__(self) -> dict:
        """The record of the run, from its file if it is there."""
        if self.path.is_file():
            return json.loads(self.path.read_text(encoding="utf-8"))
        torch.manual_seed(self.run.seed)
        model = self._make_model(self.run.context_length)
        optimizer = make_optimizer(model, self.run.learning_rate)
        record = {"step": 0, "seconds": 0.0, "cpu_seconds": 0.0, "evaluations": []}
        if self.checkpoint.is_file():
            saved = torch.load(self.checkpoint, weights_only=False)
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            torch.set_rng_state(saved["random"])
            record = saved["record"]
        self._train(model, optimizer, record)
        if self._measure is not None:
            record |= self._measure(model, self.corpus, self.bf16)
        record |= {
            "run": asdict(self.run),
            "bfloat16": self.bf16,
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "machine": machine(),
            "versions": versions(),
        }
        write_json(self.path, record)
        self.checkpoint.unlink(missing_ok=True)
        return record

    def _train(self, model, optimizer, record):
        run = self.run
        order = order_of_windows(len(self.corpus.train.dataset), run.seed)
        for _ in range(record["step"]):
            next(order)
        progress = tqdm(total=run.num_steps, initial=record["step"], desc=run.name, mininterval=10)
        while record["step"] < run.num_steps:
            begun, cpu_begun = time.perf_counter(), time.process_time()
            model.train()
            for _ in range(min(run.eval_every, run.num_steps - record["step"])):
                loss = self._step(model, optimizer, next(order), record["step"])
                record["step"] += 1
                progress.update()
            record["seconds"] += time.perf_counter() - begun
            record["cpu_seconds"] += time.process_time() - cpu_begun
            measured = self.evaluate(model)
            record["evaluations"].append(
                {key: record[key] for key in ("step", "seconds", "cpu_seconds")} | {"train": loss} | measured
            )
            shown = {name: f"{value:.3f}" for name, value in measured.items() if isinstance(value, float)}
            progress.set_postfix(shown, refresh=False)
            self._save(model, optimizer, record)
        progress.close()

    def _step(self, model, optimizer, batch, step):
        learning_rate = self.run.learning_rate * share_of_rate(step, self.run.num_steps)
        try:
            return take_step(model, optimizer, lambda: self.loss(model, batch), learning_rate, self.bf16)
        except ValueError as error:
            raise ValueError(f"{self.run.name}, step {step + 1}: {error}") from error

    def _save(self, model, optimizer, record):
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        aside = self.checkpoint.with_suffix(f".{os.getpid()}")
        torch.save(
            {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "random": torch.get_rng_state(),
                "record": record,
            },
            aside,
        )
        aside.replace(self.checkpoint)
