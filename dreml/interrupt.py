"""Imported before all else by a script that runs: Ctrl-C during its other imports ends it in one line, no traceback.

They take seconds. Afterwards, `run_main` of console.py handles Ctrl-C.
"""

import contextlib
import os
import signal
import sys


def _end(signum: int, frame: object) -> None:
    with contextlib.suppress(Exception):  # a stream that was just being written to takes no more
        print(f"{os.path.basename(sys.argv[0])}: interrupted", file=sys.stderr, flush=True)
        sys.stdout.flush()
    os._exit(130)


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored, as behind nohup
    signal.signal(signal.SIGINT, _end)
