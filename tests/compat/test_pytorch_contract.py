"""What pipevault takes from private parts of torch: each test names the touch point that a release moved."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from pipevault.compat import pytorch
from pipevault.compat.pytorch import forget_vector_isa, one_vector_isa_probed
from pipevault.determinism.flags import code_flags

COMPILER = ("torch._inductor.compile_fx", "torch._inductor.codecache", "torch._inductor.scheduler")


def in_fresh_process(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.slow
class TestInductorOptions:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"max_autotune": True, "aot_inductor.output_path": "x"},
            {"triton.unique_kernel_names": False, "cpp.simdlen": 256, "_micro_pipeline_tp": True},
            {"fx_graph_cache": False, "trace.enabled": True},
        ],
    )
    def test_they_are_those_of_the_portable_configuration(self, changes: dict[str, Any]) -> None:
        from torch._inductor import config

        with config.patch(changes):
            assert pytorch.inductor_options() == config.save_config_portable(), "the options of a cache key changed"

    def test_an_option_that_a_class_stands_for_counts_by_its_uuid(self) -> None:
        from torch._inductor import config

        names = getattr(config, "_cache_config_factory_keys", [])
        if not names:
            pytest.skip("this torch has no such option")

        class Choices:
            def uuid(self) -> str:
                return "mine"

        with config.patch({names[0]: Choices}):
            assert pytorch.inductor_options()[names[0]] == "mine"

    def test_defaults_are_told(self) -> None:
        from torch._inductor import config

        with config.patch(max_autotune=not config.max_autotune):
            assert pytorch.inductor_default("max_autotune", value=None) is not config.max_autotune
        assert pytorch.inductor_default("no such option", value=7) == 7

    def test_reading_them_imports_no_compiler(self) -> None:
        """Importing the configuration itself brings Dynamo with it, as importing diffusers does."""
        code = (
            "import sys, torch, torch._inductor.config\n"
            "from pipevault.determinism.flags import code_flags\n"
            "before = set(sys.modules); code_flags()\n"
            "print(sorted(name for name in set(sys.modules) - before if name.startswith('torch.')))\n"
            f"print([name for name in {COMPILER!r} if name in sys.modules])"
        )
        assert in_fresh_process(code).splitlines() == ["[]", "[]"]

    def test_flags_after_diffusers_import_nothing_more_of_dynamo(self) -> None:
        code = (
            "import sys, diffusers, transformers; from diffusers import UNet2DConditionModel\n"
            "from pipevault.determinism.flags import code_flags\n"
            "before = set(sys.modules); code_flags()\n"
            "print([name for name in set(sys.modules) - before if name.startswith(('torch._dynamo', 'torch._ind'))])"
        )
        assert in_fresh_process(code) == "[]"


class TestModes:
    def test_modes_of_torch_compile_are_options_without_cuda_graphs(self) -> None:
        assert {"default", "reduce-overhead", "max-autotune"} <= set(pytorch.compile_modes())
        assert pytorch.compile_mode_options("max-autotune")["max_autotune"] is True
        assert pytorch.compile_mode_options("reduce-overhead") == {}
        assert pytorch.compile_mode_options(None) == {}

    def test_options_have_names(self) -> None:
        assert {"max_autotune", "aot_inductor.compile_wrapper_opt_level"} <= set(pytorch.inductor_option_names())


@pytest.mark.slow
class TestInductorSettings:
    @pytest.fixture(autouse=True)
    def _deterministic_as_before(self) -> Iterator[None]:
        before = pytorch.inductor_deterministic()
        yield
        pytorch.set_inductor_deterministic(before)

    def test_vector_bits_are_those_of_the_configuration(self) -> None:
        from torch._inductor import config

        for vec_isa_ok, simdlen, bits in ((False, 256, 0), (None, 256, 256), (None, None, None), (True, None, None)):
            with config.patch({"cpp.vec_isa_ok": vec_isa_ok, "cpp.simdlen": simdlen}):
                assert pytorch.inductor_vector_bits() == bits

    @pytest.mark.parametrize(
        ("variable", "value", "reader"),
        [
            ("TORCHINDUCTOR_VEC_ISA_OK", "0", "inductor_vector_bits"),
            ("TORCHINDUCTOR_DETERMINISTIC", "1", "inductor_deterministic"),
            ("CXX", "my-cxx", "inductor_compilers"),
        ],
    )
    def test_they_read_the_same_before_and_after_the_configuration_is_imported(
        self, variable: str, value: str, reader: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        code = (
            f"from pipevault.compat.pytorch import {reader} as read\n"
            "first = read(); import torch._inductor.config\n"
            "last = read(); print((list(filter(None, last)) if isinstance(last, list) else last) == first)"
        )
        monkeypatch.setenv(variable, value)
        assert in_fresh_process(code) == "True", f"torch reads {variable} in another way"
        monkeypatch.delenv(variable)
        assert in_fresh_process(code) == "True", f"the default without {variable} changed"

    def test_the_deterministic_mode_is_switched(self) -> None:
        from torch._inductor import config

        for value in (True, False):
            pytorch.set_inductor_deterministic(value)
            assert (pytorch.inductor_deterministic(), config.deterministic) == (value, value)

    def test_a_compiler_is_named(self) -> None:
        assert all(isinstance(name, str) for name in pytorch.inductor_compilers())
        assert pytorch.inductor_compilers()


class TestMachine:
    def test_cpu_capabilities_have_the_names_that_are_read(self) -> None:
        import platform

        capabilities = pytorch.cpu_capabilities()
        if platform.machine() == "x86_64":
            for name in ("avx2", "avx512_f", "avx512_vnni", "amx_tile"):
                assert name in capabilities, f"torch.cpu.get_capabilities() has no {name} any more"
        for name in ("l1d_cache_size", "l2_cache_size"):
            assert isinstance(capabilities.get(name), int), f"torch.cpu.get_capabilities() has no {name} any more"

    def test_amx_can_be_asked_for(self) -> None:
        assert pytorch.init_amx() in (True, False)

    def test_mkl_threads_stand_in_the_build_information(self) -> None:
        if torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
            assert pytorch.mkl_threads() is not None, "torch.__config__.parallel_info() is written in another way"
        else:
            assert pytorch.mkl_threads() is None

    def test_onednn_stands_in_the_build_information(self) -> None:
        if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            version = pytorch.onednn_version()
            assert version, "torch.__config__.show() is written in another way"
            assert version[0].isdigit()

    def test_tunable_op(self) -> None:
        if torch.version.cuda or torch.version.hip:
            assert pytorch.has_tunable_op(), "torch._C._cuda_tunableop_is_enabled is gone"
        else:
            assert not pytorch.has_tunable_op()


class TestAttention:
    def test_the_builtin_one_is_what_the_public_name_stands_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        public = nn.functional.scaled_dot_product_attention
        assert pytorch.builtin_attention() is public
        monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", lambda *args: args[0])
        assert pytorch.builtin_attention() is public


class TestModules:
    @pytest.mark.parametrize(
        "name",
        [
            "_parameters",
            "_buffers",
            "_non_persistent_buffers_set",
            "_modules",
            "_forward_hooks",
            "_forward_hooks_with_kwargs",
            "_forward_hooks_always_called",
            "_forward_pre_hooks",
            "_forward_pre_hooks_with_kwargs",
        ],
    )
    def test_every_module_has_what_the_fingerprint_reads(self, name: str) -> None:
        assert name in vars(nn.Linear(1, 1)), f"nn.Module has no {name} any more"


class TestFlags:
    def test_the_flags_are_what_they_were_with_the_portable_configuration(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from torch._inductor import config

        from pipevault.determinism import flags

        with config.patch(max_autotune=True):
            now = code_flags()
            monkeypatch.setattr(flags, "inductor_options", config.save_config_portable)
            assert code_flags() == now


def test_forget_vector_isa_has_inductor_probe_again() -> None:
    from torch._inductor import cpu_vec_isa

    cpu_vec_isa.valid_vec_isa_list()
    assert cpu_vec_isa.valid_vec_isa_list.cache_info().currsize == 1
    forget_vector_isa()
    assert cpu_vec_isa.valid_vec_isa_list.cache_info().currsize == 0


class TestOneVectorIsaProbed:
    """Inductor's choice stays what it is; what it would not choose is not probed."""

    @pytest.fixture(autouse=True)
    def _forgotten(self) -> Iterator[None]:
        forget_vector_isa()
        yield
        forget_vector_isa()

    def probes(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        from torch._inductor import cpu_vec_isa

        probed: list[str] = []

        def check_build(self: Any, code: str) -> bool:
            probed.append(str(self))
            return True

        monkeypatch.setattr(cpu_vec_isa.VecISA, "check_build", check_build)
        monkeypatch.setattr(cpu_vec_isa, "x86_isa_checker", lambda: ["avx2", "avx512", "avx512_vnni"])
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
        monkeypatch.setattr("platform.machine", lambda: "x86_64")
        monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
        return probed

    def test_the_choice_is_the_same_with_fewer_probes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from torch._inductor.cpu_vec_isa import pick_vec_isa

        probed = self.probes(monkeypatch)
        with one_vector_isa_probed():
            assert str(pick_vec_isa()) == "avx512 avx512_vnni"
        assert set(probed) == {"avx512 avx512_vnni"}
        assert str(pick_vec_isa()) == "avx512 avx512_vnni"
        assert {"avx2", "avx512"} <= set(probed), "outside of the block all are probed"

    def test_one_that_the_compiler_lacks_gives_way_to_the_next(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from torch._inductor import cpu_vec_isa

        self.probes(monkeypatch)
        monkeypatch.setattr(cpu_vec_isa.VecISA, "check_build", lambda self, code: str(self) == "avx2")
        with one_vector_isa_probed():
            assert str(cpu_vec_isa.pick_vec_isa()) == "avx2"
        forget_vector_isa()
        monkeypatch.setattr(cpu_vec_isa.VecISA, "check_build", lambda self, code: False)
        with one_vector_isa_probed():
            assert str(cpu_vec_isa.pick_vec_isa()) == "INVALID_VEC_ISA"

    @pytest.mark.parametrize("chooser", ["simdlen", "environment"])
    def test_what_else_chooses_finds_all(self, monkeypatch: pytest.MonkeyPatch, chooser: str) -> None:
        from torch._inductor import config
        from torch._inductor.cpu_vec_isa import pick_vec_isa

        self.probes(monkeypatch)
        if chooser == "environment":
            monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
        with config.patch({"cpp.simdlen": 256 if chooser == "simdlen" else None}), one_vector_isa_probed():
            assert str(pick_vec_isa()) == "avx2"

    def test_two_threads_leave_what_was_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from torch._inductor import cpu_vec_isa

        self.probes(monkeypatch)
        before = cpu_vec_isa.valid_vec_isa_list
        first, second = one_vector_isa_probed(), one_vector_isa_probed()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        second.__exit__(None, None, None)
        assert cpu_vec_isa.valid_vec_isa_list is before
