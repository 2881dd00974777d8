"""``python -m pipevault`` is the command ``pipevault``."""

from __future__ import annotations

from pipevault_command import main

if __name__ == "__main__":
    main()
