"""Which families of kernels are switched off."""

from adder.kernels import families


def test_a_family_is_used_until_it_is_switched_off_and_says_why_then():
    assert families.why_off("rope") is None and not families.is_tried("rope")
    families.turn_off("rope", "it was off by 0.3")
    families.trust("swiglu")
    assert families.why_off("rope") == "it was off by 0.3"
    assert families.why_off("swiglu") is None and families.is_tried("swiglu")
    families.forget()
    assert families.why_off("rope") is None and not families.is_tried("swiglu")
