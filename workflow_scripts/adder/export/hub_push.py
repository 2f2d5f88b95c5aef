"""Uploading a finished model directory to the Hugging Face hub, as one commit: it is there whole or not at all."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from adder.core.errors import UserError
from adder.core.progress import Progress
from adder.core.secrets import without_secrets

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

TITLE_LENGTH = 72  # characters of a commit's first line that are shown everywhere


class Upload(TypedDict):
    """`pushed.json`: where a model is."""

    repo: str
    private: bool
    url: str
    commit: str


def push(folder: Path, repo: str, private: bool, message: str, progress: Progress) -> Upload:
    """Upload all files of `folder` to the model repository `repo` (owner/name), made here where it isn't there.

    Weights that the repository has and the folder hasn't are removed by the same commit, so that no shard of an earlier
    model stays. The token comes from the environment variable HF_TOKEN.
    Raises UserError: no token, one that may not write there, a name that isn't one, a public repository where a private
    one is asked for, a model card that the hub refuses, a hub that is out of reach.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars, logging

    token = os.environ.get("HF_TOKEN")
    if not token:
        raise UserError(f"export.hub: to upload to {repo}, set HF_TOKEN to a token that may write there")
    disable_progress_bars()
    logging.set_verbosity_error()
    # Only the environment's token: one from a login file would make the same configuration behave differently.
    api = HfApi(token=token)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise UserError(
                f"export.hub: {repo} is public and export.private is true; make it private on its hub page, or set "
                "export.private: false"
            )
        operations = _operations(api, folder, repo)
        size = sum(path.stat().st_size for path in folder.rglob("*"))
        progress.say(f"uploading {size / 1e6:,.0f} MB to {repo}")
        title = message if len(message) <= TITLE_LENGTH else f"{message[: TITLE_LENGTH - 1]}…"
        done = api.create_commit(repo, operations, commit_message=title, commit_description=message)
    except UserError:
        raise
    except Exception as error:  # of the client's, and of the libraries that it uploads by
        raise UserError(_explain(error, repo, token)) from error
    progress.say(f"uploaded: {done.commit_url}")
    return {"repo": repo, "private": private, "url": f"{api.endpoint}/{repo}", "commit": done.oid}


def _operations(api: "HfApi", folder: Path, repo: str) -> "list[CommitOperationAdd | CommitOperationDelete]":
    """The additions of one commit, and the removal of weights of an earlier one."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    stale = [name for name in api.list_repo_files(repo) if _is_weights(name) and name not in names]
    return [
        *(CommitOperationAdd(name, folder / name) for name in names),
        *(CommitOperationDelete(name) for name in stale),
    ]


def _is_weights(name: str) -> bool:
    """Whether from_pretrained could load this file of a repository as (a part of) the model."""
    return "/" not in name and name.endswith((".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json"))


def _explain(error: Exception, repo: str, token: str) -> str:
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # of the HTTP library that it uses, whichever that is
        OfflineModeIsEnabled,
    )

    if isinstance(error, HFValidationError):
        return f"export.hub: {repo!r} is no name of a repository; it reads owner/name"
    answered = isinstance(error, HfHubHTTPError)
    status = error.response.status_code if answered else None
    owner = repo.partition("/")[0]
    if status == 401:
        return (
            f"export.hub: the hub doesn't know the token in HF_TOKEN; to upload to {repo}, it needs one that may write"
        )
    if status == 403:
        return f"export.hub: the token in HF_TOKEN may not write to {repo}; it needs write access to what {owner} owns"
    if isinstance(error, OfflineModeIsEnabled) or (isinstance(error, HTTPError | ConnectionError) and not answered):
        return f"export.hub: the hub is out of reach (HF_HUB_OFFLINE, or no network): {repo} was not uploaded"
    return f"export.hub: {repo} can't be uploaded: {without_secrets(error, {token: '${HF_TOKEN}'})}"
