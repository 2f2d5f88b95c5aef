"""Secrets in URLs and messages: refused where written out, named where they would be shown."""

import pytest

from adder.core import secrets
from adder.core.errors import UserError

SECRET = "s3cr3t+/Päss&word"


def test_messages_hide_a_secret_in_every_form(monkeypatch):
    monkeypatch.setenv("MY_SECRET", SECRET)
    address, hidden = secrets.filled_in("https://host/${MY_SECRET}?x=${MY_SECRET}", "here")
    assert SECRET in address
    from urllib.parse import quote, quote_plus

    error = OSError(f"{SECRET} {quote(SECRET)} {quote_plus(SECRET)} {SECRET!r} https://cdn/x?Signature=abc")
    text = secrets.without_secrets(error, hidden)
    assert not any(form in text for form in (SECRET, quote(SECRET), quote_plus(SECRET), "abc"))


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("https://me:hunter2@host/x.jsonl", "what stands before @"),
        ("https://ghp_abcdef@host/x.jsonl", "what stands before @"),
        ("https://host/x.jsonl?token=hunter2", "`token`"),
        ("https://host/x.jsonl?a=1&X-Amz-Signature=hunter2", "`X-Amz-Signature`"),
        ("https://host/x.jsonl?sv=1&sig=hunter2", "`sig`"),
        ("https://host/x.jsonl?api_key=hunter2", "`api_key`"),
        ("ftp://me:hunter2@host/x.jsonl", "what stands before @"),
        ("https://host/x.jsonl?pass=hunter2", "`pass`"),
        ("https://host/x.jsonl?X-Credentials=hunter2", "`X-Credentials`"),
        ("https://host/ghp_abcdef" + "0" * 30 + "/x.jsonl", "what stands in its path"),
    ],
)
def test_a_secret_written_out_is_refused_without_repeating_it(url, what):
    with pytest.raises(UserError) as refused:
        secrets.refuse_secrets(url, "data.sources.0.url")
    assert what in str(refused.value) and "${NAME}" in str(refused.value)
    assert not any(secret in str(refused.value) for secret in ("hunter2", "ghp_"))


@pytest.mark.parametrize(
    "url",
    [
        "https://host/x.jsonl?monkey=1&keyword=a&page_key_order=b",
        "https://me:${PASSWORD}@host/x.jsonl?token=${TOKEN}",
        "abfs://container@account.dfs.core.windows.net/x.jsonl",
        "s3://bucket/x.jsonl?versionId=3",
        "https://host/x.jsonl?${SIGNED}",
        "https://host/hf_data/sk-learn/bypass.jsonl?compass=1&path=a",
    ],
)
def test_other_urls_are_no_secret(url):
    secrets.refuse_secrets(url, "data.sources.0.url")


def test_a_variable_that_is_not_set_is_named(monkeypatch):
    monkeypatch.delenv("MY_TOKEN", raising=False)
    with pytest.raises(UserError, match="needs the environment variable MY_TOKEN, which is not set"):
        secrets.filled_in("https://host/${MY_TOKEN}", "here")


def test_what_libraries_write_is_cleared_of_secrets_in_every_form(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("MY_SIGNED", "a=1&b=hunter2222")  # no telling name; the settings say that it is one
    monkeypatch.setenv("SHORT_TOKEN", "abc")
    text = f"{SECRET} {SECRET!r} http://me:pass1@h/x?sig=s1&a=1 abc a=1&b=hunter2222"
    named = secrets.variables_in({"sources": [{"url": "https://h/?${MY_SIGNED}"}], "judge": {"api_key_env": "MY_KEY"}})
    assert named == {"MY_SIGNED", "MY_KEY"}
    clean = secrets.scrubbed(text, named)
    assert clean == "${HF_TOKEN} '${HF_TOKEN}' http://…@h/x?sig=…&a=1 abc ${MY_SIGNED}"


def test_a_token_is_known_by_its_form_and_a_folder_is_no_secret(monkeypatch):
    monkeypatch.setenv("PWD", "/home/me/adder")
    monkeypatch.setenv("PGPASSWORD", "hunter2222")
    token = "hf_" + "aB3" * 12
    text = f"401 for {token}: Authorization: Bearer sk-{'x1' * 16} in /home/me/adder, hunter2222"
    assert secrets.scrubbed(text) == "401 for …: Authorization: Bearer … in /home/me/adder, ${PGPASSWORD}"


def test_every_secret_in_the_settings_is_named_and_none_repeated():
    token = "hf_" + "aB3" * 12
    settings = {
        "model": {"source": "https://me:hunter2@host/model", "revision": token},
        "data": {"sources": [{"path": "s3://bucket/x?sig=hunter2"}, {"url": "https://h/x?token=${TOKEN}"}]},
        "format": {"system_prompt": "See https://host/a?key=b, and http://[ too"},
        "train": {"epochs": 3, "tags": ["http://[", None]},
    }
    found = list(secrets.written_out(settings))
    assert [one.partition(":")[0] for one in found] == ["model.source", "model.revision", "data.sources.0.path"]
    assert "hunter2" not in str(found) and token not in str(found)
