"""Settings: which source wins, and what each bad value is told, with the source that it came from."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from pipevault.errors import SettingsError, UnknownBackendError, UnknownLevelError, UnknownModeError
from pipevault.settings import LEVELS, PROFILES, Settings, Tier, config_file, default_dir, split_level


@pytest.fixture
def config(tmp_path: Path) -> Callable[[str], dict[str, str]]:
    """Writes a config file; the environment that names it."""

    def write(text: str) -> dict[str, str]:
        (tmp_path / "etc").mkdir(exist_ok=True)
        (tmp_path / "etc" / "pipevault.toml").write_text(text)
        return {"PIPEVAULT_CONFIG": str(tmp_path / "etc" / "pipevault.toml")}

    return write


Config = Callable[[str], dict[str, str]]


class TestPrecedence:
    def test_default(self) -> None:
        settings = Settings.resolve(environ={})
        assert (settings.dir, settings.mode) == (default_dir(), "compile")

    def test_argument_before_environment_before_file(self, config: Config) -> None:
        environ = config('mode = "off"\nweights = "baked"\non_unfrozen = "eager"\n')
        environ |= {"PIPEVAULT_MODE": "require", "PIPEVAULT_WEIGHTS": "bound"}
        settings = Settings.resolve(environ=environ, mode="compile", weights=None)
        assert (settings.mode, settings.weights, settings.on_unfrozen) == ("compile", "bound", "eager")

    def test_an_empty_variable_counts_as_unset(self, config: Config) -> None:
        environ = config('mode = "off"\n') | {"PIPEVAULT_MODE": "", "PIPEVAULT_SPEED": ""}
        assert Settings.resolve(environ=environ).mode == "off"

    def test_a_bad_value_that_another_source_overrides_does_no_harm(self, config: Config) -> None:
        assert Settings.resolve(environ=config('mode = "fast"\n'), mode="off").mode == "off"


class TestDir:
    def test_a_relative_one_in_the_file_starts_at_the_file(self, config: Config, tmp_path: Path) -> None:
        assert Settings.resolve(environ=config('dir = "vault"\n')).dir == tmp_path / "etc" / "vault"

    def test_a_relative_one_in_the_environment_starts_at_the_process(
        self, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        environ = config('dir = "vault"\n') | {"PIPEVAULT_DIR": "here"}
        assert Settings.resolve(environ=environ).dir == tmp_path / "here"

    def test_a_config_file_with_a_relative_name(
        self, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config('dir = "vault"\n')
        monkeypatch.chdir(tmp_path)
        environ = {"PIPEVAULT_CONFIG": "etc/pipevault.toml"}
        assert Settings.resolve(environ=environ).dir == tmp_path / "etc" / "vault"

    def test_home(self, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", "/home/ada")
        assert Settings.resolve(environ=config('dir = "~/vault"\n')).dir == Path("/home/ada/vault")


class TestSource:
    """Each error says where its value was set."""

    def test_argument(self) -> None:
        with pytest.raises(UnknownModeError, match=r"mode 'fast'.*compile, require, off.*the argument mode\.$") as info:
            Settings.resolve(environ={}, mode="fast")
        assert (info.value.mode, info.value.known) == ("fast", ("compile", "require", "off"))

    def test_environment(self) -> None:
        with pytest.raises(UnknownBackendError, match=r"the environment variable PIPEVAULT_BACKEND\.$"):
            Settings.resolve(environ={"PIPEVAULT_BACKEND": "magic"})

    @pytest.mark.parametrize(
        "line",
        [
            *('mode = "fast"', 'backend = "magic"', "dir = 3", 'dir = ""', "mode = 1", 'weights = "heavy"'),
            *('lock_timeout_s = "soon"', "lock_timeout_s = true", "lock_timeout_s = -1", 'dir = "~nobody-here/vault"'),
        ],
    )
    def test_config_file(self, config: Config, line: str) -> None:
        environ = config(line)
        with pytest.raises(SettingsError) as info:
            Settings.resolve(environ=environ)
        assert str(info.value).endswith(f" It was set by the config file {environ['PIPEVAULT_CONFIG']}.")
        assert line.partition(" ")[0] in str(info.value)

    def test_a_timeout_in_the_environment(self) -> None:
        with pytest.raises(
            SettingsError,
            match=r"Invalid lock_timeout_s 'soon': expected a number of seconds",
        ):
            Settings.resolve(environ={"PIPEVAULT_LOCK_TIMEOUT_S": "soon"})


class TestLevel:
    def test_default(self) -> None:
        assert Settings.resolve(environ={}).level == "repeatable"

    def test_argument_before_environment_before_file(self, config: Config) -> None:
        environ = config('level = "off"\n')
        assert Settings.resolve(environ=environ).level == "off"
        environ["PIPEVAULT_LEVEL"] = "strict+audit"
        assert Settings.resolve(environ=environ).level == "strict+audit"
        assert Settings.resolve(environ=environ, level="invariant").level == "invariant"

    @pytest.mark.parametrize("name", [*LEVELS, *PROFILES])
    def test_each_with_and_without_audit(self, name: str) -> None:
        assert split_level(name) == (PROFILES.get(name, name), False)
        assert split_level(f"{name}+audit") == (PROFILES.get(name, name), True)
        assert Settings.resolve(environ={"PIPEVAULT_LEVEL": f"{name}+audit"}).level == f"{name}+audit"

    def test_a_profile_stands_for_a_level(self) -> None:
        assert set(PROFILES) == {"development", "test", "production"}
        assert set(PROFILES.values()) <= set(LEVELS)

    @pytest.mark.parametrize("text", ["fast", "Strict", "strict+", "strict+log", "+audit", "strict+audit+audit"])
    def test_unknown(self, config: Config, text: str) -> None:
        with pytest.raises(UnknownLevelError, match=r"Unknown level .* Levels: off, seeded, .*\+audit") as info:
            Settings.resolve(environ={"PIPEVAULT_LEVEL": text})
        assert str(info.value).endswith("It was set by the environment variable PIPEVAULT_LEVEL.")
        assert (info.value.level, info.value.known) == (text, (*LEVELS, *PROFILES))
        with pytest.raises(UnknownLevelError, match=r"set by the config file .*pipevault\.toml\.$"):
            Settings.resolve(environ=config(f'level = "{text}"\n'))

    def test_a_level_in_the_file_is_text(self, config: Config) -> None:
        with pytest.raises(SettingsError, match="Invalid level 3: expected text"):
            Settings.resolve(environ=config("level = 3\n"))


class TestUnknownNames:
    def test_variable(self) -> None:
        with pytest.raises(SettingsError, match=r"^Unknown setting PIPEVAULT_MODUS\. Did you mean PIPEVAULT_MODE\?$"):
            Settings.resolve(environ={"PIPEVAULT_MODUS": "require"})

    def test_a_variable_that_resembles_none(self) -> None:
        with pytest.raises(SettingsError, match=r"^Unknown setting PIPEVAULT_XYZ\. Known: PIPEVAULT_DIR, "):
            Settings.resolve(environ={"PIPEVAULT_XYZ": "1"})

    @pytest.mark.parametrize(
        "name",
        [
            *("PIPEVAULT_DEBUG", "PIPEVAULTS", "MY_PIPEVAULT_MODE", "PIPEVAULT_SERVICE_HOST", "PIPEVAULT_PORT"),
            *("PIPEVAULT_STORE_SERVICE_PORT_HTTP", "PIPEVAULT_PORT_80_TCP_ADDR"),
        ],
    )
    def test_variables_that_are_left_alone(self, name: str) -> None:
        assert Settings.resolve(environ={name: "1"}).mode == "compile"

    def test_name_in_the_file(self, config: Config) -> None:
        with pytest.raises(SettingsError, match=r"^Unknown setting modus in .*toml\. Did you mean mode\?$"):
            Settings.resolve(environ=config('modus = "off"\n'))

    def test_argument(self) -> None:
        with pytest.raises(SettingsError, match=r"^Unknown setting modus\. Did you mean mode\?$"):
            Settings.resolve(environ={}, modus="off")


class TestConfigFile:
    def test_one_that_is_named_must_exist(self, tmp_path: Path) -> None:
        with pytest.raises(SettingsError, match=r"PIPEVAULT_CONFIG names .*none\.toml"):
            Settings.resolve(environ={"PIPEVAULT_CONFIG": str(tmp_path / "none.toml")})

    def test_one_that_is_no_toml(self, config: Config) -> None:
        with pytest.raises(SettingsError, match=r"pipevault\.toml cannot be read"):
            Settings.resolve(environ=config("mode ="))

    def test_the_default_place_follows_the_user(self) -> None:
        assert config_file({}) == Path(os.environ["XDG_CONFIG_HOME"]) / "pipevault" / "config.toml"


class TestSizes:
    @pytest.mark.parametrize(
        ("text", "size_bytes"),
        [("7", 7), ("20GB", 20 * 10**9), ("500 MiB", 500 << 20), ("1.5kb", 1500), ("2 tib", 2 << 40)],
    )
    def test_bytes_with_and_without_a_unit(self, text: str, size_bytes: int) -> None:
        assert Settings.resolve(environ={}, max_size=text).max_size == size_bytes
        assert Settings.resolve(environ={"PIPEVAULT_MAX_SIZE": text}).max_size == size_bytes

    def test_a_vault_has_a_limit_unless_none_is_asked_for(self) -> None:
        assert Settings.resolve(environ={}).max_size == Settings(Path()).max_size == 50_000_000_000
        assert Settings.resolve(environ={}, max_size="none").max_size is None
        assert Settings.resolve(environ={"PIPEVAULT_MAX_SIZE": "None"}).max_size is None
        assert Settings(Path(), max_size=None).max_size is None

    @pytest.mark.parametrize("value", ["", "much", "5 bytes", "GB", "1e9", True, 1.5, "-1", -1])
    def test_no_size(self, value: Any) -> None:
        with pytest.raises(SettingsError, match=r"Invalid max_size .*: expected .* bytes"):
            Settings.resolve(environ={}, max_size=value)

    @pytest.mark.parametrize("value", ["0", 0, "0GB"])
    def test_zero_would_keep_nothing_and_is_no_word_for_no_limit(self, value: Any) -> None:
        with pytest.raises(
            SettingsError, match=r"Invalid max_size 0: expected 1 or more bytes, or none.*the argument max_size"
        ):
            Settings.resolve(environ={}, max_size=value)

    @pytest.mark.parametrize(("name", "kind"), [("trusted_users", "user"), ("trusted_groups", "group")])
    def test_a_name_that_nobody_has_is_told_with_its_source(self, name: str, kind: str) -> None:
        message = rf"{name} names 'nobody-of-this-name', but this machine has no such {kind}\. .* It was set by the env"
        with pytest.raises(SettingsError, match=message):
            Settings.resolve(environ={f"PIPEVAULT_{name.upper()}": "root:nobody-of-this-name"})
        assert getattr(Settings.resolve(environ={f"PIPEVAULT_{name.upper()}": "root:4711"}), name) == ("root", "4711")


class TestTiers:
    def test_as_json(self, tmp_path: Path) -> None:
        document = Settings.resolve(environ={}, tiers=[tmp_path], trusted_keys=["a.pub"]).to_json()
        assert json.loads(json.dumps(document)) == document
        assert document["tiers"] == [{"dir": str(tmp_path), "signature": None, "copy": True}]

    def test_in_the_environment_as_a_path_list(self, tmp_path: Path) -> None:
        text = os.pathsep.join(map(str, [tmp_path / "a", tmp_path / "b"]))
        assert [tier.dir for tier in Settings.resolve(environ={"PIPEVAULT_TIERS": text}).tiers] == [
            tmp_path / "a",
            tmp_path / "b",
        ]

    def test_in_the_file_as_folders_and_tables(self, config: Config, tmp_path: Path) -> None:
        environ = config('tiers = ["baked", {dir = "/mnt/shared", signature = "require", copy = false}]')
        tiers = Settings.resolve(environ=environ).tiers
        assert tiers == (
            Tier(Path(environ["PIPEVAULT_CONFIG"]).parent / "baked"),
            Tier(Path("/mnt/shared"), "require", copy=False),
        )

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (5, "expected a list"),
            ([5], "expected a folder"),
            ([{"signature": "off"}], "expected dir"),
            ([{"dir": "/a", "colour": 1}], "colour.*: expected dir"),
            ([{"dir": "/a", "signature": 1}], "expected text"),
            ([{"dir": "/a", "signature": "maybe"}], "expected one of off, warn, require"),
            ([{"dir": "/a", "copy": "perhaps"}], "expected true or false"),
            (["/a", "/b", "/a"], "names /a twice"),
        ],
    )
    def test_tiers_that_cannot_be_used(self, value: Any, message: str) -> None:
        with pytest.raises(SettingsError, match=message):
            Settings.resolve(environ={}, tiers=value)


@pytest.mark.parametrize(("text", "value"), [("1", True), ("true", True), ("no", False), ("0", False)])
def test_a_switch_in_the_environment(text: str, value: bool) -> None:
    assert Settings.resolve(environ={"PIPEVAULT_ALLOW_GROUP_WRITE": text}).allow_group_write is value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("allow_group_write", "perhaps"),
        ("signature", "maybe"),
        ("on_lock_timeout", "wait"),
        ("tier_timeout_s", -1),
        ("trusted_keys", [5]),
        ("trusted_keys", 5),
    ],
)
def test_values_that_cannot_be_used(name: str, value: Any) -> None:
    with pytest.raises(SettingsError, match=name):
        Settings.resolve(environ={}, **{name: value})


def test_trusted_keys_in_the_environment_and_as_a_list() -> None:
    keys = os.pathsep.join(["a.pub", "b.pub"])
    assert Settings.resolve(environ={"PIPEVAULT_TRUSTED_KEYS": keys}).trusted_keys == ("a.pub", "b.pub")
    assert Settings.resolve(environ={}, trusted_keys=["a.pub"]).trusted_keys == ("a.pub",)


class TestConfigFileOwner:
    def test_a_config_file_that_others_may_write_is_not_read(self, tmp_path: Path) -> None:
        file = tmp_path / "config.toml"
        file.write_text('signature = "off"\n')
        file.chmod(0o666)
        with pytest.raises(SettingsError, match=r"is not read, for it decides which code is loaded.*chmod go-w"):
            Settings.resolve(environ={"PIPEVAULT_CONFIG": str(file)})
        file.chmod(0o644)
        assert Settings.resolve(environ={"PIPEVAULT_CONFIG": str(file)}, dir=tmp_path).signature == "off"

    @pytest.mark.root
    def test_nor_is_one_of_another_user(self, tmp_path: Path) -> None:
        file = tmp_path / "config.toml"
        file.write_text("")
        os.chown(file, 54001, -1)
        with pytest.raises(SettingsError, match="belongs to user 54001"):
            Settings.resolve(environ={"PIPEVAULT_CONFIG": str(file)})


class TestWeakerTiers:
    TIER: ClassVar[dict[str, str]] = {"dir": "/opt/vault", "signature": "off"}

    def test_a_tier_does_not_weaken_what_another_place_requires(self, tmp_path: Path) -> None:
        file = tmp_path / "config.toml"
        file.write_text('[[tiers]]\ndir = "/opt/vault"\nsignature = "warn"\n')
        environ = {"PIPEVAULT_CONFIG": str(file), "PIPEVAULT_SIGNATURE": "require"}
        with pytest.raises(SettingsError, match="set by the environment, and the config file weakens it to 'warn'"):
            Settings.resolve(environ=environ, dir=tmp_path)
        with pytest.raises(SettingsError, match="an argument weakens it"):
            Settings.resolve(environ={"PIPEVAULT_SIGNATURE": "require"}, dir=tmp_path, tiers=[self.TIER])

    def test_it_may_where_both_are_said_in_one_place(self, tmp_path: Path) -> None:
        settings = Settings.resolve(environ={}, dir=tmp_path, signature="require", tiers=[self.TIER])
        assert settings.tiers[0].signature == "off"
        file = tmp_path / "config.toml"
        file.write_text('signature = "require"\n[[tiers]]\ndir = "/opt/vault"\nsignature = "warn"\n')
        assert Settings.resolve(environ={"PIPEVAULT_CONFIG": str(file)}, dir=tmp_path).tiers[0].signature == "warn"

    def test_a_stricter_tier_may_come_from_anywhere(self, tmp_path: Path) -> None:
        environ = {"PIPEVAULT_SIGNATURE": "require"}
        tiers = [{"dir": "/opt/vault", "signature": "require"}, {"dir": "/mnt/vault"}]
        assert Settings.resolve(environ=environ, dir=tmp_path, tiers=tiers).signature == "require"


class TestTrusted:
    def test_users_and_groups_by_name_or_number(self, tmp_path: Path) -> None:
        environ = {"PIPEVAULT_TRUSTED_USERS": "1000:root", "PIPEVAULT_TRUSTED_GROUPS": "100"}
        settings = Settings.resolve(environ=environ, dir=tmp_path)
        assert (settings.trusted_users, settings.trusted_groups) == (("1000", "root"), ("100",))
        assert Settings.resolve(environ={}, dir=tmp_path, trusted_users=[1000]).trusted_users == ("1000",)

    @pytest.mark.parametrize("value", [[True], [-1], [""], 7, [1.5]])
    def test_what_is_neither_is_an_error(self, tmp_path: Path, value: object) -> None:
        with pytest.raises(SettingsError, match="Invalid trusted_groups"):
            Settings.resolve(environ={}, dir=tmp_path, trusted_groups=value)

    def test_shared(self, tmp_path: Path) -> None:
        assert Settings.resolve(environ={"PIPEVAULT_SHARED": "group"}, dir=tmp_path).is_shared
        assert not Settings.resolve(environ={}, dir=tmp_path).is_shared
        with pytest.raises(SettingsError, match="Invalid shared 'all': expected one of no, group"):
            Settings.resolve(environ={}, dir=tmp_path, shared="all")
