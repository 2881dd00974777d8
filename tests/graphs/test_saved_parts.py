"""Documents of saved parts are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipevault.graphs.document import read_part, write_part


def test_a_failure_leaves_the_document_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "unet"
    write_part(path, [], {"class": "old"})

    def fail(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        write_part(path, [], {"class": "new"})
    monkeypatch.undo()
    assert read_part(path)[1] == {"class": "old"}
    assert len(list(tmp_path.iterdir())) == 2, "the part and the list of parts"
    write_part(path, [], {"class": "new"})
    assert read_part(path)[1] == {"class": "new"}
