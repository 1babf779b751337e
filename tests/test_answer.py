"""`hf-reformer answer`: questions about texts to a model that answers with a part of a text."""

import json
import re

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from task_runs import run_small

from hf_reformer import ReformerByteTokenizer, ReformerForQuestionAnswering
from hf_reformer.commands import answer
from hf_reformer.training import answering
from hf_reformer.training.answering import answer_figures, find_answers, log_chances, windows_of
from hf_reformer.training.questions import (
    Answer,
    QuestionDataArguments,
    Questions,
    questions_of,
    read_answers,
    read_questions,
)


pytestmark = pytest.mark.usefixtures("own_datasets_cache")


CONTEXT = "Élan: the Severn flows past Worcester. The Wye does not."
FILES = {"README.md", "config.json", "curve.png", "model.safetensors", "predictions.jsonl", "training_log.json"}


def record(number):
    """A question about the only number of a text; every fifth has no answer."""
    answers = [] if number % 5 == 4 else [{"text": str(1000 + number), "answer_start": 8}]
    year = answers[0]["text"] if answers else "once"
    return {"question": "When?", "context": f"It was, {year}, {'quite ' * (number % 3)}so.", "answers": answers}


def squad_of(rows):
    """Those rows in SQuAD's format."""
    paragraphs = [
        {
            "context": row["context"],
            "qas": [{"id": str(place), "question": row["question"], "answers": row["answers"]}],
        }
        for place, row in enumerate(rows)
    ]
    return {"version": "v2.0", "data": [{"title": "years", "paragraphs": paragraphs}]}


@pytest.fixture(scope="module")
def years(tmp_path_factory):
    """A file of 40 questions in SQuAD's format."""
    path = tmp_path_factory.mktemp("data") / "years.json"
    path.write_text(json.dumps(squad_of(list(map(record, range(40))))), encoding="utf-8")
    return str(path)


def run(folder, **changed):
    return run_small(answer.parse_arguments, answer.answer, folder, **changed)


@pytest.fixture(scope="module")
def trained(years, tmp_path_factory):
    """A run that learns a little: its folder and its figures."""
    folder = tmp_path_factory.mktemp("runs") / "years"
    how = {"max_steps": 100, "learning_rate": 1e-2, "eval_strategy": "steps", "eval_steps": 50}
    return folder, run(folder, data=years, pretrain_steps=2, **how)


def test_every_form_says_the_same(tmp_path, years):
    rows = list(map(record, range(40)))
    tables = {
        "lists.jsonl": rows,
        "squad.jsonl": [
            row
            | {
                "answers": {
                    "text": [one["text"] for one in row["answers"]],
                    "answer_start": [one["answer_start"] for one in row["answers"]],
                }
            }
            for row in rows
        ],
        "plain.jsonl": [row | {"answers": (row["answers"] or [{"text": ""}])[0]["text"]} for row in rows],
    }
    expected = questions_of(years, QuestionDataArguments())
    assert expected.answers[3] == [Answer(8, "1003")] and expected.answers[4] == []
    for name, table in tables.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in table), encoding="utf-8")
        found = questions_of(str(tmp_path / name), QuestionDataArguments())
        assert (found.questions, found.contexts, found.answers) == (
            expected.questions,
            expected.contexts,
            expected.answers,
        )
    (tmp_path / "some.csv").write_text('q,context,a\nWhat?,"A text, short",short\n')
    names = {"question_column": "q", "answers_column": "a"}
    (found,) = questions_of(str(tmp_path / "some.csv"), QuestionDataArguments(**names)).answers
    assert found == [Answer(8, "short")]


def test_every_form_of_an_answer():
    record = {"text": "Severn", "answer_start": 10}
    forms = (["Severn"], record, [record], "Severn", [record | {"answer_start": "10"}], json.dumps([record]))
    for given in forms:
        assert read_answers(given, CONTEXT, 0, "a.csv") == [Answer(10, "Severn")]
    assert read_answers(1003, "In 1003.", 0, "a.csv") == [Answer(3, "1003")]
    for given in (None, "", [], {"text": [], "answer_start": []}, "[]"):
        assert read_answers(given, CONTEXT, 0, "a.csv") == []


def test_rows_under_data_and_a_byte_order_mark(tmp_path):
    rows = list(map(record, range(4)))
    (tmp_path / "rows.json").write_text(json.dumps({"data": rows}), encoding="utf-8-sig")
    (tmp_path / "squad.json").write_text(json.dumps(squad_of(rows)), encoding="utf-8-sig")
    found = [questions_of(str(tmp_path / name), QuestionDataArguments()) for name in ("rows.json", "squad.json")]
    assert found[0].answers == found[1].answers and found[0].answers[1] == [Answer(8, "1001")]
    assert found[1].others == {"id": ["0", "1", "2", "3"]}
    lacks = squad_of(rows)
    lacks["data"][0]["paragraphs"][1]["qas"][0]["question"] = " "
    (tmp_path / "lacks.json").write_text(json.dumps(lacks))
    with pytest.raises(ValueError, match=r"1 rows of .* have no question in column 'question' \(the first is row 2\)"):
        questions_of(str(tmp_path / "lacks.json"), QuestionDataArguments())
    (tmp_path / "other.csv").write_text("question,text\nWhat?,It.\n")
    with pytest.raises(ValueError, match=r"no column 'context'; it has .* --context_column"):
        questions_of(str(tmp_path / "other.csv"), QuestionDataArguments())


def test_questions_about_one_text_are_on_one_side(tmp_path):
    rows = [record(number % 10) | {"question": f"When, {number}?"} for number in range(40)]
    path = tmp_path / "copies.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    sides = read_questions(QuestionDataArguments(data=str(path)))
    assert len(sides.train) == 32 and len(sides.held_out) == 8
    assert not set(sides.train.contexts) & set(sides.held_out.contexts)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("severn", r"Row 3 of a\.csv has the answer 'severn', which is not in its context\. An"),
        ({"text": ["Severn"], "answer_start": [9]}, "'Severn', .* at character 9, where stands ' Sev"),
        ([{"text": "", "answer_start": 2}], "has the answer ''"),
        ([{"text": "Wye", "answer_start": -17}], "has the answer 'Wye'"),
        ([{"answer_start": 3}], "an answer is a text, or a record of text and answer_start"),
        ([7.5], r"has the answer 7\.5; an answer is a text"),
    ],
)
def test_answers_that_are_none_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        read_answers(given, CONTEXT, 2, "a.csv")


@pytest.mark.parametrize("length", [24, 40, 1000])
@pytest.mark.parametrize("has_head_tokens", [True, False])
def test_windows_lose_nothing(length, has_head_tokens):
    tokenizer = ReformerByteTokenizer()
    if has_head_tokens:
        tokenizer.add_head_tokens()
    right = ["Élan", "Severn", "not", "."]
    answers = [[Answer(CONTEXT.rindex(text), text)] for text in right] + [[]]
    questions = Questions(["Où?"] * 5, [CONTEXT] * 5, answers, list(range(5)))
    windows = windows_of(questions, tokenizer, length)
    assert max(len(window.ids) for window in windows) <= length
    for place in range(5):
        own = [window for window in windows if window.question == place]
        seen = np.zeros(len(CONTEXT), dtype=bool)
        for window in own:
            for start, end in window.offsets:
                seen[start:end] = True
        assert seen.all() and (len(own) > 1) == (length < 1000)
        held = [window for window in own if window.span != (0, 0)]
        assert bool(held) == bool(answers[place])
        for window in held:
            first, last = window.span
            assert tokenizer.decode(window.ids[first : last + 1]) == answers[place][0].text
            start, end = window.offsets[first - window.first, 0], window.offsets[last - window.first, 1]
            assert CONTEXT[start:end] == answers[place][0].text


def test_answers_that_no_window_holds_are_counted():
    context = f"{'x ' * 40}Severn{' y' * 40}"
    for answers, cut in (([Answer(80, "Severn")], 0), ([], 0), ([Answer(0, context)], 1)):
        questions = Questions(["Q?"], [context], [answers], [0])
        windows = windows_of(questions, ReformerByteTokenizer(), 60)
        assert len(windows) > 2 and answering.num_cut(windows, questions) == cut


def test_chances_are_those_of_a_softmax():
    logits = torch.randn(7, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.tensor(log_chances(logits.numpy())), logits.log_softmax(0))


def test_a_question_needs_room_for_its_context():
    questions = Questions(["Why? " * 20], [CONTEXT], [[]], [0])
    with pytest.raises(ValueError, match=r"question 'Why\? .*' leaves no room for its context in 50 tokens"):
        windows_of(questions, ReformerByteTokenizer(), 50)


class Scores(torch.nn.Module):
    """In the place of a model: scores that somebody has written down, by window."""

    device = torch.device("cpu")

    def __init__(self, scores):
        super().__init__()
        self.scores = scores

    def forward(self, input_ids, attention_mask):
        output = torch.zeros(*input_ids.shape, 2)
        for row, ids in enumerate(input_ids.tolist()):
            for (side, column), score in self.scores.get(ids[-1], {}).items():
                output[row, column, side] = score
        return type("Output", (), {"start_logits": output[..., 0], "end_logits": output[..., 1]})


def test_the_likeliest_part_is_the_answer():
    tokenizer = ReformerByteTokenizer()
    questions = Questions(["a"] * 3, ["bcdefX", "bcdefY", "bcdefZ"], [[]] * 3, [0, 1, 2])
    windows = windows_of(questions, tokenizer, 100)
    last = [window.ids[-1] for window in windows]
    scores = {
        # An end before the beginning is none.
        last[0]: {(0, 3): 9, (1, 2): 9, (1, 4): 8},
        # The question is no answer, and nothing is likelier than no answer, which the first token stands for.
        last[1]: {(0, 0): 9, (1, 0): 9, (0, 3): 8, (1, 4): 8},
        last[2]: {(0, 1): 5, (1, 6): 5},
    }
    answers, chances = find_answers(Scores(scores), windows, questions, pad_token_id=0, quiet=True)
    assert answers == [Answer(2, "de"), None, Answer(0, "bcdefZ")]
    logits = [torch.zeros(7), torch.zeros(7)]
    logits[0][1], logits[1][6] = 5, 5
    expected = logits[0].softmax(0)[1] * logits[1].softmax(0)[6]
    assert chances[2] == pytest.approx(float(expected), rel=1e-5) and chances[1] == 0


def test_figures_are_those_of_squad():
    answers = [[Answer(0, "the Severn"), Answer(0, "Severn river")], [], [], [Answer(0, "Wye")]]
    questions = Questions(["?"] * 4, [CONTEXT] * 4, answers, list(range(4)))
    found = [Answer(0, "Severn!"), None, Answer(0, "Wye"), Answer(0, "the Wye flows")]
    # Articles and punctuation do not count; of two words one is right.
    figures = answer_figures(questions, found)
    assert figures == pytest.approx({"exact_match": 0.5, "f1": (1 + 1 + 0 + 2 / 3) / 4})


def test_a_run_leaves_what_it_promises(trained, years):
    folder, figures = trained
    assert {path.name for path in folder.iterdir()} >= FILES
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    sources = list(map(record, range(40)))
    assert 4 <= len(rows) <= 8
    exact = []
    for row in rows:
        source = sources[row["row"] - 1]
        assert row["answers"] == [one["text"] for one in source["answers"]]
        if row["predicted"] is not None:
            assert source["context"][row["start"] :].startswith(row["predicted"])
        exact.append((row["predicted"] or "").strip(",. ") == (row["answers"] or [""])[0])
    ours = figures["this model"]
    assert ours["exact_match"] == pytest.approx(np.mean(exact)) and ours["exact_match"] > 0
    assert figures["the sentence most like the question, by TF-IDF"]["exact_match"] == 0
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "question-answering" and "$" not in card.text
    assert "| this model | " in card.text and "windows that overlap" in card.text
    log = json.loads((folder / "training_log.json").read_text())
    watched = {
        row["step"]: (row["eval_exact_match"], row["eval_f1"]) for row in log["log_history"] if "eval_f1" in row
    }
    # What training is watched by is what the report says.
    assert list(watched) == [50, 100] and watched[100] == pytest.approx((ours["exact_match"], ours["f1"]))


def test_the_card_answers_the_same(trained, monkeypatch, capsys):
    folder, _ = trained
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    row = next(row for row in rows if row["predicted"] is not None)
    (block,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    block = block.replace("A question?", row["question"])
    block = block.replace("A text that has the answer.", record(row["row"] - 1)["context"])
    monkeypatch.chdir(folder.parent)
    exec(block)
    assert capsys.readouterr().out.strip() == row["predicted"]


def test_new_questions_are_answered(trained, tmp_path, capsys):
    folder, figures = trained
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    new = [{name: record(row["row"] - 1)[name] for name in ("question", "context")} for row in rows]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in new), encoding="utf-8")
    given = ["--model_name_or_path", str(folder), "--predict", str(tmp_path / "new.jsonl"), "--use_cpu", "True"]
    answer.main([*given, "--disable_tqdm", "True"])
    found = [json.loads(line) for line in (tmp_path / "new_predictions.jsonl").read_text().splitlines()]
    assert [(row["predicted"], row["start"]) for row in found] == [(row["predicted"], row["start"]) for row in rows]
    assert re.search(rf"{len(rows)} questions, \d without an answer", capsys.readouterr().out)
    assert [row["context"] for row in found] == [row["context"] for row in new]
    # A file with answers is measured.
    labelled = [{"id": str(row["row"]), **record(row["row"] - 1)} for row in rows]
    (tmp_path / "labelled.json").write_text(json.dumps({"data": labelled}))
    answer.main([*given[:3], str(tmp_path / "labelled.json"), *given[4:], "--disable_tqdm", "True"])
    assert f"exact match {figures['this model']['exact_match']:.3f}" in capsys.readouterr().out
    found = [json.loads(line) for line in (tmp_path / "labelled_predictions.jsonl").read_text().splitlines()]
    assert [row["id"] for row in found] == [row["id"] for row in labelled]
    # In windows it answers, too.
    in_windows = ["--context_length", "20", "--predictions_path", str(tmp_path / "windows.jsonl")]
    answer.main([*given, "--disable_tqdm", "True", *in_windows])
    assert len((tmp_path / "windows.jsonl").read_text().splitlines()) == len(rows)


def test_a_mistake_ends_with_its_message(years, trained, tmp_path):
    folder, _ = trained
    with pytest.raises(SystemExit, match=r"hf-reformer answer: predict is new\.csv, but no model"):
        answer.main(["--predict", "new.csv"])
    with pytest.raises(SystemExit, match=r"hf-reformer answer: Name a file with --data"):
        answer.main([])
    none = [record(4) | {"context": f"Nothing, {number}."} for number in range(4)]
    (tmp_path / "none.json").write_text(json.dumps(squad_of(none)))
    with pytest.raises(SystemExit, match="has an answer, so there is nothing to learn"):
        answer.main(["--data", str(tmp_path / "none.json")])
    with pytest.raises(SystemExit, match=r"which cannot do this\. Name a folder that hf-reformer answer trained"):
        ReformerForQuestionAnswering.from_pretrained(folder).reformer.save_pretrained(tmp_path / "base")
        answer.main(["--model_name_or_path", str(tmp_path / "base"), "--predict", years])


def test_a_test_is_cut_before_training(years, tmp_path):
    (tmp_path / "test.csv").write_text(f"question,context,answers\n{'Why? ' * 40},It was so.,so\n")
    with pytest.raises(SystemExit, match="leaves no room for its context in 37 tokens"):
        answer.main(
            [
                "--data",
                years,
                "--test_data",
                str(tmp_path / "test.csv"),
                "--use_cpu",
                "True",
                "--context_length",
                "37",
                "--output_dir",
                str(tmp_path / "run"),
                "--baseline",
                "False",
            ]
        )
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("checkpoint*"))


def test_no_words_no_baseline():
    questions = Questions(["?"], ["... !"], [[Answer(0, "...")]], [0])
    assert answering.baseline(questions) == {}


def test_candidates_are_enough(monkeypatch):
    """The best pair of all is found among the best beginnings and ends."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(60, 2, generator=generator).numpy()
    span, _ = answering._best_span(scores)
    monkeypatch.setattr(answering, "CANDIDATES", 60)
    assert answering._best_span(scores)[0] == span
