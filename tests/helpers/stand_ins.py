"""A pipeline that paints flat pictures and a cache that freezes nothing, in place of the real ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from PIL import Image

from pipevault.cache.outcome import Explanation, Outcome, PartOutcome, Step
from pipevault.digest import Digest
from pipevault.key import Difference, Key
from pipevault.settings import Settings

KEY = Key({"machine": {"threads": 2}})
NEAREST = Digest("a" * 64)
PARTS = {"unet": PartOutcome("frozen", "", 2), "vae.decoder": PartOutcome("eager", "it keeps state", 0)}


class FlatPipeline:
    """Picture ``n`` has one colour, which follows from its generator's seed."""

    def __call__(self, prompts: list[str], **options: Any) -> Any:
        seeds = [generator.initial_seed() for generator in options["generator"]]
        assert len(prompts) == len(seeds)
        return SimpleNamespace(images=[Image.new("RGB", (32, 32), (seed % 256, 0, 0)) for seed in seeds])


class FakeCache:
    """Records how it was used; ``report`` is what :func:`outcome` then tells of any pipeline."""

    report = Outcome("miss", KEY.digest, "no entry for this model yet", PARTS, {"compile unet": 1.5}, stored=True)
    explanation = Explanation(KEY, "miss", "no entry has this key", NEAREST, (Difference("machine.threads", 2, 1),))
    used: dict[str, Any]

    def __init__(self, dir: Any = None, **options: Any) -> None:
        type(self).used = {"dir": dir, **options}
        given = {name: options[name] for name in ("mode", "weights") if options.get(name)}
        self.settings = Settings.resolve(**{"dir": dir, "mode": "compile", **given})
        self._progress = options.get("progress")

    def load(self, pipe: Any, **shape: Any) -> Any:
        type(self).used["shape"] = shape
        assert self._progress is not None
        self._progress(Step("unet", "compile"))
        self._progress(Step("unet", "compile", 1.5))
        return pipe

    def explain(self, pipe: Any, **shape: Any) -> Explanation:
        type(self).used["shape"] = shape
        return self.explanation


def fake_outcome(pipe: Any) -> Outcome:
    return FakeCache.report
