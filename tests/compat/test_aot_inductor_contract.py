"""What pipevault takes from AOTInductor's runtime: each test names the touch point that a release moved."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipevault.compat import aot_inductor
from pipevault.compat.aot_inductor import GraphRunner

CPU = torch.device("cpu")


SIZE = 600
"""Of a graph that takes a tenth of a second, in which another thread can do something."""


class Products(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(SIZE))
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(12):
            x = (x @ self.weight).relu()
        return x * self.scale


def weights(factor: float) -> dict[str, torch.Tensor]:
    """Return weights with which the graph multiplies what is not negative by ``factor``."""
    return {"weight": torch.eye(SIZE), "scale": torch.full((1,), factor)}


def multiplied(runner: GraphRunner) -> float:
    """Return what the graph makes of ones."""
    [made] = runner.run([torch.ones(SIZE, SIZE)])
    assert bool((made == made[0, 0]).all())
    return made[0, 0].item()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that AOTInductor makes of :class:`Products`, with its weights outside."""
    from torch._inductor import aot_compile

    program = torch.export.export(Products(), (torch.ones(SIZE, SIZE),))
    options = {
        "aot_inductor.package": True,
        "aot_inductor.package_constants_in_so": False,
        "always_keep_tensor_constants": True,
    }
    with torch.no_grad():
        files: Any = aot_compile(program.module(check_guards=False), *program.example_inputs, options=options)
    [made] = [Path(file) for file in files if isinstance(file, str) and file.endswith(".so")]
    return Path(shutil.copy(made, tmp_path_factory.mktemp("library") / "graph.so"))


def need_c_interface(library: Path) -> None:
    if torch.__version__ < "2.13" and not aot_inductor._Native.runs(str(library)):
        pytest.skip("libraries of this torch lack a function of the C interface")
    assert aot_inductor._Native.runs(str(library)), "the C interface lost a function"


@pytest.fixture(params=["C interface", "torch's runner"])
def open_graph(
    request: pytest.FixtureRequest, library: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], GraphRunner]:
    """Return what opens the library in both ways."""
    if request.param == "torch's runner":
        monkeypatch.setattr(aot_inductor._Native, "runs", lambda library: False)
    else:
        need_c_interface(library)
    return lambda: GraphRunner(library, CPU)


@pytest.mark.compile
class TestGraphs:
    def test_a_library_is_opened_where_it_lies_and_takes_weights_from_outside(
        self, open_graph: Callable[[], GraphRunner]
    ) -> None:
        runner = open_graph()
        assert sorted(runner.constants) == ["scale", "weight"], "the constants of a library are named otherwise"
        assert not runner.is_bound
        runner.bind(weights(5.0))
        assert runner.is_bound
        assert multiplied(runner) == 5.0

    def test_it_is_pointed_at_other_weights(self, open_graph: Callable[[], GraphRunner]) -> None:
        runner = open_graph()
        for factor in (2.0, 3.0, 4.0):
            runner.bind(weights(factor))
            assert multiplied(runner) == factor
        runner.release()
        assert not runner.is_bound
        runner.bind(weights(7.0))
        assert multiplied(runner) == 7.0

    def test_a_graph_that_could_not_be_pointed_at_weights_is_pointed_at_all_of_them_later(
        self, open_graph: Callable[[], GraphRunner], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        runner = open_graph()

        def failing(tensors: Any) -> None:
            raise RuntimeError("no memory")

        monkeypatch.setattr(runner._graph, "update", failing)
        with pytest.raises(RuntimeError, match="no memory"):
            runner.bind(weights(2.0))
        assert not runner.is_bound
        runner.bind(weights(3.0))
        assert multiplied(runner) == 3.0

    def test_it_reads_the_weights_where_they_are(self, open_graph: Callable[[], GraphRunner]) -> None:
        runner, given = open_graph(), weights(2.0)
        runner.bind(given)
        given["scale"].fill_(9.0)
        assert multiplied(runner) == 9.0

    def test_two_graphs_of_one_library_have_weights_of_their_own(self, open_graph: Callable[[], GraphRunner]) -> None:
        runners = [open_graph() for _ in range(2)]
        for factor, runner in enumerate(runners):
            runner.bind(weights(float(factor)))
        assert [multiplied(runner) for runner in runners] == [0.0, 1.0]

    def test_weights_are_free_once_others_are_bound_or_the_graph_is_gone(
        self, open_graph: Callable[[], GraphRunner]
    ) -> None:
        runner = open_graph()
        watched = []
        for factor in (1.0, 2.0, 3.0):
            given = weights(factor)
            watched.append(given["weight"].untyped_storage()._weak_ref())
            runner.bind(given)
            multiplied(runner)
            del given
        free = torch.UntypedStorage._expired
        assert [free(storage) for storage in watched] == [True, True, False]
        runner.release()
        assert free(watched[-1])
        given = weights(4.0)
        watched.append(given["weight"].untyped_storage()._weak_ref())
        runner.bind(given)
        del given, runner
        gc.collect()
        assert free(watched[-1])

    def test_a_graph_that_goes_while_a_program_is_traced_leaves_nothing_in_it(
        self, open_graph: Callable[[], GraphRunner]
    ) -> None:
        class Collecting(nn.Module):
            runner: GraphRunner | None = open_graph()

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                type(self).runner = None
                return x + 1

        assert Collecting.runner is not None
        Collecting.runner.bind(weights(2.0))
        program = torch.export.export(Collecting(), (torch.ones(2),), strict=False)
        assert [node.target for node in program.graph.nodes if node.op == "call_function"] == [
            torch.ops.aten.add.Tensor
        ]

    def test_inference_tensors_are_weights_too(self, open_graph: Callable[[], GraphRunner]) -> None:
        runner = open_graph()
        with torch.inference_mode():
            runner.bind(weights(2.0))
        assert multiplied(runner) == 2.0
        runner.bind(weights(3.0))
        with torch.inference_mode():
            assert multiplied(runner) == 3.0
        runner.release()

    def test_inputs_that_it_cannot_take_are_an_error(self, open_graph: Callable[[], GraphRunner]) -> None:
        runner = open_graph()
        runner.bind(weights(2.0))
        with pytest.raises(RuntimeError):
            runner.run([])
        assert multiplied(runner) == 2.0

    def test_a_descriptor_is_a_path_that_it_is_opened_by(
        self, open_graph: Callable[[], GraphRunner], library: Path
    ) -> None:
        with library.open("rb") as file:
            runner = GraphRunner(Path(f"/proc/self/fd/{file.fileno()}"), CPU)
            runner.bind(weights(2.0))
            assert multiplied(runner) == 2.0

    def test_a_child_opens_a_graph_again_that_ran_in_a_thread_of_its_parent(
        self, open_graph: Callable[[], GraphRunner]
    ) -> None:
        runner = open_graph()
        runner.bind(weights(2.0))
        with runner.lock:  # as that thread has it
            if (child := os.fork()) == 0:
                signal.alarm(60)  # ends a child that waits for ever
                with runner.lock:
                    if not runner.is_bound:
                        runner.bind(weights(3.0))
                os._exit(int(multiplied(runner)))
            _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 3
        assert multiplied(runner) == 2.0


@pytest.mark.compile
class TestTheLockOfPython:
    def test_other_threads_run_while_a_graph_does(self, library: Path) -> None:
        need_c_interface(library)
        runner = GraphRunner(library, CPU)
        runner.bind(weights(2.0))
        thread = threading.Thread(target=runner.run, args=([torch.ones(SIZE, SIZE)],))
        turns = 0
        interval_s = sys.getswitchinterval()
        sys.setswitchinterval(1000.0)  # so a thread goes on until it gives the lock away
        try:
            thread.start()
            while thread.is_alive():
                time.sleep(0.001)
                turns += 1
        finally:
            sys.setswitchinterval(interval_s)
        assert turns > 4  # one or two, where the graph holds the lock

    def test_operators_without_a_c_interface_are_called_by_torchs_runner(self, library: Path, tmp_path: Path) -> None:
        need_c_interface(library)
        copied = Path(shutil.copy(library, tmp_path / "graph.so"))
        assert aot_inductor._Native.runs(str(copied))
        (tmp_path / "graph.json").write_text("{}")
        assert not aot_inductor._Native.runs(str(copied))

    def test_a_file_that_is_no_library_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "broken.so").write_bytes(b"no library")
        with pytest.raises(OSError, match="broken"):
            GraphRunner(tmp_path / "broken.so", CPU)
