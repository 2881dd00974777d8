"""``python -m pipevault`` is the command ``pipevault``."""

from __future__ import annotations

from pipevault.cli.app import main

if __name__ == "__main__":
    main()
