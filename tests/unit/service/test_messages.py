"""AnalysisOutput between worker and service: what is stored is what is loaded, or it is refused."""

from __future__ import annotations

import io
import json
import stat
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from service.shared.durable import digest
from service.shared.messages import (
    TOKEN_CODES,
    AnalysisOutput,
    Counts,
    Message,
    RetentionArrays,
    TokenState,
    load_output,
    store_output,
)
from tests.rows import arrays, output


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Path, str]:
    content = arrays().to_npz()
    return store_output(tmp_path / "outputs" / "7", 3, output(arrays_sha256=digest(content)), content)


def test_what_was_stored_is_loaded(stored: tuple[Path, str]) -> None:
    """Every field, and every array with its type and its NaN."""
    path, sha256 = stored

    said, loaded = load_output(path, sha256)

    assert said == output(arrays_sha256=said.arrays_sha256)
    for name in ("tokens", "merged_into", "scores", "source_pixels_from_token"):
        expected, found = getattr(arrays(), name), getattr(loaded, name)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


def test_files_are_named_by_their_fence_and_private(stored: tuple[Path, str]) -> None:
    """Nobody else may read what a model said about a patient, and nothing unfinished lies beside it."""
    path, _ = stored

    assert sorted(one.name for one in path.parent.iterdir()) == ["3.json", "3.npz"]
    assert all(stat.S_IMODE(one.stat().st_mode) == 0o600 for one in path.parent.iterdir())
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_output_of_another_fence_is_never_touched(stored: tuple[Path, str]) -> None:
    """A worker that lost its lease writes beside the winner's files."""
    path, sha256 = stored
    content = arrays().to_npz()

    late, _ = store_output(path.parent, 2, output(findings="late", arrays_sha256=digest(content)), content)

    assert late != path
    assert load_output(path, sha256)[0].findings == "The lungs are clear."


def test_output_with_changed_bytes_is_refused(stored: tuple[Path, str]) -> None:
    """Also one that is still valid JSON."""
    path, sha256 = stored
    path.write_bytes(path.read_bytes().replace(b"No acute", b"An acute"))

    with pytest.raises(ValueError, match=r"3\.json does not match its recorded SHA-256"):
        load_output(path, sha256)


def test_arrays_with_changed_bytes_are_refused(stored: tuple[Path, str]) -> None:
    """The JSON's digest covers them through the one that it holds."""
    path, sha256 = stored
    path.with_suffix(".npz").write_bytes(arrays().to_npz() + b"\0")

    with pytest.raises(ValueError, match=r"3\.npz do not match their recorded SHA-256"):
        load_output(path, sha256)


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    """An npz could hold code; it is loaded without pickle."""
    buffer = io.BytesIO()
    np.savez(buffer, tokens=np.array([print], dtype=object))

    with pytest.raises(ValueError, match="allow_pickle"):
        RetentionArrays.from_npz(buffer.getvalue())


def test_field_that_is_not_understood_is_refused() -> None:
    """A newer worker beside an older service is an error on the first message, not a silent loss."""
    content = json.loads(output().model_dump_json()) | {"confidence": 0.9}

    with pytest.raises(ValidationError, match="confidence"):
        AnalysisOutput.model_validate_json(json.dumps(content))


def test_other_version_is_refused() -> None:
    """The version is a contract, not a remark."""
    content = json.loads(output().model_dump_json()) | {"version": 2}

    with pytest.raises(ValidationError, match="version"):
        AnalysisOutput.model_validate_json(json.dumps(content))


def test_every_part_of_the_message_is_strict_and_frozen() -> None:
    """Also the nested ones."""
    parts = [Message, *Message.__subclasses__()]

    assert len(parts) > 8
    assert all(one.model_config.get("extra") == "forbid" and one.model_config.get("frozen") for one in parts)
    assert Counts in parts


def test_token_codes_are_those_of_stored_arrays() -> None:
    """They stand in files; a member that moves would change what old files say."""
    assert TOKEN_CODES == {
        TokenState.KEPT: 0,
        TokenState.MERGED: 1,
        TokenState.DROPPED: 2,
        TokenState.NOT_ENCODED: 3,
    }
