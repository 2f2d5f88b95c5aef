"""How many cases Hypothesis makes for a test: few and always the same, or many at random."""

from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import providers

DETERMINISTIC, EXPLORE = "deterministic", "explore"


def register_profiles() -> None:
    """Make the profile that all tests run with, and the one that `pytest --hypothesis-profile=explore` asks for.

    A test says how many cases it makes of the first by `@examples(N)`; of the second it makes as many as that says. No
    test fails for taking long.
    """
    # Hypothesis also takes constants from the modules that are loaded, which depend on the tests that ran before.
    # Private, but there is no setting for it.
    providers._get_local_constants = lambda: providers._local_constants
    slow = [HealthCheck.too_slow, HealthCheck.large_base_example]
    settings.register_profile(DETERMINISTIC, derandomize=True, deadline=None, suppress_health_check=slow)
    settings.register_profile(EXPLORE, max_examples=3000, deadline=None, suppress_health_check=slow, print_blob=True)
    settings.load_profile(DETERMINISTIC)


def examples(count: int, *suppressed: HealthCheck) -> settings:
    """The settings of a test of `count` cases."""
    profile = settings.get_current_profile_name()
    most = settings.default.max_examples if profile == EXPLORE else count
    return settings(max_examples=most, suppress_health_check=[*settings.default.suppress_health_check, *suppressed])
