"""What a token reads, drawn: where its keys stand, round by round, and the text with the keys in it."""

from collections.abc import Iterable
from html import escape

from matplotlib.figure import Figure

from .reading import KeysRead
from .token_text import TokenText


# Keys that a round's table lists, and characters around each.
MOST_LISTED = 10
AROUND = 20
# Characters of the text that are shown around the token; a browser is slow with more.
MOST_SHOWN = 200_000
# Beside the largest weight, from which on what is read of a key is underlined in the text.
UNDERLINED = 0.1
KEY_COLOR, QUERY_COLOR = "#1f5fa8", "#c2410c"
# As seen on the page, so that a table has one line for each key.
VISIBLE = str.maketrans({"\n": "⏎", "\r": "⏎", "\t": "⇥"})


def draw_keys(keys: KeysRead, head: int | None) -> Figure:
    """
    Where the keys of a token stand in the text: a row for each round, a dot for each key, a stem for its weight.

    Args:
        keys: What the token reads.
        head: Of this head; None for the mean of all.
    """
    figure = Figure(figsize=(11, 0.9 + 1.25 * keys.num_rounds), dpi=100, layout="constrained")
    rows = figure.subplots(keys.num_rounds, 1, sharex=True, squeeze=False)[:, 0]
    highest = max(
        [weight for number in range(keys.num_rounds) for weight in keys.by_key(number, head).values()] or [0]
    )
    for number, row in enumerate(rows):
        weights = keys.by_key(number, head)
        row.vlines(list(weights), 0, list(weights.values()), color=KEY_COLOR, lw=1.4)
        row.plot(list(weights), [0] * len(weights), ".", color=KEY_COLOR, ms=4, alpha=0.5)
        row.axvline(keys.position, color=QUERY_COLOR, lw=1.6)
        row.set_ylabel("all tokens" if keys.is_dense else f"round {number + 1}", fontsize=9)
        row.set(ylim=(-0.06 * (highest or 1), 1.12 * (highest or 1)), xlim=(-0.01 * keys.position - 1, None))
        row.tick_params(labelsize=8)
        row.spines[["top", "right"]].set_visible(False)
    rows[-1].set_xlim(right=1.02 * keys.position + 1)
    rows[-1].set_xlabel("position in the text; the token stands at the line", fontsize=9)
    figure.suptitle("weight of each key" + ("" if head is None else f", head {head + 1}"), fontsize=10)
    return figure


def heading(text: TokenText, keys: KeysRead) -> str:
    """One line: which token, which layer, how much is read."""
    own = escape(text.of_token(keys.position).translate(VISIBLE).replace(" ", "␣"))
    met = len(keys.by_key())
    found = f"sees all {met:,} tokens before it" if keys.is_dense else f"meets {met:,} of {keys.position:,} tokens"
    if not met:
        found = "reads nothing: it meets no token but itself"
    rounds = "" if keys.is_dense else f" in {keys.num_rounds} {'round' if keys.num_rounds == 1 else 'rounds'}"
    return f"<b>Position {keys.position:,}, <code>{own}</code></b>, layer {keys.layer + 1}: it {found}{rounds}."


def explanation(keys: KeysRead, threshold: int) -> str:
    """What the reader must know: dense texts, and values of the successor."""
    said = []
    if keys.is_dense:
        said.append(
            f"This is dense attention: the layer does not hash the first {threshold:,} tokens, so nothing is left out."
        )
    if keys.value_shift:
        said.append(
            "A key stands for a token like this one, and what is read of it is the value of the token behind it "
            "(<code>lsh_value_shift=1</code>), underlined where the weight is large: what came next the last time."
        )
    return " ".join(said)


def text_with_keys(text: TokenText, keys: KeysRead, head: int | None) -> str:
    """
    The text as HTML: the token, the keys in the colour of their weight, and what is read of them underlined.

    Args:
        head: Of this head; None for the mean of all.
    """
    weights = keys.by_key(None, head)
    largest = max(weights.values(), default=1.0) or 1.0
    styles: dict[tuple[int, int], tuple[str, str]] = {}
    shown = _shown(text, keys.position)
    for position, weight in reversed(weights.items()):
        share = weight / largest
        span = (text.starts[position], text.ends[position])
        style = f"background: rgb(31 95 168 / {0.12 + 0.63 * share:.2f})"
        styles[span] = ("key", style)
        if keys.value_shift and share >= UNDERLINED and position + 1 < len(text):
            behind = (text.starts[position + 1], text.ends[position + 1])
            styles.setdefault(behind, ("read", ""))
    styles[text.starts[keys.position], text.ends[keys.position]] = ("query", "")
    marks = sorted((span, style) for span, style in styles.items() if span[0] >= shown.start and span[1] <= shown.stop)
    return f'<div class="reading">{"".join(_pieces(text.text, shown, marks))}</div>'


def _shown(text, position):
    """The characters that are shown: those around the token."""
    middle = text.starts[position]
    begin = max(0, min(middle - MOST_SHOWN // 2, len(text.text) - MOST_SHOWN))
    return range(begin, min(len(text.text), begin + MOST_SHOWN))


def _pieces(text, shown, marks) -> Iterable[str]:
    """Spans that say where they begin, so that a click tells its place."""
    begin = shown.start
    for (start, end), (name, style) in marks:
        if start < begin or end <= start:
            continue
        if start > begin:
            yield _span(text, begin, start)
        yield _span(text, start, end, name, style)
        begin = end
    yield _span(text, begin, shown.stop)


def _span(text, start, end, name="", style=""):
    attributes = f' class="{name}"' if name else ""
    attributes += f' style="{style}"' if style else ""
    words = escape(text[start:end], quote=False)
    # A new line has no width to show a colour on.
    if name:
        words = words.replace("\n", "⏎\n")
    return f'<span data-start="{start}" data-end="{end}"{attributes}>{words}</span>'


def key_tables(text: TokenText, keys: KeysRead, head: int | None) -> str:
    """
    For each round a table of the keys with the largest weights, as HTML.

    Args:
        head: Of this head; None for the mean of all.
    """
    tables = "".join(_table(text, keys, number, head) for number in range(keys.num_rounds))
    return f'<div class="rounds">{tables}</div>'


def _table(text, keys, number, head):
    weights = keys.by_key(number, head)
    listed = list(weights.items())[:MOST_LISTED]
    rows = "".join(
        f"<tr><td>{abs(keys.position - position):,}</td><td>{position:,}</td><td>{100 * weight:.1f} %</td>"
        f"<td><code>{_around(text, position, keys.value_shift)}</code></td></tr>"
        for position, weight in listed
    )
    rest = len(weights) - len(listed)
    if rest:
        share = 100 * (sum(weights.values()) - sum(weight for _, weight in listed))
        rows += f'<tr><td colspan="4">and {rest:,} more, with {share:.1f} % together</td></tr>'
    where = "Dense attention" if keys.is_dense else f"Round {number + 1}{_bucket(keys, number, head)}"
    head_row = "<tr><th>tokens back</th><th>position</th><th>weight</th><th>the text there</th></tr>"
    return (
        f'<section class="round"><h4>{where}: {len(weights):,} {"key" if len(weights) == 1 else "keys"}</h4>'
        f"<table>{head_row}{rows}</table></section>"
    )


def _bucket(keys, number, head):
    if head is None:
        return f", {keys.num_heads} heads"
    return f", bucket {keys.buckets[head, number]} with {keys.bucket_sizes[head, number]:,} tokens of the text"


def _around(text, position, value_shift):
    """The text around a key, the key marked and what is read of it underlined."""
    start, end = text.starts[position], text.ends[position]
    read_end = end
    if value_shift and position + 1 < len(text):
        read_end = text.ends[position + 1]
    before, key = text.text[max(0, start - AROUND) : start], text.text[start:end]
    read, behind = text.text[end:read_end], text.text[read_end : read_end + AROUND]
    before, key, read, behind = (escape(part.translate(VISIBLE)) for part in (before, key, read, behind))
    read = f'<span class="read">{read}</span>' if read else ""
    return f'{before}<span class="key">{key}</span>{read}{behind}'
