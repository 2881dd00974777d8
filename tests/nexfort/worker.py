"""One process that loads a pipeline with backend ``nexfort`` and calls it twice; prints what happened as JSON."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import pipevault
from helpers.pipelines import PlainPipeline, draw, stable_diffusion
from pipevault.cache.onediff_backends import _nexfort_folder
from pipevault.compat.nexfort import cached_files, cached_graphs


def cpu_s() -> float:
    """CPU time of this process and of the compilers that it ran: other work on the machine does not count."""
    return sum(os.times()[:4])


def sha256(pixels: torch.Tensor) -> str:
    return hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest()


def run(vault: str, kind: str, settings: dict[str, Any]) -> dict[str, Any]:
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("pipevault").addHandler(handler)
    pipe: Any = PlainPipeline() if kind == "plain" else stable_diffusion(Path(vault).parent / "tokenizer")
    parts = None if kind == "plain" else ["unet"]
    eager = draw(pipe)
    started_s = cpu_s()
    cache = pipevault.PipelineCache(vault, backend="nexfort", **settings)
    cache.load(pipe, batch_size=1, parts=parts)
    loaded_s = cpu_s()
    folder = _nexfort_folder()
    graphs, files = cached_graphs(folder), set(cached_files(folder))
    first = draw(pipe)
    called_s = cpu_s()
    second = draw(pipe)
    after, told = cached_graphs(folder), len(said)
    seeded = pipe("a cat", seed=7, **({} if kind == "plain" else {"output_type": "np"}))
    result = {
        "status": pipevault.outcome(pipe).status,
        "key": pipevault.outcome(pipe).key.hex,
        "parts": {name: part.status for name, part in pipevault.outcome(pipe).parts.items()},
        "sha256": [sha256(first), sha256(second)],
        "distance": float((first - eager).abs().max()),
        "graphs": len(graphs),
        "compiled": len(after - graphs),
        "files_added": sorted(set(cached_files(folder)) - files),
        "folder": str(folder),
        "load_s": loaded_s - started_s,
        "first_call_s": called_s - loaded_s,
        "level": dict(pipevault.record_of(seeded).level),
        "said": said[:told],
    }
    if "other call" in sys.argv:  # a call that nothing was kept for: it is compiled, and told of at the next one
        draw(pipe, prompt=["a cat", "a dog"])
        draw(pipe)
        result["said_of_another_call"] = said[told:]
    pipevault.unload(pipe)
    result["eager_again"] = torch.equal(draw(pipe), eager)
    return result


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))))
