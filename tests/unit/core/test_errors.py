"""A mistake of the user's is an exception of its own kind; what the system refuses becomes one that names the file."""

import errno
import os
from pathlib import Path

import pytest

from adder.core.errors import UserError, of_system, system_errors_told


def refused(number: int, name: str | None = "data/rows.jsonl") -> OSError:
    return OSError(number, os.strerror(number), name) if name else OSError(number, os.strerror(number))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.ENOTDIR, errno.EMFILE])
def test_it_names_file_and_reason(number):
    with pytest.raises(UserError) as told, system_errors_told():
        raise refused(number)
    assert str(told.value).startswith(f"data/rows.jsonl: {os.strerror(number)}")


def test_a_file_that_the_error_does_not_name_is_named_by_who_reads_it():
    with pytest.raises(UserError, match=r"^rows\.jsonl: "), system_errors_told(Path("rows.jsonl")):
        raise refused(errno.EIO, None)
    assert of_system(refused(errno.EIO, None)) is None
    with pytest.raises(OSError, match="no reason"), system_errors_told():
        raise OSError("no reason")


def test_a_full_disk_is_told_where_no_file_is_named():
    assert str(of_system(refused(errno.ENOSPC, None))) == (
        "the disk: No space left on device; make room, then the same command goes on"
    )


def test_a_name_of_any_length_and_kind_leaves_one_short_sentence():
    assert len(str(of_system(refused(errno.ENAMETOOLONG, "a" * 5000)))) < 300
    assert "\ufffd" in str(of_system(OSError(errno.EACCES, "no", b"\xff.jsonl")))


def test_only_mistakes_of_the_users_are_caught_as_such():
    with pytest.raises(UserError, match=r"^rows\.jsonl, row 3: found a cat$"):
        raise UserError("rows.jsonl, row 3: found a cat")
    assert not isinstance(ValueError("boom"), UserError)
