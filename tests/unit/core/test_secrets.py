"""Secrets are refused where they would be written down, and named where they would be shown."""

from urllib.parse import quote

import pytest

from adder.core.errors import UserError
from adder.core.secrets import filled_in, refuse_secrets, without_secrets


@pytest.mark.parametrize(
    "url",
    [
        "https://me:hunter2@host/x",
        "https://hunter2@host/x",
        "https://host/x?api_key=hunter2",
        "https://host/x?X-Amz-Signature=hunter2&a=1",
        "s3://bucket/x?token=hunter2",
    ],
)
def test_a_secret_in_a_url_is_refused_without_repeating_it(url):
    with pytest.raises(UserError, match=r"^here: .* looks like a secret") as caught:
        refuse_secrets(url, "here")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["https://host/x?page=2", "https://host/x?token=${TOKEN}", "abfs://container@account/x", "https://host/key"]
)
def test_other_urls_pass(url):
    refuse_secrets(url, "here")


def test_a_variable_that_is_not_set_is_named(monkeypatch):
    monkeypatch.delenv("MY_TOKEN", raising=False)
    with pytest.raises(UserError, match="needs the environment variable MY_TOKEN, which is not set"):
        filled_in("https://host/${MY_TOKEN}", "here")


def test_messages_show_the_name_in_place_of_the_value(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "p ss/w?rd")
    url, secrets = filled_in("https://host/${MY_TOKEN}", "here")
    error = OSError(f"{url} {quote('p ss/w?rd', safe='')} https://cdn/x?Signature=abc")
    text = without_secrets(error, secrets)
    assert "p ss" not in text and quote("p ss/w?rd", safe="") not in text and "abc" not in text
    assert "${MY_TOKEN}" in text
