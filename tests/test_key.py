"""The key: how its digest is put together, what shares a shelf, and which key is nearest."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipevault.digest import digest_json
from pipevault.key import FACTOR_GROUPS, KEY_VERSION, SHELF_DIGITS, Difference, Key, leaf_differences, nearest

GRAPH = {
    "architecture": {"class": "UNet2DConditionModel", "digest": "ab" * 32},
    "dtype": "float32",
    "machine": {"type": "cpu"},
    "signature": {"arguments": [["tensor", "float32", [2, 4, 8, 8], "cpu"]], "autocast": None},
    "constants": None,
}
PLAN = {
    "pipeline": {"class": "StableDiffusionPipeline", "config": {"ümlaut": True}},
    "architecture": {"unet": {"class": "UNet2DConditionModel"}},
    "call": {"height": 512},
}
texts = st.text(max_size=3)
groups = st.sampled_from(FACTOR_GROUPS)
values = st.none() | texts | st.integers() | st.dictionaries(texts, texts, max_size=2)
factors = st.dictionaries(groups, values, max_size=5)


def changed(base: dict[str, Any], **groups: Any) -> Key:
    return Key({**base, **groups})


def test_the_digests_are_those_of_every_release() -> None:
    """A change of any of them is a change of the format: raise ``KEY_VERSION``."""
    assert KEY_VERSION == 2
    assert Key(GRAPH).digest.hex == "190bd239ac00f0a2051a99231fc4d5bbfe43088e9ea2f788e59a091526b2388b"
    assert Key(PLAN).digest.hex == "786176509d38ead17121a1dc797f10bb2b7c3c7db3b69abf206e3e85752f7470"
    assert Key({}).digest.hex == "a4ae9ab029afe80eafa200737e0cff9d2127021f51b4c7c31e8e21e4132ac0f5"
    assert Key(GRAPH).shelf.hex == "e59a091526b2388b3ff73277df7bfcb44cbfac65761ec0c43ec161a58b0de848"


def test_the_digest_is_that_of_the_format_in_other_words() -> None:
    def sha(document: object) -> str:
        text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    shared = {name: GRAPH[name] for name in ("architecture", "dtype", "machine")}
    graph_shelf = sha({"key_version": 2, "shelf": shared})
    plan_shelf = sha(
        {
            "key_version": 2,
            "plans_of": {"class": "StableDiffusionPipeline", "architecture": PLAN["architecture"]},
        }
    )
    assert Key(GRAPH).digest.hex == sha({"key_version": 2, "factors": GRAPH})[:48] + graph_shelf[:16]
    assert Key(PLAN).digest.hex == sha({"key_version": 2, "factors": PLAN})[:48] + plan_shelf[:16]


def test_kinds() -> None:
    assert Key(GRAPH).kind == "graph"
    assert Key(PLAN).kind == "plan"
    assert Key({"signature": None}).kind == "graph"


@pytest.mark.parametrize("group", ["signature", "constants"])
def test_graphs_of_one_part_share_a_shelf(group: str) -> None:
    one, other = Key(GRAPH), changed(GRAPH, **{group: "other"})
    assert one.shelf == other.shelf
    assert one.digest != other.digest
    assert one.digest.hex[-SHELF_DIGITS:] == other.digest.hex[-SHELF_DIGITS:] == one.shelf.hex[:SHELF_DIGITS]


@pytest.mark.parametrize(
    "group", ["architecture", "dtype", "machine", "weights", "toolchain", "backend", "determinism"]
)
def test_graphs_of_other_parts_have_another_shelf(group: str) -> None:
    assert changed(GRAPH, **{group: "other"}).shelf != Key(GRAPH).shelf


@pytest.mark.parametrize("group", ["call", "dtype", "machine", "toolchain", "weights"])
def test_plans_of_one_architecture_share_a_shelf(group: str) -> None:
    assert changed(PLAN, **{group: "other"}).shelf == Key(PLAN).shelf
    assert changed(PLAN, pipeline={"class": "StableDiffusionPipeline"}).shelf == Key(PLAN).shelf
    assert changed(PLAN, pipeline={"class": "Other"}).shelf != Key(PLAN).shelf
    assert changed(PLAN, architecture={}).shelf != Key(PLAN).shelf


@given(factors, factors)
def test_equal_factors_and_no_others_have_one_digest(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert (Key(one).digest == Key(other).digest) is (one == other)
    assert Key(one).digest.hex.startswith(digest_json({"key_version": KEY_VERSION, "factors": one}).hex[:48])


@pytest.mark.parametrize("pipeline", [None, "text", [], {"class": None}])
def test_a_pipeline_without_a_class_has_a_shelf(pipeline: object) -> None:
    assert Key({"pipeline": pipeline}).shelf == Key({}).shelf


def test_the_nearest_is_the_one_with_the_fewest_differences() -> None:
    far, near = changed(PLAN, call={"height": 1}, machine="other"), changed(PLAN, call={"height": 1})
    found = nearest(Key(PLAN), [far, near])
    assert found is not None
    assert found[0] == near
    assert [difference.factor for difference in found[1]] == ["call.height"]
    assert nearest(Key(PLAN), []) is None


def test_an_empty_mapping_against_a_filled_one_differs_in_what_the_other_holds() -> None:
    assert leaf_differences({"a": {}, "b": 1}, {"a": {"c": True}, "b": 1}) == (Difference("a.c", None, True),)
    assert leaf_differences({"a": {"c": True}}, {"a": {}}) == (Difference("a.c", True, None),)
    assert leaf_differences({"a": {}, "b": 1}, {"b": 1}) == (Difference("a", {}, None),)
