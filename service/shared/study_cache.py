"""Where workers keep the pruned features of a study for its next route or prompt, and what bounds them.

Features show a patient's anatomy, so they lie under the study's own folder and go with it. Losing them costs time only.
"""

from __future__ import annotations

import shutil
from pathlib import Path

SUFFIX = ".safetensors"


def cache_folder(data: Path, study_id: int) -> Path:
    """Of one study, under the data folder."""
    return data / "cache" / str(study_id)


def remove_cache(data: Path, study_id: int) -> bool:
    """Remove what is kept of one study; was there anything?"""
    folder = cache_folder(data, study_id)
    present = folder.is_dir()
    shutil.rmtree(folder, ignore_errors=True)
    return present


def bound_cache(data: Path, *, limit_bytes: int, keep_s: float, now_s: float) -> int:
    """Remove what has not been used for `keep_s`, then what was used longest ago, until the rest fits; how many files.

    now_s: seconds since the epoch. Files that another worker removes meanwhile are no fault.
    """
    found = []
    for path in (data / "cache").glob("*/*"):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        found.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in found)
    removed = 0
    for used_s, size, path in sorted(found):
        if total <= limit_bytes and now_s - used_s < keep_s:
            break
        path.unlink(missing_ok=True)
        removed += 1
        total -= size
    return removed
