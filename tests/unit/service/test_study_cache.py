"""service.shared.study_cache: bounded by size and age, and removed with the study."""

from __future__ import annotations

import os
from pathlib import Path

from service.shared.study_cache import bound_cache, cache_folder, remove_cache

NOW_S = 1_000_000.0


def keep(data: Path, study_id: int, name: str, *, size: int, age_s: float) -> Path:
    path = cache_folder(data, study_id) / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    os.utime(path, (NOW_S - age_s, NOW_S - age_s))
    return path


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    """Until the rest fits; no more than that."""
    old = keep(tmp_path, 1, "a", size=40, age_s=30)
    middle = keep(tmp_path, 2, "b", size=40, age_s=20)
    young = keep(tmp_path, 1, "c", size=40, age_s=10)

    assert bound_cache(tmp_path, limit_bytes=100, keep_s=1000, now_s=NOW_S) == 1
    assert [path.exists() for path in (old, middle, young)] == [False, True, True]


def test_what_is_too_old_goes_however_small(tmp_path: Path) -> None:
    """Age counts from the last use; drafts that a crash left behind grow old too."""
    old = keep(tmp_path, 1, "a", size=1, age_s=1001)
    draft = keep(tmp_path, 1, "b.safetensors.part", size=1, age_s=5000)
    young = keep(tmp_path, 1, "c", size=1, age_s=999)

    assert bound_cache(tmp_path, limit_bytes=100, keep_s=1000, now_s=NOW_S) == 2
    assert [path.exists() for path in (old, draft, young)] == [False, False, True]


def test_nothing_is_kept_without_room(tmp_path: Path) -> None:
    """A limit of 0 empties it; an absent folder is no fault."""
    keep(tmp_path, 1, "a", size=1, age_s=0)

    assert bound_cache(tmp_path, limit_bytes=0, keep_s=1000, now_s=NOW_S) == 1
    assert bound_cache(tmp_path / "none", limit_bytes=0, keep_s=1000, now_s=NOW_S) == 0


def test_study_is_removed_with_all_of_it(tmp_path: Path) -> None:
    """And no other."""
    keep(tmp_path, 1, "a", size=1, age_s=0)
    other = keep(tmp_path, 11, "a", size=1, age_s=0)

    assert remove_cache(tmp_path, 1)
    assert not cache_folder(tmp_path, 1).exists()
    assert other.exists()
    assert not remove_cache(tmp_path, 1)
