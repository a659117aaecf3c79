"""Takes a picture of a report with headless Chromium."""

import os
import pathlib
import shutil
import subprocess
import tempfile

from bilevel_jax.errors import RunError

WIDTH, HEIGHT = 1100, 1380  # pixels
NAMES = "chromium", "chromium-browser", "google-chrome"
TIMEOUT = 120  # seconds
FLAGS = (
    *("--headless", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-quic"),
)
LIGHT_SCHEME = "--blink-settings=preferredColorScheme=1"


def find_browser() -> str:
    """The path of Chromium.

    Raises:
      FileNotFoundError: there is none on PATH.
    """
    browser = next(filter(None, map(shutil.which, NAMES)), None)
    if browser is None:
        raise FileNotFoundError(f"--screenshot needs Chromium, but none of {', '.join(NAMES)} is on PATH")
    return browser


def take(page: pathlib.Path, out: pathlib.Path) -> None:
    """Writes a PNG of the top of a page, WIDTH x HEIGHT pixels, in the light colour scheme.

    Raises:
      FileNotFoundError: there is no Chromium on PATH.
      RunError: Chromium took no picture.
    """
    browser = find_browser()
    with tempfile.TemporaryDirectory() as directory:
        picture = pathlib.Path(directory, "picture.png")
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses to run as root with its sandbox
        profile = f"--user-data-dir={directory}/profile"
        options = [LIGHT_SCHEME, profile, f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={picture}"]
        command = [browser, *FLAGS, *sandbox, *options, page.resolve().as_uri()]
        try:
            done = subprocess.run(command, capture_output=True, timeout=TIMEOUT)
        except subprocess.TimeoutExpired as error:
            raise RunError(f"{browser} took no picture within {TIMEOUT} s") from error
        if done.returncode or not picture.exists():
            lines = done.stderr.decode(errors="replace").strip().splitlines()
            raise RunError(f"{browser} took no picture of {page}: {lines[-1] if lines else f'status {done.returncode}'}")
        shutil.move(picture, out)
