"""`transformers serve`, asked over the loopback interface."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from .launching import LAUNCHER
from .setting import Check, Setting, Wrong, expect
from .texts import sentences


TOOLS = ("transformers", "fastapi", "uvicorn", "openai")
HOST = "127.0.0.1"
STARTING_SECONDS, ASKING_SECONDS = 120, 60
NEW_TOKENS = 8


def ask(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """The server's answer to a request; without a body it is a GET."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=ASKING_SECONDS) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise Wrong(f"{error.code}: {error.read().decode(errors='replace')}") from error


def wait_until_healthy(url: str, server: subprocess.Popen) -> None:
    """Return when the server answers.

    Raises:
        Wrong: it ended, or takes too long.
    """
    for _ in range(STARTING_SECONDS):
        if server.poll() is not None:
            raise Wrong(f"the server ended with status {server.returncode}")
        try:
            ask(f"{url}/health")
        except OSError:
            time.sleep(1)
        else:
            return
    raise Wrong(f"the server did not answer within {STARTING_SECONDS} s")


@contextmanager
def running_server(*arguments: str) -> Iterator[str]:
    """
    The address of a server that answers, on a free port of this machine; it is stopped afterwards.

    Args:
        arguments: What Python is given to start it, but for host, port and device.

    Raises:
        Wrong: it ended, or takes too long.
    """
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    command = [sys.executable, *arguments, "--host", HOST, "--port", str(port), "--device", "cpu"]
    server = subprocess.Popen(command, env=os.environ)
    try:
        wait_until_healthy(f"http://{HOST}:{port}", server)
        yield f"http://{HOST}:{port}"
    finally:
        server.terminate()
        server.wait()


def serve(preload: bool, setting: Setting) -> dict[str, Any]:
    """Start the server, ask for a completion and for an answer in a chat, stop it; the model alone writes the same."""
    model = [setting.causal] if preload else []
    sentence = sentences()[0]
    with running_server(*LAUNCHER, "transformers", "serve", *model) as url:
        shared = {"model": setting.causal, "max_tokens": NEW_TOKENS, "temperature": 0}
        text = ask(f"{url}/v1/completions", shared | {"prompt": sentence})["choices"][0]["text"]
        chat = ask(f"{url}/v1/chat/completions", shared | {"messages": [{"role": "user", "content": sentence}]})
    answer = chat["choices"][0]["message"]["content"]
    tokenizer, own = (
        AutoTokenizer.from_pretrained(setting.causal),
        AutoModelForCausalLM.from_pretrained(setting.causal),
    )
    prompt = tokenizer(sentence, return_tensors="pt")
    written = own.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    expect(f"{text!r} is what the model writes", text == tokenizer.decode(written, skip_special_tokens=True))
    expect("the chat has an answer", isinstance(answer, str))
    return {"completion": text, "chat": answer}


CHECKS: dict[str, Check] = {
    "serve, completions and chat": partial(serve, False),
    "serve with a model to preload": partial(serve, True),
}
