"""`hf-reformer demo`: a page that continues a text and shows what its tokens read, as a browser has it."""

import json
import re
import socket
import sys
import urllib.request
from types import SimpleNamespace

import gradio
import gradio_client
import pytest
import torch
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from test_serve import SENTENCE, learned_by_heart, written
from tiny_models import WINDOWS, make_model

from hf_reformer import ReformerByteTokenizer, ReformerForCausalLM, ReformerForMaskedLM
from hf_reformer.commands import demo, demo_drawing, entry_point
from hf_reformer.commands.demo_page import DemoPage, Session, figures_of, text_of_file
from hf_reformer.commands.live_generation import LiveGeneration, bytes_of
from scripts.bench.benchmark_generation import bytes_held_by
from scripts.figures import demo_screenshot
from scripts.figures.demo_screenshot import drawing, enter, press, wait_for, words_of


pytestmark = pytest.mark.slow

NEW_TOKENS = 600
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


def test_a_mistake_is_said_on_the_page(browser):
    press(browser, "generate")
    wait_for(lambda: "There is no text." in browser.find_element(By.TAG_NAME, "body").text)


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
    with pytest.raises(gradio.Error, match="There is no text yet: press Generate first"):
        page.look(Session(), 0, 1, -1)
    with pytest.raises(gradio.Error, match=r"The file is no text in UTF-8: .* Save it as UTF-8"):
        text_of_file(b"\xff")
    assert text_of_file(SENTENCE.encode()) == SENTENCE
    monkeypatch.setattr(page.model, "generate", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        last_answer(page, "text")
    # The model is free again.
    assert last_answer(page, "text", 0)[0].ids


def test_a_continuation_is_stopped_and_measured():
    model = make_model(ReformerForCausalLM, **BYTES, eos_token_id=None)
    prompt = torch.tensor(ReformerByteTokenizer()(PROMPT).input_ids)
    with LiveGeneration(model, prompt, max_new_tokens=100_000) as generation:
        for progress in generation.watch(0.02):
            if progress.new_tokens > 20:
                generation.stop()
    assert 20 < progress.new_tokens == len(generation.ids) < 2_000
    # There is the length of the row, too.
    assert progress.cache_bytes == bytes_of(generation._cache) == bytes_held_by(generation._cache) - 8
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
    assert ended("--model", "too/many/parts").startswith(
        "hf-reformer demo: too/many/parts is no folder here, and not found on the Hub: "
    )
    (tmp_path / "empty").mkdir()
    assert ended("--model", tmp_path / "empty").endswith("has no config.json; name the folder of a saved model.")
    masked = tmp_path / "masked"
    make_model(ReformerForMaskedLM, is_decoder=False).save_pretrained(masked)
    assert "is a ReformerForMaskedLM by its config.json, which continues no text" in ended("--model", masked)
    assert "device is 'cud', which cannot be used here" in ended("--model", folder, "--device", "cud")
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
