"""The page that shows a comparison: the table, the pictures, where they differ, and what made them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from pipevault.compat.extras import import_extra
from pipevault.evidence.compare.run import Comparison, FinishedRun
from pipevault.evidence.files import Array
from pipevault.evidence.metrics import heat_map
from pipevault.report.page import render_page

SHOWN_PICTURES = 10
"""The most pictures that are shown of each run; the figures are over all of them."""
_LARGEST_SIDE_PX = 256


def comparison_page(comparison: Comparison, *, command: str) -> str:
    """Return the HTML page; ``command`` is what makes it again."""
    compared = [run for run in comparison.runs if run.pixels_distance is not None]
    return render_page(
        "compare.html.j2",
        {
            "title": f"One seed, {len(comparison.runs)} fresh processes: {comparison.model}",
            "comparison": comparison,
            "result": comparison.runs[0].result,
            "pictures": list(_pictures(comparison)),
            "differences": [gallery for run in compared if (gallery := _differences(comparison, run))],
            "without_difference": [
                run for run in compared if run.equal and (run.latents_distance is None or run.latents_distance.equal)
            ],
            "facts": list(_facts(comparison, command)),
        },
    )


def _pictures(comparison: Comparison) -> Iterator[dict[str, Any]]:
    """Yield a row for each set of pictures with a title and a note; runs that drew the same one share it."""
    drawn: dict[tuple[str, ...], list[FinishedRun]] = {}
    for run in comparison.runs:
        drawn.setdefault(run.result.pixels, []).append(run)
    for runs in drawn.values():
        arrays = runs[0].pictures
        shown = [Image.fromarray(one) for one in arrays[:SHOWN_PICTURES] if _is_picture(one)]
        for picture in shown:  # the page would hold tens of megabytes otherwise
            picture.thumbnail((_LARGEST_SIDE_PX, _LARGEST_SIDE_PX))
        if shown:
            yield {
                "title": ", ".join(run.plan.name for run in runs),
                "note": f"{len(arrays) - len(shown)} more are not shown." if len(shown) < len(arrays) else "",
                "pictures": list(zip(shown, _captions(comparison, runs[0]), strict=False)),
            }


def _differences(comparison: Comparison, run: FinishedRun) -> dict[str, Any] | None:
    """Return heat maps of the pixels where any differs, else of the latents; ``None`` where neither does."""
    assert run.plan.against is not None
    assert run.pixels_distance is not None
    other, distance = comparison.run(run.plan.against), run.pixels_distance
    pairs: Iterable[tuple[Array, Array]]
    if not run.equal and _is_picture(run.pictures[0]):
        pairs = zip(run.pictures, other.pictures, strict=False)
        scale = f"a difference of {distance.max_abs:g} of 255 in one channel of a pixel"
    elif run.latents_distance is not None and not run.latents_distance.equal:
        if run.latents is None or other.latents is None or run.latents.ndim < 4:
            return None
        pairs, distance = _latent_gaps(run.latents, other.latents), run.latents_distance
        scale = f"a difference of {distance.max_abs:.2g} in one channel of the latents"
        if run.equal:
            scale += ", too small to move a pixel by one of 255"
    else:
        return None
    full_scale = distance.max_abs if math.isfinite(distance.max_abs) else None
    shown = itertools.islice(pairs, SHOWN_PICTURES)
    maps = [_peaks(heat_map(one, two, full_scale=full_scale)) for one, two in shown]
    return {
        "title": f"{run.plan.name} against {run.plan.against}" + (f": {run.note}" if run.note else ""),
        "note": f"Black is equal; white, the full scale, is {scale}.",
        "pictures": list(zip(maps, _captions(comparison, run), strict=False)),
    }


def _is_picture(sample: Array) -> bool:
    return sample.dtype == "uint8" and (sample.ndim == 2 or (sample.ndim == 3 and sample.shape[-1] in (3, 4)))


def _captions(comparison: Comparison, run: FinishedRun) -> list[str]:
    prompts, count = comparison.request.prompts, len(run.pictures)
    if len(prompts) >= count:
        return list(prompts[:count])
    return [f"picture {number + 1}" for number in range(count)]


def _latent_gaps(latents: Array, others: Array) -> Iterator[tuple[Array, Array]]:
    """Yield the largest difference over channels, and over frames if there are any, and what it is without one."""
    for one, other in zip(latents, others, strict=False):
        gaps = np.abs(one.astype(np.float64) - other.astype(np.float64))
        largest = gaps.max(axis=tuple(range(gaps.ndim - 2)))
        yield largest, np.zeros_like(largest)


def _peaks(image: Image.Image) -> Image.Image:
    """Make a heat map smaller and keep the hottest pixel of each block: an average would hide single ones."""
    block = -(-max(image.size) // _LARGEST_SIDE_PX)
    measure = import_extra("skimage.measure", "scikit-image, which heat maps need,", "report")
    return Image.fromarray(measure.block_reduce(np.asarray(image), (block, block, 1), np.max))


def _facts(comparison: Comparison, command: str) -> Iterator[tuple[str, str]]:
    request, result, machine = comparison.request, comparison.runs[0].result, comparison.machine
    yield "command", command
    yield "seed", str(request.seed)
    chosen: dict[str, Any] = {
        "steps": request.steps,
        "guidance scale": request.guidance_scale,
        "size": f"{request.width}x{request.height}" if request.width else None,
    }
    yield from ((name, str(value)) for name, value in chosen.items() if value is not None)
    if len(set(request.prompts)) <= SHOWN_PICTURES:
        yield "prompts", "; ".join(request.prompts) or "none"
    keys = {run.result.key for run in comparison.runs if run.result.key}
    yield from (("key", key) for key in sorted(keys))
    yield (
        "device",
        f"{result.device}, {result.threads} threads, {result.capability} kernels".replace("1 threads", "1 thread"),
    )
    for name in ("cpu", "cores", "os", "python", "nvidia_driver"):
        if machine.get(name):
            yield name.replace("_", " "), str(machine[name])
    yield from ((name, version) for name, version in result.versions.items() if name != "graph_format")
