"""
Small language models trained on text, alike in everything but what is compared.

With one seed every contender sees the same windows in the same order, for the same steps, under the same schedule.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import nn

from hf_reformer import ReformerByteTokenizer
from hf_reformer.training.context_gain import bits_of_tokens
from hf_reformer.training.corpus import Corpus, DataArguments, Windows, build_corpus
from hf_reformer.training.provenance import machine, versions

from . import resumable


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
        eval_windows: Held-out windows, evenly spaced; None for all.
        text_path: Another text than the standard library's source.
    """

    contender: str
    seed: int
    learning_rate: float
    num_steps: int
    context_length: int
    eval_every: int
    eval_windows: int | None = 24
    text_path: str | None = None

    @property
    def name(self) -> str:
        """A file's name."""
        words = [self.contender, f"{self.context_length}", f"{self.num_steps}", f"lr{self.learning_rate:g}"]
        words += [Path(self.text_path).name] if self.text_path else []
        return resumable.file_name(*words, f"seed{self.seed}")


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


def repeated(window: np.ndarray) -> np.ndarray:
    """`[L]`, bool: bytes after `REPEATED_BYTES` that stood together, and more than `FAR_BACK` places before."""
    seen, found = {}, np.zeros(len(window), dtype=bool)
    for i in range(REPEATED_BYTES, len(window)):
        key = window[i - REPEATED_BYTES : i].tobytes()
        found[i] = i - seen.setdefault(key, i) > FAR_BACK
    return found


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


class Training(resumable.ResumableTraining):
    """
    A language model trained on text.

    Its weights after the last step are kept beside the checkpoints, which are not in the repository, so that what is
    measured of it later needs no other training.

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
        super().__init__(run, results)
        self._make_model, self._measure = make_model, measure

    @cached_property
    def corpus(self) -> Corpus:
        """What is read."""
        return read_corpus(self.run)

    def make_model(self) -> nn.Module:
        return self._make_model(self.run.context_length)

    def batches(self) -> Iterator[int]:
        return order_of_windows(len(self.corpus.train.dataset), self.run.seed)

    def window(self, batch: int) -> torch.Tensor:
        """A window to train on, `[1, L]`, by its number."""
        return self.corpus.train.dataset[batch]["input_ids"].long()[None]

    def loss(self, model: nn.Module, batch: int) -> torch.Tensor:
        ids = self.window(batch)
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    def evaluate(self, model: nn.Module) -> dict[str, float | list[float]]:
        return evaluate(model, self.corpus, self.bf16)

    def measure(self, model: nn.Module) -> dict:
        self.weights.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), self.weights)
        return {} if self._measure is None else self._measure(model, self.corpus, self.bf16)

    @property
    def weights(self) -> Path:
        """Where those of the trained model are kept."""
        return resumable.CHECKPOINTS / "trained" / f"{self.run.name}.pt"

    def trained_model(self) -> nn.Module:
        """The model after the last step, in evaluation mode; where its weights are gone, it is trained again."""
        if not (self.path.is_file() and self.weights.is_file()):
            self.carry_out()
        model = self.make_model()
        model.load_state_dict(torch.load(self.weights))
        return model.eval()


def measure_once(training: Training, path: Path, measure: Callable[[nn.Module, Corpus, bool], dict]) -> None:
    """Measure a trained model and write it to a file, unless that is there."""
    if not path.is_file():
        measured = measure(training.trained_model(), training.corpus, training.bf16)
        about = {"run": asdict(training.run), "machine": machine(), "versions": versions()}
        resumable.write_json(path, about | measured)
