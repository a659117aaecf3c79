"""Writes the report of a run again, also of an unfinished one.

    python -m bilevel_jax.report --workdir=DIR [--screenshot=FILE.png]

Writes DIR/report.html. `--screenshot` also takes a picture of it with headless Chromium.
"""

import pathlib

from absl import flags

from bilevel_jax import cli
from bilevel_jax.text import say

FLAGS = flags.FlagValues()
WORKDIR = flags.DEFINE_string("workdir", None, "A run, finished or not.", required=True, flag_values=FLAGS)
SCREENSHOT = flags.DEFINE_string("screenshot", None, "PNG file for a picture of the report.", flag_values=FLAGS)


def main() -> None:
    from bilevel_jax.report import page, screenshot

    if SCREENSHOT.value is not None:
        picture = pathlib.Path(SCREENSHOT.value)
        if picture.suffix != ".png":
            raise ValueError(f"--screenshot={picture} must end in .png")
        if not picture.parent.is_dir():
            raise FileNotFoundError(f"--screenshot: there is no directory {picture.parent}")
        screenshot.find_browser()
    report = page.write(pathlib.Path(WORKDIR.value))
    say(report)
    if SCREENSHOT.value is not None:
        screenshot.take(report, picture)
        say(picture)


if __name__ == "__main__":
    cli.run(main, FLAGS)
