"""The machine type that a graph is built for: CPU instruction set and threads, or GPU type.

Two machines with equal factors run the same native code and get the same bits from it; which of several equal
devices runs it does not count. Reading it starts no process and does not import Inductor.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipevault.compat import pytorch

NO_VECTOR_ISA = "INVALID_VEC_ISA"
_NVIDIA_DRIVER_FILE = Path("/proc/driver/nvidia/version")
# Limit the kernels that oneDNN and MKL choose from (oneDNN developer guide, "CPU Dispatcher Control").
_KERNEL_VARIABLES = (
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "ONEDNN_CPU_ISA_HINTS",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
)
_ISA_BITS = {"AVX512": 512, "AVX2": 256, "ASIMD": 128, "VSX": 256, "ZVECTOR": 256}


def machine_factors(device: torch.device) -> dict[str, Any]:
    """Return the factors of the machine type for parts that run on ``device``."""
    factors = {"type": device.type, "platform": sys.platform, "arch": platform.machine()}
    if device.type == "cpu":
        return factors | _cpu_factors()
    if device.type == "cuda":
        return factors | _cuda_factors(device)
    reader = getattr(getattr(torch, device.type, None), "get_device_name", None)
    return factors | {"name": str(reader(device)) if reader else platform.processor() or device.type}


def machine_record() -> dict[str, Any]:
    """Return readable facts that are recorded and are no factor; nothing that names the host or its user."""
    record: dict[str, Any] = {
        "os": f"{platform.system()} {platform.release()}",
        "cpu": pytorch.cpu_info("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": _memory_bytes(),
        "python": platform.python_version(),
    }
    if driver := _nvidia_driver_version():
        record["nvidia_driver"] = driver
    return record


def recorded_isa(metadata: Mapping[str, str]) -> str | None:
    """Return the CPU instruction set that an AOTInductor package says it was built for."""
    return metadata.get("AOTI_CPU_ISA")


def check_package_machine(metadata: Mapping[str, str], device: torch.device) -> str | None:
    """Return why a package with this AOTInductor metadata must not be loaded for ``device``; ``None`` if it may.

    Metadata that lacks a field is a reason too: native code of unknown origin is not loaded.
    """
    expected = {"AOTI_PLATFORM": sys.platform, "AOTI_MACHINE": platform.machine(), "AOTI_DEVICE_KEY": device.type}
    if device.type == "cuda":
        expected["AOTI_COMPUTE_CAPABILITY"] = _aoti_compute_capability(device)
    for name, here in expected.items():
        built_for = metadata.get(name)
        if built_for != here:
            return f"{name} is {built_for!r} in the package and {here!r} on this machine"
    isa = recorded_isa(metadata)
    if isa is None:
        return "the package does not say which CPU instruction set it was built for (AOTI_CPU_ISA)"
    if device.type == "cpu":
        here = inductor_isa()
        if not set(isa.split()) <= set(here.split()):
            return f"AOTI_CPU_ISA is {isa!r} in the package and {here!r} on this machine"
    elif missing := set(isa.split()) - {NO_VECTOR_ISA, *" ".join(_ranked_isas()).split()}:
        return f"AOTI_CPU_ISA is {isa!r} in the package and this host lacks {', '.join(sorted(missing))}"
    return None


def inductor_isa() -> str:
    """Return what Inductor would generate vector code for, written like ``AOTI_CPU_ISA``: ``"AVX512 AVX512_VNNI"``.

    Follows ``torch._inductor.cpu_vec_isa.pick_vec_isa`` without its trial compilation: where the C++ compiler
    is too old for the CPU's instructions, Inductor picks a smaller set.
    """
    ranked, bits = _ranked_isas(), pytorch.inductor_vector_bits()
    wanted = os.environ.get("ATEN_CPU_CAPABILITY", "")
    if bits is not None:
        ranked = [isa for isa in ranked if _ISA_BITS[isa.split()[0]] == bits]
    elif wanted == "default":
        ranked = []
    elif wanted in ("zvector", "vsx", "avx2", "avx512"):
        ranked = [isa for isa in ranked if wanted.upper() in isa] or ranked
    return ranked[0] if ranked else NO_VECTOR_ISA


def _ranked_isas() -> list[str]:
    """Inductor's candidates that this CPU has, best first."""
    if sys.platform == "darwin":
        return ["ASIMD"] if platform.processor() == "arm" else []
    if sys.platform != "linux":
        return []
    if platform.machine() != "x86_64":
        return {"aarch64": ["ASIMD"], "ppc64le": ["VSX"], "s390x": ["ZVECTOR"]}.get(platform.machine(), [])
    capabilities = pytorch.cpu_capabilities()
    has = {
        "AVX2": capabilities.get("avx2"),
        "AVX512": capabilities.get("avx512_f"),
        "AVX512_VNNI": capabilities.get("avx512_vnni"),
        "AMX_TILE": capabilities.get("amx_tile") and pytorch.init_amx(),
    }
    ranked = ["AVX512 AVX512_VNNI AMX_TILE", "AVX512 AVX512_VNNI", "AVX512", "AVX2"]
    return [isa for isa in ranked if all(has[word] for word in isa.split())]


def _cpu_factors() -> dict[str, Any]:
    capabilities, threads = pytorch.cpu_capabilities(), torch.get_num_threads()
    factors: dict[str, Any] = {
        "isa": inductor_isa(),
        "capability": str(torch.backends.cpu.get_cpu_capability()),
        # Inductor compiles with -march=native; oneDNN and MKL choose kernels by these and by the cache sizes.
        "features": sorted(name for name, present in capabilities.items() if present is True),
        "l1d_cache_bytes": capabilities.get("l1d_cache_size"),
        "l2_cache_bytes": capabilities.get("l2_cache_size"),
        "threads": threads,
        "onednn": pytorch.onednn_version() if torch.backends.mkldnn.enabled else "off",
    }
    if (mkl_threads := pytorch.mkl_threads()) not in (None, threads):
        factors["mkl_threads"] = mkl_threads
    if variables := {name: os.environ[name] for name in _KERNEL_VARIABLES if os.environ.get(name)}:
        factors["kernel_variables"] = variables
    return factors


def _cuda_factors(device: torch.device) -> dict[str, Any]:
    properties: Any = torch.cuda.get_device_properties(device)
    factors: dict[str, Any] = {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "sm_count": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
    }
    if torch.version.hip:
        factors["hip"] = torch.version.hip
        factors["gcn_arch"] = properties.gcnArchName
    return factors


def _aoti_compute_capability(device: torch.device) -> str:
    """Return it as Inductor writes it: ``"90"`` for CUDA, the architecture's name for ROCm."""
    properties: Any = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":", 1)[0]
    return f"{properties.major}{properties.minor}"


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None  # a system that does not tell


def _nvidia_driver_version() -> str | None:
    """The kernel module says it without a process and without starting CUDA."""
    try:
        text = _NVIDIA_DRIVER_FILE.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None  # no NVIDIA driver on this machine
    found = re.search(r"Kernel Module\D*?(?:x86_64|aarch64)?\s+(\d+(?:\.\d+)+)", text)
    return found[1] if found else text.partition("\n")[0]
