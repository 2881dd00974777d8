"""The manifest's bytes: round trip, and every way in which they can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.store_entries import CREATED_AT, make_key
from pipevault.digest import Digest, canonical_json, digest_bytes, digest_json
from pipevault.errors import CorruptEntryError, NewerVaultError
from pipevault.key import FACTOR_GROUPS, Key
from pipevault.store.manifest import LARGEST_SIZE_BYTES, ArtifactRef, Manifest, now_utc

PATH = Path("manifest.json")
REF = ArtifactRef(digest_bytes(b"graph"), 5, "unet/0.pt2")
NEEDED = tuple(sorted(digest_bytes(name) for name in (b"one", b"two")))
PARTS = {"unet": {"graphs": [1, 2.5, None]}}
MANIFEST = Manifest(make_key("a"), PARTS, (REF,), {"seconds": 3}, CREATED_AT, NEEDED)

plain_text = st.text(st.characters(exclude_categories=["Cs"]))
plain_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | plain_text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(plain_text, inner, max_size=4),
    max_leaves=12,
)
objects = st.dictionaries(plain_text, plain_json, max_size=4)
refs = st.builds(
    ArtifactRef,
    st.binary(max_size=8).map(digest_bytes),
    st.integers(0, LARGEST_SIZE_BYTES),
    st.from_regex(r"[a-z.]{1,3}[a-z]/[0-9]+\.pt2", fullmatch=True),
)
manifests = st.builds(
    Manifest,
    key=st.builds(Key, st.dictionaries(st.sampled_from(FACTOR_GROUPS), objects, max_size=3)),
    parts=objects,
    artifacts=st.lists(refs, max_size=4, unique_by=(lambda r: r.name, lambda r: r.digest)).map(tuple),
    info=objects,
    created_at=plain_text.filter(bool),
    needs=st.lists(st.binary(max_size=2).map(digest_bytes), max_size=4).map(tuple),
)


@given(manifests)
def test_round_trip(manifest: Manifest) -> None:
    data = manifest.to_bytes()
    again = Manifest.from_bytes(data, PATH)
    assert again == manifest
    assert again.to_bytes() == data
    assert again.manifest_digest == manifest.manifest_digest


@given(st.data())
def test_any_changed_byte_is_noticed(data: st.DataObject) -> None:
    original = MANIFEST.to_bytes()
    position = data.draw(st.integers(0, len(original) - 1))
    changed = bytearray(original)
    changed[position] ^= data.draw(st.integers(1, 255))
    with pytest.raises((CorruptEntryError, NewerVaultError)):
        Manifest.from_bytes(bytes(changed), PATH)


@given(st.binary() | plain_json.map(canonical_json) | objects.map(canonical_json))
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises((CorruptEntryError, NewerVaultError)):
        Manifest.from_bytes(data, PATH)


@pytest.mark.parametrize("length", [0, 1, 100, len(MANIFEST.to_bytes()) - 1])
def test_truncated(length: int) -> None:
    with pytest.raises(CorruptEntryError):
        Manifest.from_bytes(MANIFEST.to_bytes()[:length], PATH)


@pytest.mark.parametrize("extra", [b"\n", b" ", b"{}", b"\0"])
def test_something_after_the_end(extra: bytes) -> None:
    with pytest.raises(CorruptEntryError):
        Manifest.from_bytes(MANIFEST.to_bytes() + extra, PATH)


def test_deep_nesting_is_no_crash() -> None:
    with pytest.raises(CorruptEntryError):
        Manifest.from_bytes(b"[" * 200_000, PATH)


def test_an_edit_by_hand_is_noticed() -> None:
    edited = MANIFEST.to_bytes().replace(b'"seconds":3', b'"seconds":4')
    with pytest.raises(CorruptEntryError, match="changed after it was published"):
        Manifest.from_bytes(edited, PATH)


def test_other_white_space_is_noticed() -> None:
    with pytest.raises(CorruptEntryError, match="canonical"):
        Manifest.from_bytes(json.dumps(json.loads(MANIFEST.to_bytes()), indent=1).encode(), PATH)


def sealed(change: Callable[[dict[str, Any]], object]) -> bytes:
    """The manifest's bytes after ``change``, with a self digest that fits again."""
    document = json.loads(MANIFEST.to_bytes())
    change(document)
    document.pop("self_digest", None)
    return canonical_json({**document, "self_digest": digest_json(document).hex})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: d.pop("info"), "`info`: missing"),
        (lambda d: d.update(extra=1), "`extra`: unknown"),
        (lambda d: d.pop("manifest_version"), "with the field `manifest_version`"),
        (lambda d: d.update(manifest_version="1"), "`manifest_version`: .* got '1'"),
        (lambda d: d.update(manifest_version=True), "`manifest_version`: .* got True"),
        (lambda d: d.update(manifest_version=0), "`manifest_version`: .* got 0"),
        (lambda d: d["key"].update(digest="0" * 64), "not the key that it names"),
        (lambda d: d["key"]["factors"].update(dtype={}), "not the key that it names"),
        (lambda d: d["key"]["factors"].update(weather="fine"), "Unknown factor groups"),
        (lambda d: d["key"].update(factors=[]), "`key.factors`: expected `object`, got `array`"),
        (lambda d: d["key"].update(key_version=0), "`key.key_version`: .* got 0"),
        (lambda d: d.update(key=None), "`key`: expected `object`, got `null`"),
        (lambda d: d.update(artifacts={}), "`artifacts`: expected `array`, got `object`"),
        (lambda d: d.update(artifacts=[1]), r"`artifacts\[0\]`: expected `object`, got `int`"),
        (lambda d: d["artifacts"][0].pop("name"), r"`artifacts\[0\].name`: missing"),
        (lambda d: d["artifacts"][0].update(digest="abc"), r"`artifacts\[0\].digest`: expected `str` matching"),
        (lambda d: d["artifacts"][0].update(digest=5), r"`artifacts\[0\].digest`: expected `str`, got `int`"),
        (lambda d: d["artifacts"][0].update(size_bytes=-1), r"`artifacts\[0\].size_bytes`: expected `int` >= 0"),
        (
            lambda d: d["artifacts"][0].update(size_bytes=5.0),
            r"`artifacts\[0\].size_bytes`: expected `int`, got `float`",
        ),
        (
            lambda d: d["artifacts"][0].update(size_bytes=True),
            r"`artifacts\[0\].size_bytes`: expected `int`, got `bool`",
        ),
        (lambda d: d["artifacts"][0].update(name="../../etc/passwd"), "not a plain relative path"),
        (lambda d: d["artifacts"].append(d["artifacts"][0]), "share a name"),
        (lambda d: d.update(parts=[]), "`parts`: expected `object`, got `array`"),
        (lambda d: d.update(info=None), "`info`: expected `object`, got `null`"),
        (lambda d: d.update(created_at=""), "created_at"),
        (lambda d: d.update(manifest_version=1), "of version 1 .`manifest_version`., not 2"),
        (lambda d: d["key"].update(key_version=1), "of version 1 .`key.key_version`., not 2"),
        (lambda d: d.pop("needs"), "`needs`: missing"),
        (lambda d: d.update(needs={}), "`needs`: expected `array`, got `object`"),
        (lambda d: d.update(needs=["abc"]), r"`needs\[0\]`: expected `str` matching"),
        (lambda d: d.update(needs=[1]), r"`needs\[0\]`: expected `str`, got `int`"),
        (lambda d: d["needs"].reverse(), "not sorted"),
        (lambda d: d.update(needs=[d["needs"][0]] * 2), "names an entry twice"),
        (lambda d: d["key"]["factors"].update(pipeline="text"), "not the key that it names"),
    ],
)
def test_a_sealed_document_of_another_shape_is_refused(change: Callable[[dict[str, Any]], object], reason: str) -> None:
    with pytest.raises(CorruptEntryError, match=reason) as caught:
        Manifest.from_bytes(sealed(change), PATH)
    assert caught.value.path == PATH


def test_sealing_alone_changes_nothing() -> None:
    assert Manifest.from_bytes(sealed(lambda document: None), PATH) == MANIFEST


@pytest.mark.parametrize(
    "change", [lambda d: d.update(manifest_version=3, new="field"), lambda d: d["key"].update(key_version=3)]
)
def test_a_later_format_is_not_called_damage(change: Callable[[dict[str, Any]], object]) -> None:
    with pytest.raises(NewerVaultError, match="Upgrade pipevault"):
        Manifest.from_bytes(sealed(change), PATH)


def test_tuples_become_lists_and_the_callers_dict_is_copied() -> None:
    parts: dict[str, Any] = {"unet": {"shape": (1, 2)}}
    manifest = Manifest(make_key("a"), parts, (), {}, CREATED_AT)
    parts["unet"]["shape"] = (3,)
    assert manifest.parts == {"unet": {"shape": [1, 2]}}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), b"bytes", {1: 2}, {"a": object()}, Path("x")])
def test_what_json_cannot_hold_is_refused_at_once(value: object) -> None:
    with pytest.raises(ValueError, match=r"info\.bad"):
        Manifest(make_key("a"), {}, (), {"bad": value}, CREATED_AT)


def test_one_artifact_with_two_names_counts_once() -> None:
    twice = (REF, ArtifactRef(REF.digest, REF.size_bytes, "unet/1.pt2"))
    assert Manifest(make_key("a"), {}, twice, {}, CREATED_AT).size_bytes == REF.size_bytes


def test_one_digest_with_two_sizes_is_refused() -> None:
    with pytest.raises(ValueError, match="different sizes"):
        Manifest(make_key("a"), {}, (REF, ArtifactRef(REF.digest, 6, "unet/1.pt2")), {}, CREATED_AT)


def test_needs_are_sorted_and_none_stands_twice() -> None:
    first, second = NEEDED
    assert Manifest(make_key("a"), {}, (), {}, CREATED_AT, (second, first, second)).needs == (first, second)


@pytest.mark.parametrize("name", ["", "/x", "x/", "a//b", "..", "a/../b", "a\\b", "a\nb", "a\0b"])
def test_artifact_names_are_plain_relative_paths(name: str) -> None:
    with pytest.raises(ValueError, match="not a plain relative path"):
        ArtifactRef(REF.digest, 1, name)


def test_now_utc_is_iso_8601() -> None:
    assert len(now_utc()) == len(CREATED_AT)
    assert now_utc().endswith("+00:00")


def test_digest_is_that_of_the_document_without_it() -> None:
    document = json.loads(MANIFEST.to_bytes())
    assert Digest(document.pop("self_digest")) == MANIFEST.manifest_digest == digest_json(document)
