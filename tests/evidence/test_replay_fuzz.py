"""No record, however it was damaged or edited, does more than fail with an error of the project's own.

``RANDOM_EXAMPLES=5000`` tries so many instead of the repeatable ones, in two minutes.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pipevault
from helpers.hostile_records import ODD, damaged, damages, edited, edits
from helpers.pipelines import PlainPipeline
from helpers.sample_records import picture
from pipevault.errors import PipevaultError
from pipevault.evidence.record_files.embed import IMAGE_SUFFIXES, write_image
from pipevault.runtime.record import RunRecord

_FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "socket.connect")
_CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "shutil.rmtree", "os.chmod", "os.symlink", "os.link")
_WATCH: dict[str, Any] = {"folder": None, "found": []}


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    folder = _WATCH["folder"]
    if folder is None:
        return
    if event in _FORBIDDEN:
        _WATCH["found"].append((event, str(arguments)[:200]))
    is_write = event in _CHANGES or (event == "open" and _writes(arguments))
    if is_write and arguments and isinstance(arguments[0], (str, bytes)):
        path = os.path.abspath(os.fsdecode(arguments[0]))
        if not path.startswith(folder) and not path.startswith("/dev/"):
            _WATCH["found"].append((event, path))


def _writes(arguments: tuple[Any, ...]) -> bool:
    flags = arguments[2] if len(arguments) > 2 and isinstance(arguments[2], int) else 0
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


sys.addaudithook(_audit)  # there is no way to remove one: it looks at nothing unless a folder is set


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Inside, nothing is started, connected to, or written outside of ``folder``."""
    _WATCH.update(folder=str(folder), found=[])
    try:
        yield
    finally:
        _WATCH["folder"] = None
    assert _WATCH["found"] == []


class Quick(PlainPipeline):
    """A pipeline that would obey: it takes what diffusers' pipelines take, and draws as much as it is told to."""

    def __call__(  # type: ignore[override]
        self,
        prompt: Any = "",
        height: int = 8,
        width: int = 8,
        num_inference_steps: int = 1,
        guidance_scale: float = 1.0,
        num_images_per_prompt: int = 1,
        generator: Any = None,
    ) -> torch.Tensor:
        assert num_images_per_prompt <= 1024
        assert num_inference_steps <= 10_000
        assert height <= 16_384
        assert width <= 16_384
        return torch.randn(1, 2, 2, generator=generator if isinstance(generator, torch.Generator) else None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Any:
    return pipevault.PipelineCache(folder / "vault", on_unfrozen="eager").load(Quick())


@pytest.fixture(scope="module")
def genuine(pipe: Any) -> dict[str, Any]:
    record = pipevault.record_of(pipe("a cat", seed=7, num_inference_steps=1, guidance_scale=2.0))
    assert pipevault.replay(record, pipe).equal
    return record.to_document()


@pytest.fixture(scope="module")
def files(folder: Path, genuine: dict[str, Any]) -> dict[str, bytes]:
    record = RunRecord.from_document(genuine)
    made: dict[str, bytes] = {".json": record.to_json().encode()}
    for suffix in IMAGE_SUFFIXES:
        made[suffix] = write_image(picture(), folder / f"genuine{suffix}", record, index=0).read_bytes()
    return made


def replay(source: Any, pipe: Any, folder: Path, **options: Any) -> None:
    before = torch.get_rng_state()
    with watched(folder), suppress(PipevaultError):
        assert isinstance(pipevault.replay(source, pipe, dir=folder / "vault", **options).equal, bool)
    assert torch.equal(before, torch.get_rng_state())


@settings(suppress_health_check=list(HealthCheck))
@given(changes=edits, other=st.booleans(), fresh=st.booleans())
def test_edited_records(
    folder: Path, pipe: Any, genuine: dict[str, Any], changes: Any, other: bool, fresh: bool
) -> None:
    file = folder / "edited.json"
    file.write_text(json.dumps(edited(genuine, changes)), "utf-8")
    replay(file, Quick() if fresh else pipe, folder, allow_other_machine=other)


@settings(suppress_health_check=list(HealthCheck))
@given(changes=damages, suffix=st.sampled_from([".json", *IMAGE_SUFFIXES]))
def test_damaged_files(folder: Path, pipe: Any, files: dict[str, bytes], changes: Any, suffix: str) -> None:
    file = folder / f"damaged{suffix}"
    file.write_bytes(damaged(files[suffix], changes))
    replay(file, pipe, folder)


@pytest.mark.parametrize("name", ["num_images_per_prompt", "height", "generator", "prompt", "guidance_scale"])
def test_odd_arguments(folder: Path, pipe: Any, genuine: dict[str, Any], name: str) -> None:
    for value in ODD:
        document = edited({**genuine, "call": {**genuine["call"], name: value}}, [])
        file = folder / "odd.json"
        file.write_text(json.dumps(document), "utf-8")
        replay(file, pipe, folder)


def test_the_watch_sees_what_it_is_for(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"os\.system"), watched(folder):
        os.system("true")
    with pytest.raises(AssertionError, match="open"), watched(folder):
        (tmp_path / "new").write_text("x")
