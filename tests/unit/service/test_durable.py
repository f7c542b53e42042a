"""Files that survive a power cut: what is synced, in which order, and what a failed write leaves behind."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from service.shared.durable import digest, make_folder, write_durably


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, list[str]]]:
    """Every fsync of the test, with what lay in the folder (or in the file's folder) at that moment."""
    calls: list[tuple[Path, list[str]]] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        folder = path if path.is_dir() else path.parent
        calls.append((path, sorted(one.name for one in folder.iterdir())))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    return calls


def test_file_is_synced_before_it_has_its_name_and_its_folder_after(
    tmp_path: Path, synced: list[tuple[Path, list[str]]]
) -> None:
    """A power cut at any moment leaves the old content, nothing, or all of the new."""
    write_durably(tmp_path / "a.json", b"content")

    assert synced == [(tmp_path / "a.json.part", ["a.json.part"]), (tmp_path, ["a.json"])]
    assert (tmp_path / "a.json").read_bytes() == b"content"
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o600


def test_failed_write_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fails in fsync has not written."""
    path = tmp_path / "a.json"
    path.write_bytes(b"old")

    def failing(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="Input/output"):
        write_durably(path, b"new")

    assert path.read_bytes() == b"old"


def test_new_folders_are_synced_from_the_top(tmp_path: Path, synced: list[tuple[Path, list[str]]]) -> None:
    """A durable file in a folder whose own entry is lost would be lost with it."""
    make_folder(tmp_path / "outbox" / "ab")

    assert synced == [(tmp_path, ["outbox"]), (tmp_path / "outbox", ["ab"])]
    assert stat.S_IMODE((tmp_path / "outbox").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "outbox" / "ab").stat().st_mode) == 0o700


def test_folder_that_is_there_costs_nothing(tmp_path: Path, synced: list[tuple[Path, list[str]]]) -> None:
    """No sync for what was made before."""
    make_folder(tmp_path)

    assert synced == []


def test_digest_is_sha256() -> None:
    """FIPS 180-2, the example of the appendix."""
    assert digest(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
