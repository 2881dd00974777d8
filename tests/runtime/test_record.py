"""Run records as JSON: round trip, every bad input, the published schema."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import pickle
import random
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.sample_records import SHA256, fields, picture, sample_record, with_call
from pipevault.calls.describe import describe
from pipevault.digest import digest_json
from pipevault.errors import BadRecordError, NewerRecordError, NoRecordError, OldRecordError, RecordDigestError
from pipevault.runtime.record import RunRecord
from pipevault.runtime.record_schema import first_offence, schema


def sealed(document: dict[str, Any]) -> dict[str, Any]:
    """``document`` with the digest that its content has, as someone who knows the format would forge it."""
    content = {name: value for name, value in document.items() if name != "digest"}
    return {**content, "digest": digest_json(content).hex}


class TestRoundTrip:
    def test_through_json(self) -> None:
        record = sample_record()
        again = RunRecord.from_json(record.to_json())
        assert again == record
        assert again.to_json() == record.to_json()
        assert again.digest == record.digest
        assert hash(again) == hash(record)

    @pytest.mark.parametrize("prompt", ["ü漢字😀\n\t", 'quotes " and \\', "\0\x1f\x7f", "", "x" * 1_000_000])
    def test_prompts(self, prompt: str) -> None:
        record = with_call(prompt=prompt)
        again = RunRecord.from_json(record.to_json().encode())
        assert again == record
        assert again.call["prompt"] == prompt

    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
            # Surrogates on their own have no UTF-8.
            | st.text(st.characters(exclude_categories=["Cs"])),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
            max_leaves=8,
        )
    )  # fmt: skip
    def test_any_plain_argument(self, value: Any) -> None:
        record = with_call(anything=value)
        assert RunRecord.from_json(record.to_json()) == record

    def test_layout_of_the_text_does_not_count(self) -> None:
        record = sample_record()
        indented = json.dumps(record.to_document(), indent=4, sort_keys=False)
        assert RunRecord.from_json(indented) == record

    def test_tuples_become_lists(self) -> None:
        assert with_call(size=(1, 2)).call["size"] == [1, 2]

    def test_the_record_keeps_no_hold_of_what_it_was_made_from(self) -> None:
        given_call = fields()["call"]
        record = sample_record(call=given_call)
        given_call["prompt"] = "another"
        assert record.call["prompt"] == ["a seven", "an eight", "a nine"]

    def test_seeds_of_64_bits_stay_exact(self) -> None:
        record = sample_record(seeds={"root": 2**64 - 1, "samples": [2**63 + 1], "source": "random", "streams": {}})
        assert RunRecord.from_json(record.to_json()).seeds["samples"] == [2**63 + 1]

    def test_time_of_creation_is_the_present_in_utc(self) -> None:
        arguments = fields()
        del arguments["created_at"]
        assert RunRecord(**arguments).created_at.endswith("+00:00")

    def test_records_survive_pickling(self) -> None:
        assert pickle.loads(pickle.dumps(sample_record())) == sample_record()

    def test_of_sample(self) -> None:
        record = sample_record()
        assert record.of_sample(2).sample == 2
        assert record.of_sample(2).of_sample(None) == record
        assert record.of_sample(2).digest != record.digest


class TestDigest:
    def test_is_over_the_rest_in_canonical_json(self) -> None:
        document = sample_record().to_document()
        stated = document.pop("digest")
        text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        assert hashlib.sha256(text.encode()).hexdigest() == stated

    @pytest.mark.parametrize("name", sorted({*fields(), "sample"} - {"created_at"}))
    def test_a_change_in_any_field_is_noticed(self, name: str) -> None:
        document = sample_record().to_document()
        document[name] = {"x": 1} if document[name] != {"x": 1} else None
        with pytest.raises(RecordDigestError):
            RunRecord.from_document(document)

    def test_every_changed_character_of_the_text_is_noticed(self) -> None:
        text = with_call(prompt="ü").to_json()
        errors = (RecordDigestError, NewerRecordError, BadRecordError, NoRecordError)
        for index in random.Random(0).sample(range(len(text)), 300):
            changed = text[:index] + ("1" if text[index] != "1" else "2") + text[index + 1 :]
            with pytest.raises(errors):
                RunRecord.from_json(changed)

    def test_an_edited_prompt(self) -> None:
        text = sample_record().to_json().replace("a seven", "a three")
        with pytest.raises(RecordDigestError, match=r"run record of out\.png was changed") as caught:
            RunRecord.from_json(text, source="out.png")
        assert caught.value.source == "out.png"

    def test_an_added_field_is_an_edit(self) -> None:
        with pytest.raises(RecordDigestError):
            RunRecord.from_document({**sample_record().to_document(), "extra": 1})


class TestVersion:
    def test_newer(self) -> None:
        with pytest.raises(NewerRecordError, match=r"version 3 .*, not 2\. Upgrade"):
            RunRecord.from_document(sealed({"pipevault_record": 3, "anything": "else"}))

    def test_older(self) -> None:
        with pytest.raises(OldRecordError, match=r"version 1 .*, not 2; .* Draw the output again"):
            RunRecord.from_document(sealed({"pipevault_record": 1, "anything": "else"}))

    def test_newer_is_told_even_if_the_digest_does_not_fit(self) -> None:
        with pytest.raises(NewerRecordError):
            RunRecord.from_document({"pipevault_record": 3})

    @pytest.mark.parametrize("version", ["1", True, None, 0, -1, 1.0])
    def test_no_version(self, version: Any) -> None:
        with pytest.raises(BadRecordError) as caught:
            RunRecord.from_document(sealed({**sample_record().to_document(), "pipevault_record": version}))
        assert caught.value.field == "pipevault_record"


class TestNoRecord:
    @pytest.mark.parametrize(
        "text",
        ["", "hello", "[]", "{}", "null", '{"pipevault_vault": 1}', '{"pipevault_record": NaN}', b"\xff\xfe\xfa"],
    )
    def test_other_documents(self, text: str | bytes) -> None:
        with pytest.raises(NoRecordError, match=r"^notes\.json is not a run record"):
            RunRecord.from_json(text, source="notes.json")

    def test_deeply_nested(self) -> None:
        with pytest.raises(NoRecordError):
            RunRecord.from_json("[" * 100_000)


def _remove(document: dict[str, Any], path: list[Any]) -> None:
    for name in path[:-1]:
        document = document[name]
    del document[path[-1]]


def _put(document: dict[str, Any], path: list[Any], value: Any) -> None:
    for name in path[:-1]:
        document = document[name]
    document[path[-1]] = value


REQUIRED = [
    *([name] for name in sorted({*fields(), "sample"})),
    *(["pipeline", name] for name in ("class", "model", "revision")),
    *(["seeds", name] for name in ("root", "samples", "source")),
    *(["level", name] for name in ("asked", "achieved", "flags", "notes")),
    *(["results", name] for name in ("noise", "latents", "pixels")),
    ["results", "steps", 0, "part"],
]
WRONG: list[tuple[list[Any], Any, str]] = [
    (["created_at"], "yesterday", "created_at"),
    (["created_at"], "2026-01-31T12:00:00+00:00\n", "created_at"),
    (["created_at"], 1, "created_at"),
    (["pipeline"], [], "pipeline"),
    (["pipeline", "class"], "", "pipeline.class"),
    (["pipeline", "model"], 3, "pipeline.model"),
    (["call"], "a seven", "call"),
    (["seeds", "root"], -1, "seeds.root"),
    (["seeds", "root"], True, "seeds.root"),
    (["seeds", "root"], 1.5, "seeds.root"),
    (["seeds", "samples", 1], "7", "seeds.samples[1]"),
    (["seeds", "samples", 2], -1, "seeds.samples[2]"),
    (["seeds", "source"], "luck", "seeds.source"),
    (["level", "achieved"], "fast", "level.achieved"),
    (["level", "notes"], [1], "level.notes[0]"),
    (["key"], "abc", "key"),
    (["key"], SHA256.upper(), "key"),
    (["manifest"], 0, "manifest"),
    (["outcome"], "found", "outcome"),
    (["weights", "unet"], None, "weights.unet"),
    (["versions", "torch"], 2.13, "versions.torch"),
    (["machine"], None, "machine"),
    (["results", "pixels", 0], "", "results.pixels[0]"),
    (["results", "steps", 0, "step"], "0", "results.steps[0].step"),
    (["sample"], -1, "sample"),
    (["extra"], 1, "extra"),
]


class TestBadFields:
    @pytest.mark.parametrize("path", REQUIRED, ids=str)
    def test_missing(self, path: list[Any]) -> None:
        document = sample_record().to_document()
        _remove(document, path)
        with pytest.raises(BadRecordError, match="missing") as caught:
            RunRecord.from_document(sealed(document), source="a.json")
        assert caught.value.field == ".".join(map(str, path)).replace(".0", "[0]")
        assert "a.json" in str(caught.value)

    def test_missing_digest(self) -> None:
        document = sample_record().to_document()
        del document["digest"]
        with pytest.raises(BadRecordError) as caught:
            RunRecord.from_document(document)
        assert caught.value.field == "digest"

    @pytest.mark.parametrize(("path", "value", "field"), WRONG, ids=str)
    def test_wrong(self, path: list[Any], value: Any, field: str) -> None:
        document = sample_record().to_document()
        _put(document, path, value)
        with pytest.raises(BadRecordError) as caught:
            RunRecord.from_document(sealed(document))
        assert caught.value.field == field
        assert field in str(caught.value)

    def test_wrong_when_it_is_made(self) -> None:
        with pytest.raises(BadRecordError) as caught:
            sample_record(seeds={"root": 7, "samples": [-1], "source": "argument", "streams": {}})
        assert caught.value.field == "seeds.samples[0]"

    @pytest.mark.parametrize(
        "value", [math.nan, math.inf, object(), b"x", "\ud800", {1: 2, "1": 3}], ids=lambda value: ascii(value)[:20]
    )
    def test_no_plain_json(self, value: Any) -> None:
        with pytest.raises(BadRecordError) as caught:
            with_call(value=value)
        assert caught.value.field == "call"

    def test_errors_survive_pickling(self) -> None:
        error = pickle.loads(pickle.dumps(BadRecordError("x", "seeds", "a.png")))
        assert (str(error), error.field, error.source) == ("x", "seeds", "a.png")


class TestSchema:
    def test_is_a_schema_of_draft_2020_12(self) -> None:
        assert schema()["$schema"] == "https://json-schema.org/draft/2020-12/schema"
        jsonschema.Draft202012Validator.check_schema(schema())

    @pytest.mark.parametrize(
        "record",
        [
            sample_record(),
            sample_record().of_sample(2),
            sample_record(key=None, manifest=None, outcome="off", weights={}, versions={}, machine={}),
            with_call(
                image=describe(picture()), latents=describe(torch.zeros(1)), generator=describe(torch.Generator())
            ),
        ],
    )
    def test_holds_for_records(self, record: RunRecord) -> None:
        jsonschema.Draft202012Validator(schema()).validate(json.loads(record.to_json()))

    @pytest.mark.parametrize("change", [*((path, None) for path in REQUIRED), *(row[:2] for row in WRONG)], ids=str)
    def test_refuses_what_we_refuse(self, change: tuple[list[Any], Any]) -> None:
        document = sample_record().to_document()
        path, value = change
        if path in REQUIRED and value is None:
            _remove(document, path)
        else:
            _put(document, path, value)
        assert first_offence(document) is not None
        if value != "2026-01-31T12:00:00+00:00\n":  # the "$" of Python's regular expressions, which jsonschema uses
            assert not jsonschema.Draft202012Validator(schema()).is_valid(document)

    def test_each_field_of_the_class_is_in_the_schema(self) -> None:
        assert set(schema()["properties"]) == {*fields(), "sample", "pipevault_record", "digest"}
        assert set(schema()["required"]) == set(schema()["properties"])

    def test_a_keyword_that_the_check_does_not_know_is_not_ignored(self, monkeypatch: pytest.MonkeyPatch) -> None:
        changed = copy.deepcopy(schema())
        changed["properties"]["outcome"]["maxLength"] = 3
        monkeypatch.setattr("pipevault.runtime.record_schema.schema", lambda: changed)
        with pytest.raises(NotImplementedError, match="maxLength"):
            first_offence(sample_record().to_document())
