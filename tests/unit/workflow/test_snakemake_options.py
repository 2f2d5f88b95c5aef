"""What Snakemake offers and Adder can't keep is one sentence, before anything is removed or run."""

from pathlib import Path

import pytest

from adder.core.errors import UserError
from adder.workflow.snakemake_options import refuse


@pytest.mark.parametrize(
    ("arguments", "provider", "shared", "words"),
    [
        (
            ["all", "--delete-all-output"],
            None,
            True,
            "--delete-all-output: .*leave their data and weights.*`adder prune`",
        ),
        (["--delete-all"], None, True, "--delete-all-output: "),
        (["--archive", "my.tar.gz"], None, True, "--archive: .*without the package"),
        (["--archive=my.tar.gz"], None, True, "--archive: "),
        ([], "s3", True, "--default-storage-provider s3: results have to be on a file system that all jobs share"),
        ([], None, False, "--shared-fs-usage: .*copy finished runs from there"),
    ],
)
def test_what_would_do_something_else_than_it_says_is_refused(arguments, provider, shared, words):
    with pytest.raises(UserError, match=words):
        refuse(arguments, provider, shared, Path("results"))


def test_all_else_passes():
    refuse(["all", "-n", "--delete-temp-output", "--summary", "--all-temp", "--", "--x"], None, True, Path("results"))
