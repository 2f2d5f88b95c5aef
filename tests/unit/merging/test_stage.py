"""What the merge's settings allow."""

import pytest
from pydantic import ValidationError

from adder.merging.stage import MERGE, MergeSettings


@pytest.mark.parametrize("wrong", [{"tolerance": 0}, {"base": "quantized"}, {"rank": 3}])
def test_what_no_merge_can_do_is_refused(wrong):
    with pytest.raises(ValidationError):
        MergeSettings(method="qlora", **wrong)


def test_the_method_is_that_of_the_training():
    assert MERGE.takes == {"method": "train.method"}
