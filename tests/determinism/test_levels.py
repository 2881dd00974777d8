"""The switches of a level are set, read back, recorded and put back."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._inductor import config as inductor_config

from pipevault.determinism import levels
from pipevault.determinism.flags import code_flags
from pipevault.determinism.levels import Level, level, parse_level
from pipevault.determinism.switches import CUBLAS_VARIABLE, FLAGS, PRECISION_OPERATIONS, Flag
from pipevault.errors import SettingsError, UnknownLevelError
from pipevault.settings import LEVELS, PROFILES

BACKENDS: Any = torch.backends
UTILS: Any = torch.utils
IEEE = dict.fromkeys(PRECISION_OPERATIONS, "ieee")
DEFAULT_PRECISION = IEEE | {"cudnn.conv": "tf32", "cudnn.rnn": "tf32"}
STRICT_FLAGS = {
    "deterministic_algorithms": "error",
    "inductor_deterministic": True,
    "cudnn_benchmark": False,
    "cudnn_deterministic": True,
    "mkldnn_deterministic": True,
    "float32_precision": IEEE,
    "allow_fp16_reduced_precision_reduction": False,
    "allow_bf16_reduced_precision_reduction": False,
    "allow_fp16_accumulation": False,
    "run_time_tuning": False,
    "cublas_workspace": ":4096:8",
}


@pytest.fixture(autouse=True)
def _program(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A program that left torch as it was started; what a test changes is undone."""
    monkeypatch.delenv(CUBLAS_VARIABLE, raising=False)
    monkeypatch.setattr(BACKENDS.cuda, "is_built", lambda: True)  # its workspace is no switch elsewhere
    states = {name: flag.state() for name, flag in FLAGS.items()}
    yield
    monkeypatch.undo()
    for name, flag in FLAGS.items():
        flag.put_back(states[name])


def everything() -> dict[str, Any]:
    return {
        "flags": {name: flag.state() for name, flag in FLAGS.items()},
        "code": code_flags(),
        "environment": dict(os.environ),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fill": UTILS.deterministic.fill_uninitialized_memory,
    }


def a_program_of_its_own() -> None:
    """Sets every switch to what no level would choose."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    inductor_config.deterministic = False
    BACKENDS.cudnn.benchmark = True
    torch.set_float32_matmul_precision("medium")
    BACKENDS.cudnn.allow_tf32 = True
    BACKENDS.cuda.matmul.allow_fp16_accumulation = True
    BACKENDS.cuda.matmul.allow_bf16_reduced_precision_reduction = (False, False)
    BACKENDS.cuda.enable_flash_sdp(False)
    os.environ[CUBLAS_VARIABLE] = ":0:0"


def test_strict_sets_its_switches_and_reads_them_back() -> None:
    for customised in (False, True):
        if customised:
            a_program_of_its_own()
        before = everything()
        with level("strict") as achieved:
            assert achieved.level == "strict"
            assert {name: achieved.flags[name] for name in STRICT_FLAGS} == STRICT_FLAGS
            assert achieved.notes == ()
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
            assert inductor_config.deterministic
            assert BACKENDS.cudnn.deterministic
            assert torch.get_float32_matmul_precision() == "highest"
            assert not BACKENDS.cuda.matmul.allow_tf32
            assert not BACKENDS.cudnn.allow_tf32
            assert os.environ[CUBLAS_VARIABLE] == ":4096:8"
        assert everything() == before


def test_strict_raises_on_an_operation_without_a_deterministic_form() -> None:
    # A CPU has hardly any; torch has this function raise as such an operation would.
    with level("strict"), pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        torch.empty(4).put_(torch.tensor([0]), torch.ones(1), accumulate=False)


def test_repeatable_ends_tuning_and_keeps_the_choices_of_the_program() -> None:
    a_program_of_its_own()
    before = everything()
    with level("repeatable") as achieved:
        assert achieved.level == "repeatable"
        assert not BACKENDS.cudnn.benchmark
        assert os.environ[CUBLAS_VARIABLE] == ":4096:8"
        kept = set(FLAGS) - {"cudnn_benchmark", "cublas_workspace", "run_time_tuning"}
        assert {name: FLAGS[name].state() for name in kept} == {name: before["flags"][name] for name in kept}
        assert achieved.flags["float32_precision"]["mkldnn.matmul"] == "bf16"
        assert achieved.flags["attention"] == {"flash": False, "memory_efficient": True, "math": True, "cudnn": True}
        assert achieved.flags["threads"] == torch.get_num_threads()
    assert everything() == before


@pytest.mark.parametrize("name", ["off", "seeded"])
def test_lower_levels_touch_nothing(name: str) -> None:
    a_program_of_its_own()
    before = everything()
    with level(name) as achieved:
        assert achieved.level == name
        assert everything() == before
        assert achieved.flags["cudnn_benchmark"] is True
        BACKENDS.cudnn.deterministic = True
    assert BACKENDS.cudnn.deterministic


def test_invariant_is_strict_and_tells_to_run_each_sample_alone() -> None:
    with level("invariant") as achieved:
        assert achieved.level == "invariant"
        assert achieved.per_sample
        assert {name: achieved.flags[name] for name in STRICT_FLAGS} == STRICT_FLAGS
    for other in ("off", "seeded", "repeatable", "strict"):
        with level(other) as achieved:
            assert not achieved.per_sample


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_everything_is_put_back_after_an_exception(name: str, error: type[BaseException]) -> None:
    a_program_of_its_own()
    before = everything()
    with pytest.raises(error), level(name):
        raise error
    assert everything() == before


@pytest.mark.parametrize("outer", LEVELS)
@pytest.mark.parametrize("inner", LEVELS)
def test_levels_can_be_nested(outer: str, inner: str) -> None:
    before = everything()
    with level(outer):
        between = everything()
        with level(inner):
            pass
        assert everything() == between
    assert everything() == before


def test_what_the_program_changes_inside_is_put_back() -> None:
    before = everything()
    with level("repeatable"):
        BACKENDS.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
        os.environ[CUBLAS_VARIABLE] = ":16:8"
    assert everything() == before


def test_a_workspace_that_is_deterministic_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CUBLAS_VARIABLE, ":16:8")
    with level("strict") as achieved:
        assert achieved.flags["cublas_workspace"] == ":16:8"
    assert os.environ[CUBLAS_VARIABLE] == ":16:8"


def test_that_cuda_had_started_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with level("strict") as achieved:
        [note] = achieved.notes
    assert note.startswith("CUDA had started before CUBLAS_WORKSPACE_CONFIG was set")
    assert note.endswith("Set CUBLAS_WORKSPACE_CONFIG=:4096:8 before the program starts.")
    assert achieved.level == "strict"
    monkeypatch.setenv(CUBLAS_VARIABLE, ":4096:8")
    with level("strict") as achieved:
        assert achieved.notes == ()


@pytest.mark.parametrize(("asked", "flag", "value", "achieved_level"), [
    ("strict", "cudnn_deterministic", False, "repeatable"),
    ("invariant", "deterministic_algorithms", "off", "repeatable"),
    ("strict", "cudnn_benchmark", True, "seeded"),
    ("repeatable", "cudnn_benchmark", True, "seeded"),
])  # fmt: skip
def test_a_switch_that_does_not_take_lowers_the_level(
    monkeypatch: pytest.MonkeyPatch, asked: str, flag: str, value: Any, achieved_level: str
) -> None:
    stuck = Flag(lambda: value, lambda _: None)
    monkeypatch.setattr(levels, "FLAGS", {**FLAGS, flag: stuck})
    with level(asked) as achieved:
        assert achieved.level == achieved_level
        assert achieved.flags[flag] == value
        [note] = achieved.notes
        assert note.startswith(f"{flag} is {value!r} where ")


def test_the_reason_why_torch_refused_a_switch_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    before = everything()

    def refuse(_: Any) -> None:
        raise RuntimeError("not allowed to set BACKENDS.cudnn flags after disable_global_flags")

    monkeypatch.setattr(levels, "FLAGS", {**FLAGS, "cudnn_deterministic": Flag(lambda: False, refuse)})
    with level("strict") as achieved:
        assert achieved.level == "repeatable"
    assert "disable_global_flags" in achieved.notes[0]
    assert everything() == before


def test_one_switch_that_cannot_be_put_back_does_not_keep_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    before = everything()
    values = [False, True]

    def refuse(_: Any) -> None:
        raise OSError("stuck")

    broken = Flag(object, lambda _: values.reverse(), lambda _: values[0])
    monkeypatch.setattr(levels, "FLAGS", {**FLAGS, "cudnn_deterministic": broken})
    with pytest.raises(OSError, match="stuck"), level("strict"):
        object.__setattr__(broken, "write", refuse)
    assert everything() == before


def test_pins_hold_the_switches_under_which_a_graph_was_frozen() -> None:
    with level("repeatable") as frozen:
        pass
    before = everything()
    torch.set_float32_matmul_precision("high")
    BACKENDS.cuda.enable_math_sdp(False)
    with level("repeatable", pins=frozen.flags) as achieved:
        assert achieved == frozen
        assert torch.get_float32_matmul_precision() == "highest"
        assert BACKENDS.cuda.math_sdp_enabled()
    assert torch.get_float32_matmul_precision() == "high"
    assert not BACKENDS.cuda.math_sdp_enabled()
    BACKENDS.cuda.enable_math_sdp(True)
    torch.set_float32_matmul_precision("highest")
    assert everything()["code"] == before["code"]


def test_split_k_is_put_back_with_the_reductions_that_it_belongs_to() -> None:
    BACKENDS.cuda.matmul.allow_fp16_reduced_precision_reduction = (False, False)
    with level("repeatable", pins={"allow_fp16_reduced_precision_reduction": True}):
        assert BACKENDS.cuda.matmul.allow_fp16_reduced_precision_reduction_split_k
    assert not BACKENDS.cuda.matmul.allow_fp16_reduced_precision_reduction
    assert not BACKENDS.cuda.matmul.allow_fp16_reduced_precision_reduction_split_k


def test_threads_change_only_when_asked() -> None:
    threads = torch.get_num_threads()
    with level("repeatable", pins={"threads": threads + 1}) as achieved:
        assert torch.get_num_threads() == achieved.flags["threads"] == threads + 1
    assert torch.get_num_threads() == threads


def test_a_pin_never_weakens_a_level() -> None:
    with level("strict", pins={"cudnn_deterministic": False, "cublas_workspace": None}) as achieved:
        assert {name: achieved.flags[name] for name in STRICT_FLAGS} == STRICT_FLAGS


def test_a_switch_that_can_only_be_observed_lowers_the_level() -> None:
    with level("repeatable", pins={"diffusers_attention": "flash"}) as achieved:
        assert achieved.level == "seeded"
        assert "it can only be observed" in achieved.notes[0]


def test_an_unknown_pin_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"Unknown switch speed\. Switches: deterministic_algorithms, "):
        level("off", pins={"speed": 1}).__enter__()


@pytest.mark.parametrize("new", ["tf32", "ieee", "none"])
def test_the_new_interface_for_precision_is_read_and_put_back(new: str) -> None:
    BACKENDS.cuda.matmul.fp32_precision = new
    BACKENDS.mkldnn.conv.fp32_precision = "bf16"
    try:
        before = everything()["flags"]
        assert FLAGS["float32_precision"].read()["mkldnn.conv"] == "bf16"
        with level("strict") as achieved:
            assert achieved.flags["float32_precision"] == IEEE
            assert torch.get_float32_matmul_precision() == "highest"
        assert everything()["flags"] == before
    finally:
        BACKENDS.mkldnn.conv.fp32_precision = "none"


def test_levels_that_change_code_are_factors_of_the_key() -> None:
    plain = code_flags()
    with level("strict"):
        strict = code_flags()
    changed = {name for name in strict if strict[name] != plain[name]}
    expected = {
        "deterministic_algorithms",
        "float32_precision",
        "float16_matmul",
        "cudnn_deterministic",
        "mkldnn_deterministic",
        "inductor_config",
        "inductor_overrides",
    }
    assert changed == expected | ({"cublas_workspace"} & set(plain))
    with level("invariant"):
        assert code_flags() == strict
    with level("repeatable"):
        assert {**code_flags(), "cublas_workspace": None} == {**plain, "cublas_workspace": None}
    assert plain["float32_precision"] == DEFAULT_PRECISION


def test_the_workspace_is_a_factor_in_builds_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BACKENDS.cuda, "is_built", lambda: True)
    assert code_flags()["cublas_workspace"] is None
    with level("repeatable"):
        assert code_flags()["cublas_workspace"] == ":4096:8"


def test_reading_inductor_imports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch._inductor.config")
    monkeypatch.delenv("TORCHINDUCTOR_DETERMINISTIC", raising=False)
    assert FLAGS["inductor_deterministic"].read() is False
    monkeypatch.setenv("TORCHINDUCTOR_DETERMINISTIC", "1")
    assert FLAGS["inductor_deterministic"].read() is True


@pytest.mark.parametrize("name", LEVELS)
def test_what_was_achieved_is_plain_json(name: str) -> None:
    with level(f"{name}+audit") as achieved:
        assert json.loads(json.dumps(achieved.flags)) == achieved.flags
        assert set(achieved.flags) == set(FLAGS)


@pytest.mark.parametrize("text", [*LEVELS, *(f"{name}+audit" for name in LEVELS)])
def test_a_level_is_parsed_and_written_alike(text: str) -> None:
    assert str(parse_level(text)) == text
    assert parse_level(parse_level(text)) == parse_level(text)
    assert parse_level(text).audit == text.endswith("+audit")


def test_a_profile_stands_for_its_level() -> None:
    assert PROFILES == {"development": "seeded", "test": "strict", "production": "repeatable"}
    assert parse_level("production") == Level("repeatable")
    assert parse_level("test+audit") == Level("strict", audit=True)


@pytest.mark.parametrize("text", ["", "Strict", "strict ", "strict+", "strict+audit+audit", "+audit", "audit", "5"])
def test_an_unknown_level_is_refused(text: str) -> None:
    with pytest.raises(UnknownLevelError, match="Levels: off, seeded, repeatable, strict, invariant, ") as caught:
        parse_level(text)
    assert caught.value.level == text
    with pytest.raises(UnknownLevelError):
        level(text).__enter__()


def test_levels_are_ordered() -> None:
    assert Level("strict").includes("repeatable")
    assert Level("strict").includes("strict")
    assert not Level("strict").includes("invariant")
    assert not Level("off").includes("seeded")
