"""`hf-reformer serve` answers the `openai` client as the model alone writes."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import openai
import pytest
import torch
from launching import run_python
from tiny_models import POSITIONS, WINDOWS, make_model
from transformers import AutoModelForCausalLM, AutoTokenizer, ReformerTokenizer, set_seed

import hf_reformer
from hf_reformer import ReformerByteTokenizer, ReformerForCausalLM
from hf_reformer.commands import entry_point, serve
from hf_reformer.tokenization.tokenization_reformer_byte import CHAT_TEMPLATE
from scripts.maintain.integrations.serving import running_server


pytestmark = pytest.mark.slow

SENTENCE = "Съешь 🙂 漢字 и выпей чаю. "
# Several thousand tokens.
LONG_PROMPT = SENTENCE * 80 + "Съе"
NEW_TOKENS, SECONDS = 40, 60
MESSAGES = [{"role": "system", "content": "Пиши."}, {"role": "user", "content": "Съешь"}]
AS_PARTS = [message | {"content": [{"type": "text", "text": message["content"]}]} for message in MESSAGES]
COMMAND = ["-c", "from hf_reformer.commands.entry_point import main; main()", "serve"]


def learned_by_heart(tokenizer):
    """A model that goes on with SENTENCE: characters of several bytes, and more than the likeliest token to draw."""
    settings = WINDOWS | POSITIONS["rotary"] | {"initializer_range": 0.05, "vocab_size": len(tokenizer)}
    model = make_model(ReformerForCausalLM, **settings, eos_token_id=tokenizer.eos_token_id).train()
    ids = tokenizer(SENTENCE * 12, return_tensors="pt").input_ids
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for start in range(80):
        window = ids[:, start : start + 200]
        model(window, labels=window).loss.backward()
        optimizer.step(), optimizer.zero_grad()
    return model.eval()


def subword_tokenizer():
    """Of the kind that google/reformer-crime-and-punishment has, with a token for each character."""
    letters = sorted({*SENTENCE, *"systemuran:<>/ Пиши"} - {" "})
    vocab = {token: index for index, token in enumerate(["<unk>", "</s>", "▁", *letters, "▁и"])}
    return ReformerTokenizer(vocab=vocab, merges=[("▁", "и")])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Bytes, under the class name that published checkpoints have; and subwords, with the code beside them."""
    root = tmp_path_factory.mktemp("models")
    learned_by_heart(ReformerByteTokenizer()).save_pretrained(root / "bytes")
    ReformerByteTokenizer().save_pretrained(root / "bytes")
    config = json.loads((root / "bytes" / "config.json").read_text())
    config["architectures"] = ["ReformerModelWithLMHead"]
    (root / "bytes" / "config.json").write_text(json.dumps(config))
    hf_reformer.export(learned_by_heart(subword_tokenizer()), subword_tokenizer(), root / "subwords")
    return {folder.name: str(folder) for folder in root.iterdir()}


@pytest.fixture(scope="module")
def servers(folders):
    """An `openai` client of each model's server."""
    starts = {"bytes": ["-m", "hf_reformer", "serve", folders["bytes"], "--do-sample"]}
    starts["subwords"] = [*COMMAND, folders["subwords"]]
    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        started = {name: pool.submit(stack.enter_context, running_server(*start)) for name, start in starts.items()}
        yield {
            name: openai.OpenAI(base_url=f"{url.result()}/v1", api_key="none", timeout=SECONDS, max_retries=0)
            for name, url in started.items()
        }


@pytest.fixture(params=["bytes", "subwords"])
def subject(request, servers, folders):
    return servers[request.param], folders[request.param]


def written(folder, prompt, **settings):
    """What the model alone writes behind a text or a chat."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    if isinstance(prompt, str):
        inputs = tokenizer(prompt, return_tensors="pt")
    else:
        inputs = tokenizer.apply_chat_template(
            prompt, chat_template=CHAT_TEMPLATE, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    ids = model.generate(**inputs, **({"max_new_tokens": NEW_TOKENS, "do_sample": False} | settings))
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def complete(client, folder, prompt, **settings):
    settings = {"max_tokens": NEW_TOKENS, "temperature": 0} | settings
    return client.completions.create(model=folder, prompt=prompt, **settings)


def chat(client, folder, messages, **settings):
    settings = {"max_tokens": NEW_TOKENS, "temperature": 0} | settings
    return client.chat.completions.create(model=folder, messages=messages, **settings)


def assert_streamed(pieces, expected):
    """In many pieces, of whole characters; an end that is none is left out."""
    assert len(pieces) > 5
    assert "".join(pieces) == expected.rstrip("\ufffd")


def test_a_completion_is_what_the_model_writes(subject):
    client, folder = subject
    expected = written(folder, SENTENCE)
    # Whole characters of several bytes are in it.
    assert len(expected) > 10 and (SENTENCE * 2).startswith(expected.strip().rstrip("\ufffd"))
    completion = complete(client, folder, SENTENCE)
    assert completion.choices[0].text == expected
    assert completion.choices[0].finish_reason == "length"
    assert completion.usage.completion_tokens == NEW_TOKENS
    chunks = list(complete(client, folder, SENTENCE, stream=True))
    assert_streamed([text for chunk in chunks if (text := chunk.choices[0].text)], expected)
    assert chunks[-1].choices[0].finish_reason == "length"


def test_a_chat_without_a_template_has_an_answer(subject):
    client, folder = subject
    expected = written(folder, MESSAGES)
    assert expected
    for messages in (MESSAGES, AS_PARTS):
        assert chat(client, folder, messages).choices[0].message.content == expected
    chunks = chat(client, folder, MESSAGES, stream=True)
    assert_streamed([text for chunk in chunks if (text := chunk.choices[0].delta.content)], expected)


def test_a_response_is_the_answer_of_a_chat(subject):
    client, folder = subject
    settings = {"model": folder, "input": "Съешь", "max_output_tokens": NEW_TOKENS, "temperature": 0}
    expected = written(folder, [{"role": "user", "content": "Съешь"}])
    # Unlike the others, transformers' server streams a response that says nothing of it.
    assert client.responses.create(**settings, stream=False).output_text == expected
    events = client.responses.create(**settings, stream=True)
    assert_streamed([event.delta for event in events if event.type == "response.output_text.delta"], expected)


def test_the_server_lists_its_model_and_no_other(subject):
    client, folder = subject
    assert [model.id for model in client.models.list()] == [folder]
    with pytest.raises(openai.BadRequestError) as refused:
        complete(client, "another", "x")
    assert f"Server is pinned to '{folder}'" in refused.value.response.text


def test_a_stop_string_ends_a_completion(servers, folders):
    for stop in ("🙂", ["字", "nowhere"]):
        choice = complete(servers["bytes"], folders["bytes"], SENTENCE, stop=stop).choices[0]
        assert choice.text == SENTENCE[: SENTENCE.index(stop[0]) + 1]
        assert choice.finish_reason == "stop"


def test_a_seed_chooses_what_is_drawn(servers, folders):
    client, folder = servers["bytes"], folders["bytes"]
    drawn = {}
    for seed in (1, 2):
        set_seed(seed)
        drawn[seed] = written(folder, SENTENCE, do_sample=True, temperature=2.0)
        assert complete(client, folder, SENTENCE, seed=seed, temperature=2).choices[0].text == drawn[seed]
    assert drawn[1] != drawn[2]


def test_a_long_prompt_is_read(servers, folders):
    completion = complete(servers["bytes"], folders["bytes"], LONG_PROMPT)
    assert completion.usage.prompt_tokens == len(LONG_PROMPT.encode()) > 3000
    assert completion.choices[0].text == written(folders["bytes"], LONG_PROMPT)


def test_requests_at_the_same_time_do_not_mix(servers, folders):
    prompts = [SENTENCE * count for count in (1, 2, 3, 40)]
    with ThreadPoolExecutor() as pool:
        texts = pool.map(lambda prompt: complete(servers["bytes"], folders["bytes"], prompt).choices[0].text, prompts)
        assert list(texts) == [written(folders["bytes"], prompt) for prompt in prompts]


def manager(*arguments):
    given = serve.parse_arguments([str(argument) for argument in arguments])
    return serve.manager_class(given)(device="cpu", force_model=given.model)


def test_the_command_line_adds_to_model_and_tokenizer(folders, tmp_path):
    (tmp_path / "chat.jinja").write_text("{{ messages[0].content }}")
    given = manager(folders["bytes"], "--chat_template", tmp_path / "chat.jinja", "--do_sample", "--compile")
    model, tokenizer = given.load_model_and_processor(folders["bytes"])
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False) == "Пиши."
    assert model.generation_config.do_sample and model.generation_config.compile_config.dynamic
    tokenizer.save_pretrained(folders["bytes"] + " with a template")
    AutoModelForCausalLM.from_pretrained(folders["bytes"]).save_pretrained(folders["bytes"] + " with a template")
    model, tokenizer = manager(folders["bytes"] + " with a template").load_model_and_processor(
        folders["bytes"] + " with a template"
    )
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False) == "Пиши."
    assert not model.generation_config.do_sample and model.generation_config.compile_config is None


@pytest.fixture
def spoilt(tmp_path):
    """Folders that cannot be served, by what is wrong."""
    config = hf_reformer.ReformerConfig(architectures=["ReformerForCausalLM"], is_decoder=True, vocab_size=320)
    for name in ("no tokenizer", "too many tokens", "masked", "other"):
        config.save_pretrained(tmp_path / name)
    values = json.loads((tmp_path / "masked" / "config.json").read_text())
    for name, change in {
        "masked": {"architectures": ["ReformerForMaskedLM"]},
        "other": {"model_type": "llama"},
        "too many tokens": {"vocab_size": 100},
    }.items():
        (tmp_path / name / "config.json").write_text(json.dumps(values | change))
        ReformerByteTokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("folder", "options", "message"),
    [
        ("empty", [], "has no config.json; name the folder of a saved model."),
        ("too/many/parts", [], "too/many/parts."),
        ("other", [], "is a llama by its config.json, no Reformer."),
        ("masked", [], "is a ReformerForMaskedLM by its config.json, which continues no text"),
        ("no tokenizer", [], "has no tokenizer (tokenizer.json, "),
        ("too many tokens", [], "has 258 tokens, the model 100. Save the one"),
        ("masked", ["--continuous-batching"], "--continuous_batching is not possible: the pages"),
        ("masked", ["--cb-block-size", "4"], "--cb_block_size is not possible: the pages"),
        ("masked", ["--chat-template", "no.jinja"], "There is no file no.jinja; check --chat_template."),
    ],
)
def test_a_mistake_ends_before_the_server_starts(folder, options, message, spoilt):
    with pytest.raises(SystemExit) as end:
        serve.main([str(spoilt / folder), *options])
    assert str(end.value).startswith("hf-reformer serve: ") and message in str(end.value)
    assert "\n" not in str(end.value)


def test_a_model_that_does_not_load_ends_with_its_message(folders):
    with pytest.raises(SystemExit, match="hf-reformer serve: Unsupported dtype: 'float99'"):
        serve.main([folders["bytes"], "--dtype", "float99"])


def test_the_launcher_prefers_a_file_of_that_name(tmp_path):
    (tmp_path / "serve").write_text("print('a script')")
    assert run_python("-m", "hf_reformer", "serve", "x", cwd=tmp_path).stdout == "a script\n"
    (tmp_path / "serve").unlink()
    ended = run_python("-m", "hf_reformer", "serve", "--help", cwd=tmp_path)
    assert ended.stdout.startswith("usage: hf-reformer serve [-h]") and "--log-level" in ended.stdout


def test_the_command_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delitem(sys.modules, "hf_reformer.commands.serve")
    monkeypatch.setattr(sys, "argv", ["hf-reformer", "serve", "x"])
    with pytest.raises(SystemExit, match=r"serve needs fastapi, .*: pip install 'hf_reformer\[serve\]'\."):
        entry_point.main()
