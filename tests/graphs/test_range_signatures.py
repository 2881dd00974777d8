"""Expressions in sizes, and signatures of ranges."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipevault.digest import digest_json
from pipevault.errors import CannotFreezeError
from pipevault.graphs.freezing import SizedCall, range_signature, varying_sizes
from pipevault.graphs.ranges import Expression, Symbol, solve
from pipevault.graphs.signature import CallSignature, describe_call

HEIGHT, WIDTH = Symbol("height", 8, 16), Symbol("width", 8, 24)


def signature_of(*shapes: tuple[int, ...]) -> CallSignature:
    return describe_call([torch.empty(shape) for shape in shapes], {}).signature


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("height", 12),
        ("8*height + 1", 97),
        ("height // 5", 2),
        ("height % 5", 2),
        ("-height", -12),
        ("max(height, 3*width)", 48),
        ("min(height, width)", 12),
        ("height == 12 and width > 20", False),
        ("8 <= height < 12 or True", True),
    ],
)
def test_expressions_have_their_value(text: str, value: int) -> None:
    assert Expression(text).value({"height": 12, "width": 16}) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "height +",
        "__import__('os')",
        "height.real",
        "height ** 2",
        "height / 2",
        "1.5",
        "'text'",
        "[height]",
        "(lambda: 1)()",
        "max(height, key=len)",
        "max()",
        "height if width else 1",
        "height[0]",
        "open(height)",
        "1 + " * 400 + "1",
        "(" * 300 + "1" + ")" * 300,
        "-" * 999 + "1",
        "\0",
    ],
)
def test_anything_else_is_no_expression(text: str) -> None:
    with pytest.raises(ValueError, match=r"expression|numbers alone"):
        Expression(text)


@given(st.integers(1, 64), st.integers(1, 16), st.integers(0, 99))
def test_a_size_gives_the_symbol(symbol: int, factor: int, offset: int) -> None:
    known = Expression(f"{factor}*tokens + {offset}")
    assert known.solve(factor * symbol + offset, {}) == ("tokens", symbol)
    if factor > 1:
        assert known.solve(factor * symbol + offset + 1, {}) is None


@given(st.text(max_size=40))
def test_no_text_does_more_than_arithmetic(text: str) -> None:
    try:
        known = Expression(text)
    except ValueError:
        return
    with contextlib.suppress(ZeroDivisionError):
        assert isinstance(known.value(dict.fromkeys(known.symbols, 3)), int)


def test_symbols_lie_in_their_ranges_and_conditions_hold() -> None:
    pairs = [("height", 12), ("width", 16), ("height*width", 192)]
    assert solve(pairs, [HEIGHT, WIDTH], ["height % 4 == 0"]) == {"height": 12, "width": 16}
    assert solve([("height", 12), ("width", 16), ("height*width", 193)], [HEIGHT, WIDTH], []) is None
    assert solve([("height", 17), ("width", 16)], [HEIGHT, WIDTH], []) is None
    assert solve(pairs, [HEIGHT, WIDTH], ["height % 5 == 0"]) is None
    assert solve(pairs, [HEIGHT, WIDTH], ["height % (width - 16) == 0"]) is None
    assert solve([("height*width", 192)], [HEIGHT, WIDTH], []) is None
    assert solve(pairs, [HEIGHT, WIDTH, Symbol("frames", 1, 9)], []) is None


def test_a_signature_of_a_range_covers_calls_in_it() -> None:
    base = signature_of((2, 4, 16, 24), (2, 7))
    ranged = base.with_sizes([2, 4, "height", "width", 2, 7], [HEIGHT, WIDTH], ["height % 2 == 0"])
    assert ranged.covers(base)
    assert ranged.covers(signature_of((2, 4, 8, 9), (2, 7)))
    assert not ranged.covers(signature_of((2, 4, 9, 9), (2, 7)))
    assert not ranged.covers(signature_of((2, 4, 18, 9), (2, 7)))
    assert not ranged.covers(signature_of((1, 4, 16, 24), (2, 7)))
    assert not ranged.covers(signature_of((2, 4, 16, 24), (2, 8)))
    assert not ranged.covers(signature_of((2, 4, 16, 24)))
    assert not ranged.covers(replace(base, autocast="bfloat16"))


def test_a_signature_of_a_range_survives_json_and_says_what_it_is() -> None:
    base = signature_of((2, 16))
    ranged = base.with_sizes([2, "tokens"], [Symbol("tokens", 4, 16)], ["tokens % 2 == 0"])
    assert CallSignature.from_json(ranged.to_json()) == ranged
    assert str(ranged) == "float32[2,tokens] where tokens 4-16"
    assert ranged.is_range
    assert not base.is_range
    assert ranged.digest != base.digest
    assert base.digest == digest_json({"arguments": base.arguments, "autocast": None, "state": (), "fixed": ()})


@pytest.mark.parametrize("text", ["tokens.real", "open(tokens)", ""])
def test_a_signature_with_other_code_in_it_is_refused(text: str) -> None:
    ranged = signature_of((2, 16)).with_sizes([2, "tokens"], [Symbol("tokens", 4, 16)], [])
    document = ranged.to_json()
    for name, wrong in (("conditions", [text]), ("arguments", ranged.with_sizes([2, text], [], []).arguments)):
        with pytest.raises(ValueError, match="expression"):
            CallSignature.from_json({**document, name: wrong})


def sized(cause: str, *shapes: tuple[int, ...]) -> SizedCall:
    causes = frozenset(filter(None, cause.split()))
    return SizedCall(describe_call([torch.empty(shape) for shape in shapes], {}), causes)


def test_sizes_are_called_by_what_they_vary_with() -> None:
    base = signature_of((4, 64), (4, 8, 8), (4, 2))
    others = [
        sized("height", (4, 32), (4, 4, 8), (4, 2)),
        sized("width", (4, 32), (4, 8, 4), (4, 2)),
        sized("batch_size", (2, 64), (2, 8, 8), (2, 2)),
        sized("height width batch_size", (2, 16), (2, 4, 4), (2, 2)),
    ]
    names = {place: str(symbol) for place, symbol in varying_sizes(base, others).items()}
    assert names == {
        (0, 0): "batch 2-4",
        (0, 1): "tokens 16-64",
        (1, 0): "batch 2-4",
        (1, 1): "height 4-8",
        (1, 2): "width 4-8",
        (2, 0): "batch 2-4",
    }
    assert [str(one) for one in varying_sizes(base, [sized("", (4, 60), (4, 8, 8), (4, 2))]).values()] == [
        "length 60-64"
    ]
    drafted = range_signature(base, [], others)
    assert drafted.sizes == ("batch", "tokens", "batch", "height", "width", "batch", 2)
    assert range_signature(base, [], []) is base


def test_calls_that_differ_in_more_than_sizes_have_no_range() -> None:
    base = signature_of((4, 64))
    with pytest.raises(CannotFreezeError, match="more than sizes"):
        varying_sizes(base, [sized("height", (4, 32), (1,))])
    fixed = describe_call([torch.empty(4), 3], {})
    other = SizedCall(describe_call([torch.empty(8), 5], {}))
    with pytest.raises(CannotFreezeError, match=r"number that steers its code and is not a size \(3, 5\)"):
        range_signature(fixed.signature.fix([1], fixed.leaves), fixed.leaves, [other])


def test_a_number_that_is_a_size_counts_it() -> None:
    base = describe_call([torch.empty(2, 8), [8, 3]], {})
    other = SizedCall(describe_call([torch.empty(2, 6), [6, 3]], {}))
    ranged = range_signature(base.signature.fix([1, 2], base.leaves), base.leaves, [other])
    assert (ranged.counted, ranged.fixed) == (((1, 0, 1),), ((2, "3"),))
    assert CallSignature.from_json(ranged.to_json()) == ranged
    for length, count, third, admitted in ((8, 8, 3, True), (7, 7, 3, True), (7, 8, 3, False), (7, 7, 4, False)):
        call = describe_call([torch.empty(2, length), [count, third]], {})
        assert ranged.covers(call.signature) == (6 <= length <= 8)
        assert ranged.admits(call.leaves) == admitted
    assert not ranged.admits(describe_call([torch.empty(2), [2, 3]], {}).leaves)
