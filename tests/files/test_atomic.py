"""Writing in one step, and what a failing file system leaves."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from pipevault.digest import digest_bytes
from pipevault.errors import LockTimeoutError, VaultError, VaultFullError, VaultNotWritableError
from pipevault.files.atomic import (
    copy_file,
    create_file,
    make_folder,
    publish_file,
    replacing,
    vault_errors,
    write_file,
)


def fail_with(number: int):  # type: ignore[no-untyped-def]
    def fail(*args: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_write_file_creates_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_file(path, b"old")
    write_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert list(tmp_path.iterdir()) == [path]


def test_the_mode_does_not_depend_on_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write_file(tmp_path / "file", b"")
        make_folder(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o755


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.ENOSPC, VaultFullError),
        (errno.EDQUOT, VaultFullError),
        (errno.EFBIG, VaultFullError),
        (errno.EACCES, VaultNotWritableError),
        (errno.EPERM, VaultNotWritableError),
        (errno.EROFS, VaultNotWritableError),
        (errno.EIO, VaultError),
    ],
)
@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_failure_of_any_step_is_named_and_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type[VaultError], step: str
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, step, fail_with(number))
    with pytest.raises(error, match="file could not be written") as caught:
        write_file(path, b"new")
    assert type(caught.value) is error
    assert caught.value.path == path
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_may_take_several_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:3]))
    write_file(tmp_path / "file", b"0123456789")
    assert (tmp_path / "file").read_bytes() == b"0123456789"


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_without_fsync_of_folders_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    fsync = os.fsync

    def files_only(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)
    write_file(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


def test_the_file_is_durable_before_its_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace

    def recording_fsync(descriptor: int) -> None:
        steps.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def recording_replace(source: Path, target: Path) -> None:
        steps.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "replace", recording_replace)
    write_file(tmp_path / "file", b"new")
    assert steps == ["file", "rename", "folder"]


def test_publish_file_moves(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"new")
    publish_file(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == b"new"
    assert not (tmp_path / "source").exists()


def test_copy_file_tells_what_it_wrote(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000
    (tmp_path / "source").write_bytes(data)
    assert copy_file(tmp_path / "source", tmp_path / "copy", mode=0o444) == (digest_bytes(data), len(data))
    assert (tmp_path / "copy").read_bytes() == data
    assert stat.S_IMODE((tmp_path / "copy").stat().st_mode) == 0o444


def test_copy_file_never_replaces(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"new")
    (tmp_path / "copy").write_bytes(b"old")
    with pytest.raises(VaultError):
        copy_file(tmp_path / "source", tmp_path / "copy", mode=0o444)
    assert (tmp_path / "copy").read_bytes() == b"old"


def test_a_source_that_is_absent_is_the_callers_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        copy_file(tmp_path / "absent", tmp_path / "copy", mode=0o444)


def test_make_folder_over_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(VaultError, match="could not be created"):
        make_folder(tmp_path / "file")
    with pytest.raises(VaultError, match="could not be created"):
        make_folder(tmp_path / "file" / "below")


def test_errors_of_this_package_pass_unchanged(tmp_path: Path) -> None:
    original = LockTimeoutError("late", "key", 1.0)  # a TimeoutError, so an OSError too
    with pytest.raises(LockTimeoutError) as caught, vault_errors(tmp_path, "written"):
        raise original
    assert caught.value is original


class TestReplacing:
    def test_the_new_file_takes_the_place_at_the_end_alone(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_bytes(b"old")
        with replacing(path) as temporary:
            temporary.write_bytes(b"new")
            assert temporary.parent == tmp_path
            assert path.read_bytes() == b"old"
        assert path.read_bytes() == b"new"
        assert list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
    def test_an_error_or_an_interrupt_leaves_the_old_file_and_nothing_else(
        self, tmp_path: Path, error: type[BaseException]
    ) -> None:
        path = tmp_path / "file"
        path.write_bytes(b"old")

        def fail() -> None:
            with replacing(path) as temporary:
                temporary.write_bytes(b"half")
                raise error

        with pytest.raises(error):
            fail()
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]

    def test_a_block_that_writes_nothing_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError), replacing(tmp_path / "file"):
            pass
        assert list(tmp_path.iterdir()) == []

    def test_two_at_once_have_two_names(self, tmp_path: Path) -> None:
        with replacing(tmp_path / "file") as one, replacing(tmp_path / "file") as other:
            assert one != other
            one.write_bytes(b"one")
            other.write_bytes(b"other")
        assert (tmp_path / "file").read_bytes() == b"one"

    @pytest.mark.parametrize("durable", [True, False])
    def test_only_what_must_outlive_a_power_cut_is_waited_for(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
    ) -> None:
        synced: list[int] = []
        monkeypatch.setattr(os, "fsync", synced.append)
        with replacing(tmp_path / "file", durable=durable) as temporary:
            temporary.write_bytes(b"new")
        assert len(synced) == (2 if durable else 0), "the file, then its folder"

    def test_only_a_folder_may_lack_an_fsync(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "fsync", fail_with(errno.EINVAL))
        with pytest.raises(OSError, match="Invalid argument"), replacing(tmp_path / "file") as temporary:
            temporary.write_bytes(b"new")
        assert list(tmp_path.iterdir()) == []


def test_of_two_that_create_a_file_one_gets_it(tmp_path: Path) -> None:
    (tmp_path / "staging").mkdir()
    create_file(tmp_path / "file", b"first", staging=tmp_path / "staging")
    with pytest.raises(FileExistsError):
        create_file(tmp_path / "file", b"second", staging=tmp_path / "staging")
    assert (tmp_path / "file").read_bytes() == b"first"


def test_a_file_system_without_hard_links_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", fail_with(errno.EPERM))
    test_of_two_that_create_a_file_one_gets_it(tmp_path)
