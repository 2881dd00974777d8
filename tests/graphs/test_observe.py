"""What an eager call writes, seen by identity and version and never by value."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque, namedtuple
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from torch import nn

from helpers.graph_parts import subject_of
from pipevault.errors import CannotFreezeError
from pipevault.graphs.freezing import observe_call
from pipevault.graphs.observe import (
    Attributes,
    ObservedCall,
    PlainCall,
    copied,
    follow,
    held,
    iter_tensors,
    observe,
    observe_plain,
    read_state,
    same_values,
    write_back,
    write_state,
)
from pipevault.graphs.signature import ABSENT

Pair = namedtuple("Pair", "left right")
X = torch.arange(6.0).reshape(2, 3)


class Doing(nn.Module):
    """Does with itself and its arguments what a test says."""

    def __init__(self, body: Callable[..., Any], **attributes: Any) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.register_buffer("steps", torch.zeros(1))
        for name, value in attributes.items():
            setattr(self, name, value)
        self.__dict__["body"] = body

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.body(self, *args, **kwargs)


def seen(module: nn.Module, *args: Any, **kwargs: Any) -> ObservedCall:
    return observe(module, module, args, kwargs)


class Box:
    """An object of a program's own."""


class TestArguments:
    @pytest.mark.parametrize(
        ("container", "write", "after"),
        [
            ([1], lambda c: c.append(2), [1, 2]),
            ([1, 2], lambda c: c.clear(), []),
            ({"a": 1}, lambda c: c.update(b=2), {"a": 1, "b": 2}),
            ({"a": 1}, lambda c: c.pop("a"), {}),
            (deque([1], maxlen=1), lambda c: c.append(2), deque([2], maxlen=1)),
            ([[1], {"k": [2]}], lambda c: c[1]["k"].append(3), [[1], {"k": [2, 3]}]),
            (([1], 2), lambda c: c[0].append(2), ([1, 2], 2)),
        ],
    )
    def test_a_container_that_is_written_to_is_told_with_its_final_value(
        self, container: Any, write: Callable[[Any], None], after: Any
    ) -> None:
        before = repr(container)
        found = seen(Doing(lambda self, x, c: write(c)), X, container)
        assert found.after == {1: after}
        assert repr(container) == before  # the caller's was left alone

    def test_it_is_told_by_name_where_it_was_given_by_name(self) -> None:
        found = seen(Doing(lambda self, x, cache: cache.append(x)), X, cache=[])
        assert list(found.after) == ["cache"]

    def test_what_is_written_with_equal_values_is_written(self) -> None:
        def rewrite(self: Any, x: torch.Tensor, cache: list[Any]) -> None:
            cache[0] = cache[0].clone()

        assert list(seen(Doing(rewrite), X, [X]).after) == [1]

    def test_what_is_only_read_is_not_written(self) -> None:
        cache = {"a": [X, 1, "text", None, 2.5], "b": deque([X])}
        assert seen(Doing(lambda self, x, c: x + c["a"][0]), X, cache).after == {}

    def test_the_very_value_put_back_is_no_write(self) -> None:
        def put_back(self: Any, x: torch.Tensor, cache: list[Any]) -> None:
            cache[0] = cache[0]
            cache[1] = 10**6  # the same number, made again

        assert seen(Doing(put_back), X, [X, 10**6]).after == {}

    def test_a_tensor_changed_in_place_is_refused(self) -> None:
        for write in (lambda self, x: x.add_(1), lambda self, x: x.copy_(x), lambda self, x: x[0].fill_(0)):
            with pytest.raises(CannotFreezeError, match="a tensor among its arguments in place"):
                seen(Doing(write), X)

    def test_a_tensor_in_a_container_changed_in_place_is_refused(self) -> None:
        with pytest.raises(CannotFreezeError, match="a tensor among its arguments in place"):
            seen(Doing(lambda self, x, cache: cache[0].add_(1)), X, [X])

    def test_the_callers_tensors_are_not_given_to_the_part(self) -> None:
        before = X.clone()
        with pytest.raises(CannotFreezeError):
            seen(Doing(lambda self, x: x.zero_()), X)
        assert torch.equal(X, before)

    def test_copies_keep_strides_and_make_containers_new(self) -> None:
        tree = {"a": [X.t()], "b": 1}
        again = copied(tree)
        assert again["a"] is not tree["a"]
        assert again["a"][0] is not tree["a"][0]
        assert again["a"][0].stride() == X.t().stride()


class TestRandomNumbers:
    @pytest.mark.parametrize("draw", [torch.rand_like, nn.functional.dropout, lambda x: torch.randperm(3)])
    def test_draws_are_refused(self, draw: Callable[[Any], Any]) -> None:
        with pytest.raises(CannotFreezeError, match="draws random numbers"):
            seen(Doing(lambda self, x: draw(x)), X)

    def test_draws_from_a_generator_of_its_own_are_let_through_as_no_stream_moves(self) -> None:
        module = Doing(lambda self, x: torch.randn(3, generator=torch.Generator().manual_seed(0)))
        before = torch.get_rng_state()
        found = seen(module, X)
        assert torch.equal(found.output, torch.randn(3, generator=torch.Generator().manual_seed(0)))
        assert torch.equal(torch.get_rng_state(), before)


class TestAttributes:
    @pytest.mark.parametrize(
        ("attributes", "write"),
        [
            ({}, lambda self, x: setattr(self, "cache", x)),
            ({"cache": None}, lambda self, x: setattr(self, "cache", x)),
            ({"cache": []}, lambda self, x: self.cache.append(x)),
            ({"cache": deque([X], maxlen=1)}, lambda self, x: self.cache.append(x)),
            ({"cache": {"a": {"b": []}}}, lambda self, x: self.cache["a"]["b"].append(x)),
            ({"cache": {1}}, lambda self, x: self.cache.add(2)),
            ({"cache": X}, lambda self, x: setattr(self, "cache", self.cache.clone())),
            ({"cache": 1}, lambda self, x: setattr(self, "cache", 2)),
            ({"cache": 1}, lambda self, x: setattr(self, "cache", True)),
            ({"cache": 1}, lambda self, x: delattr(self, "cache")),
        ],
    )
    def test_each_kind_of_write_is_seen(self, attributes: dict[str, Any], write: Callable[..., None]) -> None:
        module = Doing(write, **attributes)
        assert list(seen(module, X).state) == [":cache"]

    def test_paths_name_the_module(self) -> None:
        module = Doing(lambda self, x: setattr(self.inner, "cache", x))
        assert list(seen(module, X).state) == ["inner:cache"]

    def test_what_is_read_or_set_to_itself_is_not_written(self) -> None:
        module = Doing(lambda self, x: setattr(self, "kept", self.kept), kept=[X, {"a": 1}], count=1)
        assert seen(module, X).state == {}

    def test_a_deep_container_that_nobody_wrote_is_not_written(self) -> None:
        module = Doing(lambda self, x: x, deep=[[[[[[[[1]]]]]]]])
        assert seen(module, X).state == {}

    def test_inside_an_object(self) -> None:
        box = Box()
        box.last = None  # type: ignore[attr-defined]
        module = Doing(lambda self, x: setattr(self.box, "last", x), box=box)
        assert list(seen(module, X).state) == [":box"]

    def test_inside_an_object_that_held_nothing(self) -> None:
        module = Doing(lambda self, x: setattr(self.box, "last", x), box=Box())
        assert list(seen(module, X).state) == [":box"]

    @pytest.mark.parametrize(
        "write",
        [
            lambda self, x: self.table.add_(1),
            lambda self, x: self.table.copy_(self.table),
            lambda self, x: self.table[0].zero_(),
        ],
    )
    def test_a_tensor_changed_in_place_is_refused(self, write: Callable[..., None]) -> None:
        with pytest.raises(CannotFreezeError, match="changes table in place"):
            seen(Doing(write, table=X.clone()), X)

    def test_a_tensor_in_a_list_changed_in_place_is_refused(self) -> None:
        with pytest.raises(CannotFreezeError, match="in place"):
            seen(Doing(lambda self, x: self.tables[0].add_(1), tables=[X.clone()]), X)

    @pytest.mark.parametrize(
        ("write", "name"),
        [
            (lambda self, x: self.steps.add_(1), "steps"),
            (lambda self, x: setattr(self, "steps", self.steps + 1), "steps"),
            (lambda self, x: self.inner.weight.mul_(2), "inner.weight"),
        ],
    )
    def test_a_write_to_a_registered_tensor_is_refused(self, write: Callable[..., None], name: str) -> None:
        with pytest.raises(CannotFreezeError, match=f"changes its tensor {name}"):
            seen(Doing(write), X)


class TestRestoring:
    def test_values_and_identity_of_containers_come_back(self) -> None:
        inner = [X]
        kept = {"a": inner, "q": deque([1], maxlen=2), "s": {1}}

        def write(self: Any, x: torch.Tensor) -> None:
            self.kept["a"].append(x)
            self.kept["q"].append(2)
            self.kept["s"].add(2)
            self.kept["new"] = 1
            self.fresh = 1
            self.number = 2
            self.replaced = [9]

        replaced = [8]
        module = Doing(write, kept=kept, number=1, replaced=replaced)
        attributes = Attributes(module)
        module(X)
        attributes.restore(tuple(attributes.written()))
        assert module.kept is kept
        assert module.kept["a"] is inner
        assert inner == [X]
        assert kept == {"a": inner, "q": deque([1]), "s": {1}}
        assert module.replaced is replaced
        assert module.replaced == [8]
        assert module.number == 1
        assert not hasattr(module, "fresh")

    def test_objects_get_back_what_they_held(self) -> None:
        box = Box()
        box.values = [1]  # type: ignore[attr-defined]
        module = Doing(lambda self, x: (self.box.values.append(2), setattr(self.box, "more", 1)), box=box)
        attributes = Attributes(module)
        module(X)
        attributes.restore(tuple(attributes.written()))
        assert vars(box) == {"values": [1]}

    def test_only_what_is_asked_for_is_restored(self) -> None:
        module = Doing(lambda self, x: (self.a.append(1), self.b.append(1)), a=[], b=[])
        attributes = Attributes(module)
        module(X)
        attributes.restore([":a"])
        assert (module.a, module.b) == ([], [1])

    def test_a_counter_gets_back_its_counts(self) -> None:
        module = Doing(lambda self, x: self.counts.update("ab"), counts=Counter("aab"))
        attributes = Attributes(module)
        module(X)
        attributes.restore(tuple(attributes.written()))
        assert module.counts == Counter("aab")

    def test_what_refuses_to_be_filled_stays_as_it_is(self) -> None:
        config = FrozenDict({"channels": 4})
        module = Doing(lambda self, x: self.kept.append(1), config=config, kept=[])
        attributes = Attributes(module)
        module(X)
        attributes.restore_all()
        assert module.kept == []
        assert module.config is config
        assert config == {"channels": 4}

    def test_deep_containers_keep_their_content(self) -> None:
        module = Doing(lambda self, x: self.deep[0][0][0][0].append(1), deep=[[[[[[[[1]]]]]]]])
        attributes = Attributes(module)
        module(X)
        attributes.restore(tuple(attributes.written()))
        assert module.deep == [[[[[[[[1]]]]]]]]

    def test_what_holds_itself_is_restored(self) -> None:
        box = Box()
        box.owner, box.last = box, None  # type: ignore[attr-defined]
        module = Doing(lambda self, x: setattr(self.box, "last", x), box=box)
        attributes = Attributes(module)
        module(X)
        attributes.restore(tuple(attributes.written()))
        assert box.last is None  # type: ignore[attr-defined]


class TestHeld:
    @pytest.mark.parametrize(
        "value", [[1, [2]], {"a": [1]}, deque([1], maxlen=2), (1, [2]), {1}, OrderedDict(a=1), Pair(1, [2])]
    )
    def test_it_is_equal_and_stays_what_it_was(self, value: Any) -> None:
        now = held(value)
        assert type(now) is type(value)
        assert now == value
        assert same_values(now, value)

    def test_later_writes_do_not_show(self) -> None:
        value = {"a": [1], "b": deque([1])}
        now = held(value)
        value["a"].append(2)
        value["b"].append(2)
        assert now == {"a": [1], "b": deque([1])}

    def test_an_object_that_holds_itself(self) -> None:
        box = Box()
        box.owner = box  # type: ignore[attr-defined]
        assert same_values(held(box), held(box))


class TestSameValues:
    @pytest.mark.parametrize(
        ("one", "other", "same"),
        [
            (X, X.clone(), True),
            (X, X.double(), False),
            (X, X + 1, False),
            (X, X[:1], False),
            ([X, 1], [X.clone(), 1], True),
            ({"a": X}, {"a": X + 1}, False),
            ({"a": 1, "b": 2}, {"b": 2, "a": 1}, False),
            ([1], (1,), False),
            (1, True, False),
            (None, None, True),
            (deque([X]), deque([X.clone()]), True),
        ],
    )
    def test_tensors_are_compared_by_their_numbers(self, one: Any, other: Any, same: bool) -> None:
        assert same_values(one, other) is same


class TestWritingBack:
    def test_nested_containers_keep_their_identity(self) -> None:
        inner, queue = [1], deque([1], maxlen=2)
        target = {"list": inner, "queue": queue, "gone": 1}
        result = write_back(target, {"list": [1, 2], "queue": deque([1, 2], maxlen=2), "new": [3]})
        assert result is target
        assert target == {"list": [1, 2], "queue": deque([1, 2]), "new": [3]}
        assert target["list"] is inner
        assert target["queue"] is queue

    def test_lists_within_a_tuple_are_filled(self) -> None:
        inner = [1]
        write_back((inner, 2), ([1, 2], 2))
        assert inner == [1, 2]

    def test_another_type_replaces(self) -> None:
        assert write_back([1], (1, 2)) == (1, 2)
        assert write_back(None, [1]) == [1]

    def test_state_is_written_into_the_container_that_is_there(self) -> None:
        module = Doing(lambda self, x: x, cache=[1])
        kept = module.cache
        write_state(module, ":cache", [2, 3])
        assert module.cache is kept
        assert kept == [2, 3]
        write_state(module, "inner:last", 5)
        assert read_state(module, [":cache", "inner:last", ":absent"]) == {
            ":cache": [2, 3],
            "inner:last": 5,
            ":absent": ABSENT,
        }


def test_tensors_of_attributes_are_found_again_by_their_steps() -> None:
    module = Doing(lambda self, x: x, table=X, nested={"a": [None, X + 1]})
    module.inner.rope = (X + 2,)  # type: ignore[assignment]
    found = {tuple(steps): tensor for steps, tensor in iter_tensors(module)}
    assert set(found) == {("", "table"), ("", "nested", "a", 1), ("inner", "rope", 0)}
    for steps, tensor in found.items():
        assert follow(module, steps) is tensor
    assert follow(module, ("", "nested", "a", 7)) is None
    assert follow(module, ("gone", "table")) is None


def test_tensors_in_objects_and_under_keys_of_any_kind_are_found() -> None:
    module = Doing(lambda self, x: x, rope=SimpleNamespace(tables={(4, 4): torch.ones(2)}, owner=None))
    module.rope.owner = module.rope
    ((steps, tensor),) = iter_tensors(module)
    assert steps == ["", "rope", "tables", "(4, 4)"]
    assert follow(module, steps) is tensor


class TestRefusedCalls:
    """A refused call runs eagerly afterwards, so that observing it must have left nothing behind."""

    def test_a_buffer_is_as_it_was(self) -> None:
        module = Doing(lambda self, x: x * self.steps.add_(1))
        with pytest.raises(CannotFreezeError):
            observe_call(subject_of(module), (X,), {})
        assert module.steps.item() == 0

    def test_a_tensor_among_the_attributes_is_as_it_was(self) -> None:
        module = Doing(lambda self, x: x * self.table.add_(1), table=torch.zeros(1))
        with pytest.raises(CannotFreezeError):
            observe_call(subject_of(module), (X,), {})
        assert module.table.item() == 0

    def test_random_streams_and_attributes_are_as_they_were(self) -> None:
        module = Doing(lambda self, x: (self.calls.append(1), x + torch.rand(3))[1], calls=[])
        before = torch.get_rng_state()
        with pytest.raises(CannotFreezeError, match="random"):
            observe_call(subject_of(module), (X,), {})
        assert module.calls == []
        assert torch.equal(torch.get_rng_state(), before)


class TestStateOrCache:
    """Which of the written attributes a graph must take and return."""

    def state_of(self, module: nn.Module, *args: Any) -> tuple[str, ...]:
        return observe_call(subject_of(module), args, {}).signature.state_paths

    def test_a_table_filled_at_the_first_call_is_a_cache_and_stays_filled(self) -> None:
        def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
            self.table = torch.arange(3.0) if self.table is None else self.table
            return x + self.table

        module = Doing(forward, table=None)
        assert self.state_of(module, X) == ()
        assert torch.equal(module.table, torch.arange(3.0))  # type: ignore[arg-type]

    def test_what_is_filled_from_the_input_is_state_and_is_put_back(self) -> None:
        def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
            self.first = x if self.first is None else self.first
            return x + self.first

        module = Doing(forward, first=None)
        assert self.state_of(module, X) == (":first",)
        assert module.first is None

    def test_what_grows_whatever_it_is_given_is_state(self) -> None:
        module = Doing(lambda self, x: (self.log.append(1), x)[1], log=[])
        assert self.state_of(module, X) == (":log",)
        assert module.log == []

    def test_a_value_that_is_the_same_after_every_call_is_a_cache(self) -> None:
        module = Doing(lambda self, x: (setattr(self, "shape", tuple(x.shape)), x)[1], shape=None)
        assert self.state_of(module, X) == ()
        assert module.shape == (2, 3)

    def test_a_flag_that_steers_the_first_call_is_state(self) -> None:
        def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
            if self.is_first:
                self.is_first = False
                return x * 2
            return x

        module = Doing(forward, is_first=True)
        assert self.state_of(module, X) == (":is_first",)
        assert module.is_first is True

    @pytest.mark.parametrize("before", [None, deque(), deque([X, X])])
    def test_what_is_set_without_a_look_at_it_is_unread(self, before: Any) -> None:
        def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
            del self.queue
            self.queue = deque([x])
            return x * 2

        module = Doing(forward, queue=before)
        assert observe_call(subject_of(module), (X,), {}).signature.state == ((":queue", ("unread", "", None)),)
        assert module.queue is before

    @pytest.mark.parametrize(
        "look",
        [
            lambda self: len(self.queue),
            lambda self: 1 if self.queue else 0,
            lambda self: 1 if self.queue is None else 0,
            lambda self: 1 if isinstance(self.queue, deque) else 0,
            lambda self: sum(int(item[0, 0] > 100) for item in self.queue),
            lambda self: self.queue.clear() or 0,
        ],
    )
    def test_any_look_at_it_is_seen(self, look: Callable[[Any], int]) -> None:
        def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
            steered = look(self)
            self.queue = deque([x])
            return x + steered

        module = Doing(forward, queue=deque([X]))
        assert observe_call(subject_of(module), (X,), {}).signature.unread == frozenset()
        assert len(module.queue) == 1  # type: ignore[arg-type]

    def test_a_flag_beside_state_is_state(self) -> None:
        def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
            front = self.queue.popleft() if self.is_full else x * 0
            self.queue.append(x)
            self.is_full = True
            return x + front

        module = Doing(forward, is_full=False, queue=deque())
        assert self.state_of(module, X) == (":is_full", ":queue")
        assert (module.is_full, list(module.queue)) == (False, [])  # type: ignore[arg-type]

    def test_a_counter_is_refused_and_put_back(self) -> None:
        module = Doing(lambda self, x: (setattr(self, "calls", self.calls + 1), x)[1], calls=0)
        with pytest.raises(CannotFreezeError, match=r"changes with each call \(calls: 0 became 1\)"):
            self.state_of(module, X)
        assert module.calls == 0

    def test_state_in_an_object_is_refused(self) -> None:
        box = Box()
        box.last = None  # type: ignore[attr-defined]
        module = Doing(lambda self, x: (setattr(self.box, "last", x), x)[1], box=box)
        with pytest.raises(CannotFreezeError, match=r"state that no graph can take: argument :box is a .*Box"):
            self.state_of(module, X)
        assert box.last is None  # type: ignore[attr-defined]

    def test_state_in_an_object_that_holds_its_owner_is_refused(self) -> None:
        box = Box()
        module = Doing(lambda self, x: (setattr(self.box, "last", x), x)[1], box=box)
        box.owner, box.last = module, None  # type: ignore[attr-defined]
        with pytest.raises(CannotFreezeError, match="state that no graph can take"):
            self.state_of(module, X)

    def test_state_in_a_named_tuple(self) -> None:
        module = Doing(lambda self, x: (setattr(self, "pair", Pair(x, None)), x)[1], pair=Pair(X, None))
        assert self.state_of(module, X) == (":pair",)

    def test_a_tensor_in_a_list_that_sums_up_its_inputs_is_no_cache(self) -> None:
        module = Doing(lambda self, x: x + self.sums[0].add_(x.sum()), sums=[torch.zeros(1)])
        with pytest.raises(CannotFreezeError, match="in place"):
            self.state_of(module, X)
        assert module.sums[0].item() == 0

    def test_arguments_that_are_written_are_part_of_the_program(self) -> None:
        module = Doing(lambda self, x, cache: (cache.append(x), x)[1])
        cache: list[Any] = []
        observation = observe_call(subject_of(module), (X, cache), {})
        assert observation.program.written == (1,)
        assert cache == []

    def test_an_opaque_argument_is_refused(self) -> None:
        with pytest.raises(CannotFreezeError, match=r"argument 0\.1 is a .*Box"):
            observe_call(subject_of(Doing(lambda self, x, box: x)), (X, Box()), {})


class TestPlainCalls:
    """A call that only returns values stands for the same call later."""

    def plain(self, module: nn.Module, *args: Any) -> PlainCall | None:
        with torch.no_grad():
            output, call = observe_plain(module, module, args, {})
        assert call is None or call.output is not output
        return call

    def test_what_a_call_returns_stands_for_it_while_the_module_is_as_it_was(self) -> None:
        module = Doing(lambda self, x: [x * self.scale, None, 2, {"name": "latents"}], scale=2.0)
        call = self.plain(module, X)
        assert call is not None
        assert torch.equal(call.output[0], X * 2)
        assert call.is_as_then
        vars(module)["scale"] = 3.0
        assert not call.is_as_then
        vars(module)["scale"] = 2.0
        assert call.is_as_then
        module.steps.add_(1)
        assert not call.is_as_then, "a buffer changed"

    @pytest.mark.parametrize(
        "body",
        [
            pytest.param(lambda self, x: x, id="returns an argument"),
            pytest.param(lambda self, x: x.view(-1), id="returns a view of one"),
            pytest.param(lambda self, x: [x + 1, Box()], id="returns an object"),
            pytest.param(lambda self, x: (x + 1).to_sparse(), id="returns no strided tensor"),
            pytest.param(lambda self, x: nn.Parameter(x + 1), id="returns a tensor of a class of its own"),
            pytest.param(lambda self, x: x.add_(1) + 1, id="changes an argument"),
            pytest.param(lambda self, x: setattr(self, "cache", x + 1) or x + 2, id="keeps a tensor"),
            pytest.param(lambda self, x: setattr(self, "count", self.count + 1) or x + 2, id="counts"),
            pytest.param(lambda self, x: self.steps.add_(1) + x[:, :1], id="changes a buffer"),
            pytest.param(lambda self, x: self.seen.append(x + 1) or x + 2, id="fills a list"),
            pytest.param(lambda self, x: x + torch.rand(3), id="draws"),
        ],
    )
    def test_another_call_stands_for_nothing_and_is_the_callers_own(self, body: Callable[..., Any]) -> None:
        module, twin = Doing(body, count=0, seen=[]), Doing(body, count=0, seen=[])
        given, other = X.clone(), X.clone()
        torch.manual_seed(0)
        assert self.plain(module, given) is None
        drawn = torch.get_rng_state()
        torch.manual_seed(0)
        with torch.no_grad():
            twin(other)
        assert torch.equal(given, other)
        assert torch.equal(drawn, torch.get_rng_state()), "it was made once"
        mine, theirs = ({name: vars(one)[name] for name in ("count", "seen")} for one in (module, twin))
        assert (mine["count"], len(mine["seen"])) == (theirs["count"], len(theirs["seen"]))
        assert torch.equal(module.get_buffer("steps"), twin.get_buffer("steps"))

    def test_the_call_is_made_on_what_it_was_given(self) -> None:
        module = Doing(lambda self, x, y: torch.ones(1) if x is y else torch.zeros(1))
        call = self.plain(module, X, X)
        assert call is not None
        assert torch.equal(call.output, torch.ones(1))

    def test_nothing_is_told_where_changes_are_not_counted_or_gradients_are_asked_for(self) -> None:
        module = Doing(lambda self, x: x.mul(2))
        with torch.inference_mode():
            assert observe_plain(module, module, (X,), {})[1] is None
            made_there = X * 1
        assert self.plain(module, made_there) is None
        asked = X.clone().requires_grad_()
        output, call = observe_plain(module, module, (asked,), {})
        assert call is None
        assert output.requires_grad

    def test_a_list_that_is_filled_is_another_call(self) -> None:
        assert self.plain(Doing(lambda self, x, found: found.append(x + 1) or x + 2), X, []) is None

    def test_what_the_part_raises_is_raised(self) -> None:
        def failing(self: Any, x: torch.Tensor) -> None:
            self.count = 1
            raise ValueError("height must be divisible by 8")

        with pytest.raises(ValueError, match="divisible by 8"):
            self.plain(Doing(failing, count=0), X)

    def test_a_call_that_was_seen_is_not_made_again(self) -> None:
        runs: list[int] = []
        module = Doing(lambda self, x: runs.append(1) or x * 2)
        call = self.plain(module, X)
        observation = observe_call(subject_of(module), (X,), {}, call)
        assert runs == [1]
        assert observation.signature == observe_call(subject_of(module), (X,), {}).signature
        assert (observation.seen, observation.caches) == (call, frozenset())
