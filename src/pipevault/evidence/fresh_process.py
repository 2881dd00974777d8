"""One generation in a Python process of its own, so that nothing in memory is shared with any other.

The parent writes ``job.json`` into an empty folder and starts :mod:`pipevault.evidence.fresh_generation`; the child
writes the pictures and ``result.json`` next to it, or leaves its error (:mod:`pipevault.files.child`).
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

from pipevault.errors import PipevaultError, SettingsError
from pipevault.evidence.generation_job import (
    COMPILED,
    COMPILED_BY_BLOCKS,
    JOB_FILE,
    RESULT_FILE,
    GenerationJob,
    GenerationResult,
)
from pipevault.files.child import printed, run_child

_CHILD = "pipevault.evidence.fresh_generation"
_CACHE_FOLDER = "compile-cache"


def generate_in_fresh_process(
    job: GenerationJob, folder: Path, *, label: str = "", timeout_s: float | None = None
) -> GenerationResult:
    """Return what the job gave; its files are in ``folder``, which is made and must be empty. ``label`` names it in
    errors.

    Raises what :func:`~pipevault.files.child.run_child` raises, and :class:`PipevaultError` for a child that left no
    result.
    """
    name = label or f"{job.method} generation of {job.model}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        text = json.dumps({"job": job.to_json(), "started_at_s": time.time()})
    except TypeError as error:
        raise SettingsError(f"The arguments of {name} must be plain JSON to go to another process: {error}.") from error
    (folder / JOB_FILE).write_text(text, encoding="utf-8")
    cache = folder / _CACHE_FOLDER
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(cache), "TRITON_CACHE_DIR": str(cache / "triton")}
    own = caches if job.method in (COMPILED, COMPILED_BY_BLOCKS) else {}
    environment = {**own, **job.environment}
    try:
        run_child(_CHILD, [str(folder / JOB_FILE)], folder, name=name, environment=environment, timeout_s=timeout_s)
    finally:
        shutil.rmtree(cache, ignore_errors=True)
    try:
        return GenerationResult.from_json(json.loads((folder / RESULT_FILE).read_text("utf-8")), folder)
    except (OSError, ValueError) as error:
        raise PipevaultError(
            f"{name} failed: its process ended without a result that can be read ({type(error).__name__}: {error}). "
            f"{printed(folder)}"
        ) from error
