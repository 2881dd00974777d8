"""Which graph serves a call. Tables hold documents without graphs, except where a cast graph must run."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from helpers.graph_parts import frozen, graphs_of, refusals_of, uses_of
from pipevault.errors import CannotFreezeError, ChangedPartError
from pipevault.graphs.frozen import GraphDocument, constant_sha256
from pipevault.graphs.part import part_state
from pipevault.graphs.program import Results
from pipevault.graphs.signature import CallSignature, DescribedCall, describe_call
from pipevault.graphs.table import ShelfItem, Slot, Table, cast_leaves

X = torch.linspace(-1, 1, 32).reshape(2, 16)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def document(signature: CallSignature, **changes: Any) -> GraphDocument:
    plain = GraphDocument(signature, "", "", None, {}, (), Results((), ""), (), "", (), {}, {})
    return replace(plain, **changes)


def kept(signature: CallSignature, key: str, **changes: Any) -> ShelfItem:
    return ShelfItem(signature, key, document(signature, **changes))


def call_of(*args: Any, **kwargs: Any) -> DescribedCall:
    return describe_call(args, kwargs)


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last: Any = None
        self.table = torch.ones(3)


class TestCasts:
    @pytest.mark.parametrize(
        ("leaf", "dtype"),
        [
            (torch.tensor(981), "float32"),
            (torch.tensor([981.0, 1.0]), "int64"),
            (torch.tensor(0.5), "float64"),
            (torch.tensor(0.5, dtype=torch.float64), "float32"),
            (torch.tensor(2**24), "float32"),
        ],
    )
    def test_values_that_survive_are_cast(self, leaf: torch.Tensor, dtype: str) -> None:
        found = cast_leaves((X, leaf, 3), ["float32", dtype])
        assert found is not None
        image, cast, number = found
        assert image is X
        assert number == 3
        assert isinstance(cast, torch.Tensor)
        assert str(cast.dtype) == f"torch.{dtype}"
        assert cast.tolist() == leaf.tolist()

    @pytest.mark.parametrize(
        ("leaf", "dtype"),
        [
            (torch.tensor(0.5), "int64"),
            (torch.tensor([1.0, 2.5]), "int64"),
            (torch.tensor(2**24 + 1), "float32"),
            (torch.tensor(0.1, dtype=torch.float64), "float32"),
            (torch.tensor(float("nan")), "int64"),
        ],
    )
    def test_values_that_do_not_survive_are_not(self, leaf: torch.Tensor, dtype: str) -> None:
        assert cast_leaves((X, leaf), ["float32", dtype]) is None

    def test_a_table_finds_a_graph_of_other_dtypes_for_scalars_alone(self) -> None:
        table, module = Table(None), Holder()
        slot = table.add(kept(call_of(X, torch.tensor(3)).signature, "a"))
        assert table.find(module, (X, torch.tensor(7.0)), {})[0] is None
        found = table.find_cast(module, (X, torch.tensor(7.0)), {})
        assert found is not None
        assert found[0] is slot
        assert found[1].leaves[1].dtype == torch.int64
        assert found[2] == ("torch.float32", "torch.float32")
        assert table.find_cast(module, (X, torch.tensor(0.5)), {}) is None
        assert table.find_cast(module, (X.double(), torch.tensor(7.0)), {}) is None
        assert table.find_cast(module, (X, torch.tensor(7.0).half()), {}) is None

    def test_fixed_numbers_must_fit_as_well(self) -> None:
        table, module = Table(None), Holder()
        call = call_of(X, torch.tensor(3), size=2)
        table.add(kept(call.signature.fix([2], call.leaves), "a"))
        assert table.find_cast(module, (X, torch.tensor(7.0)), {"size": 2}) is not None
        assert table.find_cast(module, (X, torch.tensor(7.0)), {"size": 3}) is None

    def test_refusals_are_not_cast_to(self) -> None:
        table, module = Table(None), Holder()
        table.add(ShelfItem(call_of(X, torch.tensor(3)).signature, "a", refusal="no"))
        assert table.find_cast(module, (X, torch.tensor(7.0)), {}) is None


class Timed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.is_strange = False

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if self.is_strange and t.is_floating_point():
            return x
        return x * torch.cos(t.float() / 100)


@pytest.mark.compile
class TestTimeSteps:
    @pytest.fixture(scope="class")
    @staticmethod
    def part() -> Any:
        part = frozen(Timed())
        with torch.no_grad():
            part(X, torch.tensor(981))
        return part

    @pytest.mark.parametrize("t", [torch.tensor(961.0), torch.tensor(1.0, dtype=torch.float64), torch.tensor(5).int()])
    def test_another_dtype_that_holds_the_value_runs_in_the_same_graph(self, part: Any, t: torch.Tensor) -> None:
        before = uses_of(part)["frozen"]
        torch.testing.assert_close(part(X, t), Timed()(X, t))
        assert uses_of(part) == {"frozen": before + 1}
        assert graphs_of(part) == 1

    def test_a_part_that_does_something_else_for_another_dtype_is_told(self, part: Any) -> None:
        (slot,) = part_state(part).graphs
        slot.casts.clear()
        part.is_strange = True
        try:
            with pytest.raises(ChangedPartError, match="cast to the dtypes that were frozen"):
                part(X, torch.tensor(961.0))
        finally:
            part.is_strange = False

    def test_a_value_that_no_cast_keeps_is_another_call(self, part: Any) -> None:
        state, t = part_state(part), torch.tensor(0.5)
        options, eager = state.options, uses_of(part).get("eager", 0)
        state.options = replace(options, policy="eager")
        torch.testing.assert_close(part(X, t), Timed()(X, t))
        state.options = options
        assert uses_of(part)["eager"] == eager + 1
        assert graphs_of(part) == 1


class TestSlots:
    def test_slots_of_one_signature_differ_in_fixed_values(self) -> None:
        table, module = Table(None), Holder()
        slots: dict[int, Slot] = {}
        for size in (2, 3, 4):
            call = call_of(X, size=size, scale=0.5)
            index = call.leaves.index(size, 1)
            slots[size] = table.add(kept(call.signature.fix([index], call.leaves), str(size)))
        for size, slot in slots.items():
            found, call = table.find(module, (X,), {"size": size, "scale": 9.0})
            assert found is slot
            assert call.leaves[1:] == (9.0, size)
        assert table.find(module, (X,), {"size": 5, "scale": 0.5})[0] is None
        table.remove(slots[3])
        assert table.find(module, (X,), {"size": 3, "scale": 0.5})[0] is None
        assert table.find(module, (X,), {"size": 4, "scale": 0.5})[0] is slots[4]
        assert list(table) == [slots[2], slots[4]]

    def test_what_is_there_is_not_added_again(self) -> None:
        table = Table(None)
        signature = call_of(X).signature
        slot = table.add(kept(signature, "a"))
        assert table.add(kept(signature, "a")) is slot
        assert table.add(kept(signature, "b")) is not slot
        assert len(list(table)) == 2

    def test_state_is_looked_for_beside_the_arguments(self) -> None:
        table, module = Table(None), Holder()
        empty = table.add(kept(describe_call((X,), {}, {":last": None}).signature, "empty"))
        filled = table.add(kept(describe_call((X,), {}, {":last": X}).signature, "filled"))
        assert table.state_paths == (":last",)
        assert table.find(module, (X,), {})[0] is empty
        module.last = X + 1
        slot, call = table.find(module, (X,), {})
        assert slot is filled
        assert call.leaves[1] is module.last
        module.last = object()
        assert table.find(module, (X,), {})[0] is None

    def test_a_constant_must_hold_the_numbers_of_the_graph(self) -> None:
        table, module = Table(None), Holder()
        origins = (("table", ("", "table"), constant_sha256(torch.ones(3))),)
        slot = table.add(kept(call_of(X).signature, "a", origins=origins))
        assert table.find(module, (X,), {})[0] is slot
        module.table.add_(1)
        assert table.find(module, (X,), {})[0] is None
        module.table = torch.ones(3)
        assert table.find(module, (X,), {})[0] is slot
        module.table = None  # type: ignore[assignment]  # not filled yet
        assert table.find(module, (X,), {})[0] is slot

    def test_a_constant_in_the_place_of_one_that_was_freed_is_hashed(self) -> None:
        table, module = Table(None), Holder()
        origins = (("table", ("", "table"), constant_sha256(torch.ones(3))),)
        slot = table.add(kept(call_of(X).signature, "a", origins=origins))
        assert table.find(module, (X,), {})[0] is slot
        for _ in range(20):
            for value, expected in ((2.0, None), (1.0, slot)):
                module.table = None  # type: ignore[assignment]
                module.table = torch.full((3,), value)
                assert table.find(module, (X,), {})[0] is expected

    def test_a_constant_that_counts_no_versions_is_compared_each_time(self) -> None:
        table, module = Table(None), Holder()
        with torch.inference_mode():
            module.table = torch.ones(3)
        origins = (("table", ("", "table"), constant_sha256(torch.ones(3))),)
        slot = table.add(kept(call_of(X).signature, "a", origins=origins))
        assert table.find(module, (X,), {})[0] is slot
        with torch.inference_mode():
            module.table.add_(1)
        assert table.find(module, (X,), {})[0] is None
        with torch.inference_mode():
            module.table.sub_(1)
        assert table.find(module, (X,), {})[0] is slot

    def test_a_constant_is_not_hashed_again_while_nobody_wrote_to_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        table, module = Table(None), Holder()
        origins = (("table", ("", "table"), constant_sha256(torch.ones(3))),)
        slot = table.add(kept(call_of(X).signature, "a", origins=origins))
        assert table.find(module, (X,), {})[0] is slot
        monkeypatch.setattr("pipevault.graphs.table.constant_sha256", lambda tensor: pytest.fail("hashed again"))
        assert table.find(module, (X,), {})[0] is slot

    def test_a_shelf_gives_its_news_once_asked(self) -> None:
        class Shelf:
            identity = "identity"

            def news(self, known: Collection[str]) -> list[ShelfItem]:
                return [] if "a" in known else [kept(call_of(X).signature, "a")]

        table, module = Table(Shelf()), Holder()  # type: ignore[arg-type]
        assert table.find(module, (X,), {})[0] is None
        table.read_shelf()
        assert table.find(module, (X,), {})[0] is not None
        table.read_shelf()
        assert len(list(table)) == 1


class Tabled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.ones(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.table


def test_a_graph_with_other_constants_that_another_process_made_meanwhile_is_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    origins = (("table", ("", "table"), constant_sha256(torch.zeros(16))),)

    class Shelf:
        identity = "identity"

        def __init__(self) -> None:
            self.items: list[ShelfItem] = []

        def news(self, known: Collection[str]) -> list[ShelfItem]:
            return [item for item in self.items if item.key not in known]

        @contextmanager
        def freezing(self, signature: CallSignature) -> Iterator[None]:
            self.items.append(kept(signature, "theirs", origins=origins))
            yield

        def refuse(self, signature: CallSignature, reason: str) -> ShelfItem:
            return ShelfItem(signature, "ours", refusal=reason)

    def build_graph(*arguments: Any) -> Any:
        raise CannotFreezeError("compiled here")

    monkeypatch.setattr("pipevault.graphs.inductor.build_graph", build_graph)
    shelf = Shelf()
    part = frozen(Tabled(), shelf=lambda *arguments: shelf)
    assert torch.equal(part(X), X)
    assert refusals_of(part) == ["compiled here"]
