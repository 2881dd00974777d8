"""The command ``pipevault``: it is quiet about Ctrl-C before anything is imported, the package included."""

from __future__ import annotations

import os


def _end(*_: object) -> None:
    os.write(2, b"pipevault: interrupted\n")
    os._exit(130)


try:
    import signal
except KeyboardInterrupt:
    _end()


def be_quiet() -> None:
    """End the process with one line at Ctrl-C, until the command line has its own way."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def main() -> None:
    """Run the command line; leaves with ``SystemExit``."""
    be_quiet()
    from pipevault.cli.app import main as run

    run()
