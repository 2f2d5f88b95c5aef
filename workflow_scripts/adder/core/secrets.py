"""Secrets in URLs and messages: refused where they are written out, named where they would be shown."""

import os
import re
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import parse_qsl, quote, quote_plus, urlsplit

from adder.core.errors import UserError

URL = re.compile(r"[a-z][a-z0-9+.-]*://\S+$", re.IGNORECASE)
VARIABLE = re.compile(r"\$\{(\w+)\}")
# Names in a query whose values give access: token, sig, X-Amz-Signature, api_key and the like.
SECRET_NAME = re.compile(
    r"(^|[-_.])(sig|signature|secret|pass|passphrase|pwd|pat|jwt|bearer|auth|authorization|credentials?"
    r"|(api|access|secret|account|private|open_?ai|license)[-_]?key)$|(token|password|passwd)$|^key$",
    re.IGNORECASE,
)
# What the tokens of hubs and clouds look like wherever they stand: Hugging Face, OpenAI and its like, GitHub, GitLab,
# Slack, AWS, Google.
TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[opsur]_[A-Za-z0-9]{20,}|github_pat_\w{20,}"
    r"|glpat-[\w-]{20,}|xox[abprs]-[\w-]{10,}|(?:AKIA|ASIA)[A-Z0-9]{16}|AIza[\w-]{35})(?![\w-])"
)
NO_SECRETS = frozenset({"PWD", "OLDPWD"})  # folders


def refuse_secrets(url: str, where: str) -> None:
    """Raise UserError where a password or token is written out in a URL: it would stand in reports and records."""
    parts = urlsplit(url)
    user, _, password = parts.netloc.rpartition("@")[0].partition(":")
    # Elsewhere a name without a password is none (abfs://container@account).
    written = [("what stands before @", password or (user if parts.scheme in ("http", "https") else ""))]
    written += [(f"`{name}`", value) for name, value in parse_qsl(parts.query) if SECRET_NAME.search(name)]
    written += [("what stands in its path", found) for found in TOKEN.findall(parts.path)]
    for what, value in written:
        if value and not VARIABLE.search(value):
            raise UserError(
                f"{where}: {what} in this URL looks like a secret, and the configuration is shown in reports. Put it "
                "into an environment variable and write ${NAME} in its place."
            )


def written_out(settings: Any, where: str = "") -> Iterator[str]:
    """A sentence for each secret that stands in settings (JSON), by its path and without repeating it: in a value that
    is a URL, or a token by its form anywhere.
    """
    if isinstance(settings, dict | list):
        for name, value in settings.items() if isinstance(settings, dict) else enumerate(settings):
            yield from written_out(value, f"{where}.{name}" if where else str(name))
    elif isinstance(settings, str):
        try:
            if URL.match(settings):
                refuse_secrets(settings, where)
            if TOKEN.search(settings):
                yield (
                    f"{where}: what stands there looks like a token, and the configuration is shown in reports. Put it "
                    "into an environment variable"
                )
        except UserError as error:
            yield str(error)
        except ValueError:  # no URL after all, which whoever reads it says
            return


def filled_in(url: str, where: str) -> tuple[str, dict[str, str]]:
    """The URL with its variables' values, and {value: "${NAME}"}."""
    values = {}
    for name in VARIABLE.findall(url):
        if not os.environ.get(name):
            raise UserError(f"{where}: {url} needs the environment variable {name}, which is not set")
        values[name] = os.environ[name]
    filled = VARIABLE.sub(lambda match: values[match.group(1)], url)
    return filled, {value: f"${{{name}}}" for name, value in values.items()}


def without_secrets(error: Exception, secrets: dict[str, str]) -> str:
    """The error's kind and text: for each secret, as it is and as URLs quote it, its name; of other URLs no query."""
    text = f"{type(error).__name__}: {error}"
    for value in sorted(secrets, key=len, reverse=True):
        for form in (value, quote(value, safe=""), quote(value), quote_plus(value), repr(value)[1:-1]):
            text = text.replace(form, secrets[value])
    return re.sub(r"\?[^\s'\")>]+", "?…", text)  # redirects may be signed


def scrubbed(text: str, named: Iterable[str] = ()) -> str:
    """Text without what gives access: passwords in URLs, values of environment variables whose names tell of secrets,
    or that are `named`.
    """
    for value, name in secret_values(named).items():
        for form in (value, quote(value, safe=""), quote(value), quote_plus(value), repr(value)[1:-1]):
            text = text.replace(form, f"${{{name}}}")
    text = TOKEN.sub("…", re.sub(r"(?<=://)[^/\s@]+@", "…@", text))
    return re.sub(r"(?<=[?&])([\w.-]+)=[^&\s]+", lambda m: f"{m[1]}=…" if SECRET_NAME.search(m[1]) else m[0], text)


def secret_values(named: Iterable[str] = ()) -> dict[str, str]:
    """{value: name} of the environment variables that are `named` or whose names tell of secrets, longest value first.

    What is shorter than six characters is no secret, and stands in many a text.
    """
    telling = {name for name in os.environ if SECRET_NAME.search(name)} - NO_SECRETS
    names = telling | (set(named) & os.environ.keys())
    found = {os.environ[name].strip(): name for name in names if len(os.environ[name].strip()) >= 6}
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def variables_in(settings: Any) -> set[str]:
    """Names of the environment variables that settings (JSON) take something from: `${NAME}`, and `token_env: NAME`."""
    if isinstance(settings, dict):
        own = {value for name, value in settings.items() if str(name).endswith("_env") and isinstance(value, str)}
        return own.union(*map(variables_in, settings.values()))
    if isinstance(settings, list):
        return set().union(*map(variables_in, settings))
    return set(VARIABLE.findall(settings)) if isinstance(settings, str) else set()
