"""Compiling in other processes."""

from __future__ import annotations

import os
import selectors
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import pipevault
from helpers.pipelines import FAST_BUILD, draw, stable_diffusion
from pipevault.cache import builders
from pipevault.cache.builders import Builders, environment
from pipevault.errors import InterruptedBuildError
from pipevault.files import memory
from pipevault.graphs.part import FrozenPart
from pipevault.graphs.state import PartState
from pipevault.graphs.views import outline, with_empty_weights
from pipevault.store.vault import Vault


def artifacts(root: Path) -> dict[str, list[str]]:
    found = (m for m in Vault.open(root).manifests() if m.key.kind == "graph")
    return {m.info["signature_text"]: [ref.digest.hex for ref in m.artifacts] for m in found}


def test_two_processes_make_the_bytes_of_one(frozen_vault: Path, tmp_path: Path) -> None:
    pipe = stable_diffusion(tmp_path / "tokenizer")
    steps: list[Any] = []
    cache = pipevault.PipelineCache(tmp_path / "vault", build_config=FAST_BUILD, jobs=2, progress=steps.append)
    cache.load(pipe, batch_size=1)
    assert artifacts(tmp_path / "vault") == artifacts(frozen_vault)
    begun = [step for step in steps if step.action == "compile" and step.seconds is None]
    assert begun[0].detail == "3 graphs"
    assert [(step.part, step.position) for step in begun[1:]] == [
        ("unet", "1 of 3"),
        ("vae.decoder", "2 of 3"),
        ("text_encoder", "3 of 3"),
    ]
    order = [(step.action, step.part) for step in steps if step.seconds is None and step.part]
    assert order.index(("compile", "unet")) < order.index(("capture", "vae.decoder")), "it began before all were seen"
    plain = draw(stable_diffusion(tmp_path / "tokenizer"))
    torch.testing.assert_close(draw(pipe), plain, atol=1e-4, rtol=1e-4)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(256, 256)
        self.second = nn.Linear(256, 256)
        self.second.weight = self.first.weight
        self.alias = self.first
        self.register_buffer("table", torch.arange(100_000.0).reshape(1000, 100).t())
        self.small = nn.Parameter(torch.ones(3))
        self.again = nn.Parameter(self.first.weight.data)


def test_an_outline_has_the_layout_of_a_module_and_none_of_its_weights() -> None:
    module = Tied()
    sent = outline(module)
    assert sent is not module
    assert type(sent) is Tied
    assert sent.first.weight.is_meta
    assert sent.table.is_meta
    assert torch.equal(sent.small, module.small)
    assert not module.first.weight.is_meta, "the module itself stays what it was"
    there = with_empty_weights(sent)
    assert there.first.weight is there.second.weight
    assert there.again is there.first.weight, "what shares its memory is tied there"
    assert there.alias is there.first
    for (name, ours), (_, theirs) in zip(module.state_dict().items(), there.state_dict().items(), strict=True):
        assert (ours.shape, ours.stride(), ours.dtype) == (theirs.shape, theirs.stride(), theirs.dtype), name
        assert theirs.device.type == "cpu"


class Mixed(nn.Module):
    """Takes transposed tensors: torch computes their products in two ways, as weights ask for gradients or not."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.mix = nn.Linear(features, features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mix(x.transpose(1, 2)).transpose(1, 2)


class MixedParts:
    def __init__(self, *, gradients: bool) -> None:
        torch.manual_seed(0)
        self.unet = Mixed(256).eval().requires_grad_(gradients)  # large enough to be sent without its weights
        self.transformer = Mixed(16).eval().requires_grad_(gradients)

    def __call__(self, prompt: str = "", generator: torch.Generator | None = None) -> torch.Tensor:
        with torch.no_grad():
            mixed = self.unet(torch.randn(1, 256, 16, generator=generator))
            return self.transformer(mixed.transpose(1, 2)).transpose(1, 2)


@pytest.mark.compile
def test_gradients_of_weights_change_no_graph_here_or_in_another_process(tmp_path: Path) -> None:
    made = []
    for number, (gradients, jobs) in enumerate([(True, 1), (False, 1), (True, 2), (False, 2)]):
        vault = tmp_path / str(number)
        cache = pipevault.PipelineCache(vault, build_config=FAST_BUILD, jobs=jobs)
        pipe = cache.load(MixedParts(gradients=gradients), batch_size=1)
        assert all(weight.requires_grad == gradients for weight in pipe.unet.parameters())
        made.append(artifacts(vault))
    assert len(made[0]) == 2
    assert made == [made[0]] * 4


class Local(nn.Module):
    def __init__(self, factor: Any) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)
        self.factor = factor

    def forward(self, x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        return x - self.factor(self.mix(x)) * step


class TwoParts:
    """Its parts hold a function without a name, which cannot be sent to another process."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.unet = Local(lambda x: x * 0.1).eval()
        self.transformer = Local(lambda x: x * 0.2).eval()

    def __call__(self, prompt: str = "", generator: torch.Generator | None = None) -> torch.Tensor:
        with torch.no_grad():
            x = torch.randn(2, 8, generator=generator)
            return self.transformer(self.unet(x, torch.tensor(1.0)), torch.tensor(2.0))


@pytest.mark.compile
def test_what_cannot_be_sent_is_compiled_here(tmp_path: Path) -> None:
    pipe = TwoParts()
    pipevault.PipelineCache(tmp_path / "vault", build_config=FAST_BUILD, jobs=2).load(pipe, batch_size=1)
    assert isinstance(pipe.unet, FrozenPart)
    assert isinstance(pipe.transformer, FrozenPart)
    assert pipevault.outcome(pipe).status == "miss"


@pytest.mark.compile
def test_what_is_compiled_is_let_go_when_another_part_cannot_be_frozen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = stable_diffusion(tmp_path / "tokenizer")
    begin, abandon = PartState.begin_ahead, Builders.abandon
    at_work: list[str] = []

    def refused(self: PartState, *args: Any) -> Any:
        if self.name == "vae.decoder":
            raise InterruptedBuildError("no memory", self.name)
        return begin(self, *args)

    def noted(self: Builders) -> None:
        abandon(self)
        at_work.extend(work.state.name for works in self._busy.values() for work in works if work)
        assert all(builder._process.returncode is not None for builder in self._busy)

    monkeypatch.setattr(PartState, "begin_ahead", refused)
    monkeypatch.setattr(Builders, "abandon", noted)
    with pytest.raises(InterruptedBuildError, match="no memory"):
        pipevault.PipelineCache(tmp_path / "vault", build_config=FAST_BUILD, jobs=2).load(pipe, batch_size=1)
    assert at_work == ["unet"]
    assert artifacts(tmp_path / "vault") == {}


@pytest.mark.compile
def test_a_process_that_is_killed_is_named_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = builders._Builder.send

    def killed(self: Any, job: Path) -> None:
        send(self, job)
        while job.exists() and self.is_alive():  # until it has begun
            time.sleep(0.01)
        self._process.kill()

    monkeypatch.setattr(builders._Builder, "send", killed)
    pipe = stable_diffusion(tmp_path / "tokenizer")
    cache = pipevault.PipelineCache(tmp_path / "vault", build_config=FAST_BUILD, jobs=2)
    with pytest.raises(InterruptedBuildError, match=r"compiled unet ended with -9.*set jobs to 1"):
        cache.load(pipe, batch_size=1)
    assert len(artifacts(tmp_path / "vault")) == 2, "the graphs of the other parts were stored"
    assert not isinstance(pipe.unet, FrozenPart)
    monkeypatch.undo()
    cache.load(pipe, batch_size=1)
    assert len(artifacts(tmp_path / "vault")) == 3


def test_no_process_is_started_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builders, "available_memory_bytes", lambda: 1_000_000_000)
    with Builders(4, "repeatable") as pool:
        assert not pool._has_room()
        monkeypatch.setattr(builders, "available_memory_bytes", lambda: 4_000_000_000)
        assert pool._has_room()
        pool.peak_bytes = 3_000_000_000
        assert not pool._has_room()
    with Builders(1, "repeatable") as pool:
        assert not pool._has_room()


def test_memory_is_that_of_the_container_if_that_is_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    whole = memory.available_memory_bytes()
    assert 0 < whole < 1 << 50
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    assert memory.available_memory_bytes() == 600_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_memory_bytes() > 600_000
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "none")
    assert memory.available_memory_bytes() > 1 << 60


def test_an_estimate_comes_from_earlier_graphs() -> None:
    assert Builders(2, "repeatable").estimate(3) == "3 graphs"
    assert Builders(2, "repeatable", 10.0).estimate(3) == "3 graphs, about 20 s as earlier ones took"
    assert Builders(2, "repeatable", 10.0).estimate(1) == "1 graph, about 10 s as earlier ones took"


def test_another_process_finds_the_modules_of_this_one() -> None:
    assert str(Path(__file__).parents[1]) in environment()["PYTHONPATH"].split(os.pathsep)


class Stub:
    """In place of another process: its replies are what the test writes."""

    def __init__(self, send: Callable[[Path], None] = lambda job: None) -> None:
        self.send = send
        reading, self._writing = os.pipe()
        self.replies = os.fdopen(reading, "rb", buffering=0)

    def reply(self, text: bytes) -> None:
        os.write(self._writing, text)

    def end(self) -> None:
        os.close(self._writing)

    def receive(self) -> bool:
        return bool(self.replies.readline())

    def exit_code(self) -> int:
        return -9

    def is_alive(self) -> bool:
        return False


class Ended:
    """In place of work: remembers what came of it."""

    def __init__(self, folder: Path) -> None:
        self.pending = SimpleNamespace(folder=folder)
        self.job = folder / "job-0.pt"
        self.state = SimpleNamespace(name="unet")
        self.error: Exception | None = None
        self.checks_to_prepare = 2
        self.on_prepared: Callable[[], None] = lambda: None

    def prepare_check(self) -> bool:
        if self.checks_to_prepare == 0:
            self.on_prepared()
            return False
        self.checks_to_prepare -= 1
        return True

    def end(self, build: Any) -> None:
        try:
            build()
        except InterruptedBuildError as error:
            self.error = error


@pytest.mark.parametrize("content", [None, b"", b"\x80\x04"])
def test_a_process_that_ends_idle_or_half_way_through_a_result(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / builders.RESULT_FILE).write_bytes(content)
    idle, busy, work = Stub(), Stub(), Ended(tmp_path)
    with Builders(3, "repeatable") as pool:
        for stub in (idle, busy):
            pool._selector.register(stub.replies, selectors.EVENT_READ, stub)
        pool._idle, pool._busy = [idle], {busy: [work]}  # type: ignore[list-item,dict-item]
        idle.end()
        busy.reply(b"done\n") if content is not None else busy.end()
        while pool._busy:
            pool._receive(wait=True)
        pool._receive(wait=False)
        assert isinstance(work.error, InterruptedBuildError)
        assert "compiled unet ended with -9" in str(work.error)
        assert idle not in pool._idle or content is None


def test_eager_code_to_compare_with_runs_while_another_process_compiles(tmp_path: Path) -> None:
    (tmp_path / builders.RESULT_FILE).write_bytes(b"")
    busy, work = Stub(), Ended(tmp_path)
    with Builders(3, "repeatable") as pool:
        pool._selector.register(busy.replies, selectors.EVENT_READ, busy)
        pool._busy = {busy: [work]}  # type: ignore[dict-item,list-item]
        work.on_prepared = lambda: busy.reply(b"done\n")  # so that this ends only where all was prepared before
        pool.build_all()
    assert work.checks_to_prepare == 0
    assert isinstance(work.error, InterruptedBuildError)


@pytest.mark.parametrize(("jobs", "sent", "kept"), [(1, 0, 3), (2, 1, 2), (4, 2, 1)])
def test_work_is_sent_as_it_comes_and_the_last_is_left_for_this_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, jobs: int, sent: int, kept: int
) -> None:
    monkeypatch.setattr(builders, "available_memory_bytes", lambda: 1 << 40)

    def send(work: Any) -> bool:
        busy: Any = Stub()
        pool._busy[busy] = [work]
        return True

    with Builders(jobs, "repeatable") as pool:
        monkeypatch.setattr(pool, "_send", send)
        for number in range(3):
            pool.offer(Ended(tmp_path), more=2 - number)  # type: ignore[arg-type]
        assert (len(pool._busy), len(pool._waiting)) == (sent, kept)
        pool._busy.clear()


def test_the_next_graph_is_sent_before_one_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / builders.RESULT_FILE).write_bytes(b"")
    monkeypatch.setattr(builders, "available_memory_bytes", lambda: 1 << 40)
    busy, work, other = Stub(), Ended(tmp_path), Ended(tmp_path)
    events: list[Any] = []
    with Builders(2, "repeatable") as pool:
        pool._selector.register(busy.replies, selectors.EVENT_READ, busy)
        pool._busy, pool._waiting = {busy: [work]}, [other]  # type: ignore[dict-item,list-item]
        monkeypatch.setattr(pool, "_send", lambda sent: events.append(sent) or True)
        monkeypatch.setattr(work, "end", lambda build: events.append("checked"))
        busy.reply(b"done\n")
        pool._receive(wait=True)
    assert events == [other, "checked"]


class Queue:
    """One other process that is busy with ``first``, and a pool whose work is what tests say."""

    def __init__(self, pool: Builders, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.pool, self.events = pool, list[str]()
        self.busy: Any = Stub()
        self.works = {name: self._work(name, tmp_path) for name in ("first", "second", "third", "fourth")}
        pool._selector.register(self.busy.replies, selectors.EVENT_READ, self.busy)
        pool._busy = {self.busy: [self.works["first"]]}  # type: ignore[dict-item]
        monkeypatch.setattr(builders, "available_memory_bytes", lambda: 1 << 40)
        monkeypatch.setattr(pool, "_send", self._send)

    def _work(self, name: str, tmp_path: Path) -> Any:
        folder = tmp_path / name
        folder.mkdir()
        (folder / builders.RESULT_FILE).write_bytes(b"")
        work: Any = Ended(folder)
        work.start = lambda: self.events.append(f"{name} begins there")
        work.end = lambda build: self.events.append(f"{name} is checked")
        work.build_here = lambda: self.events.append(f"{name} here")
        return work

    def _send(self, work: Any, to: Any = None) -> bool:
        work.job = work.pending.folder / "job-0.pt"
        work.job.touch()
        self.events.append(f"{work.pending.folder.name} {'ahead' if to else 'sent'}")
        self.pool._busy.setdefault(to or self.busy, []).append(work)
        return True

    def wait(self, *names: str) -> None:
        self.pool._waiting = [self.works[name] for name in names]

    def here(self, name: str, *replies: bytes) -> None:
        """While this process compiles ``name`` the other one answers."""

        def build() -> None:
            self.events.append(f"{name} here")
            for reply in replies:
                self.busy.reply(reply)

        self.works[name].build_here = build


def test_another_process_has_its_next_graph_before_this_one_compiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Builders(2, "repeatable") as pool:
        queue = Queue(pool, monkeypatch, tmp_path)
        queue.wait("second", "third")
        queue.here("second", b"done\ndone\n")
        pool.build_all()
    assert queue.events == [
        "third ahead",
        "second here",
        "third begins there",
        "first is checked",
        "third is checked",
    ]


def test_a_graph_that_was_sent_ahead_and_not_begun_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Builders(2, "repeatable") as pool:
        queue = Queue(pool, monkeypatch, tmp_path)
        queue.wait("second", "third")
        queue.here("third", b"done\ndone\n")  # to the second line the other process has nothing to do
        pool.build_all()
    assert queue.events == ["third ahead", "second here", "third here", "first is checked"]
    assert builders._take(queue.works["third"].job) is None, "only one process has it"


def test_a_graph_that_was_begun_is_not_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Builders(2, "repeatable") as pool:
        queue = Queue(pool, monkeypatch, tmp_path)
        queue.wait("second", "third")
        queue.here("second")
        work = queue.works["first"]
        prepare = work.prepare_check

        def idle() -> bool:
            queue.busy.reply(b"done\ndone\n")
            return bool(prepare())

        work.prepare_check = idle
        monkeypatch.setattr(builders, "_take", lambda folder: None)
        pool.build_all()
    assert "third here" not in queue.events
    assert queue.events[-1] == "third is checked"


def test_a_process_that_is_done_takes_over_from_one_that_has_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Builders(3, "repeatable") as pool:
        queue = Queue(pool, monkeypatch, tmp_path)
        other: Any = Stub()
        pool._selector.register(other.replies, selectors.EVENT_READ, other)
        for name in ("second", "third"):
            queue._send(queue.works[name], queue.busy)
        pool._busy[other] = [queue.works["fourth"]]
        queue.events.clear()
        other.reply(b"done\n")
        pool._receive(wait=True)
        assert [work and work.pending.folder.name for work in pool._busy[queue.busy]] == [
            "first",
            "second",
            None,
            "third",
        ]
        assert queue.events == ["third sent", "fourth is checked"]
        pool._busy.clear()


def test_few_graphs_are_sent_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Builders(2, "repeatable") as pool:
        queue = Queue(pool, monkeypatch, tmp_path)
        queue.wait("second", "third", "fourth")
        monkeypatch.setattr(builders, "MAX_AHEAD", 1)
        pool._send_ahead()
        assert queue.events == ["second ahead"]
        pool._busy.clear()


def test_a_process_that_dies_gives_back_what_it_had_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Builders(2, "repeatable") as pool:
        queue = Queue(pool, monkeypatch, tmp_path)
        queue.wait("second", "third")
        queue.works["second"].build_here = queue.busy.end
        monkeypatch.setattr(pool, "_taken_back", lambda: None)
        pool.build_all()
    assert queue.events == ["third ahead", "first is checked", "third here"]


def test_a_process_that_ends_before_it_begins_leaves_its_work_to_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Builders(2, "repeatable") as pool:
        queue = Queue(pool, monkeypatch, tmp_path)
        first = queue.works["first"]
        first.job.touch()
        queue.wait("second")
        queue.works["second"].build_here = queue.busy.end
        pool.build_all()
    assert queue.events == ["first here"]


def test_a_graph_is_sent_under_a_new_name_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that had it before knows the old name only, and must not take it from the one that has it now."""
    sent: list[Path] = []
    monkeypatch.setattr(torch, "save", lambda job, path: path.touch())
    monkeypatch.setattr(builders, "outline", lambda module: module)
    monkeypatch.setattr(builders, "replace", lambda build, **changed: build)
    build: Any = SimpleNamespace(
        options=SimpleNamespace(weights="bound"),
        module=nn.Linear(2, 2),
        program=SimpleNamespace(values=lambda leaves: []),
        leaves=[],
    )
    work: Any = SimpleNamespace(pending=SimpleNamespace(folder=tmp_path), build=build, start=lambda: None)
    with Builders(3, "repeatable") as pool:
        pool._idle = [Stub(sent.append), Stub(sent.append)]  # type: ignore[list-item]
        assert pool._send(work)
        assert builders._take(work.job) is not None
        assert pool._send(work)
        pool._busy.clear()
    assert len(set(sent)) == 2
    assert builders._take(sent[0]) is None
    assert builders._take(sent[1]) is not None


@pytest.mark.parametrize(("count", "is_one_of_many"), [(5, False), (6, True)])
def test_headers_are_made_for_many_graphs(tmp_path: Path, count: int, is_one_of_many: bool) -> None:
    works: list[Any] = [Ended(tmp_path) for _ in range(count)]
    with Builders(1, "repeatable") as pool:
        for number, work in enumerate(works):
            pool.offer(work, more=count - 1 - number)
    assert {work.is_one_of_many for work in works} == {is_one_of_many}


def test_a_process_that_is_gone_takes_no_work_and_stops_quietly(tmp_path: Path) -> None:
    builder = builders._Builder()
    os.kill(builder._process.pid, signal.SIGKILL)
    builder._process.wait()
    builder.send(tmp_path)
    assert not builder.receive()
    builder.stop()
