"""What can't be had from the Hugging Face hub, and what to do about it, in one sentence."""

import os

from huggingface_hub import errors
from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage] - of whichever client it uses

from adder.core.secrets import without_secrets

__all__ = ["HTTPError", "explain"]


def explain(error: Exception, lead: str, no_revision: str, missing: str, unreachable: str) -> str:
    """The message for an error of huggingface_hub's: `lead` (the setting and the repository), then what happened.

    `no_revision`, `missing` and `unreachable` say it for a repository without that revision, for one that isn't there
    or is private, and for a hub that is out of reach while its cache doesn't hold the repository whole.
    """
    cause = error
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        cause = error.__cause__
    if isinstance(cause, errors.GatedRepoError):
        return f"{lead} is gated: accept its terms on its hub page, then set HF_TOKEN to a token that may read it"
    if isinstance(cause, errors.RevisionNotFoundError):
        return f"{lead} {no_revision}"
    if isinstance(cause, errors.RepositoryNotFoundError):
        return f"{lead} {missing}; if it is private, set HF_TOKEN to a token that may read it"
    absent = (
        errors.OfflineModeIsEnabled,
        errors.LocalEntryNotFoundError,
        errors.IncompleteSnapshotError,
        errors.CachedRepoTreeNotFoundError,
    )
    no_answer = isinstance(cause, HTTPError) and not isinstance(cause, errors.HfHubHTTPError)
    if no_answer or isinstance(cause, absent):
        return f"{lead} {unreachable}"
    token = os.environ.get("HF_TOKEN")
    return f"{lead} can't be fetched from the hub: {without_secrets(cause, {token: '${HF_TOKEN}'} if token else {})}"
