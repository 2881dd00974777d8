"""A child process of Python: started with its own environment, waited for, and ended with all that it started.

The child works in a folder. There it prints to ``output.txt``, and :func:`leave_error` leaves ``error.pickle`` for the
parent, which raises it.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipevault.errors import PipevaultError

ERROR_FILE, OUTPUT_FILE = "error.pickle", "output.txt"
_SHOWN_LINES = 12


def run_child(
    module: str,
    arguments: Sequence[str],
    folder: Path,
    *,
    name: str,
    environment: Mapping[str, str],
    timeout_s: float | None = None,
) -> None:
    """Run ``python -m module *arguments`` in ``folder``, with ``environment`` laid over this process's; ``name`` is
    what messages call it.

    Raises the error that the child left, and :class:`PipevaultError` with the last lines that it printed if it failed
    otherwise, was killed, or took over ``timeout_s``. However this is left, the child and what it started are gone.
    """
    with (folder / OUTPUT_FILE).open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            # Python 3.11 and later keep the working directory, which may hold a torch.py, off the module search path.
            env={**os.environ, "PYTHONSAFEPATH": "1", **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return_code = process.wait(timeout_s)
        except BaseException as error:  # an interrupt included: compilers in the child's session would go on
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                raise PipevaultError(
                    f"{name} took longer than {timeout_s:g} s and was ended. Allow more time. {printed(folder)}"
                ) from error
            raise
    if (folder / ERROR_FILE).is_file():
        left = pickle.loads((folder / ERROR_FILE).read_bytes())
        assert isinstance(left, PipevaultError)
        left.args = (f"{name} failed: {left}", *left.args[1:])
        raise left
    if return_code:
        raise PipevaultError(f"{name} failed: its process {_ending(return_code)}. {printed(folder)}")


def leave_error(folder: Path, error: PipevaultError) -> None:
    """Leave ``error`` in ``folder`` for the parent of this process, which raises it."""
    (folder / ERROR_FILE).write_bytes(pickle.dumps(error))


def printed(folder: Path) -> str:
    text = (folder / OUTPUT_FILE).read_bytes().decode("utf-8", "replace")
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return f"It printed:\n{chr(10).join(lines[-_SHOWN_LINES:])}" if lines else "It printed nothing."


def _ending(return_code: int) -> str:
    if return_code > 0:
        return f"ended with exit code {return_code}"
    try:
        return f"was killed by {signal.Signals(-return_code).name}"
    except ValueError:
        return f"was killed by signal {-return_code}"
