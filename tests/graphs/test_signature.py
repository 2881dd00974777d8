from __future__ import annotations

import json
import re
from collections import OrderedDict, defaultdict, deque, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from hypothesis import given
from hypothesis import strategies as st
from transformers.modeling_outputs import BaseModelOutput

from pipevault.digest import canonical_json
from pipevault.graphs.signature import CallSignature, DescribedCall, describe_call, is_number, rebuild

Pair = namedtuple("Pair", "left right")
X = torch.zeros(2, 3)


def described(*args: object, **kwargs: object) -> DescribedCall:
    return describe_call(args, kwargs)


def signature(*args: object, **kwargs: object) -> CallSignature:
    return described(*args, **kwargs).signature


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (signature(X), signature(X.double())),
        (signature(X), signature(X[:1])),
        (signature(X, X), signature(X, X.to("meta"))),
        (signature(X, flag=True), signature(X, flag=1)),
        (signature(X, flag=True), signature(X, flag=False)),
        (signature(X, scale=1), signature(X, scale=1.0)),
        (signature(X, scale=1), signature(X, scale=torch.tensor(1))),
        (signature(X, extra=None), signature(X)),
        (signature([X]), signature((X,))),
        (signature([X]), signature([X, X])),
        (signature(x=X), signature(X)),
        (signature(X, kind="a"), signature(X, kind="b")),
        (signature(X, kind="1"), signature(X, kind=1)),
        (signature(X, dtype=torch.float16), signature(X, dtype=torch.float32)),
        (signature(X, cond={"a": X}), signature(X, cond={"b": X})),
        (signature(X, cond={1: X}), signature(X, cond={"1": X})),
        (signature(Pair(X, None)), signature((X, None))),
        (signature(deque([X])), signature(deque([X], maxlen=2))),
        (signature(OrderedDict(a=X)), signature({"a": X})),
    ],
)
def test_what_changes_the_code_changes_the_signature(one: CallSignature, other: CallSignature) -> None:
    assert one != other
    assert one.digest != other.digest


def test_values_of_tensors_and_order_of_keywords_do_not_count() -> None:
    assert signature(X, a=1, b=X) == signature(X + 1, b=X * 2, a=1)
    assert described(X, a=1, b=2).leaves[1:] == described(X, b=2, a=1).leaves[1:] == (1, 2)


@pytest.mark.parametrize(
    ("one", "other"),
    [(0.5, 0.25), (1, 2), (0.5, np.float32(0.25)), (0.5, np.float64(0.25)), (1, np.int64(2)), (True, np.bool_(True))],
)
def test_a_number_counts_by_its_type_and_numpys_like_pythons(one: object, other: object) -> None:
    assert signature(X, value=one) == signature(X, value=other)


def test_numbers_are_leaves_of_the_call_in_its_order() -> None:
    call = described(X, [2, X], scale=0.5, flag=True, step=np.int64(7))
    assert [leaf for leaf in call.leaves if not isinstance(leaf, torch.Tensor)] == [2, 0.5, 7]
    assert [type(call.leaves[index]) for index in call.numbers] == [int, float, int]
    assert len(call.tensors) == 2
    assert not is_number(True)


class TestFixedNumbers:
    def test_values_that_are_fixed_count(self) -> None:
        call = described(X, scale=0.5, step=3)
        half = call.signature.fix([1], call.leaves)
        other = call.signature.fix([1], (X, 0.25, 3))
        assert half != other
        assert half.digest != other.digest
        assert half.without_fixed == other.without_fixed == call.signature
        assert call.signature.without_fixed is call.signature

    def test_a_signature_admits_calls_with_its_fixed_values(self) -> None:
        call = described(X, scale=0.5, step=3)
        fixed = call.signature.fix([1], call.leaves)
        assert fixed.admits((X, 0.5, 99))
        assert not fixed.admits((X, 0.25, 3))
        assert call.signature.admits((X, 0.25, 99))

    def test_numbers_whose_text_differs_in_the_last_place_are_told_apart(self) -> None:
        call = described(X, scale=0.1)
        assert not call.signature.fix([1], call.leaves).admits((X, 0.1 + 2**-56))

    def test_they_are_read_in_the_readable_form(self) -> None:
        call = described(X, scale=0.5, step=3)
        assert str(call.signature) == "float32[2,3], scale=float, step=int"
        assert str(call.signature.fix([2], call.leaves)) == "float32[2,3], scale=float, step=3"


class TestLoose:
    def test_dtypes_of_scalars_and_vectors_of_real_numbers_are_open(self) -> None:
        for one, other in [(torch.tensor(3), torch.tensor(3.0)), (torch.ones(4), torch.ones(4, dtype=torch.int64))]:
            assert signature(X, one) != signature(X, other)
            assert signature(X, one).loose == signature(X, other).loose

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            (X, X.double()),
            (torch.ones(4), torch.ones(3)),
            (torch.ones(4), torch.ones(4).half()),
            (torch.ones(4), torch.ones(4).bool()),
            (torch.tensor(1.0), 1.0),
            (1, 1.0),
        ],
    )
    def test_everything_else_still_counts(self, one: object, other: object) -> None:
        assert signature(X, one).loose != signature(X, other).loose

    def test_inside_containers_and_state_too(self) -> None:
        one = describe_call((X, [torch.tensor(3)]), {}, {":last": torch.tensor(1)}).signature
        other = describe_call((X, [torch.tensor(3.0)]), {}, {":last": torch.tensor(1.0)}).signature
        assert one.loose == other.loose


class TestState:
    def test_state_counts_by_path_and_shape(self) -> None:
        plain = signature(X)
        with_state = describe_call((X,), {}, {"a:last": None}).signature
        filled = describe_call((X,), {}, {"a:last": X}).signature
        elsewhere = describe_call((X,), {}, {"b:last": X}).signature
        assert len({plain, with_state, filled, elsewhere}) == 4
        assert filled.state_paths == ("a:last",)
        assert str(filled) == "float32[2,3], state a:last=float32[2,3]"

    def test_the_leaves_of_state_come_after_those_of_the_arguments(self) -> None:
        call = describe_call((X,), {"scale": 2.0}, {"b:two": [4], "a:one": 3})
        assert call.leaves[1:] == (2.0, 3, 4)


def test_json_round_trip_gives_an_equal_key() -> None:
    call = describe_call(
        (X,), {"scale": 0.1, "cond": [None, X], "out": UNet2DConditionOutput(sample=X), "pair": Pair(X, 1)}, {":s": [X]}
    )
    original = call.signature.fix(call.numbers[:1], call.leaves)
    again = CallSignature.from_json(json.loads(canonical_json(original.to_json())))
    assert again == original
    assert hash(again) == hash(original)
    assert again.admits(call.leaves)


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.sampled_from([X, X.double(), X[0]])
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.lists(inner, max_size=3).map(deque),
        st.dictionaries(st.text(max_size=3), inner, max_size=3),
        st.tuples(inner, inner).map(lambda both: Pair(*both)),
    ),
    max_leaves=8,
)


@given(args=st.lists(TREES, max_size=3), kwargs=st.dictionaries(st.text(min_size=1, max_size=3), TREES, max_size=3))
def test_any_call_survives_json_and_is_rebuilt(args: list[Any], kwargs: dict[str, Any]) -> None:
    call = describe_call(args, kwargs)
    assert not call.opaque
    fixed = call.signature.fix(call.numbers, call.leaves)
    again = CallSignature.from_json(json.loads(canonical_json(fixed.to_json())))
    assert again == fixed
    assert again.digest == fixed.digest
    assert str(again) == str(fixed)
    assert again.admits(call.leaves)
    again_args, again_kwargs = rebuild(again.arguments, iter(call.leaves))
    assert describe_call(again_args, again_kwargs).signature == call.signature
    assert repr((again_args, again_kwargs)) == repr((tuple(args), {name: kwargs[name] for name in sorted(kwargs)}))


class TestRebuild:
    @pytest.mark.parametrize(
        "value",
        [
            [X, [1, None]],
            (X, True, "text"),
            {"b": X, "a": 0.5},
            {1: X},
            deque([X, 1], maxlen=3),
            OrderedDict([("b", X), ("a", 1)]),
            Pair(X, (X, 2)),
            UNet2DConditionOutput(sample=X),
            BaseModelOutput(last_hidden_state=X, hidden_states=(X, X)),
            torch.bfloat16,
            torch.device("cpu"),
            torch.device("cuda", 1),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_a_rebuilt_value_is_equal_in_containers_of_its_own(self, value: Any) -> None:
        call = described(value)
        assert not call.opaque
        (again,), kwargs = rebuild(call.signature.arguments, iter(call.leaves))
        assert kwargs == {}
        assert type(again) is type(value)
        assert repr(again) == repr(value)
        if isinstance(value, (list, dict, deque)):
            assert again is not value
        if isinstance(value, dict):
            assert list(again) == list(value)
        if isinstance(value, deque):
            assert again.maxlen == value.maxlen

    def test_the_tensors_are_the_very_leaves_that_are_given(self) -> None:
        call = described(UNet2DConditionOutput(sample=X), scale=2.0)
        other = X + 1
        (output,), kwargs = rebuild(call.signature.arguments, iter([other, 3.0]))
        assert output.sample is other
        assert kwargs == {"scale": 3.0}

    def test_classes_of_one_name_are_not_mixed_up(self) -> None:
        one = type("Twins", (UNet2DConditionOutput,), {"__module__": "one"})
        other = type("Twins", (UNet2DConditionOutput,), {"__module__": "other"})
        calls = [described(one(sample=X)), described(other(sample=X))]
        rebuilt = [rebuild(call.signature.arguments, iter(call.leaves))[0][0] for call in calls if not call.opaque]
        assert [type(value) for value in rebuilt] == [one, other][: len(rebuilt)]


def test_tensors_come_in_the_order_of_pytree() -> None:
    a, b, c = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    call = described(a, z=[b], k={"y": c})
    assert [tuple(t.shape) for t in call.tensors] == [(1,), (3,), (2,)]


def test_the_device_is_that_of_the_first_tensor_with_a_dimension() -> None:
    assert described(torch.tensor(1.0), X.to("meta")).device == torch.device("meta")
    assert described(torch.tensor(1.0)).device == torch.device("cpu")
    assert described(X.to("meta")).device == torch.device("meta")
    assert described(1).device is None


def test_autocast_counts() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        inside = signature(X)
    assert inside != signature(X)
    assert "autocast bfloat16" in str(inside)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([object()], r"argument 1\.scheduler\.0 is a builtins\.object"),
        ({"a": {1, 2}}, r"argument 1\.scheduler\.a is a builtins\.set"),
        (defaultdict(list, a=X), r"argument 1\.scheduler is a collections\.defaultdict"),  # type: ignore[arg-type]
        (np.zeros(3), r"argument 1\.scheduler is a numpy\.ndarray"),
        (1j, r"argument 1\.scheduler is a builtins\.complex"),
    ],
)
def test_an_argument_of_unknown_type_is_named(value: object, text: str) -> None:
    call = described(X, scheduler=value)
    assert re.fullmatch(text, call.opaque)


def test_the_first_opaque_argument_is_named_and_opaque_ones_count_by_class() -> None:
    call = described(object(), 1j)
    assert call.opaque == "argument 0.0 is a builtins.object"
    assert call.signature == signature(object(), 2j)


def test_readable_form_names_arguments_shapes_and_dtypes() -> None:
    assert str(signature(X, return_dict=False, t=torch.tensor(3))) == "float32[2,3], return_dict=False, t=int64[]"
    assert str(signature(X, [X, None], kind="a")) == "float32[2,3], list(float32[2,3], None), kind='a'"
