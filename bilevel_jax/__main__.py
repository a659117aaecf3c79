"""All commands in one: `bilevel-jax NAME --flag=value ...` is `python -m bilevel_jax.NAME --flag=value ...`; `train` is `main`."""

import difflib
import os
import runpy
import sys

COMMANDS = {
    "train": "trains a model and weighs the rows of a mixture",
    "prepare": "reads and tokenizes the rows of a run ahead of it",
    "report": "writes the report of a run again",
    "export": "writes the kept rows, or adapter and base as one model",
    "score": "losses of the responses of rows",
    "sample": "responses of a model to prompts",
    "judge": "win rates of responses by a judge",
    "evaluate": "benchmarks of lm-eval",
}
ALIASES = {"main": "train"}
IN_THE_CLONE = ("sweep", "accuracy")  # commands of `experiments`, which is not installed
MODULES = {"train": "bilevel_jax.main"}


def usage() -> str:
    """The commands, one a line."""
    lines = [f"  {name:<10}{what}" for name, what in COMMANDS.items()]
    return "\n".join(["usage: bilevel-jax NAME --flag=value ...; `bilevel-jax NAME --help` lists the flags of one", "", *lines])


def main() -> None:
    """Runs the command that the first argument names, as `python -m` would."""
    name = ALIASES.get(sys.argv[1], sys.argv[1]) if len(sys.argv) > 1 else "--help"
    if name in ("help", "--help", "-h"):
        print(usage())
        return
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        if name in IN_THE_CLONE:
            hint = f"; in a clone of the repository there is `python -m experiments.{name}`"
        print(f"error: there is no command {name!r}{hint}; choose {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # for reward functions; last, so that no file there hides a library
    del sys.argv[1]
    runpy.run_module(MODULES.get(name, f"bilevel_jax.{name}"), run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
