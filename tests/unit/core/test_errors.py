"""A mistake of the user's is an exception of its own kind, which programming errors are not."""

import pytest

from adder.core.errors import UserError


def test_only_mistakes_of_the_users_are_caught_as_such():
    with pytest.raises(UserError, match=r"^rows\.jsonl, row 3: found a cat$"):
        raise UserError("rows.jsonl, row 3: found a cat")
    assert not isinstance(ValueError("boom"), UserError)
