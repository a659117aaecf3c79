"""What the commands share: flags that fail in one line, and errors that read as one."""

import os
import pathlib
import platform
import re
import signal
import sys
import time
import zlib
from collections.abc import Callable

from absl import app, flags, logging

BEGAN = time.perf_counter()  # of the process, nearly: before JAX is imported


def fail(message: str, code: int = 1):
    """Ends the process with one line on standard error."""
    lines = [line.strip() for line in str(message).splitlines() if line.strip()]
    print(f"error: {lines[-1] if lines else 'unknown'}", file=sys.stderr, flush=True)
    sys.exit(code)


def parse(argv: list[str], known: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Sets the flags; what is wrong with them ends the process with one line and status 2."""
    try:
        rest = known(argv)
    except (flags.Error, ValueError, TypeError) as error:
        fail(error, 2)
    except (SyntaxError, ImportError) as error:
        fail(f"--config cannot be read: {error}", 2)
    except (AttributeError, KeyError) as error:  # how ml_collections speaks of a key or get_config that is not there
        said = re.sub(r"[\"'\\]", "", str(error).replace("\\n", "; "))
        fail("--config: a file without get_config()" if "get_config" in said else f"the config has no key {said}", 2)
    if len(rest) > 1:
        fail(f"unexpected argument {rest[1]!r}; flags are written --name=value", 2)
    return rest


def keep_compilations() -> None:
    """Lets the next process find what this one compiled: JAX's own cache, in the user's cache directory unless JAX's variables say
    otherwise. Processors of several kinds may share a home, and code for one may not run on another: each has its own directory.
    """
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    able = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    kind = f"{platform.machine()}-{zlib.crc32(able.encode()):08x}"
    home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(home / "bilevel_jax" / kind))
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2**30))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def register(*command_flags: flags.FlagValues) -> None:
    """Adds the flags of a command to those that absl parses.

    Commands define their flags apart, with `flag_values=FLAGS`, so that any two of them can be imported in one process.
    """
    for values in command_flags:
        flags.FLAGS.append_flag_values(values)
        values.mark_as_parsed()  # absl parses the same flags as part of its own
        for name in values:
            flags.FLAGS.register_flag_by_module(sys.argv[0], values[name])  # for --help
            if hasattr(values[name], "flag_values"):  # a config flag, which defines --config.KEY where it is parsed
                values[name].flag_values = flags.FLAGS


def run(main: Callable[[], None], *command_flags: flags.FlagValues) -> None:
    """Parses the flags of a command and calls `main()`. Errors that say what is wrong end the process with one line, status 1."""

    def guarded(argv: list[str]) -> None:
        del argv
        from bilevel_jax import errors

        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # libraries report too much below that
        try:
            main()
        except errors.Interrupted as stop:
            print(f"\n{stop}", file=sys.stderr)
            sys.exit(128 + signal.SIGTERM)
        except KeyboardInterrupt:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(128 + signal.SIGINT)  # an orderly exit would wait, or crash, in a computation that is still under way
        except (ValueError, OSError, errors.RunError) as error:
            # Our own errors, and those of libraries about values and files, speak for themselves; anything else is a bug.
            if os.environ.get("BILEVEL_JAX_TRACEBACK"):
                raise
            fail(error)

    register(*command_flags)
    keep_compilations()  # before anything imports JAX, as the config file does
    app.run(guarded, flags_parser=parse)
