"""``ls``, ``show``, ``rm`` and ``where`` on a vault with small entries."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Collection
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from helpers.command_runner import Run
from helpers.planned_entries import Planned
from pipevault.cli.listing import call_text
from pipevault.digest import Digest, digest_bytes
from pipevault.key import Key
from pipevault.store.inventory import mentioned
from pipevault.store.layout import Layout
from pipevault.store.manifest import Manifest
from pipevault.store.retention import removal
from pipevault.store.vault import Vault


class TestLs:
    def test_table(self, run: Run, vault: Vault, small_key: Digest, large_key: Digest) -> None:
        result = run("ls", "--dir", vault.root)
        assert result.exit_code == 0
        lines = [line for line in result.stdout.splitlines() if line.strip()]
        assert lines[0].split() == ["KEY", "MODEL", "CALL", "TORCH", "DEVICE", "SIZE", "USED", "PIN"]
        newest, oldest = lines[2:]
        assert newest.startswith(large_key.short)
        assert oldest.startswith(small_key.short)
        assert "StableDiffusionPipeline" in oldest
        assert "512x512, batch 2, guidance, float32" in oldest
        assert oldest.split()[-4:] == ["cpu", "1.0", "kB", "never"]

    def test_a_shared_artifact_counts_once(self, run: Run, vault: Vault) -> None:
        assert run("ls", "--dir", vault.root).stderr == f"2 entries, 1.5 kB in {vault.root}\n"

    def test_json(self, run: Run, vault: Vault, small_key: Digest, large_key: Digest) -> None:
        document = json.loads(run("ls", "--dir", vault.root, "--json").stdout)
        assert document["vault"] == str(vault.root)
        assert document["broken"] == []
        assert {entry["key"]: entry["size_bytes"] for entry in document["entries"]} == {
            small_key.hex: 1000,
            large_key.hex: 1500,
        }
        assert document["entries"][0]["factors"]["machine"] == {"type": "cpu", "threads": 1}

    @pytest.mark.parametrize(
        ("call", "text"),
        [
            ({}, ""),
            ({"height": None, "width": None, "batch_size": 1, "guidance": None}, ""),
            ({"height": 8, "width": 16, "num_frames": 9, "guidance": False}, "16x8, 9 frames"),
            (
                {"height": 8, "width": 8, "batch_size": 4, "prompts": 2, "images_per_prompt": 2, "guidance": True},
                "8x8, batch 4, guidance, prompts=2, images_per_prompt=2",
            ),
            ({"height": 8, "width": 8, "batch_size": 1, "prompts": 1, "output": "latent"}, "8x8, output=latent"),
            ({"height": 8, "width": 8, "arguments": {"image": "RGB image 8x8"}}, "8x8, image=RGB image 8x8"),
            ({"height": 8, "width": 8, "function": "draw_twice 1f2e"}, "8x8, function=draw_twice 1f2e"),
            ({"tokens": 3, "arguments": [1]}, "tokens=3, arguments=[1]"),
            ("everything", "everything"),
        ],
    )
    def test_calls_are_told_apart(self, call: object, text: str) -> None:
        assert call_text(call) == text

    def test_a_pipe_gets_the_width_of_columns_and_no_trailing_blanks(self, run: Run, vault: Vault) -> None:
        wide = run("ls", "--dir", vault.root).stdout.splitlines()
        narrow = run("ls", "--dir", vault.root, env={"COLUMNS": "72"}).stdout.splitlines()
        assert max(map(len, wide)) > 80
        assert max(map(len, narrow)) <= 72
        assert [line for line in wide + narrow if line != line.rstrip()] == []

    @pytest.mark.parametrize("columns", ["", "0", "wide", "-5"])
    def test_columns_that_are_no_number(self, run: Run, vault: Vault, columns: str) -> None:
        assert len(run("ls", "--dir", vault.root, env={"COLUMNS": columns}).stdout.splitlines()) == 4

    def test_damaged_entries_are_counted(self, run: Run, vault: Vault, broken_key: Digest) -> None:
        for options in ([], ["--json"]):
            result = run("ls", "--dir", vault.root, *options)
            assert result.exit_code == 0
            assert result.stderr.splitlines()[-1].startswith("1 entry is damaged, or of a later pipevault")

    def test_a_broken_entry_is_reported_beside_the_others(self, run: Run, vault: Vault, broken_key: Digest) -> None:
        result = run("ls", "--dir", vault.root)
        assert result.exit_code == 0
        assert f"{broken_key.short} cannot be used: " in result.stderr
        [broken] = json.loads(run("ls", "--dir", vault.root, "--json").stdout)["broken"]
        assert broken["key"] == broken_key.hex
        assert broken["path"] == str(vault.layout.manifest_file(broken_key))

    @pytest.mark.parametrize("options", [(), ("--json",)])
    def test_a_folder_without_a_vault_is_told_and_stays_as_it_is(
        self, run: Run, tmp_path: Path, options: tuple[str, ...]
    ) -> None:
        (tmp_path / "empty").mkdir()
        for name in ("none", "empty"):
            result = run("ls", "--dir", tmp_path / name, *options)
            assert result.exit_code == 1
            assert [json.loads(result.stdout)["code"]] == ["not-a-vault"] if options else result.stdout == ""
            assert f"Found no vault at {tmp_path / name}" in result.stderr
        assert not (tmp_path / "none").exists()
        assert list((tmp_path / "empty").iterdir()) == []

    def test_a_file_is_no_vault(self, run: Run, tmp_path: Path) -> None:
        file = tmp_path / "file"
        file.write_text("")
        assert run("ls", "--dir", file).exit_code == 1

    def test_the_environment_names_the_vault(self, run: Run, vault: Vault) -> None:
        result = run("ls", "--json", env={"PIPEVAULT_DIR": str(vault.root)})
        assert len(json.loads(result.stdout)["entries"]) == 2

    def test_no_torch(self, vault: Vault) -> None:
        code = (
            "import sys\nfrom pipevault.cli.app import main\n"
            f"try:\n    main(['ls', '--dir', {str(vault.root)!r}])\n"
            "except SystemExit as error:\n    assert error.code == 0\n"
            "print('torch' in sys.modules, file=sys.stderr)"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert result.stderr.splitlines()[-1] == "False"


class TestSortAndFilter:
    """``ls`` of a vault with a plan and graphs that were used, pinned, and made by another torch for a GPU."""

    @pytest.fixture
    def gpu_key(self, vault: Vault, planned: Planned, large_key: Digest, small_key: Digest) -> Digest:
        factors = {
            "pipeline": {"class": "diffusers.FluxPipeline"},
            "dtype": {"transformer": "bfloat16"},
            "machine": {"type": "cuda", "name": "NVIDIA H100 PCIe", "capability": "9.0"},
            "toolchain": {"torch": "2.14.0+cu130", "graph_format": "3"},
        }
        manifest = Manifest(Key(factors), {}, (), {}, "2025-01-01T12:00:00+00:00")
        vault.publish(manifest, {})
        vault.pin(manifest.key.digest, "prod")
        vault.pin(manifest.key.digest, "best")
        for key, time_s in ((large_key, time.time() - 7200), (small_key, time.time() - 3 * 86400)):
            vault.record_use(key)
            os.utime(vault.layout.use_file(key), times=(time_s, time_s))
        return manifest.key.digest

    def listed(self, run: Run, vault: Vault, *options: str) -> list[str]:
        """The keys in the order of the table, which is that of the document."""
        table = [line[:12] for line in run("ls", *options, "--dir", vault.root).stdout.splitlines()[2:]]
        document = json.loads(run("ls", *options, "--json", "--dir", vault.root).stdout)
        assert [entry["key"][:12] for entry in document["entries"]] == table
        return table

    def test_columns(self, run: Run, vault: Vault, gpu_key: Digest, large_key: Digest, small_key: Digest) -> None:
        lines = {line[:12]: line for line in run("ls", "--dir", vault.root).stdout.splitlines()}
        cells = re.split("  +", lines[gpu_key.short])
        assert cells[1:4] == ["FluxPipeline", "bfloat16", "2.14.0"]
        assert cells[4:] == ["cuda, NVIDIA H100 PCIe", "0 B", "never", "best, prod"]
        assert re.split("  +", lines[large_key.short])[-1] == "2 h"
        assert re.split("  +", lines[small_key.short])[-1] == "3 d"

    def test_json_has_last_use_and_pins(self, run: Run, vault: Vault, gpu_key: Digest, small_key: Digest) -> None:
        entries = {e["key"]: e for e in json.loads(run("ls", "--json", "--dir", vault.root).stdout)["entries"]}
        assert (entries[gpu_key.hex]["pins"], entries[gpu_key.hex]["last_used_at"]) == (["best", "prod"], None)
        used_at = datetime.fromisoformat(entries[small_key.hex]["last_used_at"])
        assert abs((datetime.now(timezone.utc) - used_at).total_seconds() - 3 * 86400) < 600

    def test_sort(self, run: Run, vault: Vault, gpu_key: Digest, large_key: Digest, small_key: Digest) -> None:
        assert self.listed(run, vault)[:2] == [large_key.short, small_key.short]
        assert self.listed(run, vault)[-1] == gpu_key.short
        assert self.listed(run, vault, "--sort", "used")[:2] == [large_key.short, small_key.short]
        assert self.listed(run, vault, "--sort", "size")[:2] == [large_key.short, small_key.short]
        assert self.listed(run, vault, "--sort", "model")[0] == gpu_key.short
        assert self.listed(run, vault, "--sort", "pin")[-1] == gpu_key.short
        assert self.listed(run, vault, "--sort", "torch")[-1] == gpu_key.short
        assert self.listed(run, vault, "--sort", "device")[-1] == gpu_key.short

    @pytest.mark.parametrize(
        "filters",
        [
            ["model=fluxpipeline"],
            ["device=CUDA"],
            ["device=NVIDIA H100 PCIe"],
            ["torch=2.14.0"],
            ["dtype=bfloat16"],
            ["pin=prod"],
            ["pin=best", "kind=plan"],
        ],
        ids="+".join,
    )
    def test_filter(self, run: Run, vault: Vault, gpu_key: Digest, filters: list[str]) -> None:
        assert self.listed(run, vault, *(word for text in filters for word in ("--filter", text))) == [gpu_key.short]

    def test_what_no_entry_has(self, run: Run, vault: Vault, gpu_key: Digest) -> None:
        assert self.listed(run, vault, "--filter", "model=Flux") == []
        assert self.listed(run, vault, "--filter", "pin=prod", "--filter", "device=cpu") == []

    def test_a_misspelt_filter(self, run: Run, vault: Vault) -> None:
        result = run("ls", "--filter", "modl=x", "--dir", vault.root)
        assert (result.exit_code, "Did you mean model=x?" in result.stderr) == (2, True)

    @pytest.mark.parametrize("text", ["model", "colour=red", "=red"])
    def test_a_filter_that_is_none(self, run: Run, vault: Vault, text: str) -> None:
        result = run("ls", "--filter", text, "--dir", vault.root)
        assert result.exit_code == 2
        assert f"Invalid filter '{text}': expected NAME=VALUE with NAME one of kind, model" in result.stderr

    def test_80_columns_hold_every_key_and_one_line_for_each_entry(
        self, run: Run, vault: Vault, gpu_key: Digest, planned: Planned
    ) -> None:
        lines = run("ls", "--dir", vault.root, env={"COLUMNS": "80"}).stdout.splitlines()
        assert len(lines) == 2 + 6
        assert max(map(len, lines)) <= 80
        assert gpu_key.short in [line.split()[0] for line in lines]
        assert [line for line in lines[2:] if "…" not in line] != lines[2:]


class TestKinds:
    def test_ls_shows_plans_and_graphs(self, run: Run, vault: Vault, planned: Planned) -> None:
        lines = {line[:12]: line for line in run("ls", "--dir", vault.root).stdout.splitlines()}
        graph = lines[planned.graphs[0].short].split("  ")
        assert [cell.strip() for cell in graph if cell.strip()][1:3] == ["UNet2DConditionModel", "sample 2x4x8x8"]
        assert " StableDiffusionPipeline  64x64, float16 " in lines[planned.plan.short]

    def test_only_some(self, run: Run, vault: Vault, planned: Planned, small_key: Digest, large_key: Digest) -> None:
        def listed(*options: str) -> set[str]:
            document = json.loads(run("ls", *options, "--json", "--dir", vault.root).stdout)
            shown = run("ls", *options, "--dir", vault.root).stdout
            assert all(entry["key"][:12] in shown for entry in document["entries"])
            assert len(shown.splitlines()) == len(document["entries"]) + 2
            return {entry["key"] for entry in document["entries"]}

        graphs = {key.hex for key in planned.graphs}
        plans = {planned.plan.hex, small_key.hex, large_key.hex}
        assert listed("--kind", "graph") == graphs
        assert listed("--kind", "plan") == plans
        assert listed("--kind", "all") == listed() == graphs | plans

    def test_another_kind_is_refused(self, run: Run, vault: Vault) -> None:
        assert run("ls", "--kind", "pipeline", "--dir", vault.root).exit_code == 2

    def test_json(self, run: Run, vault: Vault, planned: Planned) -> None:
        entries = json.loads(run("ls", "--json", "--dir", vault.root).stdout)["entries"]
        found = {entry["key"]: (entry["kind"], entry["shelf"][:16], entry["needs"]) for entry in entries}
        graphs = sorted(key.hex for key in planned.graphs)
        assert found[planned.plan.hex] == ("plan", planned.plan.hex[-16:], graphs)
        assert found[graphs[0]] == ("graph", graphs[0][-16:], [])

    def test_show_tells_kind_shelf_and_needs(self, run: Run, vault: Vault, planned: Planned) -> None:
        first, second = planned.graphs
        vault.remove(vault.plan_removal([second]))
        lines = [line.split() for line in run("show", planned.plan.short, "--dir", vault.root).stdout.splitlines()]
        assert ["kind", "plan"] in lines
        assert [line[1][:16] for line in lines if line[:1] == ["shelf"]] == [planned.plan.hex[-16:]]
        assert ["KEY", "NEEDED,", "AND", "WHERE"] in lines
        assert [first.short, "in", "the", "vault"] in lines
        assert [second.short, "not", "in", "the", "vault"] in lines
        assert ["kind", "graph"] in [
            line.split() for line in run("show", first.short, "--dir", vault.root).stdout.splitlines()
        ]

    def test_an_old_vault_is_refused(self, run: Run, vault: Vault) -> None:
        vault.layout.vault_file.write_text('{"pipevault_vault":1}')
        for command in (["ls"], ["show", "ab"], ["prune"], ["verify"]):
            result = run(*command, "--dir", vault.root)
            assert result.exit_code == 3
            assert "pipevault 0.1 wrote" in result.stderr


class TestShow:
    def test_text(self, run: Run, vault: Vault, large_key: Digest) -> None:
        result = run("show", large_key.short, "--dir", vault.root)
        assert result.exit_code == 0
        assert large_key.hex in result.stdout
        assert "machine.threads" in result.stdout
        assert "frozen, 1 graph" in result.stdout
        assert "eager: it keeps state beside its arguments" in result.stdout
        assert "unet/1.pt2" in result.stdout
        assert "check.distance" in result.stdout

    def test_a_blank_line_stands_between_two_tables_and_none_at_the_end(
        self, run: Run, vault: Vault, large_key: Digest
    ) -> None:
        lines = run("show", large_key.short, "--dir", vault.root).stdout.splitlines()
        heads = [
            number
            for number, line in enumerate(lines)
            if line.split()[:1] in (["PART"], ["SHA-256"], ["FACTOR"], ["FACT"])
        ]
        assert [number for number, line in enumerate(lines) if not line] == [number - 1 for number in heads]
        assert len(heads) == 4

    def test_json(self, run: Run, vault: Vault, large_key: Digest) -> None:
        document = json.loads(run("show", large_key.short, "--dir", vault.root, "--json").stdout)
        assert document["key"] == large_key.hex
        assert [artifact["name"] for artifact in document["artifacts"]] == ["unet/0.pt2", "unet/1.pt2"]
        assert document["info"] == {"check": {"distance": 0.5}}
        assert Path(document["manifest"]).is_file()

    def test_upper_case_and_spaces_are_accepted(self, run: Run, vault: Vault, large_key: Digest) -> None:
        assert run("show", f" {large_key.short.upper()} ", "--dir", vault.root).exit_code == 0

    def test_text_that_is_no_key(self, run: Run, vault: Vault) -> None:
        result = run("show", "unet", "--dir", vault.root)
        assert result.exit_code == 1
        assert "'unet' is not a key" in result.stderr

    def test_no_vault(self, run: Run, tmp_path: Path) -> None:
        result = run("show", "ab", "--dir", tmp_path / "none")
        assert result.exit_code == 1
        assert not (tmp_path / "none").exists()


class TestRm:
    def test_dry_run_removes_nothing(self, run: Run, vault: Vault, large_key: Digest) -> None:
        result = run("rm", large_key.short, "--dry-run", "--dir", vault.root)
        assert result.exit_code == 0
        assert result.stdout == f"Would remove {large_key.short}\n"
        assert "1 artifact stays, which other entries name" in result.stderr
        assert vault.lookup(large_key) is not None

    def test_yes_removes_what_no_other_entry_uses(
        self, run: Run, vault: Vault, small_key: Digest, large_key: Digest
    ) -> None:
        result = run("rm", large_key.short, "--yes", "--json", "--dir", vault.root)
        document = json.loads(result.stdout)
        assert document["dry_run"] is False
        assert document["keys"] == [large_key.hex]
        assert (len(document["artifacts"]), len(document["shared"])) == (1, 1)
        assert vault.lookup(large_key) is None
        kept = vault.lookup(small_key)
        assert kept is not None
        vault.verified_path(kept.artifacts[0])

    @pytest.mark.parametrize("option", ["--yes", "--dry-run"])
    def test_the_manifests_are_searched_once(
        self, run: Run, vault: Vault, large_key: Digest, option: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        searched: list[int] = []

        def search(layout: Layout, digests: Collection[Digest], **options: Any) -> set[Digest]:
            searched.append(len(digests))
            return mentioned(layout, digests, **options)

        monkeypatch.setattr(removal, "mentioned", search)
        assert run("rm", large_key.short, option, "--dir", vault.root).exit_code == 0
        assert searched == [2]

    def test_several_keys_and_one_given_twice(
        self, run: Run, vault: Vault, small_key: Digest, large_key: Digest
    ) -> None:
        result = run("rm", small_key.short, large_key.short, small_key.hex, "--yes", "--dir", vault.root)
        assert result.stdout.count("Removed ") == 2
        assert list(vault.manifests()) == []

    def test_a_broken_entry_can_be_removed(self, run: Run, vault: Vault, broken_key: Digest) -> None:
        assert run("rm", broken_key.short, "--yes", "--dir", vault.root).exit_code == 0
        assert not vault.layout.manifest_file(broken_key).exists()

    def test_without_a_terminal_it_asks_for_yes(self, run: Run, vault: Vault, large_key: Digest) -> None:
        result = run("rm", large_key.short, "--dir", vault.root)
        assert result.exit_code == 2
        assert "--yes" in result.stderr
        assert vault.lookup(large_key) is not None

    @pytest.mark.parametrize(("answer", "removed"), [("y\n", True), ("n\n", False), ("\n", False)])
    def test_a_person_is_asked(
        self,
        run: Run,
        vault: Vault,
        large_key: Digest,
        monkeypatch: pytest.MonkeyPatch,
        answer: str,
        removed: bool,
    ) -> None:
        monkeypatch.setattr("pipevault.cli.removal._is_interactive", lambda: True)
        result = run("rm", large_key.short, "--dir", vault.root, input=answer)
        assert (vault.lookup(large_key) is None) is removed
        assert (result.exit_code == 0) is removed

    def test_one_unknown_key_removes_nothing(self, run: Run, vault: Vault, large_key: Digest) -> None:
        result = run("rm", large_key.short, "0123456789ab", "--yes", "--dir", vault.root)
        assert result.exit_code == 1
        assert vault.lookup(large_key) is not None

    def test_a_beginning_that_several_keys_share(self, run: Run, vault: Vault, small_key: Digest) -> None:
        twin = vault.layout.manifest_file(Digest(small_key.hex[:40] + "00000000" + small_key.hex[48:]))
        shutil.copyfile(vault.layout.manifest_file(small_key), twin)
        result = run("rm", small_key.hex[:12], "--yes", "--dir", vault.root)
        assert result.exit_code == 1
        assert "2 keys begin with" in result.stderr


class TestRmPlans:
    def test_a_plan_goes_alone(self, run: Run, vault: Vault, planned: Planned) -> None:
        assert run("rm", planned.plan.short, "--yes", "--dir", vault.root).stdout == f"Removed {planned.plan.short}\n"
        assert all(vault.lookup(key) for key in planned.graphs)

    def test_with_graphs(self, run: Run, vault: Vault, planned: Planned, small_key: Digest) -> None:
        options = ("--with-graphs", "--dir", vault.root)
        keys = sorted([planned.plan, *planned.graphs])
        dry = run("rm", planned.plan.short, "--dry-run", *options)
        assert dry.stdout.splitlines() == [f"Would remove {key.short}" for key in keys]
        assert run("rm", planned.plan.short, "--yes", *options).stdout.count("Removed") == 3
        assert not any(vault.lookup(key) for key in keys)
        assert vault.lookup(small_key) is not None

    def test_a_graph_of_a_pinned_plan_stays(self, run: Run, vault: Vault, planned: Planned) -> None:
        vault.pin(planned.plan, "prod")
        for options in ([planned.graphs[0].short], [planned.graphs[0].short, "--force"]):
            result = run("rm", *options, "--yes", "--dir", vault.root)
            assert result.exit_code == 3
            assert f"is needed by {planned.plan.short}, which is pinned as prod" in result.stderr

    def test_with_graphs_and_a_pinned_graph_removes_nothing(self, run: Run, vault: Vault, planned: Planned) -> None:
        vault.pin(planned.graphs[0], "prod")
        assert run("rm", planned.plan.short, "--with-graphs", "--yes", "--dir", vault.root).exit_code == 3
        assert vault.lookup(planned.plan) is not None

    def test_orphans_have_no_graphs(self, run: Run, vault: Vault) -> None:
        result = run("rm", "--orphans", "--with-graphs", "--dir", vault.root)
        assert (result.exit_code, "--with-graphs goes with a KEY" in result.stderr) == (2, True)


class TestRmOrphans:
    @pytest.fixture
    def orphan(self, vault: Vault) -> Digest:
        """An artifact of 300 bytes that no entry names, two hours old; beside it one that was written just now."""
        for data, age_s in ((b"old" * 100, 7200), (b"new", 0)):
            path = vault.layout.artifact_file(digest_bytes(data))
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
            os.utime(path, times=(time.time() - age_s,) * 2)
        return digest_bytes(b"old" * 100)

    def test_dry_run(self, run: Run, vault: Vault, orphan: Digest) -> None:
        result = run("rm", "--orphans", "--dry-run", "--dir", vault.root)
        assert result.exit_code == 0, result.output
        assert result.stdout == f"Would remove {orphan.short}\n"
        assert "Would remove 1 artifact that no entry names, 300 B; 1 artifact stays, younger" in result.stderr
        assert vault.layout.artifact_file(orphan).exists()

    def test_the_old_one_goes_and_the_young_one_and_the_entries_stay(
        self, run: Run, vault: Vault, orphan: Digest, large_key: Digest
    ) -> None:
        document = json.loads(run("rm", "--orphans", "--yes", "--json", "--dir", vault.root).stdout)
        young = digest_bytes(b"new")
        assert document == {
            "dry_run": False,
            "keys": [],
            "artifacts": [orphan.hex],
            "shared": [],
            "too_young": [young.hex],
            "size_bytes": 300,
        }
        assert not vault.layout.artifact_file(orphan).exists()
        assert vault.layout.artifact_file(young).exists()
        kept = vault.lookup(large_key)
        assert kept is not None
        for ref in kept.artifacts:
            vault.verified_path(ref)

    def test_none(self, run: Run, vault: Vault) -> None:
        result = run("rm", "--orphans", "--dir", vault.root)
        assert (result.exit_code, result.stdout) == (0, "")
        assert "Removed 0 artifacts that no entry names, 0 B." in result.stderr

    def test_without_a_terminal_it_asks_for_yes(self, run: Run, vault: Vault, orphan: Digest) -> None:
        result = run("rm", "--orphans", "--dir", vault.root)
        assert (result.exit_code, "--yes" in result.stderr) == (2, True)
        assert vault.layout.artifact_file(orphan).exists()

    @pytest.mark.parametrize("arguments", [[], ["--orphans", "3f9a"]])
    def test_either_keys_or_orphans(self, run: Run, vault: Vault, arguments: list[str]) -> None:
        result = run("rm", *arguments, "--yes", "--dir", vault.root)
        assert (result.exit_code, "--orphans alone" in result.stderr) == (2, True)


class TestWhere:
    def test_folder_alone_on_stdout(self, run: Run, tmp_path: Path) -> None:
        assert run("where", "--dir", tmp_path / "v").stdout == f"{tmp_path / 'v'}\n"
        assert "max_size: 50.0 GB" in run("where", "--dir", tmp_path / "v").stderr
        assert "max_size: no limit" in run("where", env={"PIPEVAULT_MAX_SIZE": "none"}).stderr

    def test_json_shows_every_setting(self, run: Run, tmp_path: Path) -> None:
        config = tmp_path / "config.toml"
        config.write_text('mode = "require"\n')
        result = run("where", "--json", env={"PIPEVAULT_DIR": str(tmp_path / "v"), "PIPEVAULT_CONFIG": str(config)})
        document = json.loads(result.stdout)
        assert document["dir"] == str(tmp_path / "v")
        assert document["mode"] == "require"
        assert document["config_file"] == str(config)
