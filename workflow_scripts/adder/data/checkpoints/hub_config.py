"""A hub model's config.json before anything else of it is fetched: what can't be done is said before any job."""

import os
import re
from pathlib import Path

from adder.data.model_types import ModelSettings

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
SECONDS = 5  # that the hub has to answer while a workflow is made ready


def folder_with_config(settings: ModelSettings) -> Path | None:
    """A folder that holds the model's config.json, out of the client's cache or from the hub.

    None where the source is no hub id or has none, or the hub is out of reach: then the job that fetches the model says
    what there is to say.
    """
    import huggingface_hub  # not at the top: the workflow is parsed without it
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    from adder.data.hub_errors import HTTPError

    if settings.file is not None or ".." in settings.source or not HUB_ID.fullmatch(settings.source):
        return None
    try:
        kept = huggingface_hub.try_to_load_from_cache(settings.source, "config.json", revision=settings.revision)
        if isinstance(kept, str):
            return Path(kept).parent
        token = os.environ.get("HF_TOKEN") or False
        url = huggingface_hub.hf_hub_url(settings.source, "config.json", revision=settings.revision)
        # Asks once. A download asks a hub that doesn't answer six times, for a minute each, whatever etag_timeout says.
        huggingface_hub.get_hf_file_metadata(url, token=token, timeout=SECONDS)
        return Path(
            huggingface_hub.hf_hub_download(
                settings.source, "config.json", revision=settings.revision, token=token, etag_timeout=SECONDS
            )
        ).parent
    except (HTTPError, HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError):
        return None
