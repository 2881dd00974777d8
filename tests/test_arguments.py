"""The arguments of ``PipelineCache``, ``prepare`` and ``from_pretrained``: settings, their fields, and other names."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import pipevault
from helpers.pipelines import PlainPipeline
from pipevault.calls.call import CallShape
from pipevault.calls.call_shapes import LoadFields, ShapeFields
from pipevault.errors import SettingsError
from pipevault.settings import Settings
from pipevault.settings.arguments import SettingsFields, field_names


class Pretrained(PlainPipeline):
    """A class that takes the option ``variant`` and no other."""

    given: str | None = None

    @classmethod
    def from_pretrained(cls, path: Any, variant: str | None = None) -> Pretrained:
        pipe = cls()
        pipe.given = variant
        return pipe


def construct(**arguments: Any) -> Any:
    return pipevault.from_pretrained(Pretrained, "model", **{"mode": "off", **arguments})


def test_the_fields_are_those_of_the_dataclasses() -> None:
    assert set(field_names(SettingsFields)) == {field.name for field in fields(Settings)} - {"dir"} | {"determinism"}
    assert field_names(ShapeFields) == (*(field.name for field in fields(CallShape)), "dynamic")


@pytest.mark.parametrize(
    ("function", "groups"),
    [
        (pipevault.PipelineCache, [SettingsFields]),
        (pipevault.from_pretrained, [SettingsFields, LoadFields, ShapeFields]),
        (pipevault.PipelineCache.prepare, [ShapeFields]),
        (pipevault.PipelineCache.load, [ShapeFields]),
        (pipevault.PipelineCache.explain, [ShapeFields]),
        (pipevault.PipelineCache.key, [ShapeFields]),
    ],
)
def test_help_shows_each_of_them(function: Callable[..., Any], groups: list[type]) -> None:
    shown = inspect.signature(function).parameters
    assert {name for group in groups for name in field_names(group)} <= set(shown)
    assert {"fields", "shape"}.isdisjoint(shown)
    assert ("options" in shown) == (function is pipevault.from_pretrained)


class TestSettings:
    def test_a_whole_one(self, tmp_path: Path) -> None:
        settings = Settings(tmp_path, mode="off", jobs=3)
        assert pipevault.PipelineCache(settings=settings).settings is settings
        assert pipevault.status(pipevault.from_pretrained(Pretrained, "model", settings=settings)).status == "off"

    @pytest.mark.parametrize("field", [{"dir": "elsewhere"}, {"jobs": 2}, {"determinism": "strict"}])
    def test_not_with_fields(self, tmp_path: Path, field: dict[str, Any]) -> None:
        with pytest.raises(SettingsError, match=f"settings= and {next(iter(field))}= are both given"):
            pipevault.PipelineCache(settings=Settings(tmp_path), **field)

    def test_a_field_of_none_is_left_out(self, tmp_path: Path) -> None:
        settings = Settings(tmp_path, mode="off")
        assert pipevault.PipelineCache(settings=settings, jobs=None).settings is settings
        assert pipevault.PipelineCache(tmp_path, mode="off", jobs=None).settings.jobs == 0


class TestDeterminism:
    def test_it_is_another_name_of_level(self, tmp_path: Path) -> None:
        assert pipevault.PipelineCache(tmp_path, mode="off", determinism="strict").settings.level == "strict"
        both = pipevault.PipelineCache(tmp_path, mode="off", determinism="strict", level="strict")
        assert both.settings.level == "strict"

    def test_two_different_ones(self, tmp_path: Path) -> None:
        with pytest.raises(SettingsError, match="level is 'off' and determinism is 'strict'"):
            pipevault.PipelineCache(tmp_path, mode="off", determinism="strict", level="off")
        with pytest.raises(SettingsError, match="Give one of them"):
            construct(dir=tmp_path, determinism="strict", level="off")

    def test_an_unknown_one_is_told_like_an_unknown_level(self, tmp_path: Path) -> None:
        with pytest.raises(pipevault.errors.UnknownLevelError, match="'firm'"):
            construct(dir=tmp_path, determinism="firm")


class TestWrongNames:
    def test_of_a_setting(self, tmp_path: Path) -> None:
        with pytest.raises(SettingsError, match=r"Unknown setting job\. Did you mean jobs\?"):
            pipevault.PipelineCache(tmp_path, job=2)  # type: ignore[call-arg]

    def test_of_a_size(self, tmp_path: Path) -> None:
        cache = pipevault.PipelineCache(tmp_path, mode="off")
        for function in (cache.prepare, cache.explain, cache.key):
            with pytest.raises(SettingsError, match=r"hieght\. Did you mean height\?"):
                function(PlainPipeline(), hieght=8)  # type: ignore[call-arg]

    @pytest.mark.parametrize(
        ("name", "nearest"), [("tier", "tiers"), ("hight", "height"), ("determinsm", "determinism")]
    )
    def test_of_an_option(self, tmp_path: Path, name: str, nearest: str) -> None:
        with pytest.raises(SettingsError, match=rf"Unknown option {name}\. Did you mean {nearest}\?"):
            construct(dir=tmp_path, **{name: 8})

    def test_other_options_go_to_the_pipeline_and_its_components_are_no_slips(self, tmp_path: Path) -> None:
        assert construct(dir=tmp_path, variant="fp16").given == "fp16"

        class WithPart(Pretrained):
            def __init__(self, shape: int = 0) -> None:
                super().__init__()
                self.shape = shape

            @classmethod
            def from_pretrained(cls, path: Any, variant: str | None = None, shape: int = 0) -> WithPart:
                return cls(shape)

        assert pipevault.from_pretrained(WithPart, "model", dir=tmp_path, mode="off", shape=3).shape == 3


class TestOtherNames:
    def test_load_is_prepare(self, tmp_path: Path) -> None:
        assert pipevault.PipelineCache.load is pipevault.PipelineCache.prepare
        pipe = pipevault.PipelineCache(tmp_path, mode="off").prepare(PlainPipeline(), height=8)
        assert pipevault.status(pipe).status == "off"

    def test_outcome_is_status(self) -> None:
        assert pipevault.outcome is pipevault.status
        assert {"outcome", "status"} <= set(pipevault.__all__)
