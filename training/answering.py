"""
Questions as rows for a model, what it answers, and how good that is.

A row is the question and its context, or a window of a context that is longer; windows overlap by a quarter. The
answer is the part of the context that begins at the likeliest token and ends at the likeliest one behind it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from sklearn.feature_extraction.text import TfidfVectorizer
from torchmetrics.text import SQuAD
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .questions import Answer, Questions
from .row_batches import check_offsets, each_through_model
from .tables import excerpt


# Tokens of the longest answer.
LONGEST_ANSWER = 512
# Beginnings and ends that are paired.
CANDIDATES = 20
SENTENCE = re.compile(r"[^\n.!?]*\w[^\n.!?]*")


@dataclass(frozen=True)
class Window:
    """
    A question and as much of its context as a model reads at once.

    Attributes:
        ids: Of the tokens.
        question: The place of the question.
        first: Where the tokens of the context begin.
        offsets: `[n, 2]`, the first character of each of them and the one behind its last.
        span: The first and the last token of the first answer; 0 and 0 where it is not here.
    """

    ids: list[int]
    question: int
    first: int
    offsets: np.ndarray
    span: tuple[int, int]


def windows_of(questions: Questions, tokenizer: PreTrainedTokenizerBase, length: int) -> list[Window]:
    """
    Questions and contexts as windows of at most `length` tokens.

    Raises:
        ValueError: A question leaves no room for its context, or the tokenizer does not say from which characters a
            token is.
    """
    check_offsets(tokenizer)
    windows = []
    for place in range(len(questions)):
        question = questions.questions[place]
        room = length - len(tokenizer(question, split_special_tokens=True, verbose=False)["input_ids"]) - 2
        if room < 2:
            raise ValueError(
                f"The question {excerpt(question, 40)!r} leaves no room for its context in {length:,} tokens. Give "
                "more with --context_length."
            )
        encoded = tokenizer(
            question,
            questions.contexts[place],
            truncation="only_second",
            max_length=length,
            stride=min(length // 4, room // 2),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_attention_mask=False,
            split_special_tokens=True,
            verbose=False,
        )
        answer = questions.answers[place][0] if questions.answers[place] else None
        for number, ids in enumerate(encoded["input_ids"]):
            is_context = np.asarray([part == 1 for part in encoded.sequence_ids(number)], dtype=bool)
            offsets = np.asarray(encoded["offset_mapping"][number]).reshape(-1, 2)[is_context]
            first = int(is_context.argmax())
            windows.append(Window(ids, place, first, offsets, _span(answer, offsets, first)))
    return windows


def _span(answer: Answer | None, offsets: np.ndarray, first: int) -> tuple[int, int]:
    if answer is None or not len(offsets):
        return 0, 0
    start, end = answer.start, answer.start + len(answer.text)
    if start < offsets[0, 0] or end > offsets[-1, 1]:
        return 0, 0
    begins = int(np.searchsorted(offsets[:, 1], start, side="right"))
    ends = int(np.searchsorted(offsets[:, 0], end)) - 1
    return first + begins, first + max(begins, ends)


def num_cut(windows: Sequence[Window], questions: Questions) -> int:
    """How many questions have their answer whole in no window."""
    whole = {window.question for window in windows if window.span != (0, 0)}
    return sum(bool(answers) and place not in whole for place, answers in enumerate(questions.answers))


def rows_of(windows: Sequence[Window]) -> Dataset:
    """`input_ids`, `start_positions` and `end_positions`."""
    return Dataset.from_dict(
        {
            "input_ids": [window.ids for window in windows],
            "start_positions": [window.span[0] for window in windows],
            "end_positions": [window.span[1] for window in windows],
        }
    )


def find_answers(
    model: PreTrainedModel,
    windows: Sequence[Window],
    questions: Questions,
    *,
    pad_token_id: int | None,
    quiet: bool = False,
) -> tuple[list[Answer | None], list[float]]:
    """The answer to each question, or None for no answer, and its chance among the parts of its window."""

    def compute(model, batch):
        output = model(**batch)
        logits = torch.stack([output.start_logits, output.end_logits], dim=-1).float()
        return logits.masked_fill(batch["attention_mask"][..., None] == 0, -torch.inf).log_softmax(1)

    ids = [window.ids for window in windows]
    found = each_through_model(model, ids, compute, pad_token_id=pad_token_id, description="answering", quiet=quiet)
    return answers_at(windows, [scores.numpy() for scores in found], questions)


def log_chances(logits: np.ndarray) -> np.ndarray:
    """Logarithms of the chances of tokens, `[tokens, 2]`, of their logits."""
    shifted = logits - logits.max(0)
    return shifted - np.log(np.exp(shifted).sum(0))


def answers_at(
    windows: Sequence[Window], found: Sequence[np.ndarray], questions: Questions
) -> tuple[list[Answer | None], list[float]]:
    """
    The likeliest answer to each question in all of its windows, and its chance.

    Args:
        found: Of each window `[tokens, 2]`, the logarithms of the chances that the answer begins and ends at a token;
            the first token stands for no answer.
    """
    best: list[Answer | None] = [None] * len(questions)
    # How much likelier the answer is than that its window has none.
    odds, chances = [0.0] * len(questions), [0.0] * len(questions)
    for window, scores in zip(windows, found, strict=True):
        span, score = _best_span(scores[window.first : window.first + len(window.offsets)])
        odd = score - float(scores[0].sum())
        if span is not None and odd > odds[window.question]:
            start, end = window.offsets[span[0], 0], window.offsets[span[1], 1]
            text = questions.contexts[window.question][start:end]
            best[window.question] = Answer(int(start) + len(text) - len(text.lstrip()), text.strip())
            odds[window.question], chances[window.question] = odd, float(np.exp(score))
    return best, chances


def _best_span(scores: np.ndarray) -> tuple[tuple[int, int] | None, float]:
    """The first and last token with the largest sum of scores, `[n, 2]`, and that sum."""
    best, largest = None, -np.inf
    begins, ends = (np.argsort(-scores[:, side], kind="stable")[:CANDIDATES] for side in (0, 1))
    for begin in begins:
        for end in ends:
            score = scores[begin, 0] + scores[end, 1]
            if begin <= end < begin + LONGEST_ANSWER and score > largest:
                best, largest = (int(begin), int(end)), float(score)
    return best, largest


def answer_figures(questions: Questions, found: Sequence[Answer | None]) -> dict[str, float]:
    """`exact_match` and `f1` of words as SQuAD counts them, from 0 to 1; no answer is an answer without words."""
    metric = SQuAD()
    for place, answer in enumerate(found):
        right = [one.text for one in questions.answers[place]] or [""]
        metric.update(
            [{"id": str(place), "prediction_text": "" if answer is None else answer.text}],
            [{"id": str(place), "answers": {"text": right, "answer_start": [0] * len(right)}}],
        )
    return {name: float(value) / 100 for name, value in metric.compute().items()}


def baseline(measured: Questions) -> dict[str, dict[str, float]]:
    """The same figures of the sentence or line of the context that is most like the question, by TF-IDF."""
    vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\w+")
    texts = [*measured.questions, *dict.fromkeys(measured.contexts)]
    if not any(re.search(r"\w", text) for text in texts):
        return {}
    vectorizer.fit(texts)
    answers: list[Answer | None] = []
    for question, context in zip(measured.questions, measured.contexts, strict=True):
        parts = [(found.start(), found[0]) for found in SENTENCE.finditer(context)] or [(0, context)]
        likeness = vectorizer.transform([text for _, text in parts]) @ vectorizer.transform([question]).T
        start, text = parts[int(likeness.toarray()[:, 0].argmax())]
        answers.append(Answer(start + len(text) - len(text.lstrip()), text.strip()))
    return {"the sentence most like the question, by TF-IDF": answer_figures(measured, answers)}
