"""What is kept from one compilation to the next changes time alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from helpers.pipelines import FAST_BUILD
from pipevault.compat import pytorch
from pipevault.compat.pytorch import forget_vector_isa
from pipevault.digest import digest_bytes, digest_file
from pipevault.graphs import compiler_cache
from pipevault.graphs.compiler_cache import Headers, compiler_folder, probe_vector_isa, trials_folder
from pipevault.graphs.inductor import BuildOptions, _build_folder, _compile, _inductor_caches_in
from pipevault.settings.user_folders import user_folder


class Squared(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x + 1


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own-cache"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command lines of the C++ compiler."""
    from torch._inductor import cpp_builder

    seen: list[str] = []
    run = cpp_builder.run_compile_cmd

    def noted(command: str, cwd: str) -> None:
        seen.append(command)
        run(command, cwd)

    monkeypatch.setattr(cpp_builder, "run_compile_cmd", noted)
    return seen


def compiled(*, make_headers: bool = False) -> str:
    """Return the digest of a library."""
    program = torch.export.export(Squared(), (torch.ones(4),))
    with _build_folder(digest_bytes(b"squared")) as folder, _inductor_caches_in(folder):
        files, _ = _compile(program, BuildOptions(config=FAST_BUILD), make_headers=make_headers)
        [library] = [file for file in files if file.endswith(".so")]
        return digest_file(Path(library)).hex


@pytest.mark.compile
class TestTrials:
    @pytest.fixture(autouse=True)
    def _forgotten(self) -> Iterator[None]:
        self.as_in_a_new_process()
        yield
        self.as_in_a_new_process()

    def as_in_a_new_process(self) -> None:
        forget_vector_isa()
        pytorch._try_kept.cache_clear()

    def chosen(self) -> str:
        from torch._inductor.cpu_vec_isa import pick_vec_isa

        return str(pick_vec_isa())

    def test_a_trial_is_compiled_once(self, commands: list[str]) -> None:
        probe_vector_isa()
        assert commands, "this machine has vector instructions"
        chosen = self.chosen()
        self.as_in_a_new_process()
        commands.clear()
        probe_vector_isa()
        assert commands == []
        assert self.chosen() == chosen

    def test_one_that_was_cut_off_is_made_again_and_changes_no_choice(self, commands: list[str]) -> None:
        probe_vector_isa()
        count = len(commands)
        chosen = self.chosen()
        folder = trials_folder()
        assert folder is not None
        for trial in folder.rglob("*.so"):
            trial.write_bytes(trial.read_bytes()[:1000])
        self.as_in_a_new_process()
        commands.clear()
        probe_vector_isa()
        assert len(commands) == count
        assert self.chosen() == chosen
        assert not folder.exists()


@pytest.mark.compile
class TestHeaders:
    def test_they_change_no_byte_and_are_made_once(self, commands: list[str]) -> None:
        plain = compiled()
        assert not any("-include" in command for command in commands)
        assert compiled(make_headers=True) == plain
        commands.clear()
        assert compiled() == plain
        assert sum("-include" in command for command in commands) == 2, "the wrapper and the kernels"
        assert not any(".gch" in command for command in commands)

    def test_none_are_made_for_a_few_graphs(self, commands: list[str]) -> None:
        compiled()
        folder = compiler_folder()
        assert folder is not None
        assert not (folder / "headers").exists()

    def test_where_the_compiler_fails_with_them_it_compiles_without(self, commands: list[str]) -> None:
        plain = compiled(make_headers=True)
        folder = compiler_folder()
        assert folder is not None
        headers = list(folder.rglob("*.h"))
        assert len(headers) == 2
        for header in headers:
            Path(f"{header}.gch").unlink()
            header.write_text("#error not these\n")
        assert compiled() == plain
        assert not any(header.exists() for header in headers)
        commands.clear()
        assert compiled() == plain
        assert not any("-include" in command for command in commands)


class TestWhoMakesThem:
    def headers(self) -> tuple[Headers, Path]:
        made = Headers({"option": 1})
        assert made._folder is not None
        return made, made._folder

    def test_one_process_at_a_time(self) -> None:
        headers, folder = self.headers()
        with headers.used(make=True) as first, self.headers()[0].used(make=True) as second:
            assert (first, second) == (True, False)
            folder.mkdir()
        with self.headers()[0].used(make=False) as later:
            assert later

    def test_what_an_interrupted_process_left_is_removed(self) -> None:
        headers, folder = self.headers()
        making = headers.used(make=True)
        making.__enter__()
        folder.mkdir()
        (folder / "half.gch").write_bytes(b"")
        making.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
        with headers.used(make=False) as is_used:
            assert not is_used
        with headers.used(make=True) as is_used:
            assert is_used
            assert not folder.exists()

    def test_versions_of_torch_that_nobody_used_for_a_month_go(self) -> None:
        headers, folder = self.headers()
        others = [folder.parents[2] / name for name in ("1.0", "2.0")]
        for other in others:
            (other / "headers").mkdir(parents=True)
        os.utime(others[0], (0, 0))
        with headers.used(make=True):
            pass
        assert [other.exists() for other in others] == [False, True]

    def test_options_have_headers_of_their_own(self) -> None:
        assert Headers({"option": 1})._folder != Headers({"option": 2})._folder

    def test_a_torch_without_them_has_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(compiler_cache, "can_precompile_headers", lambda: False)
        with Headers({}).used(make=True) as is_used:
            assert not is_used


class TestTheFolder:
    def test_it_is_for_this_user_and_this_torch(self) -> None:
        folder = compiler_folder()
        assert folder == user_folder("cache") / "compiler" / torch.__version__
        assert folder.stat().st_mode & 0o777 == 0o700

    def test_one_that_others_can_write_to_is_not_used(self) -> None:
        folder = compiler_folder()
        assert folder is not None
        folder.chmod(0o777)
        assert compiler_folder() is None
        assert trials_folder() is None

    @pytest.mark.parametrize("mode", [0o770, 0o1777])
    def test_one_whose_way_others_can_change_is_not_used(self, mode: int) -> None:
        folder = compiler_folder()
        assert folder is not None
        (folder if mode == 0o1777 else folder.parent).chmod(mode)
        assert compiler_folder() is None

    def test_without_a_home_there_is_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nothing")
        assert compiler_folder() is None
        with Headers({}).used(make=True) as is_used:
            assert not is_used
        probe_vector_isa()
