"""What a part does with a call: policies, refusals, failures of the moment, and graphs for other weights."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from helpers.graph_parts import frozen, graphs_of, refusals_of, uses_of
from pipevault.errors import (
    CannotFreezeError,
    ChangedPartError,
    CompilerMissingError,
    InterruptedBuildError,
    NotFiniteError,
    TrainingModeError,
    UnfrozenCallError,
)
from pipevault.graphs import freezing, inductor
from pipevault.graphs.part import part_state, unfrozen
from pipevault.graphs.state import GENERATING, MAX_VALUES

X = torch.linspace(-1, 1, 32).reshape(2, 16)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, scale: float = 1.0, other: Any = None) -> torch.Tensor:
        return torch.tanh(self.mix(x)) * scale


@pytest.fixture(scope="module")
def small_part() -> Any:
    part = frozen(Small())
    with torch.no_grad():
        part(X, scale=2.0)
    return part


@pytest.fixture
def small(small_part: Any) -> Iterator[Any]:
    """A part with one graph; its options and its counts are given back."""
    state = part_state(small_part)
    options = state.options
    state.uses.clear()
    state.start_listing()
    state._told.clear()
    yield small_part
    state.options, state.trial, state.observer = options, None, None
    state._failed.clear()


def set_policy(part: Any, policy: str, **options: Any) -> None:
    state = part_state(part)
    state.options = replace(state.options, policy=policy, **options)


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What became of calls; that a freeze begins, which may take minutes, is a line of its own."""
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    return [text for text in told if not text.startswith("freezing ")]


class TestPolicies:
    @pytest.mark.compile
    @pytest.mark.parametrize("policy", ["compile", "eager", "error", "background"])
    def test_a_call_that_has_a_graph_runs_it(self, small: Any, policy: str) -> None:
        set_policy(small, policy)
        torch.testing.assert_close(small(X, scale=3.0), unfrozen(small)(X, scale=3.0))
        assert uses_of(small) == {"frozen": 1}

    def test_with_off_no_graph_runs_and_gradients_flow(self, small: Any) -> None:
        set_policy(small, "off")
        with torch.enable_grad():
            output = small(X, scale=2.0)
        assert output.requires_grad
        assert uses_of(small) == {}

    def test_with_eager_unknown_calls_run_and_are_told_once(self, small: Any, caplog: pytest.LogCaptureFixture) -> None:
        set_policy(small, "eager")
        for _ in range(3):
            torch.testing.assert_close(small(X[:1]), unfrozen(small)(X[:1]))
        assert uses_of(small) == {"eager": 3}
        (text,) = warnings_in(caplog)
        assert text == "Small runs eagerly for float32[1,16]: it has no graph (on_unfrozen is 'eager')"
        assert list(part_state(small).unstored.values()) == ["it has no graph (on_unfrozen is 'eager')"]

    def test_with_error_the_message_says_what_was_called_what_is_frozen_and_what_to_do(self, small: Any) -> None:
        set_policy(small, "error", freeze_hint="Run pipevault prewarm")
        with pytest.raises(UnfrozenCallError) as caught:
            small(X[:1], scale=2.0)
        assert str(caught.value) == (
            "Small was called with a signature that no frozen graph has.\n"
            "  Called: float32[1,16], scale=float.\n"
            "  Frozen: float32[2,16], scale=float.\n"
            "Run pipevault prewarm, or set on_unfrozen='eager' to run such calls uncompiled."
        )
        assert uses_of(small) == {}

    def test_the_message_reads_as_sentences_in_one_line_too(self) -> None:
        part = frozen(Small())
        set_policy(part, "error", freeze_hint="Run pipevault prewarm")
        with pytest.raises(UnfrozenCallError) as caught:
            part(X[:1])
        assert " ".join(str(caught.value).split()) == (
            "Small was called with a signature that no frozen graph has. Called: float32[1,16]. "
            "Run pipevault prewarm, or set on_unfrozen='eager' to run such calls uncompiled."
        )

    def test_with_background_another_process_is_asked_until_it_says_no_for_good(self, small: Any) -> None:
        asked: list[str] = []

        def background(state: Any, args: Any, kwargs: Any) -> tuple[str, bool]:
            asked.append(state.name)
            return f"answer {len(asked)}", len(asked) == 2

        set_policy(small, "background", background=background)
        for _ in range(4):
            torch.testing.assert_close(small(X[:1]), unfrozen(small)(X[:1]))
        assert asked == ["Small", "Small"]
        assert uses_of(small) == {"eager": 4}
        assert list(part_state(small).unstored.values()) == ["answer 2"]

    @pytest.mark.parametrize("policy", ["compile", "error", "background"])
    def test_an_argument_that_no_graph_takes_runs_eagerly(
        self, small: Any, policy: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        set_policy(small, policy)
        small(X, other=object())
        assert uses_of(small) == {"eager": 1}
        assert "argument 1.other is a builtins.object" in warnings_in(caplog)[0]

    @pytest.mark.parametrize("policy", ["compile", "error", "background"])
    def test_a_call_that_no_loaded_pipeline_makes_is_not_frozen(self, small: Any, policy: str) -> None:
        looked: list[str] = []
        set_policy(small, policy, guard=looked.append)
        small(X[:1])
        assert looked == ["Small"]
        assert uses_of(small) == {"eager": 1}
        small(X, scale=2.0)
        assert uses_of(small) == {"eager": 1, "frozen": 1}

    def test_the_guard_is_not_asked_within_a_pipelines_own_call(
        self, small: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        set_policy(small, "error", guard=lambda name: pytest.fail("asked"))
        monkeypatch.setattr(GENERATING, "parts", frozenset({id(part_state(small))}))
        small(X, scale=2.0)
        assert uses_of(small) == {"frozen": 1}

    def test_an_observer_sees_frozen_and_eager_calls(self, small: Any) -> None:
        seen: list[tuple[str, int, torch.Size]] = []
        set_policy(small, "eager")
        part_state(small).observer = lambda name, tensors, output: seen.append((name, len(tensors), output.shape))
        small(X, scale=2.0)
        small(X[:1])
        assert seen == [("Small", 1, torch.Size([2, 16])), ("Small", 1, torch.Size([1, 16]))]


class Drawing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand(16)


class Adding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.calls.add_(1)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * self.calls


class Modes(nn.Module):
    def forward(self, x: torch.Tensor, mode: int = 0) -> torch.Tensor:
        return x * [1.0, 2.0][mode % 2]


class TestRefusals:
    @pytest.mark.parametrize(
        ("make", "reason"),
        [(Drawing, "draws random numbers"), (Adding, "changes its tensor calls"), (Counting, "changes with each call")],
    )
    def test_a_refused_part_computes_what_its_eager_twin_does_and_is_told_once(
        self, make: Callable[[], nn.Module], reason: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        part, eager = frozen(make()), make()
        torch.manual_seed(3)
        expected = [eager(X) for _ in range(3)]
        torch.manual_seed(3)
        actual = [part(X) for _ in range(3)]
        torch.testing.assert_close(actual, expected)
        assert uses_of(part) == {"eager": 3}
        (text,) = warnings_in(caplog)
        assert f"{make.__name__} runs eagerly for float32[2,16]: it cannot be frozen: " in text
        assert reason in text
        (refusal,) = refusals_of(part)
        assert reason in refusal
        assert graphs_of(part) == 0

    def test_a_part_that_asks_for_graph_after_graph_runs_eagerly_from_then_on(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made: list[str] = []

        def build(*args: Any, **kwargs: Any) -> Any:
            made.append("")
            raise CannotFreezeError("only the count is of interest")

        part = frozen(Modes())
        state = part_state(part)
        call = freezing.describe_call((X,), {"mode": 1})  # type: ignore[attr-defined]
        for mode in range(MAX_VALUES):
            signature = call.signature.fix([1], (X, mode + 100))
            state.table.add(freezing_kept(signature))
        monkeypatch.setattr(inductor, "build_graph", build)
        torch.testing.assert_close(part(X, mode=1), X * 2.0)
        assert made == []
        assert "vary with every call" in refusals_of(part)[0]

    def test_one_refusal_counts_for_every_value_of_the_numbers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def build(*args: Any, **kwargs: Any) -> Any:
            raise CannotFreezeError("no")

        monkeypatch.setattr(inductor, "build_graph", build)
        part = frozen(Modes())
        part(X, mode=1)
        monkeypatch.setattr(freezing, "observe", lambda *args: pytest.fail("tried again"))
        torch.testing.assert_close(part(X, mode=2), X)
        assert uses_of(part) == {"eager": 2}


def freezing_kept(signature: Any) -> Any:
    from pipevault.graphs.frozen import GraphDocument
    from pipevault.graphs.program import Results
    from pipevault.graphs.table import ShelfItem

    document = GraphDocument(signature, "", "", None, {}, (), Results((), ""), (), "", (), {}, {})
    return ShelfItem(signature, signature.digest.hex, document)


class TestFailuresOfTheMoment:
    def test_an_interrupted_build_runs_eagerly_and_is_no_refusal(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        tries: list[int] = []

        def build(*args: Any, **kwargs: Any) -> Any:
            tries.append(1)
            raise InterruptedBuildError("AOTInductor was interrupted: Killed signal terminated program cc1plus")

        monkeypatch.setattr(inductor, "build_graph", build)
        part = frozen(Small())
        for _ in range(3):
            torch.testing.assert_close(part(X), unfrozen(part)(X))
        assert tries == [1]
        assert refusals_of(part) == []
        assert uses_of(part) == {"eager": 3}
        (text,) = warnings_in(caplog)
        assert "was interrupted: Killed signal" in text
        part_state(part).attach(torch.device("cpu"))  # the next load tries again
        part(X)
        assert tries == [1, 1]

    def test_a_full_disk_while_compiling_is_such_a_failure(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def export(*args: Any, **kwargs: Any) -> Any:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(torch.export, "export", export)
        part = frozen(Small())
        torch.testing.assert_close(part(X), unfrozen(part)(X))
        assert refusals_of(part) == []
        assert "interrupted" in next(iter(part_state(part).unstored.values()))

    def test_a_rehearsal_is_told_of_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def build(*args: Any, **kwargs: Any) -> Any:
            raise InterruptedBuildError("killed")

        monkeypatch.setattr(inductor, "build_graph", build)
        monkeypatch.setattr(GENERATING, "rehearsing", True)
        with pytest.raises(InterruptedBuildError):
            frozen(Small())(X)

    def test_a_missing_compiler_is_an_error_and_no_refusal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def build(*args: Any, **kwargs: Any) -> Any:
            raise CompilerMissingError("No working C++ compiler")

        monkeypatch.setattr(inductor, "build_graph", build)
        part = frozen(Small())
        with pytest.raises(CompilerMissingError):
            part(X)
        assert refusals_of(part) == []

    def test_a_part_in_training_mode_is_an_error_and_no_refusal(self) -> None:
        part = frozen(Small())
        part.train()
        with pytest.raises(TrainingModeError, match="training mode"):
            part(X)
        part.eval()
        assert refusals_of(part) == []

    def test_what_the_part_itself_raises_reaches_the_caller(self) -> None:
        part = frozen(Small())
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            part(torch.ones(2, 3))
        assert refusals_of(part) == []


class TestGradients:
    def test_a_first_call_is_refused_as_every_later_one(self) -> None:
        part = frozen(Small())
        for _ in range(2):
            with torch.enable_grad(), pytest.raises(CannotFreezeError, match="weights that ask for gradients"):
                part(X)

    @pytest.mark.compile
    def test_known_calls_are_refused_while_gradients_are_enabled(self, small: Any) -> None:
        with torch.enable_grad(), pytest.raises(CannotFreezeError, match=r"torch\.no_grad\(\)"):
            small(X, scale=2.0)
        small.requires_grad_(False)
        with torch.enable_grad(), pytest.raises(CannotFreezeError, match="on tensors that need gradients"):
            small(X.clone().requires_grad_(), scale=2.0)
        with torch.enable_grad():
            assert not small(X, scale=2.0).requires_grad
        small.requires_grad_(True)


class TestWhatIsFound:
    @pytest.mark.compile
    def test_a_call_whose_output_is_not_finite_runs_eagerly_and_nothing_is_stored(self) -> None:
        part = frozen(Small())
        output = part(X * float("nan"), scale=2.0)
        assert bool(output.isnan().all())
        assert (graphs_of(part), refusals_of(part)) == (0, [])
        assert "not finite" in next(iter(part_state(part).unstored.values()))

    def test_a_rehearsal_with_such_an_output_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(GENERATING, "rehearsing", True)
        part = frozen(Small())
        monkeypatch.setattr(
            part_state(part), "freeze", lambda *args: (_ for _ in ()).throw(NotFiniteError("not finite", "Small"))
        )
        with pytest.raises(NotFiniteError):
            part(X * float("nan"))

    @pytest.mark.compile
    def test_a_trial_compares_once_and_tells_what_it_found(self, small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        told: list[str] = []
        part_state(small).trial = told.append
        small(X, scale=2.0)
        small(X, scale=2.0)
        assert told == [""]
        part_state(small).trial = told.append
        monkeypatch.setattr(Small, "forward", lambda self, x, scale=1.0, other=None: x)
        small(X, scale=2.0)
        assert "no longer computes what its graph does (it was changed)" in told[1]

    @pytest.mark.compile
    def test_weights_of_another_dtype_have_their_own_graphs_and_the_first_come_back(self) -> None:
        part = frozen(Small())
        part(X)
        (single,) = part_state(part).graphs
        part.double()
        torch.testing.assert_close(part(X.double()), unfrozen(part)(X.double()))
        (double,) = part_state(part).graphs
        assert double is not single
        part.float()
        torch.testing.assert_close(part(X), unfrozen(part)(X))
        assert part_state(part).graphs == [single]
        part.double()
        part(X.double())
        assert part_state(part).graphs == [double]
        assert uses_of(part) == {"frozen": 4}

    def test_a_weight_of_another_shape_is_an_error(self, small: Any) -> None:
        kept = small.mix.bias
        small.mix.bias = nn.Parameter(torch.zeros(1))
        with pytest.raises(ChangedPartError, match=r"mix\.bias was float32\[16\]"):
            small(X, scale=2.0)
        small.mix.bias = kept
        small(X, scale=2.0)


def test_every_step_of_a_freeze_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[str, str, bool]] = []

    def build(*args: Any, **kwargs: Any) -> Any:
        raise CannotFreezeError("no")

    monkeypatch.setattr(inductor, "build_graph", build)
    part = frozen(Small(), report=lambda name, step, seconds, detail: steps.append((name, step, seconds is None)))
    part(X)
    assert steps[:3] == [("Small", "capture", True), ("Small", "capture", False), ("Small", "compile", True)]
