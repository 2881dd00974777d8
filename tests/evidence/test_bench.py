"""``pipevault bench``: what is run, and what is made of the times."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pipevault.cli.app import app
from pipevault.cli.bench import rows
from pipevault.errors import BadCallError, PipevaultError, SettingsError
from pipevault.evidence import bench as benches
from pipevault.evidence.bench import ALL_WAYS, bench
from pipevault.evidence.generation_job import GenerationJob, GenerationResult
from pipevault.evidence.request import Request
from pipevault.report.plots import time_bars

RESULT = GenerationResult(
    pictures=(),
    pixels=("a",),
    warm_pixels=("a",),
    latents=None,
    noise=None,
    seconds={"import": 1.0, "open": 1.0, "ready": 0.5, "first": 2.0, "warm": 1.0},
    outcome="",
    key=None,
    device="cpu",
    threads=1,
    capability="AVX2",
    versions={},
    peak_bytes=1_000_000,
)


class Stand:
    """In place of fresh processes: the second and later runs of a way are faster, a way in ``broken`` fails."""

    def __init__(self, broken: str = "", kind: type[PipevaultError] = PipevaultError) -> None:
        self.jobs: list[tuple[str, GenerationJob]] = []
        self.broken = broken
        self.kind = kind

    def __call__(
        self, job: GenerationJob, folder: Path, *, label: str = "", timeout_s: float | None = None
    ) -> GenerationResult:
        self.jobs.append((label, job))
        if self.broken and label.startswith(self.broken):
            raise self.kind("it cannot")
        number = int(folder.name.removeprefix("run-"))
        warm = 0.5 if job.method == "frozen" else 1.0
        ready = 30.0 if number == 0 and job.method == "frozen" else number / 10
        left = "unet: it differs" if job.compile_profile == "max" else ""
        return replace(RESULT, seconds={**RESULT.seconds, "ready": ready, "warm": warm}, left_eager=left)


def test_each_way_is_run_from_nothing_and_then_again() -> None:
    stand = Stand()
    result = bench(GenerationJob("demo", Request()), runs=3, generate=stand)
    assert [one.name for one in result.measured] == list(ALL_WAYS)
    assert [label for label, _ in stand.jobs if label.startswith("eager")] == [f"eager, run {n}" for n in (1, 2, 3)]
    assert [label for label, _ in stand.jobs if label.startswith("blocks")] == [
        "blocks, nothing on disk",
        *(f"blocks, run {n}" for n in (2, 3, 4)),
    ]
    whole = next(one for one in result.measured if one.name == "whole")
    assert (whole.miss_s, whole.hit_s, whole.runs, whole.peak_bytes) == (32.0, 2.2, 3, 1_000_000)
    table = {row[0]: row[1:] for row in rows(result)}
    assert table["whole"] == ("32.0", "0.20", "2.00", "0.50", "2.20", "0.50", "1.0 MB")
    assert table["eager"][5] == "1.00"
    document = result.to_json()
    assert document["measured"][0]["seconds"]["warm"] == 1.0
    assert document["skipped"] == ()
    assert {one["name"] for one in document["measured"] if one["left_eager"]} == {"whole max"}


def test_ways_keep_their_own_folders_and_settings() -> None:
    stand = Stand()
    bench(GenerationJob("demo", Request(), jobs=2), runs=1, generate=stand)
    jobs: dict[str, list[GenerationJob]] = {}
    for label, job in stand.jobs:
        jobs.setdefault(label.partition(", nothing")[0].partition(", run")[0], []).append(job)
    assert {name: job[0].regions for name, job in jobs.items()}["blocks"] == "blocks"
    assert jobs["range"][0].load == {"dynamic": True}
    assert jobs["whole max"][0].compile_profile == "max"
    assert {job.jobs for made in jobs.values() for job in made} == {2}
    folders = [made[0].dir for name, made in jobs.items() if made[0].method == "frozen"]
    assert len(set(folders)) == len(folders)
    assert jobs["whole"][0].dir == jobs["whole"][1].dir
    cached = [job.environment["TORCHINDUCTOR_CACHE_DIR"] for job in jobs["torch.compile"]]
    assert len(set(cached)) == 1
    assert jobs["eager"][0].environment == {}
    own = {job.environment["XDG_CACHE_HOME"] for job in jobs["whole"]}
    assert len(own) == 1, "what compilers keep is not on disk before the first run"
    assert own.isdisjoint(job.environment["XDG_CACHE_HOME"] for job in jobs["blocks"])
    mega = jobs["torch.compile Mega-cache"]
    assert mega[0].artifacts is not None
    assert mega[0].artifacts == mega[1].artifacts
    assert mega[0].environment == {}, "each process has an empty cache folder of its own"
    assert GenerationJob.from_json(json.loads(json.dumps(asdict(mega[0]), default=str))) == mega[0]


def test_a_way_that_fails_is_told_and_the_others_go_on() -> None:
    result = bench(GenerationJob("demo", Request()), ways=("eager", "whole"), runs=1, generate=Stand("whole"))
    assert [one.name for one in result.measured] == ["eager"]
    assert result.skipped == (("whole", "it cannot"),)


@pytest.mark.parametrize("kind", [SettingsError, BadCallError])
def test_what_is_wrong_for_all_ways_ends_it_at_the_first(kind: type[PipevaultError]) -> None:
    stand = Stand("eager", kind)
    with pytest.raises(kind, match="it cannot"):
        bench(GenerationJob("demo", Request()), runs=1, generate=stand)
    assert len(stand.jobs) == 1


def test_a_setting_that_a_later_way_alone_brings_stops_no_other() -> None:
    stand = Stand("blocks", SettingsError)
    result = bench(GenerationJob("demo", Request()), ways=("eager", "blocks", "whole"), runs=1, generate=stand)
    assert [one.name for one in result.measured] == ["eager", "whole"]
    assert result.skipped == (("blocks", "it cannot"),)


def test_unknown_ways_and_no_runs_are_errors() -> None:
    with pytest.raises(SettingsError, match="Unknown way 'slow'"):
        bench(GenerationJob("demo", Request()), ways=("slow",), generate=Stand())
    with pytest.raises(SettingsError, match="runs must be 1 or more"):
        bench(GenerationJob("demo", Request()), runs=0, generate=Stand())


def test_the_command_shows_a_table_and_writes_a_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stood(*args: Any, **kwargs: Any) -> Any:
        return bench(*args, **{**kwargs, "generate": Stand("range")})

    monkeypatch.setattr(benches, "bench", stood)
    plot = tmp_path / "bench.svg"
    result = CliRunner().invoke(app, ["bench", "demo", "--runs", "1", "--plot", str(plot)])
    assert result.exit_code == 4, result.output
    assert "skipped range" in result.stdout
    assert "whole max, left eager" in result.stdout
    assert "whole fast, left eager" not in result.stdout
    assert "unet: it differs" in result.stdout
    assert plot.read_text().lstrip().startswith("<svg") or "<svg" in plot.read_text()
    missing = CliRunner().invoke(app, ["bench", "demo", "--plot", str(tmp_path / "none" / "bench.svg")])
    assert missing.exit_code == 2
    assert "folder that exists" in missing.stderr


def test_bars_are_the_same_for_the_same_times() -> None:
    times = {"whole": (30.0, 0.2), "blocks": (5.0, 0.2)}
    assert time_bars(times) == time_bars(times)
