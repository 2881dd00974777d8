"""Turn the roles of docstrings, such as ``:class:`~pipevault.errors.MissError```, into links of the built pages."""

from __future__ import annotations

import re
from typing import Any

_ROLE = re.compile(r":(?:class|func|meth|attr|data|mod|exc):<code>(~?)([\w.]+)</code>")


def on_page_content(html: str, **_: Any) -> str:
    """Return ``html`` with each role as a link to what it names, or as plain code where no page describes that."""
    return _ROLE.sub(_link, html)


def _link(role: re.Match[str]) -> str:
    short, target = role.groups()
    name = target.rpartition(".")[2] if short else target
    target = target if target.startswith("pipevault.") else f"pipevault.{target}"
    return f'<autoref optional identifier="{target}"><code>{name}</code></autoref>'
