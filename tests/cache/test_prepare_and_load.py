"""``prepare`` and ``load`` of a cache are one thing, in subclasses too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import pipevault
from helpers.loaded import Paused
from pipevault.runtime import construct


class Base(pipevault.PipelineCache):
    def _prepare(self, pipe: Any, *_: Any, **__: Any) -> None:
        pipe.seen = [*getattr(pipe, "seen", []), "prepared"]


class Older(Base):
    def load(self, pipe: Any, **options: Any) -> Any:
        pipe.seen = ["load"]
        return super().load(pipe, **options)


class Newer(Base):
    def prepare(self, pipe: Any, **options: Any) -> Any:
        pipe.seen = ["prepare"]
        return super().prepare(pipe, **options)


class NewerOfOlder(Older):
    def prepare(self, pipe: Any, **options: Any) -> Any:
        pipe = super().load(pipe, **options)
        pipe.seen = [*pipe.seen, "and more"]
        return pipe


class Mixin:
    def load(self, pipe: Any, **options: Any) -> Any:
        pipe.seen = ["mixed in"]
        return pipe


class Mixed(Mixin, Base):
    pass


class Both(Base):
    def prepare(self, pipe: Any, **options: Any) -> Any:
        pipe.seen = ["prepare"]
        return pipe

    def load(self, pipe: Any, **options: Any) -> Any:
        pipe.seen = ["load"]
        return pipe


@pytest.mark.parametrize("name", ["prepare", "load"])
@pytest.mark.parametrize(
    ("cache", "seen"),
    [
        (Base, ["prepared"]),
        (Older, ["load", "prepared"]),
        (Newer, ["prepare", "prepared"]),
        (NewerOfOlder, ["load", "prepared", "and more"]),
        (Mixed, ["mixed in"]),
    ],
)
def test_what_overrides_one_name_overrides_the_other(
    tmp_path: Path, cache: type[pipevault.PipelineCache], seen: list[str], name: str
) -> None:
    assert getattr(cache(tmp_path), name)(Paused()).seen == seen


def test_a_class_with_both_names_has_what_it_says(tmp_path: Path) -> None:
    assert Both(tmp_path).prepare(Paused()).seen == ["prepare"]
    assert Both(tmp_path).load(Paused()).seen == ["load"]


@pytest.mark.parametrize(("cache", "seen"), [(Older, ["load", "prepared"]), (Newer, ["prepare", "prepared"])])
def test_from_pretrained_takes_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: type[pipevault.PipelineCache], seen: list[str]
) -> None:
    class Opened(Paused):
        @classmethod
        def from_pretrained(cls, path: Path) -> Opened:
            return cls()

    monkeypatch.setattr(construct, "PipelineCache", cache)
    assert pipevault.from_pretrained(Opened, tmp_path, dir=tmp_path).seen == seen  # type: ignore[attr-defined]
