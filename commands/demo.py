"""
A page in the browser that shows what a model reads: it continues a text, and each token shows its keys by hash round.

    hf-reformer demo # the model that comes with the package
    hf-reformer demo --model runs/mine
    hf-reformer demo --model runs/demo --port 7861 --device cuda

Nothing leaves the machine, and the page loads nothing from elsewhere. docs/how_to/look.md says what it shows.
"""

import argparse
import os
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from importlib import import_module
from typing import Any

import torch


# gradio reads it when it is imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

from transformers import AutoModelForCausalLM, AutoTokenizer

from ..starter import FOLDER
from .causal_models import check_model
from .command_line import mistakes_end, usable_device
from .demo_page import CSS, LONGEST, DemoPage


# What a browser may load: what comes from here.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
LARGEST_FILE = "64mb"
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
Message = MutableMapping[str, Any]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments from the command line; a value that cannot work ends the program with a message."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument(
        "--model", default=FOLDER, help="folder of a saved causal model, or a name on the Hub (default: the starter)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default %(default)s: this machine)")
    parser.add_argument("--port", type=int, default=7860, help="port to listen at (default %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--longest",
        type=int,
        default=LONGEST,
        help="tokens that a text may have, new ones included (default %(default)s; never more than a table of "
        "positions has)",
    )
    parser.add_argument(
        "--share",
        action="store_true",
        help="also make a public address for a week, through a tunnel that gradio downloads: anybody may then use it",
    )
    arguments = parser.parse_args(argv)
    if not 1 <= arguments.port <= 65535:
        parser.error(f"--port is {arguments.port}; a port is a number from 1 to 65535")
    if arguments.longest < 1:
        parser.error(f"--longest is {arguments.longest}; give a number of tokens from 1 on")
    return arguments


def check_address(host: str, port: int) -> None:
    """
    Raises:
        ValueError: Nobody can listen there.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        # Python adds the address.
        reason = (error.strerror or str(error)).partition(" (")[0]
        raise ValueError(
            f"cannot listen at port {port} of {host}: {reason}. Give a free port with --port, or another --host."
        ) from error


class OnlyFromHere:
    """Tells browsers to load nothing from elsewhere, whatever a page asks for; a middleware of ASGI."""

    def __init__(self, app: Callable[..., Awaitable[None]]):
        self.app = app

    async def __call__(self, scope: Message, receive: Any, send: Callable[[Message], Awaitable[None]]) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", []), (b"content-security-policy", POLICY.encode())]
                message = {**message, "headers": headers}
            await send(message)

        await self.app(scope, receive, send_with_policy)


def show(arguments: argparse.Namespace) -> None:
    """
    Load the model and answer browsers until the process is stopped.

    Raises:
        ValueError: The model, the device or the address cannot be used.
    """
    check_address(arguments.host, arguments.port)
    check_model(arguments.model)
    device = usable_device(arguments.device)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
    model.to(device)
    gradio, middleware = import_module("gradio"), import_module("starlette.middleware")
    page = DemoPage(model, tokenizer, arguments.model, arguments.longest).build()
    _, address, _ = page.launch(
        server_name=arguments.host,
        server_port=arguments.port,
        share=arguments.share,
        theme=gradio.themes.Default(**FONTS),
        css=CSS,
        app_kwargs={"middleware": [middleware.Middleware(OnlyFromHere)]},
        max_file_size=LARGEST_FILE,
        footer_links=[],
        inbrowser=False,
        inline=False,
        mcp_server=False,
        prevent_thread_lock=True,
        pwa=False,
        quiet=True,
        run_history=False,
        ssr_mode=False,
    )
    print(f"{arguments.model} is at {address} (Ctrl-C ends it)", flush=True)
    page.block_thread()


def main(argv: list[str] | None = None) -> None:
    """Show the page; a mistake in the arguments ends the program with its message."""
    arguments = parse_arguments(argv)
    with mistakes_end("demo"):
        show(arguments)
