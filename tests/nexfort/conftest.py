"""These tests run in an environment of their own, which ``scripts/test_nexfort.sh`` builds."""

from __future__ import annotations

from pipevault.compat.nexfort import require_nexfort
from pipevault.errors import UnusableBackendError

try:
    require_nexfort()
except UnusableBackendError:
    collect_ignore_glob = ["test_*.py"]
