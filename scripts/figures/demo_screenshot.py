"""
The page of `hf-reformer demo` as a browser shows it, for docs/how_to/look.md.

    make demo                                         # trains runs/demo
    python -m scripts.figures.demo_screenshot --model runs/demo

It starts the command, gives it a text, lets it go on, chooses a token, and writes demo_page.png in docs/. It needs
Chromium and its driver (Debian: apt-get install chromium chromium-driver).
"""

import argparse
import io
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import TypeVar

from PIL import Image
from selenium.common.exceptions import WebDriverException
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By


ROOT = Path(__file__).parents[2]
TARGET = ROOT / "docs" / "demo_page.png"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
HOST = "127.0.0.1"
WIDTH, SECONDS = 1280, 60
# What a browser does when somebody puts a value into a field and leaves it.
ENTER = """
const [field, value] = arguments;
field.value = value;
for (const name of ['input', 'change', 'blur']) field.dispatchEvent(new Event(name, {bubbles: true}));
"""
Found = TypeVar("Found")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--model", default="runs/demo", help="folder of a causal model (default %(default)s)")
    parser.add_argument(
        "--text",
        type=Path,
        default=ROOT / "commands" / "generate.py",
        help="a text (default: a module of the package)",
    )
    parser.add_argument("--characters", type=int, default=3000, help="how much of it is read (default %(default)s)")
    parser.add_argument("--position", type=int, default=1500, help="the token to look at (default %(default)s)")
    parser.add_argument("--new_tokens", type=int, default=200, help="tokens to write (default %(default)s)")
    return parser.parse_args(argv)


def find_browser() -> tuple[str, str] | None:
    """The programs of a browser and its driver; None where one of them is missing."""
    browser, driver = next(filter(None, map(shutil.which, BROWSERS)), None), shutil.which("chromedriver")
    return None if browser is None or driver is None else (browser, driver)


@contextmanager
def open_browser(height: int = 1000) -> Iterator[Chrome]:
    """
    A browser without a window, which notes what it asks the network for.

    Raises:
        FileNotFoundError: There is none.
    """
    programs = find_browser()
    if programs is None:
        raise FileNotFoundError(
            "There is no chromium with chromedriver; Debian has them as chromium, chromium-driver."
        )
    options = ChromeOptions()
    options.binary_location, driver = programs
    for argument in ("headless=new", "disable-dev-shm-usage", "disable-gpu", f"window-size={WIDTH},{height}"):
        options.add_argument(f"--{argument}")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        # Chromium's sandbox is not for root, as whom containers run.
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = Chrome(options=options, service=Service(driver))
    try:
        yield browser
    finally:
        browser.quit()


@contextmanager
def running_page(model: str | Path) -> Iterator[str]:
    """
    The address of the page of a model, on a free port of this machine; it is stopped afterwards.

    Raises:
        RuntimeError: The command ended.
    """
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from hf_reformer.commands.entry_point import main; main()", "demo"]
    command += ["--model", str(model), "--host", HOST, "--port", str(port), "--device", "cpu"]
    with TemporaryFile("w+") as printed:
        process = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT)
        try:
            wait_for(lambda: _accepts(port) or process.poll() is not None)
            if process.poll() is not None:
                printed.seek(0)
                raise RuntimeError(f"the command ended: {printed.read()}")
            yield f"http://{HOST}:{port}/"
        finally:
            process.terminate()
            process.wait()


def _accepts(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex((HOST, port)) == 0


def wait_for(condition: Callable[[], Found], seconds: float = SECONDS) -> Found:
    """
    What `condition` returns, once that is true.

    Raises:
        TimeoutError: It is not, for so long.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if found := condition():
                return found
        except WebDriverException:
            # What it looks for is not there yet, or is being drawn anew.
            pass
        time.sleep(0.03)
    raise TimeoutError(f"nothing came for {seconds} s")


def enter(browser: Chrome, selector: str, value: object) -> None:
    """Put text or a number into a field, as if somebody had pasted it."""
    field = wait_for(lambda: browser.find_element(By.CSS_SELECTOR, selector))
    browser.execute_script(ENTER, field, str(value))


def words_of(browser: Chrome, name: str) -> str:
    """The text that an element shows."""
    return browser.find_element(By.ID, name).text


def written(browser: Chrome) -> str:
    """The continuation so far."""
    return browser.find_element(By.CSS_SELECTOR, "#written textarea").get_property("value")


def drawing(browser: Chrome) -> str:
    """The drawing, as the address of an image."""
    return browser.find_element(By.CSS_SELECTOR, "#drawing img").get_attribute("src")


def press(browser: Chrome, name: str) -> None:
    """Press a button when it can be pressed."""
    wait_for(lambda: browser.find_element(By.ID, name).is_enabled())
    browser.find_element(By.ID, name).click()


def save_page(browser: Chrome, target: Path) -> None:
    """The whole page as a picture of few colours."""
    height = browser.execute_script(
        "return document.querySelector('#tables').getBoundingClientRect().bottom + scrollY"
    )
    browser.set_window_size(WIDTH, int(height) + 160)
    time.sleep(1)
    with Image.open(io.BytesIO(browser.get_screenshot_as_png())) as picture:
        picture.convert("RGB").crop((0, 0, WIDTH, min(picture.height, int(height) + 10))).quantize(128).save(target)


def main(argv: list[str] | None = None) -> None:
    """Take the picture."""
    arguments = parse_arguments(argv)
    text = arguments.text.read_text(encoding="utf-8")[: arguments.characters]
    with running_page(arguments.model) as address, open_browser() as browser:
        browser.get(address)
        enter(browser, "#prompt textarea", text)
        enter(browser, "#count input[type=number]", arguments.new_tokens)
        press(browser, "generate")
        before = wait_for(lambda: drawing(browser))
        enter(browser, "#position input[type=number]", arguments.position)
        wait_for(lambda: drawing(browser) != before)
        save_page(browser, TARGET)


if __name__ == "__main__":
    main()
