"""A continuation that is written in a thread of its own, while others look at how far it is."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList, set_seed
from transformers.generation.streamers import BaseStreamer

from ..modeling.decoding.decoding_cache import ReformerCache
from ..modeling.memory.memory_measurement import resident_bytes


# Tokens of a prompt that are read at a time, where pieces give what the whole gives. Between two, it can be stopped.
PIECE = 4096


@dataclass(frozen=True)
class Progress:
    """
    How far a continuation is.

    Attributes:
        prompt_tokens, new_tokens: How many.
        prompt_seconds: What reading the prompt took, the first new token included; None while it is read.
        tokens_per_second: Of the tokens behind the first; None before there are any.
        cache_bytes: Of what the model keeps of the text.
        memory_bytes: Of this process, or of what it has on the GPU; None where the system does not tell.
    """

    prompt_tokens: int
    new_tokens: int
    prompt_seconds: float | None
    tokens_per_second: float | None
    cache_bytes: int
    memory_bytes: int | None


class LiveGeneration:
    """
    A continuation that grows. `with` waits for its thread, so that no two run one model.

    Args:
        model: A causal one, in evaluation mode.
        prompt: `[L]`, token ids.
        max_new_tokens: How many tokens are written at most.
        temperature: Of the draw; 0 takes the likeliest token.
        seed: Of the draw.

    Attributes:
        ids: The new tokens so far.

    Example:

    ```python
    with LiveGeneration(model, prompt, max_new_tokens=100) as generation:
        for progress in generation.watch():
            print(progress.new_tokens)
    ```
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompt: torch.Tensor,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
    ):
        self.ids: list[int] = []
        self._model, self._prompt, self._seed = model, prompt, seed
        self._cache: ReformerCache | None = ReformerCache(model.config, max_length=len(prompt) + max_new_tokens)
        self._settings: dict[str, float] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
        if temperature > 0:
            self._settings["temperature"] = temperature
        self._news: queue.SimpleQueue = queue.SimpleQueue()
        self._is_stopped = threading.Event()
        self._cache_bytes = 0
        self._error: BaseException | None = None
        self._start = self._first = self._last = 0.0
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "LiveGeneration":
        self._start = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
        self._thread.join()

    def stop(self) -> None:
        """Write no more than the token that is under way, and read no more than the piece of the prompt."""
        self._is_stopped.set()

    @property
    def is_stopped(self) -> bool:
        """Whether somebody has stopped it, or its end has come."""
        return self._is_stopped.is_set()

    def watch(self, seconds: float = 0.15) -> Iterator[Progress]:
        """
        How far it is, about as often as is said, and once more at the end.

        Raises:
            Exception: What ended the thread.
        """
        goes_on = True
        while goes_on:
            goes_on = self._take_news(time.perf_counter() + seconds)
            if goes_on:
                yield self.progress()
        if self._error is not None:
            raise self._error
        yield self.progress()

    def progress(self) -> Progress:
        """How far it is now."""
        seconds, cache = self._last - self._first, self._cache
        return Progress(
            prompt_tokens=len(self._prompt),
            new_tokens=len(self.ids),
            prompt_seconds=self._first - self._start if self._first else None,
            tokens_per_second=(len(self.ids) - 1) / seconds if seconds > 0 else None,
            cache_bytes=self._cache_bytes if cache is None else bytes_of(cache),
            memory_bytes=memory_in_use(self._model.device),
        )

    def _take_news(self, until: float) -> bool:
        """Take in tokens until a time; False if there will be no more."""
        while (left := until - time.perf_counter()) > 0:
            try:
                token, moment = self._news.get(timeout=left)
            except queue.Empty:
                return True
            if token is None:
                return False
            self.ids.append(token)
            self._first, self._last = self._first or moment, moment
        return True

    def _run(self) -> None:
        try:
            set_seed(self._seed)
            prompt = self._prompt[None].to(self._model.device)
            self._read_pieces(prompt)
            if not self.is_stopped:
                self._model.generate(  # type: ignore[operator]
                    prompt,
                    past_key_values=self._cache,
                    streamer=_TokensInto(self._news),
                    stopping_criteria=StoppingCriteriaList([_StopAt(self._is_stopped)]),
                    **self._settings,
                )
        except BaseException as error:
            self._error = error
        finally:
            # Whoever keeps the text does not keep what was known of it.
            self._cache_bytes = self.progress().cache_bytes
            self._cache = None
            self._news.put((None, 0.0))

    @torch.no_grad()
    def _read_pieces(self, prompt: torch.Tensor) -> None:
        """Read all but the last piece of a prompt `[1, L]` into the cache, unless it is stopped."""
        config = self._model.config
        # Stock's chunks depend on where a call ends.
        if "lsh" in config.attn_layers and not config.lsh_sliding_window:
            return
        for piece in prompt.split(PIECE, dim=1)[:-1]:
            if self.is_stopped:
                return
            self._model(piece, past_key_values=self._cache, use_cache=True, logits_to_keep=1)


class Line:
    """
    Those who want what only one can have at a time. Who comes first is the first to have it.

    Example:

    ```python
    with line.stand() as ahead:
        while ahead(0.5):
            print("still waiting")
    ```
    """

    def __init__(self) -> None:
        self._places: list[object] = []
        self._has_moved = threading.Condition()

    def __len__(self) -> int:
        return len(self._places)

    @contextmanager
    def stand(self) -> Iterator[Callable[[float | None], int]]:
        """
        A place at the end of the line, for the time of a `with`.

        Yields:
            A function that waits for its turn, at most for so many seconds (None: for ever), and returns how many are
            ahead.
        """
        place = object()
        with self._has_moved:
            self._places.append(place)

        def ahead(seconds: float | None) -> int:
            with self._has_moved:
                self._has_moved.wait_for(lambda: self._places[0] is place, seconds)
                return self._places.index(place)

        try:
            yield ahead
        finally:
            with self._has_moved:
                self._places.remove(place)
                self._has_moved.notify_all()


class _TokensInto(BaseStreamer):
    """Puts each new token with its time into a queue."""

    def __init__(self, news: queue.SimpleQueue):
        self._news, self._has_prompt = news, False

    def put(self, value: torch.Tensor) -> None:
        if self._has_prompt:
            self._news.put((int(value), time.perf_counter()))
        self._has_prompt = True

    def end(self) -> None:
        """Nothing: the thread says when it ends."""


class _StopAt(StoppingCriteria):
    def __init__(self, event: threading.Event):
        self._event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        return torch.full((len(input_ids),), self._event.is_set(), dtype=torch.bool, device=input_ids.device)


def bytes_of(cache: ReformerCache) -> int:
    """Memory of what a cache holds."""
    tensors = []
    for layer in cache.layers:
        tensors += layer.rows.tensors
        # LSH layers keep rotations and the order of buckets, too.
        order = getattr(layer, "order", None)
        kept = [getattr(layer, "rotations", None), *(vars(order).values() if order is not None else ())]
        tensors += [thing for thing in kept if isinstance(thing, torch.Tensor)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def memory_in_use(device: torch.device) -> int | None:
    """Bytes that PyTorch has given out on a GPU, or that this process has in memory; None where nobody tells."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_bytes("VmRSS")
