"""``pipevault stats``: tables, JSON and Prometheus' text format."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from helpers.command_runner import Run
from pipevault.cli.stats import duration_text, exposition
from pipevault.digest import Digest, digest_bytes
from pipevault.store.stats.summary import Counts, Statistics, count, summary
from pipevault.store.vault import Vault

GONE = digest_bytes(b"gone")


@pytest.fixture(autouse=True)
def own_state_folder(tmp_path: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
        yield


@pytest.fixture
def counted(vault: Vault, small_key: Digest) -> Vault:
    count(vault.layout, "miss", key=small_key, reason="absent")
    count(vault.layout, "miss", key=small_key, reason="damaged")
    count(vault.layout, "compiled", key=small_key, seconds=200)
    count(vault.layout, "published", key=small_key, bytes=1500)
    for _ in range(6):
        count(vault.layout, "hit", key=small_key)
        count(vault.layout, "saved", key=small_key, seconds=200)
    count(vault.layout, "hit", key=GONE)
    count(vault.layout, "quarantined")
    count(vault.layout, "rebuilt", key=small_key)
    return vault


def samples(text: str) -> Mapping[tuple[str, str], float]:
    """By name and, of the labels, reason or key."""
    return {
        (sample.name, sample.labels.get("reason", sample.labels.get("key", ""))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


class TestForPeople:
    def test_in_all_and_by_entry(self, run: Run, counted: Vault, small_key: Digest) -> None:
        result = run("stats", "--dir", counted.root)
        assert result.exit_code == 0
        assert "2 (absent 1, damaged 1)" in result.stdout
        assert "77.8 %" in result.stdout
        assert "20 min 0 s" in result.stdout
        assert "2 entries" in result.stdout
        rows = [line.split() for line in result.stdout.splitlines() if line.startswith((small_key.short, GONE.short))]
        assert [row[0] for row in rows] == [small_key.short, GONE.short]
        assert rows[0][1:3] == ["6", "2"]

    def test_80_columns_hold_a_line_for_each_entry(self, run: Run, counted: Vault, small_key: Digest) -> None:
        lines = run("stats", "--dir", counted.root, env={"COLUMNS": "80"}).stdout.splitlines()
        assert ["KEY", "HITS", "MISSES", "HIT", "RATE", "COMPILE", "TIME", "SAVED", "PUBLISHED"] in map(
            str.split, lines
        )
        [row] = [line for line in lines if line.startswith(small_key.short)]
        assert row.endswith("1, 1.5 kB")

    def test_one_entry(self, run: Run, counted: Vault, small_key: Digest) -> None:
        result = run("stats", small_key.hex[:8], "--dir", counted.root)
        assert small_key.hex in result.stdout
        assert GONE.short not in result.stdout
        assert "75.0 %" in result.stdout

    def test_an_entry_of_which_nothing_was_counted(self, run: Run, counted: Vault, large_key: Digest) -> None:
        result = run("stats", large_key.hex, "--dir", counted.root, "--json")
        assert (result.exit_code, json.loads(result.stdout)["hits"]) == (0, 0)

    def test_nothing_was_counted(self, run: Run, vault: Vault) -> None:
        result = run("stats", "--dir", vault.root)
        assert result.exit_code == 0
        assert "nothing was counted yet" in result.stdout
        assert "KEY" not in result.stdout

    def test_many_entries(self, run: Run, vault: Vault) -> None:
        for number in range(40):
            count(vault.layout, "published", key=digest_bytes(bytes([number])))
        result = run("stats", "--dir", vault.root)
        assert "10 more entries" in result.stderr

    def test_what_could_not_be_read_is_told(self, run: Run, counted: Vault) -> None:
        path = counted.layout.events_file(host="elsewhere", pid=1, random_hex="0" * 16)
        path.write_text("no event\n")
        result = run("stats", "--dir", counted.root, "--json")
        assert result.exit_code == 0
        assert "Not counted" in result.stderr
        assert len(json.loads(result.stdout)["unreadable"]) == 1

    @pytest.mark.parametrize(
        ("seconds", "text"),
        [(0, "0 s"), (12.5, "12.5 s"), (200, "3 min 20 s"), (59.96, "60.0 s"), (97500, "27 h 5 min")],
    )
    def test_durations(self, seconds: float, text: str) -> None:
        assert duration_text(seconds) == text


class TestForPrograms:
    def test_in_all(self, run: Run, counted: Vault, small_key: Digest) -> None:
        document = json.loads(run("stats", "--dir", counted.root, "--json").stdout)
        assert document["total"] == {
            "hits": 7,
            "misses": {"absent": 1, "damaged": 1},
            "hit_rate": 7 / 9,
            "compiled": 1,
            "compile_s": 200,
            "saved_s": 1200,
            "rebuilt": 1,
            "quarantined": 1,
            "published": 1,
            "published_bytes": 1500,
        }
        assert document["entries"].keys() == {small_key.hex, GONE.hex}
        assert document["stored_entries"] == 2
        assert document["vault"] == str(counted.root)

    def test_one_entry(self, run: Run, counted: Vault) -> None:
        document = json.loads(run("stats", GONE.hex[:6], "--dir", counted.root, "--json").stdout)
        assert (document["key"], document["hits"], document["hit_rate"]) == (GONE.hex, 1, 1.0)


class TestForPrometheus:
    def test_the_file(self, run: Run, counted: Vault, small_key: Digest, tmp_path: Path) -> None:
        path = tmp_path / "pipevault.prom"
        path.write_text("old")
        result = run("stats", "--dir", counted.root, "--prometheus", path)
        assert (result.exit_code, result.stdout) == (0, "")
        found = samples(path.read_text())
        assert found["pipevault_hits_total", ""] == 7
        assert found["pipevault_misses_total", "absent"] == 1
        assert found["pipevault_saved_seconds_total", ""] == 1200
        assert found["pipevault_published_bytes_total", ""] == 1500
        assert found["pipevault_entry_hits_total", small_key.hex] == 6
        assert found["pipevault_entry_misses_total", small_key.hex] == 2
        assert found["pipevault_entries", ""] == 2
        assert path.stat().st_mode & 0o777 == 0o644
        assert [file.name for file in tmp_path.iterdir() if "prom" in file.name] == ["pipevault.prom"]

    def test_every_family_has_help_and_type_and_appears_once(self, counted: Vault) -> None:
        text = exposition(summary(counted.layout), counted.root)
        families = list(text_string_to_metric_families(text))
        assert all(family.documentation and family.type in ("counter", "gauge") for family in families)
        assert len({family.name for family in families}) == len(families)
        assert text.count("# TYPE") == len(families)
        assert text.endswith("\n")

    def test_a_path_with_characters_that_need_escaping(self) -> None:
        root = Path('/vaults/a "quoted" \\ back\nslash é')
        found = Statistics(Counts(hits=3), {}, None, 0, 0, ())
        families = text_string_to_metric_families(exposition(found, root))
        assert {sample.labels["vault"] for family in families for sample in family.samples} == {str(root)}

    def test_on_standard_output(self, run: Run, counted: Vault) -> None:
        result = run("stats", "--dir", counted.root, "--prometheus", "-")
        assert samples(result.stdout)["pipevault_hits_total", ""] == 7

    def test_a_file_that_the_collector_would_not_read(self, run: Run, counted: Vault, tmp_path: Path) -> None:
        result = run("stats", "--dir", counted.root, "--prometheus", tmp_path / "pipevault.txt")
        assert result.exit_code == 2
        assert ".prom" in result.stderr

    def test_a_folder_that_does_not_exist(self, run: Run, counted: Vault, tmp_path: Path) -> None:
        result = run("stats", "--dir", counted.root, "--prometheus", tmp_path / "none" / "pipevault.prom")
        assert result.exit_code == 4
        assert result.stderr.count("\n") == 1

    @pytest.mark.parametrize("arguments", [["3f9a2c"], ["--json"]])
    def test_with_what_it_does_not_go_with(self, run: Run, counted: Vault, arguments: list[str]) -> None:
        result = run("stats", *arguments, "--dir", counted.root, "--prometheus", "-")
        assert result.exit_code == 2


class TestBadInput:
    def test_unknown_key(self, run: Run, counted: Vault) -> None:
        result = run("stats", "0123456789", "--dir", counted.root)
        assert result.exit_code == 1
        assert "0123456789" in result.stderr

    def test_no_vault(self, run: Run, tmp_path: Path) -> None:
        assert run("stats", "--dir", tmp_path / "none").exit_code == 1

    def test_totals_of_a_later_version(self, run: Run, counted: Vault) -> None:
        counted.layout.totals_file.write_text('{"totals_version": 3}')
        result = run("stats", "--dir", counted.root)
        assert result.exit_code == 3
        assert "Upgrade" in result.stderr
