"""Results of runs that never took place, for the logic of comparisons."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pipevault.evidence.compare.run import GROUPS, Comparison, compare
from pipevault.evidence.generation_job import GenerationJob, GenerationResult
from pipevault.evidence.request import Request

REQUEST = Request(prompts=("a cat", "a dog"), seed=7, steps=2)
BASE: dict[str, Any] = {"threads": 1, "capability": "AVX512", "device": "cpu", "noise": "n"}


class FakeRuns:
    """In place of :func:`generate_in_fresh_process`.

    Each prompt gives a grey picture of 8x8 pixels; ``draw`` may change the pictures of a run, ``say`` what its result
    says. ``jobs`` has what was asked for, with the label.
    """

    def __init__(
        self,
        draw: Callable[[str, list[np.ndarray[Any, Any]]], list[np.ndarray[Any, Any]]] | None = None,
        say: Callable[[str], dict[str, Any]] | None = None,
        latents: Callable[[str, int], np.ndarray[Any, Any] | None] | None = None,
        base: dict[str, Any] | None = None,
    ) -> None:
        self.jobs: dict[str, GenerationJob] = {}
        self._draw, self._say, self._latents = draw, say, latents
        self._base = {**BASE, **(base or {})}

    def __call__(
        self, job: GenerationJob, folder: Path, *, label: str = "", timeout_s: float | None = None
    ) -> GenerationResult:
        self.jobs[label] = job
        folder.mkdir()
        count = (len(job.request.prompts) or 1) if job.generations else 0
        pictures = [np.full((8, 8, 3), 100 + index, np.uint8) for index in range(count)]
        if self._draw and pictures:
            pictures = self._draw(label, pictures)
        files = []
        for index, picture in enumerate(pictures):
            files.append(folder / f"{index}.npy")
            np.save(files[-1], picture)
        pixels = tuple(hashlib.sha256(picture.tobytes()).hexdigest() for picture in pictures)
        latents = self._latents(label, count) if self._latents and count else None
        if latents is not None:
            np.save(folder / "latents.npy", latents)
        said = {**self._base, **_environment(job)}
        fields: dict[str, Any] = {
            "pictures": tuple(files),
            "pixels": pixels,
            "warm_pixels": pixels,
            "latents": None if latents is None else folder / "latents.npy",
            "seconds": {"import": 2.0, "open": 1.0, "ready": 0.5, "first": 3.0, "warm": 0.25},
            "outcome": "hit" if job.method == "frozen" else "",
            "key": "k" * 64 if job.method == "frozen" else None,
            "versions": {"torch": "2.13.0", "diffusers": "0.42.1"},
            **said,
            **(self._say(label) if self._say else {}),
        }
        return GenerationResult(**fields)


def _environment(job: GenerationJob) -> dict[str, Any]:
    """What a real process would read back."""
    said: dict[str, Any] = {}
    if "OMP_NUM_THREADS" in job.environment:
        said["threads"] = int(job.environment["OMP_NUM_THREADS"])
    if "ATEN_CPU_CAPABILITY" in job.environment:
        said["capability"] = job.environment["ATEN_CPU_CAPABILITY"].upper()
    return said


def compared(
    runs: FakeRuns | None = None, request: Request = REQUEST, *, groups: Any = GROUPS, progress: Any = None, **job: Any
) -> Comparison:
    """``job`` has further fields of the job."""
    job_of_all = GenerationJob("./model", request, **job)
    return compare(job_of_all, groups=groups, progress=progress, run=runs or FakeRuns())


def brighter(label: str, by: int = 1) -> Callable[[str, list[np.ndarray[Any, Any]]], list[np.ndarray[Any, Any]]]:
    """One channel of one pixel of the first picture of the run ``label`` is brighter."""

    def draw(run: str, pictures: list[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        if run == label:
            pictures[0][2, 5, 1] += by
        return pictures

    return draw
