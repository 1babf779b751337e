"""The page of `hf-reformer demo`: a text goes on, and each of its tokens shows what it reads."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..training.row_batches import encode, longest_input
from .demo_drawing import draw_keys, explanation, heading, key_tables, text_with_keys
from .live_generation import LiveGeneration, Progress
from .reading import Reading, lsh_layers
from .token_text import TokenText, whole_text


# What the page stands on. A missing one is an error that names it.
gr: Any = import_module("gradio")

if TYPE_CHECKING:
    EventData = Any
else:
    EventData = gr.EventData

MEBIBYTE = 2**20
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


@dataclass
class Session:
    """
    What a visitor has done.

    Attributes:
        generation: What is being written, or was.
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
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str):
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.attentions = lsh_layers(model)
        # Hooks of one text must not see another.
        self._lock = threading.Lock()

    def build(self) -> Any:
        """The page, a `gradio.Blocks`."""
        with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
            gr.Markdown(f"{INTRODUCTION} {self._describe()}")
            session = gr.State(Session())
            written = self._build_writing(session)
            if self.attentions:
                self._build_reading(session, written)
            else:
                gr.Markdown(
                    f"This model has no LSH layer (its layers: {', '.join(self.model.config.attn_layers)}), so there "
                    "are no hash rounds to look at."
                )
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
                count = gr.Slider(0, 4096, 200, step=1, label="New tokens, at most", elem_id="count")
                temperature = gr.Slider(
                    0, 2, 0.7, step=0.05, label="Temperature; 0 takes the likeliest", elem_id="temperature"
                )
                seed = gr.Number(0, precision=0, label="Seed of the draw")
                generate = gr.Button("Generate", variant="primary", elem_id="generate")
                stop = gr.Button("Stop", interactive=False, elem_id="stop")
        file.upload(text_of_file, file, prompt, api_visibility="private")
        stop.click(stop_writing, session, queue=False, api_visibility="private")
        return generate.click(
            self.write,
            [session, prompt, count, temperature, seed],
            [session, written, figures, generate, stop],
            concurrency_limit=1,
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
        position.input(self.look, chosen, views, trigger_mode="always_last", show_progress="hidden", api_name="look")
        layer.input(self.look, chosen, views, **hidden)
        head.input(self.look, chosen, views, **hidden)
        pane.select(self.choose, [session, layer, head], [position, *views], **hidden)

    @property
    def _num_heads(self) -> int:
        return next(iter(self.attentions.values())).num_heads

    def write(
        self, session: Session, prompt: str, count: int, temperature: float, seed: int
    ) -> Iterator[tuple[Any, ...]]:
        """
        Continue a text: the session, the continuation, its figures and both buttons, again and again while it grows.

        Raises:
            gradio.Error: There is no text, it is too long, or the model failed.
        """
        ids, count = self._ids_of(prompt, int(count)), int(count)
        idle = (gr.Button(interactive=True), gr.Button(interactive=False))
        session, written = Session(prompt_length=len(ids)), ""
        if count:
            try:
                with self._lock, self._generation(ids, count, temperature, int(seed or 0)) as generation:
                    session.generation = generation
                    for progress in generation.watch():
                        written = whole_text(self.tokenizer, generation.ids, False)
                        yield session, written, figures_of(progress), *reversed(idle)
                    written = whole_text(self.tokenizer, generation.ids, True)
                    ids = [*ids, *generation.ids]
            except (MemoryError, RuntimeError, ValueError) as error:
                yield session, gr.skip(), gr.skip(), *idle
                raise gr.Error(str(error) or type(error).__name__) from error
        session.ids = ids
        yield session, written, gr.skip(), *idle

    def _generation(self, ids: list[int], count: int, temperature: float, seed: int) -> LiveGeneration:
        prompt = torch.tensor(ids)
        return LiveGeneration(self.model, prompt, max_new_tokens=count, temperature=temperature, seed=seed)

    def _ids_of(self, prompt: str, count: int) -> list[int]:
        """
        Raises:
            gradio.Error: There is no text, or too much of it.
        """
        if not prompt:
            raise gr.Error("There is no text. Paste one, or drop a file.")
        [ids], _ = encode([prompt], self.tokenizer, None, add_special_tokens=False)
        longest = longest_input(self.model.config)
        if longest is not None and len(ids) + count > longest:
            raise gr.Error(
                f"The text has {len(ids):,} tokens, which with {count:,} new ones is more than the {longest:,} that "
                "this model takes. Shorten one of them."
            )
        return ids

    def read(self, session: Session, layer: int, head: int) -> tuple[Any, ...]:
        """The session, the slider for the positions of its text, and the views of a first token."""
        # What the last token of the prompt reads decides on the first new one.
        position = session.prompt_length - 1
        slider = gr.Slider(maximum=max(1, len(session.ids) - 1), value=position)
        return session, slider, *self.look(session, position, layer, head)

    def look(self, session: Session, position: int, layer: int, head: int) -> tuple[Any, ...]:
        """What a token reads: a line about it, the text with its keys, the drawing, and tables of keys by round."""
        text, reading = self._text_of(session)
        keys = reading.keys_read(min(int(position), len(text) - 1), layer)
        only = None if head < 0 else head
        threshold = self.attentions[layer].threshold.length
        found = f"<p>{heading(text, keys)}</p><p>{explanation(keys, threshold)}</p>"
        return found, text_with_keys(text, keys, only), draw_keys(keys, only), key_tables(text, keys, only)

    def choose(self, session: Session, layer: int, head: int, event: EventData) -> tuple[Any, ...]:
        """The same of the token that was clicked on, and its position first."""
        position = self._text_of(session)[0].token_at(int(event.character))
        return position, *self.look(session, position, layer, head)

    def _text_of(self, session: Session) -> tuple[TokenText, Reading]:
        """
        The text of a session, which the model reads when it is looked at first.

        Raises:
            gradio.Error: There is none.
        """
        if not session.ids:
            raise gr.Error("There is no text yet: press Generate first.")
        if session.text is None or session.reading is None:
            session.text = TokenText.of(self.tokenizer, session.ids)
            with self._lock:
                session.reading = Reading(self.model, torch.tensor(session.ids))
        return session.text, session.reading


def stop_writing(session: Session) -> None:
    """End what is being written."""
    if session.generation is not None:
        session.generation.stop()


def text_of_file(data: bytes | None) -> str:
    """
    The text of a file.

    Raises:
        gradio.Error: It is no UTF-8.
    """
    try:
        return (data or b"").decode("utf-8")
    except UnicodeDecodeError as error:
        raise gr.Error(f"The file is no text in UTF-8: {error}. Save it as UTF-8, or paste its text.") from error


def figures_of(progress: Progress | None) -> str:
    """Figures of a continuation as HTML, dashes where there are none yet."""
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
    return f'<div class="figures">{"".join(cells)}</div>'
