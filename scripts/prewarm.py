#!/usr/bin/env python3
"""Freeze a model from a checkout: the command ``pipevault prewarm``, which says more with ``--help``.

Run: ``.venv/bin/python scripts/prewarm.py MODEL --size 512x512 --size 768x512 --dtype bfloat16``.
"""

# Kept readable for any Python from 3.6 on, so that a wrong one gives the message below.
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def advice(error: Exception) -> str:
    python = ROOT / ".venv" / "bin" / "python"
    setup = "" if python.exists() else f"bash {shlex.quote(str(ROOT / 'scripts' / 'setup.sh'))}, then "
    return (
        f"pipevault cannot be imported by {sys.executable} ({error}). Run {setup}{shlex.quote(str(python))} "
        f"{shlex.quote(__file__)}, or install it for this Python: pip install {shlex.quote(str(ROOT))}"
    )


def main() -> None:
    try:
        from pipevault.cli.app import main as pipevault
    except (ImportError, SyntaxError) as error:  # SyntaxError: a Python that is too old for the package
        sys.exit(advice(error))
    pipevault(["prewarm", *sys.argv[1:]])


if __name__ == "__main__":
    main()
