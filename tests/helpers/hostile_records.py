"""Records and files as a stranger may have made them: genuine ones that were damaged, or edited and sealed again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from pipevault.digest import digest_json

ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    50_000_000,
    2**63,
    2**70,
    1e300,
    -0.0,
    "",
    "a" * 200_000,
    "; touch /tmp/owned #",
    "$(id)",
    "../../etc/passwd",
    "http://127.0.0.1:9/x",
    "__class__",
    "\x1b[31m\u202e\x00",
    "<script>alert(1)</script>",
    "\udc80",
    [],
    {},
    [[[[[[[[[[[[[[[[[[[[["deep"]]]]]]]]]]]]]]]]]]]]],
    ["a"] * 20_000,
    {"kind": "image", "sha256": "0" * 64, "size": [1, 1], "mode": "RGB"},
    {"kind": "generator", "seed": 1, "device": "cuda:0", "fresh": True},
    {"kind": "generator", "seed": "x", "device": [], "fresh": None},
    {"__reduce__": ["os.system", "id"]},
)
NAMES = (
    "build_config",
    "trust_remote_code",
    "custom_pipeline",
    "num_images_per_prompt",
    "height",
    "generator",
    "latents",
    "callback_on_step_end",
    "method",
    "load",
    "dtype",
    "device",
    "cxx",
)
Edit = tuple[int, str, Any, str]

edits: st.SearchStrategy[list[Edit]] = st.lists(
    st.tuples(
        st.integers(0, 2**16),
        st.sampled_from(("replace", "remove", "add", "rename", "repeat")),
        st.one_of(st.sampled_from(ODD), st.integers(), st.text(max_size=20), st.floats(allow_nan=False)),
        st.one_of(st.sampled_from(NAMES), st.text(max_size=8)),
    ),
    min_size=1,
    max_size=4,
)
damages: st.SearchStrategy[list[tuple[int, int]]] = st.lists(
    st.tuples(st.integers(0, 2**20), st.integers(0, 255)), min_size=1, max_size=6
)


def edited(document: dict[str, Any], changes: list[Edit]) -> dict[str, Any]:
    """A copy of a record with fields replaced, removed, added, renamed or repeated, and its digest computed again."""
    content = copy.deepcopy(document)
    content.pop("digest", None)
    for place, action, value, name in changes:
        places = list(_places(content))
        container, key = places[place % len(places)]
        if action == "replace":
            container[key] = copy.deepcopy(value)
        elif action == "remove":
            del container[key]
        elif action == "repeat" and isinstance(container[key], list):
            container[key] = container[key] * 2_000
        elif isinstance(container, dict):
            container[name] = copy.deepcopy(value) if action == "add" else container.pop(key)
    try:
        content["digest"] = digest_json(content).hex
    except (TypeError, ValueError):
        content["digest"] = "0" * 64
    return content


def _places(value: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    items: Any = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in list(items):
        found.append((value, key))
        if isinstance(item, (dict, list)) and len(found) < 500:
            found += _places(item)
    return found


def damaged(data: bytes, changes: list[tuple[int, int]]) -> bytes:
    """Bytes with some of them changed, and cut off where the last change is even."""
    made = bytearray(data)
    for place, value in changes:
        made[place % len(made)] = value
    place, value = changes[-1]
    return bytes(made[: place % len(made)] if value % 2 == 0 else made)


def files(folder: Path, write: Callable[[Path], object], suffixes: tuple[str, ...]) -> dict[str, bytes]:
    """The bytes of one genuine file of each kind."""
    made: dict[str, bytes] = {}
    for suffix in suffixes:
        path = folder / f"genuine{suffix}"
        write(path)
        made[suffix] = path.read_bytes()
    return made
