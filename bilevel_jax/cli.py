"""What all commands share: flags, and errors of one line."""

import os
import pathlib
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from absl import app, flags, logging

from bilevel_jax import compilations, config_keys, near_names, text

SMALLER = "lower batch.micro_size, data.max_length or lora.rank, or set model.remat=True; `main --plan` computes what a run needs"
BEGAN = time.perf_counter()  # approximate start of the process: before JAX is imported


def fail(message: object, code: int = 1) -> NoReturn:
    """Prints an error as one escaped line to standard error and ends the process.

    Errors of this package are one line, and a line feed in one comes from the data. Of other errors the last line says most.
    """
    is_own = type(message).__module__.startswith("bilevel_jax")
    lines = [str(message).replace("\n", "\\n")] if is_own else str(message).splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    text.say(f"error: {lines[-1] if lines else 'unknown'}", file=sys.stderr, flush=True)
    sys.exit(code)


# --------------------------------------------------------------------------------------------------------------------
# Flags
# --------------------------------------------------------------------------------------------------------------------


def register(*command_flags: flags.FlagValues, target: flags.FlagValues = flags.FLAGS) -> None:
    """Adds the flags of a command to `target`, from which they are parsed.

    Every command defines its flags in a `FlagValues` of its own, so that all commands can be imported in one process.
    """
    for values in command_flags:
        target.append_flag_values(values)
        values.mark_as_parsed()  # `target` holds the same flag objects
        for name in values:
            flag: Any = values[name]
            target.register_flag_by_module(sys.argv[0], flag)  # for --help
            if hasattr(flag, "flag_values"):  # a config flag, which defines a flag for each --config.KEY
                flag.flag_values = target


def refuse_without(flag_values: flags.FlagValues, needed: str, names: Iterable[str]) -> None:
    """Refuses a flag that goes with another one, which is missing.

    Raises:
      ValueError: one of `names` is given, and `needed` has no value.
    """
    given = next((name for name in names if flag_values[name].present), None)
    if given and not flag_values[needed].value:
        raise ValueError(f"--{given} goes with --{needed}")


def parse(argv: list[str], flag_values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Parses the flags. Errors end the process with one line and status 2."""
    try:
        rest = flag_values(argv)
    except (flags.Error, ValueError, TypeError) as error:
        fail(_section_error(argv) or _missing_flag(error) or error, 2)
    except (SyntaxError, ImportError) as error:
        fail(f"--config cannot be read: {error}", 2)
    except (AttributeError, LookupError) as error:  # raised by ml_collections for an unknown key and for a missing get_config
        fail(_config_error(argv, error), 2)
    if len(rest) > 1:
        fail(f"unexpected argument {rest[1]!r}; flags are written --name=value", 2)
    return rest


def _missing_flag(error: Exception) -> str:
    """Names the first required flag that is not given; "" for another error."""
    missing = re.search(r"Flag --(\w+) must have a value other than None", str(error))
    return f"--{missing[1]} is missing; --help describes it" if missing else ""


def _config_error(argv: list[str], error: Exception) -> str:
    """Names the first unknown key of the command line, or of the config file, and the known keys nearest to it."""
    if "get_config" in str(error):
        return "--config: a file without get_config()"
    from bilevel_jax import checks, config  # only here: they import JAX

    keys = checks.keys(config.default())
    for argument in argv[1:]:
        match = re.match(r"--?(?:no)?config\.([^=]+)", argument)
        if match and match[1] not in keys:
            key = text.one_line(match[1], 80)
            return f"the config has no key {key}{near_names.hint(key, keys)}"
    where, key = _unknown_key_in_file(error)
    if key:
        return f"{where}: the config has no key {key}{near_names.hint(key, keys)}"
    cause = re.sub(r"[\"'\\]", "", str(error).replace("\\n", "; "))
    return f"--config cannot be read: {where}{': ' * bool(where)}no key or attribute {cause}"  # raised inside get_config()


def _unknown_key_in_file(error: Exception) -> tuple[str, str]:
    """`FILE:LINE` of the statement of a config file that raised, and the unknown key in it with its full path; "" for none."""
    frames = traceback.extract_tb(error.__traceback__)
    in_file = [frame for frame in frames if frame.name == "get_config"]
    unknown = re.search(r"[\"']([\w.]+)[\"'\\]", str(error))
    if not in_file:
        return "", ""
    where = f"{pathlib.Path(in_file[-1].filename).name}:{in_file[-1].lineno}"
    if in_file[-1] is frames[-1] or not unknown or "ml_collections" not in frames[-1].filename:
        return where, ""  # an error of the file itself
    # Of `c.lorra.rank = 2` and of `c["lorra"].rank` the path begins behind the name of the config.
    line = re.sub(r"\[[\"'](\w+)[\"']\]", r".\1", in_file[-1].line or "")
    path = re.search(rf"\w+\.((?:\w+\.)*{re.escape(unknown[1])}\b(?:\.\w+)*)", line)
    return where, path[1] if path else unknown[1]


def _section_error(argv: list[str]) -> str:
    """Names the keys of the first section that the command line takes for a key; "" for none."""
    sections: dict[str, list[str]] = {}
    for key in config_keys.read():
        sections.setdefault(key.section, []).append(key.name)
    for argument in argv[1:]:
        match = re.match(r"--?config\.(\w+)(?==|$)", argument)
        if match and match[1] in sections:
            return f"{text.one_line(argument, 80)}: {match[1]} is a section; name a key of it: {', '.join(sections[match[1]])}"
    return ""


# --------------------------------------------------------------------------------------------------------------------
# Commands
# --------------------------------------------------------------------------------------------------------------------


def call(main: Callable[[], None]) -> None:
    """Calls `main()`. Expected errors end the process with one line and status 1; other errors are bugs and keep their traceback.

    Expected are ValueError, OSError and RunError: errors of this package, and of libraries about values and files. So is a lack of
    memory on the devices.
    """
    from bilevel_jax import errors

    try:
        main()
    except errors.Interrupted as error:
        print(f"\n{error}", file=sys.stderr)
        sys.exit(128 + error.number)
    except KeyboardInterrupt:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(128 + signal.SIGINT)  # a normal exit would wait for a running computation, or crash in it
    except BrokenPipeError:
        raise  # see `run`
    except (ValueError, OSError, errors.RunError) as error:
        if os.environ.get("BILEVEL_JAX_TRACEBACK"):
            raise
        if isinstance(error, OSError) and error.filename and error.strerror:
            fail(f"{error.filename}: {error.strerror}")
        fail(error)
    except BaseException as error:
        first = str(error).splitlines()[0] if str(error) else "no message"
        if type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in first:
            fail(f"out of memory ({first}); {SMALLER}")
        if type(error).__name__ != "PanicException":  # of Rust code in tokenizers and safetensors; no `Exception`
            raise
        fail(f"a library failed on its input: {first}")


def run(main: Callable[[], None], *command_flags: flags.FlagValues) -> None:
    """Parses the flags of a command and calls `main()`; see `parse` and `call` for errors."""

    def call_quietly(argv: list[str]) -> None:
        del argv
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # libraries log too much at lower levels
        call(main)

    register(*command_flags)
    compilations.enable()  # before anything imports JAX, for example the config file
    try:
        app.run(call_quietly, flags_parser=parse)
    except BrokenPipeError:  # the reader of the output, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it at its end
        sys.exit(1)
