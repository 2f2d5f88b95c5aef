"""Each thing that can be wrong with a repository of the hub has its sentence, without the token."""

import sys

import pytest
from huggingface_hub import errors

from adder.data.hub_errors import HTTPError, explain

client = sys.modules[HTTPError.__module__.partition(".")[0]]  # httpx, or what the hub's client uses in its place
RESPONSE = client.Response(404, request=client.Request("GET", "https://hub/x?token=hf_secret"))
SENTENCES = {"no_revision": "NO REVISION", "missing": "MISSING", "unreachable": "UNREACHABLE"}


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.GatedRepoError("x", response=RESPONSE), "LEAD is gated: accept its terms"),
        (errors.RevisionNotFoundError("x", response=RESPONSE), "LEAD NO REVISION"),
        (errors.RepositoryNotFoundError("x", response=RESPONSE), "LEAD MISSING; if it is private, set HF_TOKEN"),
        (errors.OfflineModeIsEnabled("x"), "LEAD UNREACHABLE"),
        (errors.LocalEntryNotFoundError("x"), "LEAD UNREACHABLE"),
        (client.ConnectError("x"), "LEAD UNREACHABLE"),
        (
            caused(errors.LocalEntryNotFoundError("x"), errors.GatedRepoError("y", response=RESPONSE)),
            "LEAD is gated",
        ),
        (errors.HfHubHTTPError("bad", response=RESPONSE), "LEAD can't be fetched from the hub: HfHubHTTPError: bad"),
    ],
)
def test_what_is_said(error, message):
    assert explain(error, "LEAD", **SENTENCES).startswith(message)


def test_the_token_and_what_addresses_are_signed_with_are_left_out(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    told = explain(OSError("hf_secret at https://cdn/x?Signature=abc"), "LEAD", **SENTENCES)
    assert told == "LEAD can't be fetched from the hub: OSError: ${HF_TOKEN} at https://cdn/x?…"
