from __future__ import annotations

import getpass
import json
import platform
import socket
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.fresh_python import run_python
from pipevault.compat import pytorch
from pipevault.digest import canonical_json
from pipevault.fingerprint import machine

CPU = torch.device("cpu")
FACTORS_CODE = (
    "import json, torch; from pipevault.fingerprint.machine import machine_factors;"
    "print(json.dumps(machine_factors(torch.device('cpu'))))"
)
AVX512 = {"avx2": True, "avx512_f": True, "avx512_vnni": True, "avx512_bf16": True, "l1d_cache_size": 32768}


def factors_in_process(folder: Path, **variables: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(run_python(FACTORS_CODE, cwd=folder, **variables))
    return result


def test_cpu_factors_of_this_process() -> None:
    factors = machine.machine_factors(CPU)
    assert factors["type"] == "cpu"
    assert factors["arch"] == platform.machine()
    assert factors["threads"] == torch.get_num_threads()
    assert factors["capability"] == torch.backends.cpu.get_cpu_capability()
    assert canonical_json(factors)


def test_isa_is_the_one_that_inductor_would_pick(tmp_path: Path) -> None:
    """Inductor compiles a probe first, unless ``TORCHINDUCTOR_VEC_ISA_OK`` says that the compiler works."""
    code = (
        "import os\n"
        "import torch._inductor.cpu_vec_isa as isa\n"
        "from pipevault.fingerprint.machine import inductor_isa\n"
        "for capability in ('', 'avx512', 'avx2', 'default', 'unknown'):\n"
        "    os.environ['ATEN_CPU_CAPABILITY'] = capability\n"
        "    print(inductor_isa() == str(isa.pick_vec_isa()).upper())"
    )
    assert run_python(code, cwd=tmp_path, TORCHINDUCTOR_VEC_ISA_OK="1").split() == ["True"] * 5


def test_isa_needs_neither_inductor_nor_a_process(tmp_path: Path) -> None:
    code = (
        "import sys, subprocess, os, torch\n"
        "before = set(sys.modules)\n"
        "def refuse(*a, **k): raise AssertionError('a process was started')\n"
        "subprocess.Popen = os.fork = os.posix_spawn = refuse\n"
        "from pipevault.fingerprint.machine import machine_factors, machine_record\n"
        "machine_factors(torch.device('cpu')); machine_record()\n"
        "print([m for m in set(sys.modules) - before if m.startswith('torch._inductor')])"
    )
    assert run_python(code, cwd=tmp_path) == "[]"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="ATEN_CPU_CAPABILITY=avx2 is for x86")
def test_capability_and_threads_of_the_environment_are_factors(tmp_path: Path) -> None:
    plain = factors_in_process(tmp_path, OMP_NUM_THREADS="1")
    avx2 = factors_in_process(tmp_path, OMP_NUM_THREADS="1", ATEN_CPU_CAPABILITY="avx2")
    threads = factors_in_process(tmp_path, OMP_NUM_THREADS="2", USER="x", HOME="/x", HOSTNAME="x")
    assert (avx2["isa"], avx2["capability"]) == ("AVX2", "AVX2")
    assert threads == {**plain, "threads": 2}


def test_kernel_variables_are_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    before = machine.machine_factors(CPU)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert machine.machine_factors(CPU) == {**before, "kernel_variables": {"ONEDNN_MAX_CPU_ISA": "AVX2"}}


def test_onednn_switched_off_is_a_factor() -> None:
    before = machine.machine_factors(CPU)
    with torch.backends.mkldnn.flags(enabled=False):
        assert machine.machine_factors(CPU) == {**before, "onednn": "off"}


def test_mkl_threads_are_a_factor_where_they_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(pytorch, "mkl_threads", lambda: 4)
    assert "mkl_threads" not in machine.machine_factors(CPU)
    monkeypatch.setattr(pytorch, "mkl_threads", lambda: 1)
    assert machine.machine_factors(CPU)["mkl_threads"] == 1


def fake_cpu(monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, Any], *, arch: str = "x86_64") -> None:
    monkeypatch.setattr(pytorch, "cpu_capabilities", lambda: capabilities)
    monkeypatch.setattr(pytorch, "init_amx", lambda: True)
    monkeypatch.setattr(platform, "machine", lambda: arch)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    monkeypatch.delenv("TORCHINDUCTOR_VEC_ISA_OK", raising=False)
    monkeypatch.delitem(sys.modules, "torch._inductor.config", raising=False)


@pytest.mark.parametrize(
    ("capabilities", "arch", "isa"),
    [
        ({"avx2": True}, "x86_64", "AVX2"),
        ({"avx2": True, "avx512_f": True}, "x86_64", "AVX512"),
        (AVX512, "x86_64", "AVX512 AVX512_VNNI"),
        ({**AVX512, "amx_tile": True}, "x86_64", "AVX512 AVX512_VNNI AMX_TILE"),
        ({"sse4_2": True}, "x86_64", "INVALID_VEC_ISA"),
        ({"neon": True}, "aarch64", "ASIMD"),
        ({}, "ppc64le", "VSX"),
        ({}, "riscv64", "INVALID_VEC_ISA"),
    ],
)
def test_isa_of_other_machines(
    capabilities: dict[str, Any], arch: str, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_cpu(monkeypatch, capabilities, arch=arch)
    assert machine.inductor_isa() == isa


def test_amx_that_the_system_does_not_grant_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cpu(monkeypatch, {**AVX512, "amx_tile": True})
    monkeypatch.setattr(pytorch, "init_amx", lambda: False)
    assert machine.inductor_isa() == "AVX512 AVX512_VNNI"


@pytest.mark.parametrize(
    ("options", "isa"),
    [
        ({"simdlen": 256}, "AVX2"),
        ({"simdlen": 512}, "AVX512 AVX512_VNNI"),
        ({"simdlen": 1}, "INVALID_VEC_ISA"),
        ({"vec_isa_ok": False}, "INVALID_VEC_ISA"),
        ({"vec_isa_ok": True}, "AVX512 AVX512_VNNI"),
    ],
)
def test_options_of_inductor_decide_the_isa(options: dict[str, Any], isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cpu(monkeypatch, AVX512)
    config = types.SimpleNamespace(cpp=types.SimpleNamespace(**{"simdlen": None, "vec_isa_ok": None, **options}))
    monkeypatch.setitem(sys.modules, "torch._inductor.config", config)
    assert machine.inductor_isa() == isa


def test_two_cpus_with_one_isa_and_other_instructions_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cpu(monkeypatch, AVX512)
    one = machine.machine_factors(CPU)
    fake_cpu(monkeypatch, {**AVX512, "avx512_bf16": False})
    assert one["isa"] == machine.machine_factors(CPU)["isa"]
    assert one["features"] != machine.machine_factors(CPU)["features"]


def fake_gpu(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    properties: dict[str, Any] = {
        "name": "NVIDIA H200",
        "major": 9,
        "minor": 0,
        "multi_processor_count": 132,
        **changes,
    }
    fake = types.SimpleNamespace(**properties)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: fake)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    monkeypatch.setattr(torch.version, "cuda", "12.8")


def test_gpu_type(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu(monkeypatch)
    assert machine.machine_factors(torch.device("cuda")) == {
        "type": "cuda",
        "platform": sys.platform,
        "arch": platform.machine(),
        "name": "NVIDIA H200",
        "compute_capability": "9.0",
        "sm_count": 132,
        "cuda": "12.8",
        "cudnn": 91002,
    }


def test_gpu_index_is_no_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu(monkeypatch)
    assert machine.machine_factors(torch.device("cuda", 0)) == machine.machine_factors(torch.device("cuda", 3))


@pytest.mark.parametrize("change", [{"multi_processor_count": 16}, {"name": "NVIDIA H100"}, {"major": 8}])
def test_gpus_that_differ(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu(monkeypatch)
    one = machine.machine_factors(torch.device("cuda"))
    fake_gpu(monkeypatch, **change)
    assert machine.machine_factors(torch.device("cuda")) != one


def test_rocm_adds_its_version_and_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu(monkeypatch, gcnArchName="gfx942:sramecc+")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    factors = machine.machine_factors(torch.device("cuda"))
    assert (factors["hip"], factors["gcn_arch"]) == ("6.4", "gfx942:sramecc+")


def test_other_devices_have_a_type_and_a_name() -> None:
    assert machine.machine_factors(torch.device("mps"))["type"] == "mps"
    assert machine.machine_factors(torch.device("mps"))["name"]


def test_record_is_plain_and_names_neither_host_nor_user() -> None:
    record = machine.machine_record()
    text = canonical_json(record).decode()
    assert record["python"] == platform.python_version()
    assert record["memory_bytes"] > 0
    assert record["cpu"]
    for secret in (socket.gethostname(), str(Path.home())):
        assert secret not in text
    assert getpass.getuser() not in record.values()


@pytest.mark.parametrize(
    "line",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build  (builder)",
        "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  550.54.15  Release Build  (builder)",
    ],
)
def test_driver_is_recorded_and_is_no_factor(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu(monkeypatch)
    before = machine.machine_factors(torch.device("cuda"))
    file = tmp_path / "version"
    file.write_text(f"{line}\nGCC version:  gcc version 12.3.0\n")
    monkeypatch.setattr(machine, "_NVIDIA_DRIVER_FILE", file)
    assert machine.machine_record()["nvidia_driver"] == "550.54.15"
    assert machine.machine_factors(torch.device("cuda")) == before


def package(**changes: str) -> dict[str, str]:
    metadata = {
        "AOTI_PLATFORM": sys.platform,
        "AOTI_MACHINE": platform.machine(),
        "AOTI_CPU_ISA": machine.inductor_isa(),
        "AOTI_DEVICE_KEY": "cpu",
        "AOTI_COMPUTE_CAPABILITY": "",
    }
    return {**metadata, **changes}


def test_package_of_this_machine_is_accepted() -> None:
    assert machine.recorded_isa(package()) == machine.inductor_isa()
    assert machine.check_package_machine(package(), CPU) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AOTI_PLATFORM", "plan9"),
        ("AOTI_MACHINE", "vax"),
        ("AOTI_DEVICE_KEY", "cuda"),
        ("AOTI_CPU_ISA", "AVX1024"),
    ],
)
def test_package_of_another_machine_is_refused(name: str, value: str) -> None:
    reason = machine.check_package_machine(package(**{name: value}), CPU)
    assert reason is not None
    assert name in reason
    assert value in reason


@pytest.mark.parametrize("name", ["AOTI_PLATFORM", "AOTI_MACHINE", "AOTI_DEVICE_KEY", "AOTI_CPU_ISA"])
def test_package_that_does_not_say_is_refused(name: str) -> None:
    metadata = package()
    del metadata[name]
    assert name in (machine.check_package_machine(metadata, CPU) or "")


@pytest.mark.parametrize(
    ("built_for", "accepted"),
    [
        ("AVX512 AVX512_VNNI", True),
        ("AVX512", True),  # an older C++ compiler on the same machine type
        ("AVX512 AVX512_VNNI AMX_TILE", False),
        ("AVX2", False),
        ("INVALID_VEC_ISA", False),
    ],
)
def test_isa_of_a_cpu_package(built_for: str, accepted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cpu(monkeypatch, AVX512)
    reason = machine.check_package_machine(package(AOTI_CPU_ISA=built_for), CPU)
    assert (reason is None) is accepted


def test_avx512_package_is_refused_where_the_process_is_held_to_avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cpu(monkeypatch, AVX512)
    built_for = package()
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert "AVX512" in (machine.check_package_machine(built_for, CPU) or "")


def test_gpu_package_needs_its_compute_capability_and_a_host_that_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cpu(monkeypatch, AVX512)
    fake_gpu(monkeypatch)
    gpu = torch.device("cuda", 1)
    fields = {"AOTI_DEVICE_KEY": "cuda", "AOTI_COMPUTE_CAPABILITY": "90"}
    assert machine.check_package_machine(package(**fields), gpu) is None
    assert machine.check_package_machine(package(**fields, AOTI_CPU_ISA="AVX2"), gpu) is None
    assert machine.check_package_machine(package(**fields, AOTI_CPU_ISA="INVALID_VEC_ISA"), gpu) is None
    host = machine.check_package_machine(package(**fields, AOTI_CPU_ISA="AVX512 AMX_TILE"), gpu)
    assert host is not None
    assert "AMX_TILE" in host
    other = machine.check_package_machine(package(**{**fields, "AOTI_COMPUTE_CAPABILITY": "80"}), gpu)
    assert other is not None
    assert "AOTI_COMPUTE_CAPABILITY is '80' in the package and '90'" in other


def test_rocm_package_is_compared_by_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu(monkeypatch, gcnArchName="gfx942:sramecc+")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    fields = {"AOTI_DEVICE_KEY": "cuda", "AOTI_COMPUTE_CAPABILITY": "gfx942"}
    assert machine.check_package_machine(package(**fields), torch.device("cuda")) is None


def test_reading_the_machine_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    machine.machine_factors(CPU)
    machine.machine_record()
