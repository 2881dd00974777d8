"""The cache on a pipeline of one small part: misses, faults, several shapes, settings."""

from __future__ import annotations

import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import pipevault
from helpers.pipelines import FAST_BUILD, PlainPipeline, draw
from pipevault.cache.outcome import PartOutcome
from pipevault.determinism.layers import capture, moved
from pipevault.errors import (
    BadCallError,
    CannotFreezeError,
    ChangedPartError,
    CompilerMissingError,
    MissError,
    NewerVaultError,
    NotAVaultError,
    SettingsError,
    UnknownBackendError,
    UnknownModeError,
    VaultFullError,
    VaultNotWritableError,
    WrongMachineError,
)
from pipevault.graphs.frozen import GraphDocument
from pipevault.graphs.part import FrozenPart
from pipevault.key import Key
from pipevault.store.manifest import Manifest, now_utc
from pipevault.store.vault import Vault


def cache(root: Path, mode: str = "compile", **options: Any) -> pipevault.PipelineCache:
    return pipevault.PipelineCache(root, mode=mode, build_config=FAST_BUILD, **options)


@pytest.fixture
def vault_copy(plain_vault: Path, tmp_path: Path) -> Path:
    """Also shows that a vault works after a plain copy."""
    return shutil.copytree(plain_vault, tmp_path / "moved")


@pytest.fixture
def no_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something was compiled")

    monkeypatch.setattr("pipevault.graphs.inductor.build_graph", refuse)


def only_artifact(root: Path) -> Path:
    (manifest,) = [entry for entry in Vault.open(root).manifests() if entry.artifacts]
    return Vault.open(root).layout.artifact_file(manifest.artifacts[0].digest)


@pytest.mark.usefixtures("no_compiling")
class TestHits:
    def test_a_pipeline_that_is_none_of_diffusers(self, vault_copy: Path) -> None:
        pipe = PlainPipeline()
        eager = draw(pipe)
        cache(vault_copy).load(pipe, batch_size=1)
        assert pipevault.outcome(pipe).status == "hit"
        torch.testing.assert_close(draw(pipe), eager)
        assert isinstance(pipe.transformer, FrozenPart)

    def test_loading_twice_is_harmless(self, vault_copy: Path) -> None:
        pipe = PlainPipeline()
        first = draw(cache(vault_copy).load(pipe, batch_size=1))
        assert torch.equal(draw(cache(vault_copy).load(pipe, batch_size=1)), first)

    def test_mode_off_gives_the_eager_pipeline_back(self, vault_copy: Path) -> None:
        pipe = PlainPipeline()
        eager = draw(pipe)
        cache(vault_copy, mode="off").load(pipe, batch_size=1)
        assert pipevault.outcome(pipe).status == "off"
        assert not isinstance(pipe.transformer, FrozenPart)
        cache(vault_copy).load(pipe, batch_size=1)
        cache(vault_copy, mode="off").load(pipe, batch_size=1)
        assert not isinstance(pipe.transformer, FrozenPart)
        assert torch.equal(draw(pipe), eager)

    def test_files_of_others_in_the_vault_do_no_harm(self, vault_copy: Path) -> None:
        (vault_copy / "notes.txt").write_text("mine")
        (vault_copy / "entries" / "README").write_text("mine")
        pipe = cache(vault_copy).load(PlainPipeline(), batch_size=1)
        assert pipevault.outcome(pipe).status == "hit"

    def test_the_generator_and_global_randomness_are_left_alone(self, vault_copy: Path) -> None:
        pipe, eager = PlainPipeline(seed=5), PlainPipeline(seed=5)
        before = capture()
        cache(vault_copy).load(pipe, batch_size=1)
        assert moved(before, capture()) == ()
        generators = [torch.Generator().manual_seed(3) for _ in range(2)]
        torch.testing.assert_close(pipe(generator=generators[0]), eager(generator=generators[1]))
        assert torch.equal(generators[0].get_state(), generators[1].get_state())
        assert moved(before, capture()) == ()


@pytest.mark.usefixtures("no_compiling")
class TestMisses:
    def test_require_on_an_empty_vault_says_what_to_run(self, tmp_path: Path) -> None:
        Vault.open(tmp_path / "vault")
        with pytest.raises(MissError, match=r"no entry for this model yet[\s\S]*run this program once with"):
            cache(tmp_path / "vault", "require").load(PlainPipeline(), batch_size=1)

    def test_neither_require_nor_explain_makes_a_vault(self, tmp_path: Path) -> None:
        with pytest.raises(MissError, match="found no vault at"):
            cache(tmp_path / "vault", "require").load(PlainPipeline(), batch_size=1)
        explanation = cache(tmp_path / "vault").explain(PlainPipeline())
        assert (explanation.status, "no vault" in explanation.reason) == ("miss", True)
        assert not (tmp_path / "vault").exists()

    def test_graphs_without_their_plan_are_told_of_and_run(self, vault_copy: Path) -> None:
        vault = Vault.open(vault_copy)
        for entry in list(vault.manifests()):
            if entry.key.kind == "plan":
                vault.layout.manifest_file(entry.key.digest).unlink()
        reader = cache(vault_copy, "require")
        explanation = reader.explain(PlainPipeline(), batch_size=1)
        assert (explanation.status, explanation.with_graphs) == ("miss", ("transformer",))
        assert "graphs of transformer are there" in explanation.reason
        assert pipevault.status(reader.prepare(PlainPipeline(), batch_size=1)).status == "hit"

    def test_a_changed_architecture_is_named(self, vault_copy: Path) -> None:
        pipe = PlainPipeline()
        pipe.transformer.temperature = 0.5
        with pytest.raises(MissError, match=r"architecture\.transformer\.digest"):
            cache(vault_copy, "require").load(pipe, batch_size=1)

    @pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
    def test_require_refuses_a_damaged_artifact_and_leaves_it(self, vault_copy: Path, damage: str) -> None:
        artifact = only_artifact(vault_copy)
        damaged = damage_file(artifact, damage)
        pipe = PlainPipeline()
        with pytest.raises(MissError, match=artifact.name[:12]):
            cache(vault_copy, "require").load(pipe, batch_size=1)
        assert not isinstance(pipe.transformer, FrozenPart)
        assert (artifact.read_bytes() if artifact.exists() else None) == damaged

    def test_require_refuses_a_manifest_that_is_no_json(self, vault_copy: Path) -> None:
        (graph,) = [entry for entry in Vault.open(vault_copy).manifests() if entry.key.kind == "graph"]
        manifest = Vault.open(vault_copy).layout.manifest_file(graph.key.digest)
        manifest.chmod(0o644)
        manifest.write_bytes(b"{")
        with pytest.raises(MissError, match=manifest.name[:12]):
            cache(vault_copy, "require").load(PlainPipeline(), batch_size=1)

    def test_an_artifact_of_another_machine_is_refused_before_it_is_opened(
        self, vault_copy: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = GraphDocument.from_json

        def from_another_machine(document: Any) -> GraphDocument:
            return real({**document, "machine": {**document["machine"], "AOTI_MACHINE": "aarch64"}})

        monkeypatch.setattr(GraphDocument, "from_json", from_another_machine)
        monkeypatch.setattr(
            "pipevault.graphs.freezing.FrozenGraph", lambda *a, **k: pytest.fail("native code was opened")
        )
        with pytest.raises((MissError, WrongMachineError), match="aarch64"):
            cache(vault_copy, "require").load(PlainPipeline(), batch_size=1)


def damage_file(path: Path, damage: str) -> bytes | None:
    data = path.read_bytes()
    path.chmod(0o644)
    if damage == "remove":
        path.unlink()
        return None
    changed = data[: len(data) // 2] if damage == "cut" else data[:100] + bytes([data[100] ^ 1]) + data[101:]
    path.write_bytes(changed)
    return changed


@pytest.mark.usefixtures("no_compiling")
class TestBadInput:
    def test_unknown_mode(self, tmp_path: Path) -> None:
        with pytest.raises(UnknownModeError, match="compile, require, off"):
            cache(tmp_path, "always")

    def test_unknown_backend(self, tmp_path: Path) -> None:
        with pytest.raises(UnknownBackendError, match="inductor"):
            pipevault.PipelineCache(tmp_path, backend="tensorrt")

    def test_a_folder_that_is_no_vault(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("")
        with pytest.raises(NotAVaultError):
            cache(tmp_path).load(PlainPipeline(), batch_size=1)

    def test_a_vault_of_a_later_version(self, vault_copy: Path) -> None:
        marker = vault_copy / "vault.json"
        marker.chmod(0o644)
        marker.write_text('{"pipevault_vault": 99}')
        with pytest.raises(NewerVaultError):
            cache(vault_copy).load(PlainPipeline(), batch_size=1)

    def test_a_read_only_vault_is_refused_before_anything_is_compiled(
        self, vault_copy: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reader = cache(vault_copy)
        tiers, vault = reader._access.tiers, Vault(reader.vault.root, False)
        monkeypatch.setitem(tiers._vaults, tiers.own_tier, vault)
        assert pipevault.outcome(reader.load(PlainPipeline(), batch_size=1)).status == "hit"
        with pytest.raises(VaultNotWritableError, match="cannot be written"):
            reader.load(PlainPipeline(), height=16)

    def test_no_compiler(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("pipevault.cache.search.find_cxx_compiler", lambda: None)
        with pytest.raises(CompilerMissingError, match=r"Install g\+\+"):
            cache(tmp_path / "vault").load(PlainPipeline(), batch_size=1)

    def test_a_call_that_the_pipeline_refuses(self, tmp_path: Path) -> None:
        class Picky(PlainPipeline):
            def __call__(self, prompt: str = "", height: int = 8, width: int = 8) -> Any:  # type: ignore[override]
                raise ValueError("too wide")

        pipe = Picky()
        with pytest.raises(BadCallError, match="too wide"):
            cache(tmp_path / "vault").load(pipe, batch_size=1)
        assert not isinstance(pipe.transformer, FrozenPart)

    def test_shapes_must_be_mappings_of_known_names(self, vault_copy: Path) -> None:
        with pytest.raises(SettingsError, match=r"Unknown argument of a shape hight\. Did you mean height\?"):
            cache(vault_copy).load(PlainPipeline(), shapes=[{"hight": 8}])
        with pytest.raises(SettingsError, match="shapes holds 8"):
            cache(vault_copy).load(PlainPipeline(), shapes=[8])  # type: ignore[list-item]
        with pytest.raises(SettingsError, match="empty"):
            cache(vault_copy).load(PlainPipeline(), shapes=[])

    def test_the_outcome_of_a_pipeline_that_was_never_loaded(self) -> None:
        with pytest.raises(SettingsError, match="was not loaded"):
            pipevault.outcome(PlainPipeline())


@pytest.mark.usefixtures("no_compiling")
class TestForeignEntries:
    def publish(self, root: Path, key: Key, parts: dict[str, Any]) -> None:
        vault = Vault.open(root)
        vault.publish(Manifest(key, parts, (), {}, now_utc()), {})

    def test_an_entry_with_parts_of_another_kind_is_a_reported_miss(self, tmp_path: Path) -> None:
        key = cache(tmp_path / "vault").key(PlainPipeline())
        self.publish(tmp_path / "vault", key, {"transformer": {"graphs": 1}})
        with pytest.raises(MissError, match="lists parts that cannot be read"):
            cache(tmp_path / "vault", "require").load(PlainPipeline(), batch_size=1)


class TestCompiling:
    def test_weights_whose_changes_are_not_counted_are_not_baked(self, tmp_path: Path) -> None:
        with torch.inference_mode():
            pipe = PlainPipeline()
        cache(tmp_path / "vault", weights="baked").load(pipe)
        [part] = pipevault.outcome(pipe).parts.values()
        assert part.status == "eager"
        assert "inference mode" in part.reason

    @pytest.mark.compile
    def test_baked_weights_count_and_a_write_to_them_is_noticed(self, tmp_path: Path) -> None:
        baked = cache(tmp_path / "vault", weights="baked")
        pipe = baked.load(PlainPipeline(), batch_size=1)
        torch.testing.assert_close(draw(pipe), draw(PlainPipeline()))
        assert baked.explain(PlainPipeline()).status == "hit"
        assert baked.explain(PlainPipeline(seed=1)).status == "miss"
        pipe.transformer.load_state_dict(PlainPipeline(seed=1).transformer.state_dict())
        with pytest.raises(ChangedPartError, match="compiled in"):
            draw(pipe)

    @pytest.mark.compile
    def test_a_part_that_counts_its_calls_stays_eager(self, tmp_path: Path) -> None:
        class Counting(torch.nn.Linear):
            calls = 0

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                self.calls += 1
                return super().forward(x) if self.calls < 100 else x

        class CountingPipeline:
            def __init__(self) -> None:
                torch.manual_seed(0)
                self.good, self.counting = Good(8, 8).eval(), Counting(8, 8).eval()

            @torch.no_grad()
            def __call__(self, num_inference_steps: int = 4) -> torch.Tensor:
                x = self.good(torch.ones(2, 8))
                for _ in range(num_inference_steps):
                    x = self.counting(x)
                return x

        pipe = cache(tmp_path / "vault").load(CountingPipeline(), batch_size=1)
        parts = pipevault.outcome(pipe).parts
        assert parts["good"].status == "frozen"
        assert parts["counting"].status == "eager"
        assert "keeps a number that changes with each call (calls:" in parts["counting"].reason

    @pytest.mark.compile
    def test_two_threads_freeze_one_after_the_other(self, tmp_path: Path) -> None:
        pipes = [PlainPipeline(), PlainPipeline()]
        expected = [draw(pipes[0], height=24), draw(pipes[1], height=40)]
        with ThreadPoolExecutor() as pool:
            list(
                pool.map(
                    lambda pair: cache(tmp_path / "vault").load(pair[0], height=pair[1]),
                    zip(pipes, (24, 40), strict=True),
                )
            )
        assert [pipevault.outcome(pipe).status for pipe in pipes] == ["miss", "miss"]
        torch.testing.assert_close([draw(pipes[0], height=24), draw(pipes[1], height=40)], expected)

    def test_several_shapes_on_a_full_disk_run_on_graphs_in_memory(
        self, vault_copy: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        count = len(list(Vault.open(vault_copy).manifests()))
        shapes = [{"height": 8}, {"batch_size": 2}]
        with monkeypatch.context() as patch:
            patch.setattr(Vault, "publish", full_disk)
            pipe = PlainPipeline()
            eager = [draw(pipe), draw(pipe, prompt=["a", "b"])]
            cache(vault_copy).load(pipe, shapes=shapes)
            outcome = pipevault.outcome(pipe)
            assert [entry.status for entry in outcome.entries] == ["hit", "miss"]
            assert not outcome.stored
            assert "not stored" in outcome.reason
            assert "no space left" in outcome.reason
            torch.testing.assert_close(draw(pipe), eager[0])
            torch.testing.assert_close(draw(pipe, prompt=["a", "b"]), eager[1])
        assert len(list(Vault.open(vault_copy).manifests())) == count

    def test_a_damaged_artifact_is_reported_set_aside_and_healed(self, vault_copy: Path) -> None:
        artifact = only_artifact(vault_copy)
        expected = artifact.read_bytes()
        damage_file(artifact, "flip")
        pipe = cache(vault_copy).load(PlainPipeline(), batch_size=1)
        outcome = pipevault.outcome(pipe)
        assert outcome.status == "miss"
        assert artifact.name[:12] in outcome.reason
        assert any((vault_copy / "quarantine").iterdir())
        assert artifact.read_bytes() == expected, "the second compilation gave other bytes"
        assert pipevault.outcome(cache(vault_copy, "require").load(PlainPipeline(), batch_size=1)).status == "hit"

    @pytest.mark.compile
    def test_state_is_frozen_and_what_no_graph_can_do_stays_eager_with_the_reason(self, tmp_path: Path) -> None:
        pipe = StatefulPipeline()
        eager = pipe()
        cache(tmp_path / "vault").load(pipe, batch_size=1)
        outcome = pipevault.outcome(pipe)
        assert outcome.status == "partial"
        parts = outcome.parts
        assert parts["good"].status == "frozen"
        assert parts["caches"] == PartOutcome("frozen", "", 2)
        assert parts["counts"].status == "eager"
        assert re.search(r"frames: \d became \d", parts["counts"].reason)
        assert parts["in_place"].status == "eager"
        assert "in place" in parts["in_place"].reason
        assert parts["odd"].status == "eager"
        assert "builtins.object" in parts["odd"].reason
        torch.testing.assert_close(pipe(), eager)
        again = StatefulPipeline()
        again()  # what a module counts on itself is part of its architecture
        assert pipevault.outcome(cache(tmp_path / "vault", "require").load(again, batch_size=1)).status == "partial"

    def test_nothing_frozen_is_an_error_and_nothing_is_stored(self, tmp_path: Path) -> None:
        class Odd(PlainPipeline):
            def __call__(self, height: int = 8, width: int = 8) -> Any:  # type: ignore[override]
                return None

        with pytest.raises(CannotFreezeError, match="no part was called"):
            cache(tmp_path / "vault").load(Odd(), batch_size=1)
        assert list(Vault.open(tmp_path / "vault").manifests()) == []


def full_disk(self: Vault, manifest: Any, files: Any) -> None:
    raise VaultFullError("no space left", self.root)


class Good(torch.nn.Linear):
    pass


class Caches(torch.nn.Module):
    """Fills a list that the caller passes, as Wan's decoder does."""

    def forward(self, x: torch.Tensor, cache: list[torch.Tensor | None]) -> torch.Tensor:
        before = cache[0]
        cache[0] = x
        return x if before is None else x + before


class Counts(torch.nn.Module):
    """Keeps frames on itself, as Pyramid-Flow's decoder does."""

    def __init__(self) -> None:
        super().__init__()
        self.frames = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.frames += 1
        return x * self.frames


class InPlace(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mul_(2)


class OddArgument(torch.nn.Module):
    def forward(self, x: torch.Tensor, context: object) -> torch.Tensor:
        return x


class StatefulPipeline:
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.good = Good(8, 8).eval()
        self.caches = Caches().eval()
        self.counts = Counts().eval()
        self.in_place = InPlace().eval()
        self.odd = OddArgument().eval()

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        self.counts.frames = 0
        x = self.good(torch.ones(2, 8))
        cache: list[Any] = [None]
        y = self.caches(x, cache) + self.caches(x, cache)
        y = self.counts(y) + self.counts(y)
        return self.odd(self.in_place(y.clone()), object())
