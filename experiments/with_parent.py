"""Executes a command that ends with its parent: `python experiments/with_parent.py PARENT COMMAND ...`.

The kernel sends SIGTERM to the command when its parent ends for any reason, for example by SIGKILL. PARENT is the process id of the
parent. On systems other than Linux the command is only executed.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # of prctl(2); the setting survives the execution of a program


def main() -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(sys.argv[1]):  # it ended before the call
        sys.exit(128 + signal.SIGTERM)
    os.execvp(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
