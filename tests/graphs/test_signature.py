from __future__ import annotations

import json
from collections import namedtuple

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from pipevault.digest import canonical_json
from pipevault.graphs.signature import Signature, UnsupportedArgumentError, describe_call, sorted_kwargs

Pair = namedtuple("Pair", "left right")
X = torch.zeros(2, 3)


def signature(*args: object, **kwargs: object) -> Signature:
    return describe_call(args, sorted_kwargs(kwargs))[0]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (signature(X), signature(X.double())),
        (signature(X), signature(X[:1])),
        (signature(X, flag=True), signature(X, flag=1)),
        (signature(X, scale=1), signature(X, scale=1.0)),
        (signature(X, scale=0.5), signature(X, scale=0.25)),
        (signature(X, extra=None), signature(X)),
        (signature([X]), signature((X,))),
        (signature(x=X), signature(X)),
        (signature(X, kind="a"), signature(X, kind="b")),
        (signature(X, cond={"a": X}), signature(X, cond={"b": X})),
        (signature(Pair(X, None)), signature((X, None))),
    ],
)
def test_what_changes_the_code_changes_the_signature(one: Signature, other: Signature) -> None:
    assert one != other
    assert one.digest != other.digest


def test_values_of_tensors_and_order_of_keywords_do_not_count() -> None:
    assert signature(X, a=1, b=X) == signature(X + 1, b=X * 2, a=1)


def test_json_round_trip_gives_an_equal_key() -> None:
    original = signature(X, scale=0.1, cond=[None, X], output=UNet2DConditionOutput(sample=X), pair=Pair(X, 1))
    again = Signature.from_json(json.loads(canonical_json(original.to_json())))
    assert again == original
    assert hash(again) == hash(original)


def test_tensors_come_in_the_order_of_pytree() -> None:
    a, b, c = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    _, tensors = describe_call((a,), sorted_kwargs({"z": [b], "k": {"y": c}}))
    assert [tuple(t.shape) for t in tensors] == [(1,), (3,), (2,)]


def test_autocast_counts() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        inside = signature(X)
    assert inside != signature(X)
    assert "autocast bfloat16" in str(inside)


def test_an_argument_of_unknown_type_is_named() -> None:
    with pytest.raises(UnsupportedArgumentError, match=r"1\.scheduler\.0 is a builtins\.object"):
        signature(X, scheduler=[object()])


def test_readable_form_names_arguments_shapes_and_dtypes() -> None:
    assert str(signature(X, return_dict=False, t=torch.tensor(3))) == "float32[2,3], return_dict=False, t=int64[]"
