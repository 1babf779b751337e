"""The chat template of a byte tokenizer that was saved without one."""

import pytest
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer

from hf_reformer import ReformerByteTokenizer, ReformerConfig


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hé 🙂"},
    {"role": "assistant", "content": "  Hi 🙂\n"},
    {"role": "user", "content": "Bye"},
]
TEXT = "system:\nBe brief.\n\nuser:\nHé 🙂\n\nassistant:\n  Hi 🙂\n</s>\n\nuser:\nBye\n\n"


def text_of(messages, tokenizer=None, **settings):
    return (tokenizer or ReformerByteTokenizer()).apply_chat_template(messages, tokenize=False, **settings)


def test_a_chat_is_plain_text():
    assert text_of(MESSAGES) == TEXT
    assert text_of(MESSAGES, add_generation_prompt=True) == TEXT + "assistant:\n"
    assert text_of(MESSAGES[:3], continue_final_message=True) == TEXT[: TEXT.index("</s>")]
    assert text_of([{"role": "user", "content": None}]) == "user:\n\n\n"


def test_its_tokens_are_those_of_the_text():
    tokenizer = ReformerByteTokenizer(cls_token="<cls>", sep_token="<sep>")
    assert (
        tokenizer.apply_chat_template(MESSAGES, return_dict=False)
        == tokenizer(TEXT, add_special_tokens=False).input_ids
    )
    assert tokenizer.eos_token_id in tokenizer.apply_chat_template(MESSAGES, return_dict=False)


def test_content_may_come_in_parts():
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hé"}, {"type": "text", "text": " 🙂"}]}]
    assert text_of(parts) == text_of(MESSAGES[1:2])


def test_the_mask_marks_what_the_assistant_writes():
    tokenizer = ReformerByteTokenizer()
    chat = tokenizer.apply_chat_template(MESSAGES, return_dict=True, return_assistant_tokens_mask=True)
    marked = [token for token, mark in zip(chat["input_ids"], chat["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(marked) == "  Hi 🙂\n</s>"


def test_what_it_does_not_know_is_refused():
    with pytest.raises(TemplateError, match="knows no tools: leave them out"):
        text_of(MESSAGES, tools=[{"type": "function", "function": {"name": "f"}}])
    with pytest.raises(TemplateError, match="takes text, but a part of a message is of type image"):
        text_of([{"role": "user", "content": [{"type": "image", "url": "x"}]}])


def test_no_file_holds_it_and_a_saved_one_wins(tmp_path):
    ReformerConfig().save_pretrained(tmp_path)
    tokenizer = ReformerByteTokenizer()
    assert tokenizer.chat_template is None
    tokenizer.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.jinja"))
    assert text_of(MESSAGES, AutoTokenizer.from_pretrained(tmp_path)) == TEXT
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert text_of(MESSAGES, loaded) == "Be brief."
    assert text_of(MESSAGES, loaded, chat_template="{{ messages[1].role }}") == "user"
