"""``prune``, ``pin``, ``unpin``, ``pins``, and what ``rm`` makes of entries in use."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from helpers.command_runner import Run
from helpers.planned_entries import publish_planned
from pipevault.digest import Digest
from pipevault.fingerprint.toolchain import package_version
from pipevault.key import Key
from pipevault.store.manifest import Manifest
from pipevault.store.retention.prune import vault_size_bytes
from pipevault.store.vault import Vault


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))


@pytest.fixture
def old_key(vault: Vault, small_key: Digest) -> Digest:
    """The small entry, last used in 1970."""
    vault.record_use(small_key)
    os.utime(vault.layout.use_file(small_key), times=(1, 1))
    os.utime(vault.layout.manifest_file(small_key), times=(1, 1))
    return small_key


class TestPrune:
    def test_without_options_and_settings_nothing_goes(self, run: Run, vault: Vault) -> None:
        result = run("prune", "--dir", vault.root)
        assert (result.exit_code, result.stdout) == (0, "")
        assert "Removed 0 entries, 0 artifacts: 0 B of " in result.stderr

    def test_dry_run_removes_nothing(self, run: Run, vault: Vault, old_key: Digest) -> None:
        result = run("prune", "--older-than", "30d", "--dry-run", "--dir", vault.root)
        assert result.exit_code == 0
        assert result.stdout.startswith(f"Would remove {old_key.short} (not used for ")
        assert vault.lookup(old_key) is not None

    def test_older_than(self, run: Run, vault: Vault, old_key: Digest, large_key: Digest) -> None:
        document = json.loads(run("prune", "--older-than", "30d", "--json", "--dir", vault.root).stdout)
        assert [entry["key"] for entry in document["entries"]] == [old_key.hex]
        assert document["artifacts"] == []
        assert document["left_bytes"] == vault_size_bytes(vault.layout)
        assert document["dry_run"] is False
        assert vault.lookup(old_key) is None
        assert vault.lookup(large_key) is not None

    def test_unused(self, run: Run, vault: Vault, old_key: Digest, large_key: Digest) -> None:
        os.utime(vault.layout.manifest_file(large_key), times=(1, 1))
        result = run("prune", "--unused", "--dir", vault.root)
        assert result.stdout == f"Removed {large_key.short} (unused)\n"
        assert vault.lookup(old_key) is not None

    def test_max_size(self, run: Run, vault: Vault, old_key: Digest) -> None:
        size = vault_size_bytes(vault.layout) - 1
        document = json.loads(run("prune", "--max-size", f"{size}B", "--json", "--dir", vault.root).stdout)
        assert [entry["key"] for entry in document["entries"]] == [old_key.hex]
        assert document["left_bytes"] <= size

    def test_the_setting_counts_where_nothing_is_asked(self, run: Run, vault: Vault, old_key: Digest) -> None:
        size = vault_size_bytes(vault.layout) - 1
        environment = {"PIPEVAULT_MAX_SIZE": str(size)}
        asked = run("prune", "--unused", "--dry-run", "--json", "--dir", vault.root, env=environment)
        assert json.loads(asked.stdout)["max_size"] is None
        result = run("prune", "--dir", vault.root, env=environment)
        assert result.stdout == f"Removed {old_key.short} (least recently used)\n"

    @pytest.mark.parametrize(
        ("option", "value"),
        [("--dtype", "bfloat16"), ("--machine", "CUDA"), ("--model", "OtherPipeline"), ("--toolchain", "old")],
    )
    def test_what_fits_goes(self, run: Run, vault: Vault, small_key: Digest, option: str, value: str) -> None:
        factors = {
            "pipeline": {"class": "diffusers.OtherPipeline"},
            "dtype": {"unet": "bfloat16"},
            "machine": {"type": "cuda"},
            "toolchain": {"torch": "1.0.0", "graph_format": "0"},
        }
        other = Manifest(Key(factors), {}, (), {}, "2025-01-31T12:00:00+00:00")
        current = Key({"toolchain": {"torch": package_version("torch"), "graph_format": "0"}})
        for manifest in (other, Manifest(current, {}, (), {}, "2025-01-31T12:00:00+00:00")):
            vault.publish(manifest, {})
        result = run("prune", option, value, "--dir", vault.root)
        what = f"{option.removeprefix('--')} {value}"
        assert result.stdout == f"Removed {other.key.digest.short} ({what})\n"
        assert vault.lookup(small_key) is not None
        assert vault.lookup(current.digest) is not None

    def test_a_plan_takes_the_graphs_with_it_that_nothing_else_needs(
        self, run: Run, vault: Vault, tmp_path: Path
    ) -> None:
        planned = publish_planned(vault, tmp_path)
        alone, shared = planned.graphs
        other = Manifest(Key({"pipeline": {"class": "Other"}}), {}, (), {}, "2025-01-31T12:00:00+00:00", (shared,))
        vault.publish(other, {})
        result = run("prune", "--model", "StableDiffusionPipeline", "--dtype", "float16", "--dir", vault.root)
        assert sorted(result.stdout.splitlines()) == sorted(
            [
                f"Removed {planned.plan.short} (model StableDiffusionPipeline, dtype float16)",
                f"Removed {alone.short} (nothing else needs it)",
            ]
        )
        assert vault.lookup(shared) is not None

    def test_the_graphs_of_a_pinned_plan_stay_with_it(self, run: Run, vault: Vault, tmp_path: Path) -> None:
        planned = publish_planned(vault, tmp_path)
        vault.pin(planned.plan, "prod")
        result = run("prune", "--model", "StableDiffusionPipeline", "--dtype", "float16", "--dir", vault.root)
        assert result.stdout == ""
        assert all(vault.lookup(key) is not None for key in (planned.plan, *planned.graphs))

    def test_all_that_is_asked_must_fit(self, run: Run, vault: Vault, small_key: Digest) -> None:
        asked = ("prune", "--dtype", "float32", "--toolchain", "old", "--dir", vault.root)
        assert run(*asked).stdout == ""
        assert vault.lookup(small_key) is not None

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--dtype", "float64"), "No entry has the dtype 'float64'. They have float32."),
            (("--machine", "tpu"), "They have cpu."),
            (("--model", "Flux"), "diffusers.StableDiffusionPipeline"),
            (("--toolchain", "new"), "'old'"),
            (("--dtype", "float32", "--unused"), "--dtype goes without"),
        ],
    )
    def test_what_nothing_fits_is_an_error(
        self, run: Run, vault: Vault, options: tuple[str, ...], message: str
    ) -> None:
        result = run("prune", *options, "--dir", vault.root)
        assert result.exit_code == 2
        assert message in result.stderr

    def test_none_is_no_limit_whatever_the_setting_says(self, run: Run, vault: Vault, old_key: Digest) -> None:
        result = run("prune", "--max-size", "none", "--dir", vault.root, env={"PIPEVAULT_MAX_SIZE": "1kB"})
        assert (result.exit_code, result.stdout) == (0, "")
        assert vault.lookup(old_key) is not None

    def test_what_cannot_be_reached_is_said(self, run: Run, vault: Vault, old_key: Digest, large_key: Digest) -> None:
        for key, name in ((old_key, "prod"), (large_key, "test")):
            assert run("pin", key.short, "--name", name, "--dir", vault.root).exit_code == 0
        result = run("prune", "--max-size", "1kB", "--dry-run", "--dir", vault.root)
        assert result.exit_code == 0
        assert f"{old_key.short} stays: pinned as prod" in result.stderr
        assert "Cannot get below " in result.stderr
        assert "(asked for 1.0 kB) because" in result.stderr
        document = json.loads(run("prune", "--max-size", "1kB", "--dry-run", "--json", "--dir", vault.root).stdout)
        assert {entry["reason"] for entry in document["staying"]} == {"pinned as prod", "pinned as test"}
        assert len(document["not_reached"]) == 2

    @pytest.mark.parametrize(
        ("option", "value", "message"),
        [
            ("--max-size", "-1GB", "0 or more bytes"),
            ("--max-size", "20XB", "20GB or 500MiB"),
            ("--max-size", "", "20GB or 500MiB"),
            ("--max-size", "many", "20GB or 500MiB"),
            ("--older-than", "-3d", "0 or more"),
            ("--older-than", "-0d", "0 or more"),
            ("--older-than", "30", "s, min, h, d, w"),
            ("--older-than", "30y", "s, min, h, d, w"),
            ("--older-than", "", "s, min, h, d, w"),
            ("--older-than", "soon", "s, min, h, d, w"),
            ("--older-than", "nan", "s, min, h, d, w"),
        ],
    )
    def test_values_that_make_no_sense(self, run: Run, vault: Vault, option: str, value: str, message: str) -> None:
        result = run("prune", option, value, "--dir", vault.root)
        assert result.exit_code == 2
        assert option in result.stderr
        assert message in result.stderr

    @pytest.mark.parametrize("age", ["1s", "1.5 min", "2H", "30d", "2w"])
    def test_ages(self, run: Run, vault: Vault, old_key: Digest, age: str) -> None:
        assert old_key.short in run("prune", "--older-than", age, "--dry-run", "--dir", vault.root).stdout

    def test_no_vault(self, run: Run, tmp_path: Path) -> None:
        assert run("prune", "--dir", tmp_path / "none").exit_code == 1

    def test_a_damaged_pin(self, run: Run, vault: Vault, old_key: Digest) -> None:
        run("pin", old_key.short, "--name", "prod", "--dir", vault.root)
        vault.layout.pin_file("prod").write_text("damaged")
        result = run("prune", "--older-than", "30d", "--dir", vault.root)
        assert result.exit_code == 3
        assert "pipevault unpin prod" in result.stderr
        assert vault.lookup(old_key) is not None


class TestPins:
    def test_pin_list_unpin(self, run: Run, vault: Vault, small_key: Digest) -> None:
        result = run("pin", small_key.short, "--name", "prod", "--dir", vault.root)
        assert result.stdout == f"Pinned {small_key.short} as prod\n"
        listed = run("pins", "--dir", vault.root)
        assert ["prod", small_key.short] in [line.split() for line in listed.stdout.splitlines()]
        assert listed.stderr == "1 pin\n"
        assert json.loads(run("pins", "--json", "--dir", vault.root).stdout) == {
            "pins": [{"name": "prod", "key": small_key.hex, "problem": ""}]
        }
        assert run("unpin", "prod", "--dir", vault.root).stdout == f"Unpinned prod, which was {small_key.short}\n"
        assert run("pins", "--dir", vault.root).stderr == "0 pins\n"

    def test_a_taken_name(self, run: Run, vault: Vault, small_key: Digest, large_key: Digest) -> None:
        run("pin", small_key.short, "--name", "prod", "--dir", vault.root)
        result = run("pin", large_key.short, "--name", "prod", "--dir", vault.root)
        assert result.exit_code == 3
        assert "--move" in result.stderr
        moved = run("pin", large_key.short, "--name", "prod", "--move", "--json", "--dir", vault.root)
        assert json.loads(moved.stdout) == {"name": "prod", "key": large_key.hex, "moved_from": small_key.hex}

    def test_unknown_pin(self, run: Run, vault: Vault) -> None:
        result = run("unpin", "prod", "--dir", vault.root)
        assert result.exit_code == 1
        assert "There are none" in result.stderr

    def test_unknown_key(self, run: Run, vault: Vault) -> None:
        assert run("pin", "0123456789ab", "--name", "prod", "--dir", vault.root).exit_code == 1

    def test_an_ambiguous_key_lists_the_candidates(self, run: Run, vault: Vault, small_key: Digest) -> None:
        twin = vault.layout.manifest_file(Digest(small_key.hex[:40] + "00000000" + small_key.hex[48:]))
        twin.write_bytes(vault.layout.manifest_file(small_key).read_bytes())
        result = run("pin", small_key.hex[:12], "--name", "prod", "--dir", vault.root)
        assert result.exit_code == 1
        assert f"2 keys begin with {small_key.hex[:12]}: {small_key.short}" in result.stderr

    @pytest.mark.parametrize("name", ["", "../prod", "a b"])
    def test_a_name_that_is_none(self, run: Run, vault: Vault, small_key: Digest, name: str) -> None:
        assert run("pin", small_key.short, "--name", name, "--dir", vault.root).exit_code == 2

    def test_without_a_name(self, run: Run, vault: Vault, small_key: Digest) -> None:
        assert run("pin", small_key.short, "--dir", vault.root).exit_code == 2

    def test_damaged_and_dangling_pins_are_listed(
        self, run: Run, vault: Vault, small_key: Digest, large_key: Digest
    ) -> None:
        for key, name in ((small_key, "damaged"), (large_key, "dangling")):
            run("pin", key.short, "--name", name, "--dir", vault.root)
        vault.layout.pin_file("damaged").write_text("")
        vault.layout.manifest_file(large_key).unlink()
        result = run("pins", "--dir", vault.root)
        assert result.exit_code == 0
        assert "dangling: its entry is gone" in result.stderr
        assert "pipevault unpin damaged" in result.stderr


class TestRmInUse:
    def test_a_pinned_entry_not_even_by_force(self, run: Run, vault: Vault, small_key: Digest) -> None:
        run("pin", small_key.short, "--name", "prod", "--dir", vault.root)
        for options in (["--yes"], ["--yes", "--force"], ["--dry-run"]):
            result = run("rm", small_key.short, *options, "--dir", vault.root)
            assert result.exit_code == 3
            assert "pipevault unpin prod" in result.stderr
        assert vault.lookup(small_key) is not None

    def test_a_leased_entry_by_force_alone(self, run: Run, vault: Vault, small_key: Digest, large_key: Digest) -> None:
        lease = vault.lease(small_key)
        result = run("rm", small_key.short, large_key.short, "--yes", "--dir", vault.root)
        assert result.exit_code == 3
        assert f"in use by process {os.getpid()} on " in result.stderr
        assert vault.lookup(large_key) is not None
        assert run("rm", small_key.short, "--yes", "--force", "--dir", vault.root).exit_code == 0
        assert vault.lookup(small_key) is None
        lease.release()

    def test_pinned_during_the_question(
        self, run: Run, vault: Vault, small_key: Digest, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pipevault.cli.removal._confirm", lambda plan: vault.pin(small_key, "prod"))
        assert run("rm", small_key.short, "--dir", vault.root).exit_code == 3
        assert vault.lookup(small_key) is not None
