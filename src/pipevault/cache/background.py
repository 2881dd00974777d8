"""Background freezing: a call is frozen in another process, while this one serves it eagerly.

One call at a time. The other process gets the part and the arguments in a private folder, freezes the call like any
other and publishes the graph; this one finds it on the shelf. A part that cannot be sent, such as one whose class
stands in the program itself, stays eager, and a warning says why.
"""

from __future__ import annotations

import logging
import pickle
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipevault.cache.access import Access
from pipevault.cache.builders import environment
from pipevault.cache.keys import PartIdentity
from pipevault.cache.search import Store
from pipevault.cache.shelf import VaultShelf
from pipevault.determinism.levels import level
from pipevault.errors import PipevaultError
from pipevault.files.scratch import scratch_folder
from pipevault.graphs.inductor import BuildOptions
from pipevault.graphs.observe import copied
from pipevault.graphs.signature import CallSignature, describe_call
from pipevault.graphs.state import PartOptions, PartState
from pipevault.settings import Settings

logger = logging.getLogger("pipevault")

JOB_FILE, ERROR_FILE, OUTPUT_FILE = "job.pt", "error.txt", "output.txt"


@dataclass
class _Running:
    process: subprocess.Popen[bytes]
    folder: Path
    held: ExitStack
    call: tuple[str, CallSignature]


_lock = threading.Lock()
_running: _Running | None = None


def freeze_in_background(
    settings: Settings, build: BuildOptions, state: PartState, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[str, bool]:
    """Start freezing the call unless another is being frozen. Return why it runs eagerly, and whether that stays so."""
    global _running
    call = state.name, describe_call(args, kwargs).signature
    with _lock:
        if _running is not None:
            failure = _failure(_running)
            if failure is None and _running.call != call:
                return f"a call of {_running.call[0]} is being frozen in the background before it", False
            if failure is None:
                return "it is being frozen in the background", False
            previous, _running = _running, None
            if failure and previous.call == call:
                return f"freezing it in the background failed: {failure}", True
        shelf = state.table.shelf
        job = {
            "module": state.module,
            "settings": settings,
            "build": build,
            "identity": shelf.identity if shelf else "",
            "threads": torch.get_num_threads(),
            "default_dtype": torch.get_default_dtype(),
            "name": call[0],
            "autocast": call[1].autocast,
        }
        try:
            with ExitStack() as stack:
                folder = stack.enter_context(scratch_folder("background"))
                torch.save({**job, "call": copied((tuple(args), dict(kwargs)))}, folder / JOB_FILE)
                with (folder / OUTPUT_FILE).open("wb") as output:
                    process = subprocess.Popen(
                        [sys.executable, "-m", "pipevault.cache.background", str(folder)],
                        env=environment(),
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                _running = _Running(process, folder, stack.pop_all(), call)
        except (OSError, pickle.PicklingError, AttributeError, TypeError, RuntimeError) as error:
            return f"it cannot be frozen in the background: {type(error).__name__}: {error}", True
    return "it is being frozen in the background", False


def _failure(running: _Running) -> str | None:
    """``None`` while it runs, else what went wrong."""
    code = running.process.poll()
    if code is None:
        return None
    with running.held:
        if code == 0:
            return ""
        error = running.folder / ERROR_FILE
        if error.is_file():
            return error.read_text("utf-8")
        last = (running.folder / OUTPUT_FILE).read_text("utf-8", "replace").strip().splitlines()[-1:]
        return f"its process ended with {code}: {last[0] if last else 'it printed nothing'}"


def main(folder: Path) -> int:
    """Freeze the call of a job: what the other process runs."""
    # The file is this user's own, in a folder that no other user can write.
    job = torch.load(folder / JOB_FILE, weights_only=False)
    torch.set_num_threads(job["threads"])
    torch.set_default_dtype(job["default_dtype"])
    try:
        with level(job["settings"].level):
            _freeze(job)
    except PipevaultError as error:
        (folder / ERROR_FILE).write_text(str(error), encoding="utf-8")
        return 1
    return 0


def _freeze(job: Mapping[str, Any]) -> None:
    settings, build = job["settings"], job["build"]
    store = Store(Access(settings, build))

    def shelf(name: str, module: nn.Module, device: torch.device) -> VaultShelf:
        return VaultShelf(store, name, PartIdentity.of(module, device, backend=settings.backend, build=build), device)

    state = PartState(job["module"], PartOptions(build=build, shelf=shelf))
    state.name = job["name"]
    args, kwargs = job["call"]
    device = describe_call(args, kwargs).device or torch.device("cpu")
    table = state.attach(device)
    if table.shelf is None or table.shelf.identity != job["identity"]:
        raise PipevaultError(
            f"{state.name} has another identity in the other process, so its graphs would not be found"
        )
    autocast = job["autocast"]
    with torch.autocast(device.type, getattr(torch, autocast or "bfloat16"), enabled=autocast is not None):
        slot = state.freeze(args, kwargs)
    if slot.refusal:
        logger.info("%s cannot be frozen: %s", state.name, slot.refusal)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
