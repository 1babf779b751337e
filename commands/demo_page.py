"""The page of `hf-reformer demo`: a text goes on, and each of its tokens shows what it reads."""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..tokenization.tokenization_reformer_byte import ReformerByteTokenizer
from ..training.row_batches import encode, longest_input
from .demo_drawing import draw_keys, explanation, heading, key_tables, text_with_keys
from .live_generation import Line, LiveGeneration, Progress
from .reading import Reading, lsh_layers
from .token_text import TokenText, whole_text


# What the page stands on. A missing one is an error that names it.
gr: Any = import_module("gradio")

if TYPE_CHECKING:
    EventData = Any
    Request = Any
else:
    EventData = gr.EventData
    Request = gr.Request

MEBIBYTE = 2**20
# Tokens that a text may have, unless `--longest` says otherwise.
LONGEST = 200_000
# Bounds of what a visitor may ask for.
MOST_NEW, HOTTEST, LARGEST_SEED = 4096, 2, 2**32 - 1
# Seconds between two words to somebody who waits, and how many may wait.
WAIT, MOST_WAITING = 0.5, 30
# A session is forgotten when nobody has asked it for so many seconds.
TIME_TO_LIVE = 600
# Of a text with more characters for each token allowed, the number of tokens is estimated from its beginning.
CHARACTERS_PER_TOKEN = 16
# Figures of a continuation, and what they are.
FIGURES = {
    "prompt": "tokens of the text",
    "prefill": "seconds to read it",
    "new": "new tokens",
    "speed": "tokens per second",
    "cache": "MiB of cache",
    "memory": "MiB in use",
}
TITLE = "What a Reformer reads"
INTRODUCTION = f"""# {TITLE}
Paste a text and press Generate. Then choose a token by the slider, or click on it: the page shows what it reads in an
LSH layer, hash round by round."""
CSS = """
.reading {white-space: pre-wrap; overflow-wrap: anywhere; font-family: monospace; font-size: 13px; line-height: 1.5;
  max-height: 26rem; overflow-y: auto; cursor: pointer; padding: .6rem; border: 1px solid var(--border-color-primary);
  border-radius: 6px}
.reading .query {background: #c2410c; color: white; border-radius: 2px}
.read {text-decoration: underline 2px #c2410c}
.reading .key, .round .key {border-radius: 2px}
.rounds {display: grid; grid-template-columns: repeat(auto-fit, minmax(32rem, 1fr)); gap: 0 1rem}
.round .key {background: rgb(31 95 168 / .35)}
.round {min-width: 0}
.round table {width: 100%; border-collapse: collapse; font-size: 13px}
.round td, .round th {padding: .1rem .6rem; text-align: left; white-space: pre; overflow: hidden;
  text-overflow: ellipsis}
.round td:last-child {width: 100%; max-width: 0}
.figures {display: grid; grid-template-columns: repeat(3, 1fr); gap: .5rem}
.figures b {display: block; font-size: 1.15rem}
"""
# A click tells the character under it; what was just drawn comes into view around its token.
ON_LOAD = """
const caret = (x, y) => {
  if (document.caretRangeFromPoint) return document.caretRangeFromPoint(x, y);
  const found = document.caretPositionFromPoint(x, y), range = document.createRange();
  range.setStart(found.offsetNode, found.offset);
  return range;
};
const holds = (node, offset, x, y) => {
  if (offset < 0 || offset >= node.length) return false;
  const range = document.createRange();
  range.setStart(node, offset), range.setEnd(node, offset + 1);
  return [...range.getClientRects()].some((box) => box.left <= x && x <= box.right && box.top <= y && y <= box.bottom);
};
element.addEventListener('click', (event) => {
  const {clientX: x, clientY: y} = event, range = caret(x, y), node = range && range.startContainer;
  const span = node && node.parentElement && node.parentElement.closest('[data-start]');
  if (!span || node.nodeType !== Node.TEXT_NODE || !document.getSelection().isCollapsed) return;
  const offset = holds(node, range.startOffset - 1, x, y) ? range.startOffset - 1 : range.startOffset;
  const {start, end} = span.dataset;
  trigger('select', {character: Math.min(Number(start) + offset, Number(end) - 1)});
});
watch('value', () => {
  const pane = element.querySelector('.reading'), token = element.querySelector('.query');
  if (pane && token) pane.scrollTop += token.getBoundingClientRect().top - pane.getBoundingClientRect().top - 150;
});
"""


# A position that somebody has deleted, to type another.
EMPTY_IS_FIRST = "(session, position, layer, head) => [session, position ?? 0, layer, head]"


@dataclass
class Session:
    """
    What a visitor has done.

    Attributes:
        generation: What waits to be written, or is being written.
        ids: The text and its continuation, once that has been written.
        prompt_length: Tokens of the text alone.
        text, reading: Of all of it, to look at.
    """

    generation: LiveGeneration | None = None
    ids: list[int] = field(default_factory=list)
    prompt_length: int = 0
    text: TokenText | None = None
    reading: Reading | None = None


class DemoPage:
    """
    The page of one model, for any number of visitors; the model works for one at a time.

    Args:
        model: A causal Reformer, in evaluation mode.
        tokenizer: The one that it was trained with.
        name: What the model is called on the page.
        longest: Tokens that a text may have, new ones included. A model's table of positions may allow fewer.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, longest: int = LONGEST):
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.attentions = lsh_layers(model)
        table = longest_input(model.config)
        self._longest, self._bound_by = longest, "this page takes (`--longest`)"
        if table is not None and table <= longest:
            self._longest, self._bound_by = table, "this model takes"
        # Hooks of one text must not see another.
        self._line = Line()

    def build(self) -> Any:
        """The page, a `gradio.Blocks`."""
        with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
            gr.Markdown(f"{INTRODUCTION} {self._describe()}")
            session = gr.State(Session(), time_to_live=TIME_TO_LIVE)
            written = self._build_writing(session)
            if self.attentions:
                self._build_reading(session, written)
            else:
                gr.Markdown(
                    f"This model has no LSH layer (its layers: {', '.join(self.model.config.attn_layers)}), so there "
                    "are no hash rounds to look at."
                )
            page.unload(_forgetter(page))
        return page

    def _describe(self) -> str:
        size = sum(parameter.numel() for parameter in self.model.parameters())
        layers = ", ".join(self.model.config.attn_layers)
        return f"Model: `{self.name}`, {size / 1e6:.1f} million weights, layers {layers}, on {self.model.device.type}."

    def _build_writing(self, session: Any) -> Any:
        """Components of the text and its continuation; the event after which the text is there."""
        with gr.Row():
            with gr.Column(scale=3):
                prompt = gr.Textbox(label="Text", lines=9, max_lines=9, elem_id="prompt")
                file = gr.File(label="or a text file (UTF-8)", type="binary", height=130, elem_id="file")
            with gr.Column(scale=3):
                written = gr.Textbox(label="Continuation", lines=9, max_lines=9, interactive=False, elem_id="written")
                figures = gr.HTML(figures_of(None), elem_id="figures")
            with gr.Column(scale=2, min_width=220):
                count = gr.Slider(0, MOST_NEW, 200, step=1, label="New tokens, at most", elem_id="count")
                temperature = gr.Slider(
                    0, HOTTEST, 0.7, step=0.05, label="Temperature; 0 takes the likeliest", elem_id="temperature"
                )
                # `write` says what is wrong with a value; Gradio fails at an empty field.
                count.preprocess = temperature.preprocess = _as_given
                seed = gr.Number(0, precision=0, label="Seed of the draw")
                generate = gr.Button("Generate", variant="primary", elem_id="generate")
                stop = gr.Button("Stop", interactive=False, elem_id="stop")
        file.upload(self.take_file, file, prompt, api_visibility="private")
        stop.click(stop_writing, session, queue=False, api_visibility="private")
        return generate.click(
            self.write,
            [session, prompt, count, temperature, seed],
            [session, written, figures, generate, stop],
            # They stand in the page's own line, which says how long it is.
            concurrency_limit=None,
            show_progress="hidden",
            api_name="write",
        )

    def _build_reading(self, session: Any, written: Any) -> None:
        kinds = [(f"layer {place + 1}", place) for place in self.attentions]
        heads = [("all heads", -1), *((f"head {head + 1}", head) for head in range(self._num_heads))]
        with gr.Row():
            position = gr.Slider(0, 1, 0, step=1, label="Position of the token", scale=4, elem_id="position")
            layer = gr.Dropdown(kinds, value=kinds[-1][1], label="LSH layer", elem_id="layer")
            head = gr.Dropdown(heads, value=-1, label="Heads", elem_id="head")
        found = gr.HTML("There is nothing to look at yet: press Generate.", elem_id="found")
        pane = gr.HTML(elem_id="pane", js_on_load=ON_LOAD)
        drawing = gr.Plot(label="Where the keys stand", elem_id="drawing")
        tables = gr.HTML(elem_id="tables")
        views = [found, pane, drawing, tables]
        hidden = {"show_progress": "hidden", "api_visibility": "private"}
        written.success(
            self.read,
            [session, layer, head],
            [session, position, *views],
            concurrency_limit=1,
            api_name="read",
        )
        chosen = [session, position, layer, head]
        # A session that comes back lives on.
        look, choose = _with_session(self.look), _with_session(self.choose)
        position.input(
            look,
            chosen,
            [session, *views],
            trigger_mode="always_last",
            show_progress="hidden",
            api_name="look",
            js=EMPTY_IS_FIRST,
        )
        layer.input(look, chosen, [session, *views], **hidden)
        head.input(look, chosen, [session, *views], **hidden)
        pane.select(choose, [session, layer, head], [session, position, *views], **hidden)

    @property
    def _num_heads(self) -> int:
        return next(iter(self.attentions.values())).num_heads

    def write(
        self, session: Session, prompt: str, count: float | None, temperature: float | None, seed: float | None
    ) -> Iterator[tuple[Any, ...]]:
        """
        Continue a text: the session, the continuation, its figures and both buttons, again and again while it grows.

        Raises:
            gradio.Error: There is no text, it is too long, a number cannot be used, or the model failed.
        """
        idle = (gr.Button(interactive=True), gr.Button(interactive=False))
        try:
            yield from self._write(prompt, count, temperature, seed, idle)
        except Exception as error:
            yield gr.skip(), gr.skip(), gr.skip(), *idle
            raise told(error) from error

    def _write(self, prompt, count, temperature, seed, idle):
        count = int(checked_number("New tokens", count, MOST_NEW, is_whole=True))
        temperature = checked_number("Temperature", temperature, HOTTEST)
        seed = int(checked_number("Seed", seed or 0, LARGEST_SEED, is_whole=True))
        ids = self._ids_of(prompt, count)
        session, written = Session(prompt_length=len(ids)), ""
        if count:
            generation = session.generation = LiveGeneration(
                self.model, torch.tensor(ids), max_new_tokens=count, temperature=temperature, seed=seed
            )
            try:
                # Whoever leaves in the middle leaves the line, too.
                with closing(self._in_turn(generation)) as turns:
                    for progress, ahead in turns:
                        written = whole_text(self.tokenizer, generation.ids, False)
                        yield session, written, figures_of(progress, waiting(ahead)), *reversed(idle)
            finally:
                session.generation = None
            if not generation.ids:
                yield session, "", figures_of(None, "Stopped before the text was read."), *idle
                return
            written = whole_text(self.tokenizer, generation.ids, True)
            ids = [*ids, *generation.ids]
        session.ids = ids
        yield session, written, gr.skip(), *idle

    def _in_turn(self, generation: LiveGeneration) -> Iterator[tuple[Progress | None, int]]:
        """
        Wait for the model, then write: how far it is, and how many are ahead.

        Raises:
            gradio.Error: Too many wait.
        """
        if len(self._line) > MOST_WAITING:
            raise gr.Error(
                f"{len(self._line) - 1} wait for the model, and no more than {MOST_WAITING} can. Try later."
            )
        with self._line.stand() as ahead:
            seconds = 0.0
            while (others := ahead(seconds)) and not generation.is_stopped:
                yield None, others
                seconds = WAIT
            if not generation.is_stopped:
                with generation:
                    for progress in generation.watch():
                        yield progress, 0

    def _ids_of(self, prompt: str, count: int) -> list[int]:
        """
        Raises:
            gradio.Error: There is no text, too much of it, or it is no Unicode.
        """
        if not prompt:
            raise gr.Error("There is no text. Paste one, or drop a file.")
        try:
            size = len(prompt.encode())
        except UnicodeEncodeError as error:
            raise gr.Error(
                f"The text has {prompt[error.start]!a} at character {error.start:,}: half of a character (a lone "
                "surrogate), which no text in Unicode has. Delete it."
            ) from error
        if isinstance(self.tokenizer, ReformerByteTokenizer):
            self._check_length(f"{size:,}", size, count)
        # To encode megabytes takes a minute.
        part = prompt[: CHARACTERS_PER_TOKEN * self._longest]
        [ids], _ = encode([part], self.tokenizer, None, add_special_tokens=False)
        if len(part) < len(prompt):
            tokens = round(len(ids) * len(prompt) / len(part))
            self._check_length(f"about {tokens:,}", tokens, count)
            [ids], _ = encode([prompt], self.tokenizer, None, add_special_tokens=False)
        self._check_length(f"{len(ids):,}", len(ids), count)
        return ids

    def _check_length(self, named: str, tokens: int, count: int) -> None:
        """
        Raises:
            gradio.Error: So many tokens, with as many new ones, are too many.
        """
        if tokens + count > self._longest:
            raise gr.Error(
                f"The text has {named} tokens, which with {count:,} new ones is more than the {self._longest:,} that "
                f"{self._bound_by}. Shorten one of them."
            )

    def take_file(self, data: bytes | None) -> str:
        """
        The text of a file that was dropped.

        Raises:
            gradio.Error: It is no UTF-8, empty, or too long.
        """
        with mistakes_told():
            text = text_of_file(data)
            self._ids_of(text, 0)
            return text

    def read(self, session: Session, layer: int, head: int) -> tuple[Any, ...]:
        """The session, the slider for the positions of its text, and the views of a first token."""
        if not session.ids:
            return session, gr.skip(), "There is nothing to look at: no text was read.", "", None, ""
        # What the last token of the prompt reads decides on the first new one.
        position = session.prompt_length - 1
        slider = gr.Slider(maximum=max(1, len(session.ids) - 1), value=position)
        return session, slider, *self.look(session, position, layer, head)

    def look(self, session: Session, position: int, layer: int, head: int) -> tuple[Any, ...]:
        """What a token reads: a line about it, the text with its keys, the drawing, and tables of keys by round."""
        with mistakes_told():
            text, reading = self._text_of(session)
            keys = reading.keys_read(min(int(position), len(text) - 1), layer)
            only = None if head < 0 else head
            threshold = self.attentions[layer].threshold.length
            found = f"<p>{heading(text, keys)}</p><p>{explanation(keys, threshold)}</p>"
            return found, text_with_keys(text, keys, only), draw_keys(keys, only), key_tables(text, keys, only)

    def choose(self, session: Session, layer: int, head: int, event: EventData) -> tuple[Any, ...]:
        """The same of the token that was clicked on, and its position first."""
        with mistakes_told():
            position = self._text_of(session)[0].token_at(int(event.character))
        return position, *self.look(session, position, layer, head)

    def _text_of(self, session: Session) -> tuple[TokenText, Reading]:
        """
        The text of a session, which the model reads when it is looked at first.

        Raises:
            gradio.Error: There is none.
        """
        if not session.ids:
            raise gr.Error(
                "There is no text here: press Generate first. A text is forgotten when nobody has looked at it for "
                f"{TIME_TO_LIVE // 60} minutes."
            )
        if session.text is None or session.reading is None:
            session.text = TokenText.of(self.tokenizer, session.ids)
            with self._line.stand() as ahead:
                ahead(None)
                session.reading = Reading(self.model, torch.tensor(session.ids))
        return session.text, session.reading


def stop_writing(session: Session) -> None:
    """End what is being written, or waits to be."""
    # The thread that writes may take it away.
    generation = session.generation
    if generation is not None:
        generation.stop()


def told(error: Exception) -> Exception:
    """An error as the page shows it."""
    if isinstance(error, gr.Error):
        return error
    words = str(error)
    if not words or not isinstance(error, MemoryError | RuntimeError | ValueError):
        words = f"{type(error).__name__}: {words}".removesuffix(": ")
    return gr.Error(words)


@contextmanager
def mistakes_told() -> Iterator[None]:
    """
    Raises:
        gradio.Error: What went wrong, in the words of another error.
    """
    try:
        yield
    except Exception as error:
        raise told(error) from error


def checked_number(name: str, value: float | None, most: int, *, is_whole: bool = False) -> float:
    """
    A number that a visitor gave.

    Raises:
        gradio.Error: It is none, or not from 0 to `most`.
    """
    if isinstance(value, int | float) and 0 <= value <= most and not (is_whole and value != int(value)):
        return value
    given = "nothing" if value is None or value == "" else repr(value)
    kind = "a whole number" if is_whole else "a number"
    raise gr.Error(f"{name}: {given} is given. Give {kind} from 0 to {most:,}.")


def _as_given(payload):
    return payload


def _with_session(function: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """The same function of a page, with the session before what it returns."""

    # Gradio asks for the names and types of what it gives.
    @wraps(function)
    def with_session(session, *chosen):
        return session, *function(session, *chosen)

    return with_session


def _forgetter(page):
    """What forgets the session of a visitor who leaves; Gradio itself would keep it for an hour."""

    # It runs where Gradio goes through the sessions, not in a thread beside.
    async def forget(request: Request) -> None:
        page.state_holder.delete_state(request.session_hash)

    return forget


def waiting(ahead: int) -> str:
    """What is said to somebody who waits; nothing if nobody is ahead."""
    return f"You wait: the model works for others, {ahead:,} ahead of you. Stop leaves the line." if ahead else ""


def text_of_file(data: bytes | None) -> str:
    """
    The text of a file.

    Raises:
        gradio.Error: It is no UTF-8, or empty.
    """
    if not data:
        raise gr.Error("The file is empty. Drop one with a text in UTF-8.")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise gr.Error(
            f"The file is no text in UTF-8: its byte {error.start:,} is 0x{data[error.start]:02x}, which cannot be "
            "there. Save it as UTF-8, or paste its text."
        ) from error


def figures_of(progress: Progress | None, note: str = "") -> str:
    """Figures of a continuation as HTML, dashes where there are none yet, below a note."""
    figures: dict[str, str | None] = dict.fromkeys(FIGURES)
    if progress is not None:
        seconds, speed, memory = progress.prompt_seconds, progress.tokens_per_second, progress.memory_bytes
        figures = {
            "prompt": f"{progress.prompt_tokens:,}",
            "prefill": None if seconds is None else f"{seconds:.2f}",
            "new": f"{progress.new_tokens:,}",
            "speed": None if speed is None else f"{speed:.1f}",
            "cache": f"{progress.cache_bytes / MEBIBYTE:.1f}",
            "memory": None if memory is None else f"{memory / MEBIBYTE:,.0f}",
        }
    cells = [
        f'<div><b data-figure="{name}">{figures[name] or "–"}</b>{words}</div>' for name, words in FIGURES.items()
    ]
    said = f"<p><b>{note}</b></p>" if note else ""
    return f'{said}<div class="figures">{"".join(cells)}</div>'
