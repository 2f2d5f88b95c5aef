"""What readers hand over can be told apart."""

import orjson
import pytest

from adder.data.row_types import Unfit, Unreadable


def test_a_value_that_json_cant_hold_is_not_written_by_accident():
    with pytest.raises(TypeError):
        orjson.dumps({"a": Unfit("binary")})
    assert repr(Unfit("binary")) == repr(Unfit("binary"))


def test_unreadable_rows_of_one_kind_may_differ_in_their_reason():
    one, other = (Unreadable(f"broken JSON at line {n}", kind="broken JSON") for n in (1, 2))
    assert one != other and one.kind == other.kind
