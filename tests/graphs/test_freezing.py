"""What a graph takes, gives back and leaves behind, on compiled parts; each is compared with its eager twin."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from onediff.infer_compiler import compile
from torch import nn

from helpers.graph_parts import frozen, graphs_of, refusals_of, uses_of
from helpers.pipelines import FAST_BUILD
from pipevault.errors import CannotFreezeError, SettingsError
from pipevault.graphs import freezing, inductor
from pipevault.graphs.check import GraphComparison
from pipevault.graphs.inductor import BuildOptions
from pipevault.graphs.part import BACKEND, part_state, unfrozen
from pipevault.graphs.state import PartOptions

pytestmark = pytest.mark.compile

X = torch.linspace(-1, 1, 32).reshape(2, 16)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def assert_same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected)


class Numbers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.Linear(16, 16)

    def forward(
        self, x: torch.Tensor, scale: float = 1.0, step: int = 0, size: int = 2, strong: float = 0.0, flag: bool = False
    ) -> dict[str, Any]:
        y = self.mix(x) * scale + torch.cos(torch.ones(1) * step)
        if strong > 0.5:
            y = y * 3
        y = y.reshape(size, -1)
        return {"y": -y if flag else y, "scale": scale, "size": size}


@pytest.fixture(scope="module")
def numbers_part() -> Any:
    part = frozen(Numbers())
    with torch.no_grad():
        part(X, scale=2.0, step=5, size=2, strong=0.0)
    return part


class TestNumbers:
    def check(self, numbers_part: Any, graphs: int, **numbers: Any) -> None:
        before = uses_of(numbers_part)["frozen"]
        actual, expected = numbers_part(X, **numbers), unfrozen(numbers_part)(X, **numbers)
        assert_same(actual["y"], expected["y"])
        assert (actual["scale"], actual["size"]) == (expected["scale"], expected["size"])
        assert type(actual["scale"]) is type(expected["scale"])
        assert uses_of(numbers_part) == {"frozen": before + 1}
        assert graphs_of(numbers_part) == graphs

    def test_only_what_steers_is_fixed(self, numbers_part: Any) -> None:
        (slot,) = part_state(numbers_part).graphs
        assert str(slot.kept.signature) == "float32[2,16], scale=float, size=2, step=int, strong=0.0"

    @pytest.mark.parametrize(("scale", "step"), [(0.5, 5), (-3.25, 981), (0.0, 0), (1e-8, -1)])
    def test_other_values_of_what_enters_arithmetic_run_in_the_one_graph(
        self, numbers_part: Any, scale: float, step: int
    ) -> None:
        self.check(numbers_part, 1, scale=scale, step=step, size=2, strong=0.0)

    def test_another_value_of_what_steers_has_a_graph_of_its_own(self, numbers_part: Any) -> None:
        self.check(numbers_part, 2, scale=0.5, step=7, size=4, strong=1.0)
        self.check(numbers_part, 2, scale=1.5, step=8, size=4, strong=1.0)
        self.check(numbers_part, 2, scale=2.0, step=5, size=2, strong=0.0)

    def test_other_values_are_compared_before_a_graph_is_kept(self, numbers_part: Any) -> None:
        (first, *_) = part_state(numbers_part).graphs
        document = first.kept.document
        assert document is not None
        assert document.checks["calls"] == 2
        assert document.checks["distance"] <= document.checks["tolerance"]


class Decoder(nn.Module):
    """As Wan's: the features that the next chunk needs lie in a list that the caller gives, with an index."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, x: torch.Tensor, feat_cache: list[Any], feat_idx: list[int]) -> torch.Tensor:
        for layer in self.layers:
            index = feat_idx[0]
            kept = x.clone()
            if feat_cache[index] is not None:
                x = x + 0.5 * feat_cache[index]
            feat_cache[index] = kept
            feat_idx[0] += 1
            x = torch.tanh(layer(x))
        return x


def test_state_in_the_arguments_is_carried_from_call_to_call() -> None:
    part = frozen(Decoder())
    eager = copy.deepcopy(unfrozen(part))
    chunks = [X * (n + 1) for n in range(4)]
    for video in range(2):
        ours: list[Any] = [None, None]
        theirs: list[Any] = [None, None]
        given = ours
        for chunk in chunks:
            our_index, their_index = [0], [0]
            assert_same(part(chunk + video, ours, our_index), eager(chunk + video, theirs, their_index))
            assert our_index == their_index == [2]
            assert ours is given
            assert_same(ours, theirs)
    assert uses_of(part) == {"frozen": 8}
    assert graphs_of(part) == 2  # the first chunk and the others


class Causal(nn.Module):
    """A convolution that keeps the last frames of its input on itself, as CogVideoX and EasyAnimate have them."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(16, 16)
        self.is_init = True
        self.cache_front_feat: deque[torch.Tensor] = deque()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_init:
            self.cache_front_feat.clear()
            front = torch.zeros_like(x)
            self.is_init = False
        else:
            front = self.cache_front_feat.popleft()
        self.cache_front_feat.append(x.clone())
        return torch.tanh(self.mix(x + front))


class CausalDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = Causal(), Causal()

    def start(self) -> None:
        for layer in (self.first, self.second):
            layer.is_init = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def test_state_on_modules_is_carried_from_call_to_call_and_started_anew() -> None:
    part = frozen(CausalDecoder())
    eager: Any = copy.deepcopy(unfrozen(part))
    for video in range(2):
        part.start()
        eager.start()
        for n in range(3):
            assert_same(part(X * (n + 1) + video), eager(X * (n + 1) + video))
            assert type(part.second.cache_front_feat) is deque
            assert_same(list(part.second.cache_front_feat), list(eager.second.cache_front_feat))
            assert part.first.is_init is False
    assert uses_of(part) == {"frozen": 6}
    assert graphs_of(part) <= 3


class Restarted(nn.Module):
    """Keeps its last input; the first chunk does not look at what the video before it has left, whatever its size."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: deque[torch.Tensor] = deque()

    def forward(self, x: torch.Tensor, is_first: bool) -> torch.Tensor:
        y = x * 2 if is_first else x + self.cache[0].mean(dim=0, keepdim=True)
        self.cache = deque([x.clone()])
        return torch.tanh(y)


def test_a_chunk_that_looks_at_no_state_has_one_graph_whatever_was_left() -> None:
    part, eager = frozen(Restarted()), Restarted()
    wide = torch.cat([X, X])
    for video in range(2):
        for x, is_first in ((X, True), (X + video, False), (wide, False), (wide, True), (X, False), (X, True)):
            assert_same(part(x, is_first=is_first), eager(x, is_first=is_first))
            assert_same(list(part.cache), list(eager.cache))
    firsts = [slot for slot in part_state(part).graphs if slot.kept.signature.unread]
    assert len(firsts) == 2  # one for each size of the chunk
    assert uses_of(part).keys() == {"frozen"}


class Rope(nn.Module):
    """Tables that are filled at the first call: one whatever it is given, one for each length."""

    def __init__(self) -> None:
        super().__init__()
        self.table: torch.Tensor | None = None
        self.tables: dict[Any, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.table is None:
            self.table = torch.linspace(0, 1, 16)
        key = tuple(x.shape)
        if key not in self.tables:
            self.tables[key] = torch.arange(float(x.shape[0]))[:, None]
        return torch.sin(x + self.table) * self.tables[key]


@pytest.fixture(scope="module")
def rope_part() -> Any:
    part = frozen(Rope())
    with torch.no_grad():
        part(X)
    return part


class TestCaches:
    def test_a_cache_is_no_state_and_later_calls_run(self, rope_part: Any) -> None:
        for n in range(3):
            assert_same(rope_part(X * n), Rope()(X * n))
        (slot,) = part_state(rope_part).graphs
        assert slot.kept.signature.state == ()
        assert uses_of(rope_part).keys() == {"frozen"}

    def test_another_shape_and_then_the_first_one_again(self, rope_part: Any) -> None:
        assert_same(rope_part(X[:1]), Rope()(X[:1]))
        assert_same(rope_part(X), Rope()(X))
        assert graphs_of(rope_part) == 2
        assert uses_of(rope_part).keys() == {"frozen"}


class First(nn.Module):
    """Remembers its first input, which a look at one call alone takes for a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.first: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.first is None:
            self.first = x * 2
        return x + self.first


def test_what_is_filled_from_the_first_input_is_state() -> None:
    part, eager = frozen(First()), First()
    for n in range(3):
        assert_same(part(X + n), eager(X + n))
        assert_same(part.first, eager.first)
    part.first = eager.first = None
    assert_same(part(X * 7), eager(X * 7))
    assert uses_of(part) == {"frozen": 4}


class Absent(nn.Module):
    """Keeps its last input in an attribute that is not there before."""

    last: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x + self.last if hasattr(self, "last") else x - 1
        self.last = x * 2
        return y


def test_state_in_an_attribute_that_is_not_there_at_first() -> None:
    part, eager = frozen(Absent()), Absent()
    for n in range(3):
        assert_same(part(X + n), eager(X + n))
        assert_same(part.last, eager.last)


class Single(nn.Module):
    """A cache of one place, filled anew for each length."""

    def __init__(self) -> None:
        super().__init__()
        self.table: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.table is None or self.table.shape[0] != x.shape[0]:
            self.table = torch.linspace(0, 1, x.shape[0])[:, None]
        return x * 2 + self.table


def test_a_cache_of_one_place_serves_shapes_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    part = frozen(Single())
    for rows in (2, 1):
        assert_same(part(X[:rows]), Single()(X[:rows]))
    assert graphs_of(part) == 2
    monkeypatch.setattr(type(part_state(part)), "freeze", lambda *args: pytest.fail("frozen again"))
    for rows in (2, 1, 2, 1):
        assert_same(part(X[:rows]), Single()(X[:rows]))
    assert uses_of(part) == {"frozen": 6}


class Tabled(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.table = torch.full((16,), value)
        self.nested = {"a": [torch.full((16,), value)]}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.table + self.nested["a"][0]


@pytest.fixture(scope="module")
def tabled_part() -> Any:
    part = frozen(Tabled(2.0))
    with torch.no_grad():
        part(X)
    return part


class TestConstants:
    def test_a_table_replaced_between_calls_is_noticed(self, tabled_part: Any) -> None:
        tabled_part.table = torch.full((16,), 5.0)
        assert_same(tabled_part(X), X * 5.0 + 2.0)
        tabled_part.table = torch.full((16,), 2.0)
        assert_same(tabled_part(X), X * 2.0 + 2.0)
        assert graphs_of(tabled_part) == 2

    def test_a_table_changed_in_place_is_noticed(self, tabled_part: Any) -> None:
        tabled_part.nested["a"][0].add_(1)
        try:
            assert_same(tabled_part(X), X * 2.0 + 3.0)
        finally:
            tabled_part.nested["a"][0].sub_(1)
        assert_same(tabled_part(X), X * 2.0 + 2.0)
        assert uses_of(tabled_part).keys() == {"frozen"}

    def test_another_module_with_another_table_does_not_use_the_graph(self, tabled_part: Any) -> None:
        (slot, *_) = part_state(tabled_part).graphs
        same, other = frozen(Tabled(2.0), policy="eager"), frozen(Tabled(7.0), policy="eager")
        for module in (same, other):
            part_state(module).table.add(slot.kept)
        assert_same(same(X), X * 2.0 + 2.0)
        assert uses_of(same) == {"frozen": 1}
        assert_same(other(X), X * 7.0 + 7.0)
        assert uses_of(other) == {"eager": 1}


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.Conv2d(4, 8, 1)
        self.norm = nn.GroupNorm(2, 8, eps=1e-12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.mix(x))


def test_an_input_of_zeros_is_frozen_where_the_graph_is_right_on_other_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    part = frozen(Norm())
    failures: list[str] = []
    real = freezing.compare_trees  # type: ignore[attr-defined]

    def compare(eager: Any, ours: Any, **options: Any) -> Any:
        result = real(eager, ours, **options)
        if not failures:  # rounding of a constant input, which normalisation makes as large as anything
            failures.append("own")
            return GraphComparison(1.0, 1e-3, "distance 1 from eager code is over 0.001")
        return result

    with monkeypatch.context() as patch:
        patch.setattr(freezing, "compare_trees", compare)
        part(torch.zeros(1, 4, 4, 4))
    assert failures == ["own"]
    assert graphs_of(part) == 1
    other = torch.randn(1, 4, 4, 4)
    assert_same(part(other), unfrozen(part)(other))
    assert uses_of(part) == {"frozen": 2}


def test_a_graph_that_differs_from_eager_code_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    part = frozen(Tabled(2.0))
    real = freezing.compare_trees  # type: ignore[attr-defined]
    calls: list[int] = []

    def compare(eager: Any, ours: Any, **options: Any) -> Any:
        calls.append(1)
        return real(eager, {**ours, "output": ours["output"] + (1.0 if len(calls) == 2 else 0.0)}, **options)

    monkeypatch.setattr(freezing, "compare_trees", compare)
    assert_same(part(X), X * 2.0 + 2.0)
    assert uses_of(part) == {"eager": 1}
    (reason,) = refusals_of(part)
    assert "differs from eager code on other values" in reason


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.mix(x)) * 2 + 1


@pytest.mark.parametrize(("wrong", "kept"), [(2, 1), (0, 1), (1, 2)])
def test_of_several_candidates_the_fastest_right_one_is_kept(
    monkeypatch: pytest.MonkeyPatch, wrong: int, kept: int
) -> None:
    module = Small().eval()
    tags: tuple[dict[str, str], ...] = (
        {},
        {"aot_inductor.compile_wrapper_opt_level": "O1"},
        {"aot_inductor.compile_wrapper_opt_level": "O2"},
    )
    configs = [{**FAST_BUILD, **one} for one in tags]
    made: list[str] = []
    seconds = {0: 3.0, 1: 1.0, 2: 2.0}
    finished = freezing._finish

    def finish(prepared: Any, built: Any, **rest: Any) -> Any:
        found: Any = finished(prepared, built, **rest)
        made.append(found.document.library)
        if len(made) == wrong + 1:
            raise RuntimeError("this one cannot even run")
        return replace(found, times=replace(found.times, frozen_s=seconds[len(made) - 1]))

    monkeypatch.setattr(freezing, "_finish", finish)
    options = BuildOptions(config=configs[0], candidates=tuple(configs[1:]))
    part = compile(module, backend=BACKEND, options=PartOptions(build=options))
    assert_same(part(X), Small().eval()(X))
    [slot] = part_state(part).graphs
    assert len(made) == 3
    assert slot.kept.document.library == made[kept]
    assert len(set(made)) == 3


def test_a_candidate_that_cannot_be_compiled_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    build_graph = inductor.build_graph

    def build(build: Any, output_dir: Any) -> Any:
        if "max_autotune" in build.options.config:
            raise CannotFreezeError("no")
        return build_graph(build, output_dir)

    monkeypatch.setattr(inductor, "build_graph", build)
    options = BuildOptions(config={**FAST_BUILD, "max_autotune": True}, candidates=(FAST_BUILD,))
    part = compile(Small().eval(), backend=BACKEND, options=PartOptions(build=options))
    assert_same(part(X), Small().eval()(X))
    assert uses_of(part) == {"frozen": 1}
    options = BuildOptions(config={**FAST_BUILD, "max_autotune": True})
    part = compile(Small().eval(), backend=BACKEND, options=PartOptions(build=options))
    assert_same(part(X), Small().eval()(X))
    assert refusals_of(part) == ["no"]


@pytest.mark.parametrize("candidates", [(), (FAST_BUILD,)])
def test_what_a_failed_check_held_is_freed_at_once(
    monkeypatch: pytest.MonkeyPatch, candidates: tuple[dict[str, Any], ...]
) -> None:
    held: list[weakref.ref[nn.Module]] = []

    def finish(prepared: Any, built: Any, **rest: Any) -> Any:
        activations = nn.Module()
        held.append(weakref.ref(activations))
        raise CannotFreezeError("it differs")

    monkeypatch.setattr(freezing, "_finish", finish)
    options = BuildOptions(config={**FAST_BUILD, "epilogue_fusion": False}, candidates=candidates)
    part = compile(Small().eval(), backend=BACKEND, options=PartOptions(build=options))
    gc.collect()
    gc.disable()
    try:
        assert_same(part(X), Small().eval()(X))
        assert [one() for one in held] == [None] * (1 + len(candidates))
    finally:
        gc.enable()


class Wide(nn.Module):
    """Its product of matrices is one that autotuning gives a packed copy of the weight."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.Linear(256, 256)
        self.mix.weight.data.mul_(factor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.mix(x))


class TestAutotuned:
    """A graph takes its weights from outside, however it was tuned."""

    options = BuildOptions.of_profile("balanced", "bound", {**FAST_BUILD, "max_autotune": True})
    x = torch.linspace(-1, 1, 20 * 256).reshape(20, 256)

    def test_other_weights_give_another_output(self) -> None:
        part = compile(Wide().eval(), backend=BACKEND, options=PartOptions(build=self.options))
        assert_same(part(self.x), Wide()(self.x))
        unfrozen(part).mix.weight.data.mul_(3.0)
        assert_same(part(self.x), Wide(3.0)(self.x))
        assert uses_of(part) == {"frozen": 2}

    def test_a_constant_that_the_compiler_makes_of_weights_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        compile_program = inductor._compile

        def packing(program: Any, options: BuildOptions, **how: Any) -> Any:
            packed = replace(options, config={**options.config, "cpp.weight_prepack": True})
            return compile_program(program, packed, **how)

        monkeypatch.setattr(BuildOptions, "__post_init__", lambda self: None)
        monkeypatch.setattr(inductor, "_compile", packing)
        part = compile(Wide().eval(), backend=BACKEND, options=PartOptions(build=self.options))
        assert_same(part(self.x), Wide()(self.x))
        assert uses_of(part) == {"eager": 1}
        [reason] = refusals_of(part)
        assert "the compiler made a constant of its own" in reason

    def test_keys_tell_graphs_that_take_no_packed_weights(self) -> None:
        assert self.options.config["cpp.weight_prepack"] is False
        assert "cpp.weight_prepack" not in BuildOptions.of_profile("max", "baked", {}).config
        assert "cpp.weight_prepack" not in BuildOptions.of_profile("balanced", "bound", {}).config
        with pytest.raises(SettingsError, match=r"cpp\.weight_prepack"):
            BuildOptions.of_profile("max", "bound", {"cpp.weight_prepack": True})


def test_the_profile_max_has_candidates_and_they_are_part_of_the_key() -> None:
    of = BuildOptions.of_profile
    assert of("balanced", "bound", {}).candidates == ()
    chosen = of("max", "bound", {"epilogue_fusion": False})
    assert len(chosen.candidates) == 2
    assert all(one["epilogue_fusion"] is False for one in (chosen.config, *chosen.candidates))
    assert chosen.to_json() != replace(chosen, candidates=()).to_json()
    assert "candidates" not in of("balanced", "bound", {}).to_json()


def test_options_of_the_profile_max_are_read_back_and_no_candidate_is_there_twice() -> None:
    chosen = BuildOptions.of_profile("max", "bound", {"epilogue_fusion": False})
    again = BuildOptions.from_json(chosen.to_json())
    assert (again, again.digest) == (chosen, chosen.digest)
    assert chosen.digest != replace(chosen, candidates=()).digest
    plain = {"max_autotune": False, "coordinate_descent_tuning": False, "conv_1x1_as_mm": True}
    assert BuildOptions.of_profile("max", "bound", plain).candidates == ()
