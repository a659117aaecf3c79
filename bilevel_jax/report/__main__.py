"""A run on one page: `python -m bilevel_jax.report --workdir=DIR` writes DIR/report.html anew, of an unfinished run too.

The rows are read again from where the config says, to show their text; where they are gone, their ids stand in for it.
"""

import pathlib

from absl import flags

from bilevel_jax import cli

FLAGS = flags.FlagValues()
WORKDIR = flags.DEFINE_string("workdir", None, "A run, finished or not.", required=True, flag_values=FLAGS)


def main() -> None:
    from bilevel_jax.report import page

    print(page.write(pathlib.Path(WORKDIR.value)))


if __name__ == "__main__":
    cli.run(main, FLAGS)
