"""`hf-reformer demo`: a page that continues a text and shows what its tokens read, as a browser has it."""

import gc
import json
import re
import socket
import sys
import urllib.request
import weakref
from datetime import timedelta
from types import SimpleNamespace

import gradio
import gradio_client
import pytest
import torch
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from test_serve import SENTENCE, learned_by_heart, subword_tokenizer, written
from tiny_models import WINDOWS, make_model

from hf_reformer import ReformerByteTokenizer, ReformerCache, ReformerForCausalLM, ReformerForMaskedLM
from hf_reformer.commands import demo, demo_drawing, demo_page, entry_point, live_generation
from hf_reformer.commands.demo_page import DemoPage, Session, figures_of, stop_writing, text_of_file
from hf_reformer.commands.live_generation import LiveGeneration, bytes_of
from scripts.bench.benchmark_generation import bytes_held_by
from scripts.figures import demo_screenshot
from scripts.figures.demo_screenshot import drawing, enter, press, wait_for, words_of


pytestmark = pytest.mark.slow

NEW_TOKENS = 400
PROMPT = SENTENCE * 20
BYTES = {"vocab_size": 258, "position_embedding_type": "rotary", "lsh_value_shift": 1} | WINDOWS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that goes on with a sentence whose characters have one to four bytes."""
    folder = tmp_path_factory.mktemp("models") / "bytes"
    learned_by_heart(ReformerByteTokenizer()).save_pretrained(folder)
    ReformerByteTokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def address(folder):
    """Where the command shows its page."""
    with demo_screenshot.running_page(folder) as address:
        yield address


@pytest.fixture(scope="module")
def window():
    if demo_screenshot.find_browser() is None:
        pytest.skip("no chromium with chromedriver on this machine")
    with demo_screenshot.open_browser() as browser:
        yield browser


@pytest.fixture
def browser(window, address):
    """A browser with the page, at its beginning."""
    window.get(address)
    wait_for(lambda: window.find_element(By.CSS_SELECTOR, "#prompt textarea"))
    return window


def given(browser, count, temperature=0, text=PROMPT):
    """A text is pasted and Generate pressed; return when the first words are there."""
    enter(browser, "#prompt textarea", text)
    enter(browser, "#count input[type=number]", count)
    enter(browser, "#temperature input[type=number]", temperature)
    press(browser, "generate")


def figures(browser):
    return {
        cell.get_attribute("data-figure"): float(cell.text.replace(",", ""))
        for cell in browser.find_elements(By.CSS_SELECTOR, "[data-figure]")
        if cell.text != "–"
    }


def position(browser):
    return int(browser.find_element(By.CSS_SELECTOR, "#position input[type=number]").get_property("value"))


def test_a_text_goes_on_before_the_eyes_of_a_visitor(browser, folder):
    expected, seen = written(folder, PROMPT, max_new_tokens=NEW_TOKENS), [""]
    given(browser, NEW_TOKENS)
    while seen[-1] != expected:
        seen.append(wait_for(lambda: (text := demo_screenshot.written(browser)) != seen[-1] and text))
        assert expected.startswith(seen[-1]), seen[-1]
    # In pieces, of whole characters: what is shown is always the beginning of the whole.
    assert len(seen) > 4
    assert SENTENCE.strip() in expected
    found = figures(browser)
    assert found.keys() == {"prompt", "prefill", "new", "speed", "cache", "memory"}
    assert (found["prompt"], found["new"]) == (len(PROMPT.encode()), NEW_TOKENS)
    assert found["speed"] > 1 and found["cache"] > 0 and found["memory"] > 100


def test_a_token_shows_what_it_reads(browser):
    given(browser, 20)
    first = wait_for(lambda: drawing(browser))
    last = len(PROMPT.encode()) - 1
    assert position(browser) == last and f"Position {last:,}" in words_of(browser, "found")
    assert "Round 1" in words_of(browser, "tables") and "Round 2" in words_of(browser, "tables")
    assert "tokens back" in words_of(browser, "tables")
    assert browser.find_elements(By.CSS_SELECTOR, "#pane .key")
    # By the slider
    slider = browser.find_element(By.CSS_SELECTOR, "#position input[type=range]")
    slider.send_keys(Keys.ARROW_LEFT)
    wait_for(lambda: f"Position {last - 1:,}" in words_of(browser, "found"))
    second = wait_for(lambda: drawing(browser) != first and drawing(browser))
    # By a click on a character
    span = browser.find_element(By.CSS_SELECTOR, "#pane .key")
    start = int(span.get_attribute("data-start"))
    ActionChains(browser).move_to_element(span).click().perform()
    characters = PROMPT + demo_screenshot.written(browser)
    where = len(characters[:start].encode())
    wait_for(lambda: f"Position {where:,}" in words_of(browser, "found"))
    wait_for(lambda: position(browser) == where)
    assert wait_for(lambda: drawing(browser) != second)
    # Another head
    tables = words_of(browser, "tables")
    browser.find_element(By.CSS_SELECTOR, "#head input").click()
    wait_for(lambda: browser.find_elements(By.CSS_SELECTOR, "[role=option]"))[1].click()
    wait_for(lambda: words_of(browser, "tables") != tables)
    assert "bucket" in words_of(browser, "tables")


def test_stop_ends_a_continuation(browser):
    given(browser, 4000)
    wait_for(lambda: demo_screenshot.written(browser))
    press(browser, "stop")
    wait_for(lambda: browser.find_element(By.ID, "generate").is_enabled())
    assert 0 < figures(browser)["new"] < 4000
    wait_for(lambda: drawing(browser))


def test_a_visitor_who_leaves_frees_the_model(browser, address):
    given(browser, 4000)
    wait_for(lambda: demo_screenshot.written(browser))
    browser.get(address)
    wait_for(lambda: browser.find_element(By.CSS_SELECTOR, "#prompt textarea"))
    given(browser, 5)
    wait_for(lambda: drawing(browser), 8)
    assert figures(browser)["new"] == 5


def test_a_file_is_read(browser, tmp_path):
    (tmp_path / "text.txt").write_text(PROMPT, encoding="utf-8")
    browser.find_element(By.CSS_SELECTOR, "#file input[type=file]").send_keys(str(tmp_path / "text.txt"))
    field = browser.find_element(By.CSS_SELECTOR, "#prompt textarea")
    wait_for(lambda: field.get_property("value") == PROMPT)


def said(browser, words):
    return wait_for(lambda: words in browser.find_element(By.TAG_NAME, "body").text, 15)


def test_a_mistake_is_said_on_the_page(browser, tmp_path):
    press(browser, "generate")
    said(browser, "There is no text.")
    (tmp_path / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    browser.find_element(By.CSS_SELECTOR, "#file input[type=file]").send_keys(str(tmp_path / "latin.txt"))
    said(browser, "The file is no text in UTF-8: its byte 2 is 0xfc, which cannot be there. Save it as UTF-8")


def test_who_waits_is_told_so(browser, address):
    first = browser.current_window_handle
    given(browser, 4096)
    wait_for(lambda: demo_screenshot.written(browser))
    browser.switch_to.new_window("tab")
    try:
        browser.get(address)
        given(browser, 5)
        wait_for(lambda: "1 ahead of you" in words_of(browser, "figures"), 5)
        # It can be given up.
        press(browser, "stop")
        wait_for(lambda: "Stopped before the text was read." in words_of(browser, "figures"), 5)
        wait_for(lambda: browser.find_element(By.ID, "generate").is_enabled())
        wait_for(lambda: "no text was read" in words_of(browser, "found"))
        press(browser, "generate")
        wait_for(lambda: "1 ahead of you" in words_of(browser, "figures"), 5)
        browser.switch_to.window(first)
        press(browser, "stop")
    finally:
        browser.switch_to.window(browser.window_handles[-1])
    wait_for(lambda: drawing(browser), 15)
    assert figures(browser)["new"] == 5 and "ahead" not in words_of(browser, "figures")
    browser.close()
    browser.switch_to.window(first)


def test_nothing_is_loaded_from_elsewhere(browser, address):
    # Not what the page before has left.
    browser.get_log("browser")
    given(browser, 3)
    wait_for(lambda: drawing(browser))
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [
        message["params"]["request"]["url"] for message in messages if message["method"] == "Network.requestWillBeSent"
    ]
    elsewhere = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert len(asked) > 10 and elsewhere == []
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_a_session_is_forgotten(window):
    page = page_of().build()
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", ssr_mode=False)
    try:
        client = gradio_client.Client(address, verbose=False, analytics_enabled=False)
        client.predict(PROMPT, 3, 0, 0, api_name="/write")
        client.predict(1, -1, api_name="/read")
        [asked] = page.state_holder.session_data.values()
        [(key, (seconds, moment))] = asked._state_ttl.items()
        # A look renews it.
        assert "Position 30" in client.predict(30, 1, -1, api_name="/look")[0]
        assert seconds == 600 and asked._state_ttl[key][1] > moment
        asked._state_ttl[key] = (seconds, moment - timedelta(seconds=601))
        wait_for(lambda: not asked.state_data, 8)
        with pytest.raises(gradio_client.exceptions.AppError, match="A text is forgotten when nobody has looked at"):
            client.predict(30, 1, -1, api_name="/look")
        # Who leaves takes it along.
        window.get(address)
        given(window, 3)
        wait_for(lambda: drawing(window))
        [left] = [session for session in page.state_holder.session_data.values() if session is not asked]
        assert any(session.ids for session in left.state_data.values())
        window.get("about:blank")
        wait_for(lambda: not left.state_data, 30)
    finally:
        page.close()


# Without a browser


def test_the_page_answers_programs(address, folder):
    with urllib.request.urlopen(address) as answer:
        assert answer.headers["content-security-policy"] == demo.POLICY
        assert "fonts.googleapis" not in answer.read().decode()
    client = gradio_client.Client(address, verbose=False, analytics_enabled=False)
    job = client.submit(PROMPT, 200, 0, 0, api_name="/write")
    text, *_ = job.result()
    assert text == written(folder, PROMPT, max_new_tokens=200)
    assert len({answer[0] for answer in job.outputs()}) > 1
    assert client.predict(1, -1, api_name="/read")[0]["value"] == len(PROMPT.encode()) - 1
    # An empty field
    with pytest.raises(gradio_client.exceptions.AppError, match=r"New tokens: nothing is given. Give a whole number"):
        client.predict(PROMPT, None, 0, 0, api_name="/write")
    with pytest.raises(gradio_client.exceptions.AppError, match=r"Temperature: nothing is given. Give a number from"):
        client.predict(PROMPT, 3, None, 0, api_name="/write")
    found, pane, _, tables = client.predict(30, 1, -1, api_name="/look")
    assert "Position 30" in found and 'class="query"' in pane and "Round 2" in tables


def page_of(**changes):
    return DemoPage(make_model(ReformerForCausalLM, **BYTES | changes), ReformerByteTokenizer(), "runs/tiny")


def last_answer(page, text, count=5):
    *_, answer = page.write(Session(), text, count, 0, 0)
    return answer


def ids_on(page):
    return re.findall(r'"elem_id": "(\w+)"', json.dumps(page.build().config, default=str))


def test_a_long_text_is_read_and_looked_at():
    page, text = page_of(), SENTENCE * 600
    assert len(text.encode()) > 16_384
    session, continuation, *_ = last_answer(page, text)
    found, pane, figure, tables = page.look(session, 16_000, 1, -1)
    assert isinstance(continuation, str) and "Position 16,000" in found and "dense" not in found
    assert pane.count('class="key"') > 4 and len(figure.axes) == 2 and "and " in tables
    assert "<code>lsh_value_shift=1</code>" in found and 'class="read"' in pane


def test_a_short_text_is_said_to_be_dense():
    page = page_of()
    session, *_ = last_answer(page, "some", 0)
    assert session.ids == ReformerByteTokenizer()("some").input_ids
    _, slider, found, _, figure, tables = page.read(session, 1, 0)
    assert slider.value == slider.maximum == 3
    assert "This is dense attention: the layer does not hash the first 16 tokens" in found
    assert "sees all 3 tokens before it" in found and "Dense attention: 3 keys" in tables and len(figure.axes) == 1
    assert "reads nothing" in page.look(session, 0, 1, -1)[0]


def test_a_click_chooses_the_token_of_a_character():
    page = page_of()
    session, *_ = last_answer(page, PROMPT, 0)
    place = PROMPT.index("漢")
    position, found, pane, *_ = page.choose(session, 1, 1, SimpleNamespace(character=place))
    assert position == len(PROMPT[:place].encode()) and "<code>漢</code>" in found
    assert '"query">漢' in pane


def test_text_is_no_html():
    page = page_of()
    session, *_ = last_answer(page, "<b>&amp;</b>" * 9, 0)
    found, pane, _, tables = page.look(session, 84, 1, -1)
    assert "<code>&lt;</code>" in found
    assert re.sub(r"</?(div|span)[^>]*>", "", pane) == "&lt;b&gt;&amp;amp;&lt;/b&gt;" * 9
    assert "<b>" not in tables and "&lt;" in tables


def test_only_a_part_of_a_huge_text_is_shown(monkeypatch):
    monkeypatch.setattr(demo_drawing, "MOST_SHOWN", 50)
    page = page_of()
    session, *_ = last_answer(page, "0123456789" * 30, 0)
    pane = page.look(session, 200, 1, -1)[1]
    assert len(re.sub(r"<[^>]*>", "", pane)) == 50 and 'data-start="175"' in pane


def test_a_model_without_lsh_layers_has_nothing_to_look_at():
    page = page_of(attn_layers=["local", "full"])
    assert len(last_answer(page, PROMPT)[0].ids) == len(PROMPT.encode()) + 5
    assert "pane" not in ids_on(page) and "pane" in ids_on(page_of())
    assert "This model has no LSH layer (its layers: local, full)" in json.dumps(page.build().config, default=str)


def test_mistakes_are_told_to_the_visitor(monkeypatch):
    page = page_of(position_embedding_type="axial")
    with pytest.raises(gradio.Error, match=r"There is no text\. Paste one, or drop a file"):
        last_answer(page, "")
    with pytest.raises(gradio.Error, match="The text has 126 tokens, which with 5 new ones is more than the 128"):
        last_answer(page, "x" * 126)
    with pytest.raises(gradio.Error, match="There is no text here: press Generate first"):
        page.look(Session(), 0, 1, -1)
    with pytest.raises(gradio.Error, match=r"The file is no text in UTF-8: its byte 1 is 0xff.* Save it as UTF-8"):
        text_of_file(b"a\xff")
    with pytest.raises(gradio.Error, match="The file is empty"):
        page.take_file(b"")
    assert text_of_file(SENTENCE.encode()) == SENTENCE
    monkeypatch.setattr(page.model, "generate", lambda *_, **__: 1 / 0)
    with pytest.raises(gradio.Error, match="ZeroDivisionError: division by zero"):
        last_answer(page, "text")
    # The model is free again.
    assert last_answer(page, "text", 0)[0].ids


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"count": None}, "New tokens: nothing is given. Give a whole number from 0 to 4,096."),
        ({"count": 2.5}, "New tokens: 2.5 is given. Give a whole number from 0 to 4,096."),
        ({"count": 4097}, "New tokens: 4097 is given."),
        ({"temperature": None}, "Temperature: nothing is given. Give a number from 0 to 2."),
        ({"temperature": float("nan")}, "Temperature: nan is given."),
        ({"seed": -1}, "Seed: -1 is given. Give a whole number from 0 to 4,294,967,295."),
        ({"prompt": "ab\ud800"}, "The text has '\\ud800' at character 2: half of a character"),
    ],
    ids=str,
)
def test_what_cannot_be_used_is_named(given, words):
    answers = page_of().write(Session(), **{"prompt": "text", "count": 3, "temperature": 0, "seed": 0} | given)
    *_, generate, stop = next(answers)
    assert generate.interactive and not stop.interactive
    with pytest.raises(gradio.Error) as error:
        next(answers)
    assert error.value.message.startswith(words)


def test_any_error_behind_the_first_token_frees_the_buttons(monkeypatch):
    page = page_of(eos_token_id=None)
    answers, found = page.write(Session(), PROMPT, 4000, 0, 0), []
    with pytest.raises(gradio.Error, match="KeyError: 'lost'"):
        for answer in answers:
            found.append(answer)
            if answer[1]:
                monkeypatch.setattr(demo_page, "whole_text", lambda *_: {}["lost"])
    assert found[-2][4].interactive and found[-1][3].interactive and not found[-1][4].interactive
    assert len(page._line) == 0


def test_who_waits_sees_the_line_and_can_leave_it():
    page = page_of(eos_token_id=None)
    first = page.write(Session(), PROMPT, 4000, 0, 0)
    next(first)
    second, third = (page.write(Session(), "text", 3, 0, 0) for _ in range(2))
    session, text, words, generate, stop = next(second)
    assert text == "" and "1 ahead of you" in words and stop.interactive and not generate.interactive
    assert "2 ahead of you" in next(third)[2]
    stop_writing(session)
    *_, (session, text, words, generate, stop) = second
    assert "Stopped before the text was read." in words and generate.interactive and not stop.interactive
    assert "nothing to look at" in page.read(session, 1, -1)[2]
    assert "1 ahead of you" in next(third)[2]
    first.close()
    *_, (session, *_) = third
    assert len(session.ids) == 7 and len(page._line) == 0


def test_a_line_has_an_end(monkeypatch):
    monkeypatch.setattr(demo_page, "MOST_WAITING", 1)
    page = page_of(eos_token_id=None)
    writers = [page.write(Session(), PROMPT, 4000, 0, 0) for _ in range(3)]
    next(writers[0]), next(writers[1]), next(writers[2])
    with pytest.raises(gradio.Error, match="1 wait for the model, and no more than 1 can"):
        next(writers[2])
    writers[1].close(), writers[0].close()


def test_what_was_known_of_a_text_is_freed(monkeypatch):
    caches = []

    def make_cache(*given, **named):
        cache = ReformerCache(*given, **named)
        caches.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(live_generation, "ReformerCache", make_cache)
    page = page_of()
    session, *_ = last_answer(page, PROMPT, 30)
    assert session.generation is None and session.ids
    with LiveGeneration(page.model, torch.tensor([5, 6, 7]), max_new_tokens=3) as generation:
        *_, progress = generation.watch()
    gc.collect()
    assert [cache() for cache in caches] == [None, None] and progress.cache_bytes > 0 and len(generation.ids) == 3


@pytest.mark.parametrize(("bound", "by"), [({}, "this page takes"), ({"position_embedding_type": "axial"}, "this mo")])
def test_a_text_has_a_bound(bound, by, monkeypatch):
    monkeypatch.setattr(ReformerByteTokenizer, "__call__", lambda *_, **__: pytest.fail("it was encoded"))
    model = make_model(ReformerForCausalLM, **BYTES | bound)
    page = DemoPage(model, ReformerByteTokenizer(), "runs/tiny", 100 if not bound else 1000)
    most = 128 if bound else 100
    with pytest.raises(
        gradio.Error, match=f"has {most:,} tokens, which with 1 new ones is more than the {most} that {by}"
    ):
        last_answer(page, "é" * (most // 2), 1)
    with pytest.raises(gradio.Error, match="The text has 8,000 tokens, which with 0 new ones is more than the"):
        page.take_file(b"x" * 8000)


def test_the_tokens_of_a_huge_text_of_subwords_are_estimated():
    page = DemoPage(make_model(ReformerForCausalLM, **BYTES), subword_tokenizer(), "runs/tiny", 50)
    with pytest.raises(gradio.Error, match=r"The text has about [\d,]+ tokens, which with 1 new ones"):
        last_answer(page, SENTENCE * 500, 1)


def test_stop_ends_the_reading_of_a_text(monkeypatch):
    monkeypatch.setattr(live_generation, "PIECE", 16)
    model = make_model(ReformerForCausalLM, **BYTES)
    ids = torch.tensor(ReformerByteTokenizer()(PROMPT).input_ids)
    expected = model.generate(ids[None], max_new_tokens=20)[0, len(ids) :].tolist()
    lengths = []
    model.register_forward_pre_hook(
        lambda _, given, named: lengths.append((given[0] if given else named["input_ids"]).shape[1]), with_kwargs=True
    )
    with LiveGeneration(model, ids, max_new_tokens=20) as generation:
        *_, progress = generation.watch()
    assert generation.ids == expected and max(lengths) == 16 and progress.cache_bytes > 0
    # Two pieces are read, and no more.
    lengths.clear()
    generation = LiveGeneration(model, ids, max_new_tokens=20)
    model.register_forward_hook(lambda *_: len(lengths) == 2 and generation.stop())
    with generation:
        *_, progress = generation.watch()
    assert lengths == [16, 16] and generation.ids == [] and progress.prompt_seconds is None


def test_stocks_chunks_are_read_at_once(monkeypatch):
    monkeypatch.setattr(live_generation, "PIECE", 16)
    model = make_model(ReformerForCausalLM, **BYTES | {"lsh_sliding_window": False, "lsh_value_shift": 0})
    lengths = []
    model.base_model.register_forward_hook(lambda *given: lengths.append(given[-1][0].shape[1]))
    with LiveGeneration(
        model, torch.tensor(ReformerByteTokenizer()(PROMPT).input_ids), max_new_tokens=2
    ) as generation:
        [*generation.watch()]
    assert lengths == [len(PROMPT.encode()), 1]


def test_a_continuation_is_stopped_and_measured():
    model = make_model(ReformerForCausalLM, **BYTES, eos_token_id=None)
    prompt = torch.tensor(ReformerByteTokenizer()(PROMPT).input_ids)
    with LiveGeneration(model, prompt, max_new_tokens=100_000) as generation:
        cache = generation._cache
        for progress in generation.watch(0.02):
            if progress.new_tokens > 20:
                generation.stop()
    assert 20 < progress.new_tokens == len(generation.ids) < 2_000
    # There is the length of the row, too.
    assert progress.cache_bytes == bytes_of(cache) == bytes_held_by(cache) - 8
    assert "–" not in figures_of(progress) and figures_of(None).count("–") == 6


def test_a_seed_chooses_what_is_drawn():
    page = page_of()

    def drawn(seed):
        *_, answer = page.write(Session(), PROMPT, 30, 1.5, seed)
        return answer[1]

    assert drawn(1) == drawn(1) != drawn(2)


# The command


def ended(*arguments):
    with pytest.raises(SystemExit) as end:
        demo.main([*map(str, arguments)])
    return str(end.value)


def test_a_mistake_ends_before_the_page_is_there(folder, tmp_path, capsys):
    assert ended("--model", "too/many/parts") == "hf-reformer demo: There is no folder too/many/parts."
    (tmp_path / "empty").mkdir()
    assert ended("--model", tmp_path / "empty").endswith("has no config.json; name the folder of a saved model.")
    masked = tmp_path / "masked"
    make_model(ReformerForMaskedLM, is_decoder=False).save_pretrained(masked)
    assert "is a ReformerForMaskedLM by its config.json, which continues no text" in ended("--model", masked)
    assert "device is 'cud', which cannot be used here" in ended("--model", folder, "--device", "cud")
    ended("--model", folder, "--longest", 0)
    assert "--longest is 0; give a number of tokens from 1 on" in capsys.readouterr().err
    ended("--model", folder, "--port", 0)
    assert "--port is 0; a port is a number from 1 to 65535" in capsys.readouterr().err


def test_a_port_in_use_is_named(folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert ended("--model", folder, "--port", port) == (
            f"hf-reformer demo: cannot listen at port {port} of 127.0.0.1: Address already in use. Give a free port "
            "with --port, or another --host."
        )
    assert "of no.such.host: " in ended("--model", folder, "--host", "no.such.host")


def test_the_command_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    for name in ("demo", "demo_page"):
        monkeypatch.delitem(sys.modules, f"hf_reformer.commands.{name}")
    monkeypatch.setattr(sys, "argv", ["hf-reformer", "demo", "--model", "x"])
    with pytest.raises(SystemExit, match=r"demo needs gradio, .*: pip install 'hf_reformer\[demo\]'\."):
        entry_point.main()
