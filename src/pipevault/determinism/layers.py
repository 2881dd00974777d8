"""The states of a program's own random streams, which threads share: taken, compared, put back, and as plain JSON.

The layers are ``python`` (``random``), ``numpy`` (its global generator), ``torch`` (the CPU's generator) and one for
each GPU that has started (``cuda:0``, …).
"""

from __future__ import annotations

import base64
import math
import random
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch

from pipevault.determinism.turns import ALONE, DEFAULT_TIMEOUT_S, TURNS
from pipevault.errors import BadRecordError

States: TypeAlias = Mapping[str, Any]

STREAMS = "random streams"
"""The resource of :data:`~pipevault.determinism.turns.TURNS`: held alone by who draws from a layer."""

WITH_OTHERS = "with others"
"""The way in which those hold it that draw from no layer."""

_SET_ASIDE: dict[int, States] = {}
"""The states that are set aside, those of all threads, outermost first."""

_WORDS = 624
_STATE_LIMIT_BYTES = 1 << 16


def capture() -> dict[str, Any]:
    """Return the state of every layer; those of torch are byte tensors."""
    return {"python": random.getstate(), "numpy": np.random.get_state(legacy=False), **capture_torch()}


def capture_torch() -> dict[str, Any]:
    """Return the states of torch's layers alone."""
    states: dict[str, Any] = {"torch": torch.get_rng_state()}
    for kind, module in gpu_modules().items():
        if module.is_initialized():
            states |= {f"{kind}:{index}": state for index, state in enumerate(module.get_rng_state_all())}
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    return states


def put(states: States) -> None:
    """Set the layers in ``states``, all of them even if one fails."""
    with ExitStack() as stack:
        for name, state in states.items():
            stack.callback(_put_one, name, state)


def moved(before: States, after: States) -> tuple[str, ...]:
    """Return the layers that something was drawn from; a GPU that started in between does not count."""
    return tuple(name for name, state in after.items() if name in before and not _same(before[name], state))


@contextmanager
def kept(*, timeout_s: float = DEFAULT_TIMEOUT_S) -> Iterator[States]:
    """Put every layer back on exit, and keep other threads' generations from drawing meanwhile; yield the states.

    A GPU that starts inside had no state: it gets the seed that torch was given before.
    """
    what = "a block with random streams of its own"
    with TURNS.take({STREAMS: ALONE}, what=what, timeout_s=timeout_s), set_aside() as states:
        yield states


@contextmanager
def set_aside() -> Iterator[States]:
    """Do what :func:`kept` does, for a thread that holds its turn."""
    states = capture()
    with ExitStack() as stack:
        stack.callback(put, states)
        for module in gpu_modules().values():
            if not module.is_initialized():
                stack.callback(module.manual_seed_all, torch.initial_seed())
        _SET_ASIDE[id(states)] = states
        stack.callback(_SET_ASIDE.pop, id(states), None)  # a forked child has none
        yield states


def _put_back_in_child() -> None:
    """A forked child has the streams of its program, not those of a generation that went on in its parent."""
    if _SET_ASIDE and not TURNS.holds(STREAMS):
        outermost = next(iter(_SET_ASIDE.values()))
        put({name: state for name, state in outermost.items() if name in ("python", "numpy", "torch")})
        _SET_ASIDE.clear()


TURNS.on_fork(_put_back_in_child)


def gpu_modules() -> dict[str, Any]:
    """Return torch's modules for the kinds of GPUs that it was built for."""
    backends: Any = torch.backends
    built = {"cuda": torch.cuda} if backends.cuda.is_built() else {}
    return built | ({"xpu": torch.xpu} if torch.xpu._is_compiled() else {})


def describe_state(name: str, state: Any) -> dict[str, Any]:
    """Return the state of a layer as plain JSON, for :func:`parse_state`."""
    if name == "python":
        _, words, gauss = state
        return _twister(words[:-1], words[-1], gauss)
    if name == "numpy":
        if state["bit_generator"] != "MT19937":
            return {"kind": str(state["bit_generator"])}
        return _twister(state["state"]["key"], state["state"]["pos"], state["gauss"] if state["has_gauss"] else None)
    if name == "torch" and (seed := fresh_seed(state)) is not None:
        return {"kind": "seed", "seed": seed}
    return {"kind": "state", "state": pack(state)}


def fresh_seed(state: torch.Tensor) -> int | None:
    """Return the seed that torch was given last, if ``state`` is what the CPU's generator is right after it."""
    seed = torch.initial_seed()
    return seed if torch.equal(torch.Generator().manual_seed(seed).get_state(), state) else None


def parse_state(name: str, described: Any) -> Any:
    """Return the state that :func:`describe_state` described. :class:`BadRecordError` for what is none."""
    field = f"seeds.streams.{name}"
    if not isinstance(described, Mapping):
        raise _bad(field, "is not a state of a random stream")
    if name not in ("python", "numpy"):
        seed = described.get("seed")
        if described.get("kind") == "seed" and type(seed) is int and 0 <= seed < 2**64:
            return torch.Generator().manual_seed(seed).get_state()
        return unpack(described.get("state"), field)
    if described.get("kind") != "mt19937":
        kind = str(described.get("kind"))[:40]
        raise _bad(field, f"is the state of a generator that cannot be set ({kind!r})")
    key = _inflated(described.get("key"), field)
    position, gauss = described.get("position"), described.get("gauss")
    is_number = gauss is None or (isinstance(gauss, float) and math.isfinite(gauss))
    if len(key) != 4 * _WORDS or type(position) is not int or not 0 <= position <= _WORDS or not is_number:
        raise _bad(field, "is not a state of a Mersenne twister")
    words = np.frombuffer(key, dtype="<u4")
    if name == "python":
        return 3, (*map(int, words), position), gauss
    return {
        "bit_generator": "MT19937",
        "state": {"key": words.astype(np.uint32), "pos": position},
        "has_gauss": int(gauss is not None),
        "gauss": gauss or 0.0,
    }


def pack(state: torch.Tensor) -> str:
    """Return the bytes of a generator's state as text of a few thousand characters."""
    return _deflated(bytes(state.cpu().numpy()))


def unpack(text: Any, field: str) -> torch.Tensor:
    """Return the state that :func:`pack` made text of. :class:`BadRecordError` names ``field`` for other texts."""
    return torch.frombuffer(bytearray(_inflated(text, field)), dtype=torch.uint8)


def _twister(words: Any, position: int, gauss: float | None) -> dict[str, Any]:
    key = _deflated(np.asarray(words, dtype="<u4").tobytes())
    return {"kind": "mt19937", "key": key, "position": int(position), "gauss": gauss}


def _deflated(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 9)).decode("ascii")


def _inflated(text: Any, field: str) -> bytes:
    try:
        data = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), _STATE_LIMIT_BYTES)
    except (ValueError, TypeError, zlib.error) as error:
        raise _bad(field, "is not a state of a random stream") from error
    if not data:
        raise _bad(field, "is an empty state")
    return data


def _bad(field: str, what: str) -> BadRecordError:
    return BadRecordError(f"Field {field!r} of the run record {what}.", field)


def _put_one(name: str, state: Any) -> None:
    if name == "python":
        random.setstate(state)
    elif name == "numpy":
        np.random.set_state(state)
    elif name == "torch":
        torch.set_rng_state(state)
    elif name == "mps":
        torch.mps.set_rng_state(state)
    else:
        kind, _, index = name.partition(":")
        gpu_modules()[kind].set_rng_state(state, int(index))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_same(value, other[name]) for name, value in one.items())
    return bool(np.array_equal(one, other)) if isinstance(one, np.ndarray) else bool(one == other)
