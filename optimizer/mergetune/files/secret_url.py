"""URLs that may hold a password: filled from the environment when used, written down without it."""

from __future__ import annotations

import os
import re
from typing import Annotated
from urllib.parse import quote, unquote

from pydantic import BeforeValidator, PlainSerializer

from mergetune.errors import MergetuneError

_VARIABLE = re.compile(r"\$\{(\w+)\}")
_IN_FRONT = re.compile(r"(?P<front>[\w+.-]+://[^:/@]*):(?P<secret>.*)@(?P<rest>[^@]*)", re.DOTALL)
_IN_QUERY = re.compile(
    r"(?P<front>[?&]\w*(?:password|passwd|pwd|token|secret)\w*=)(?P<secret>[^&]*)", re.IGNORECASE
)


def without_password(url: str) -> str:
    """Return a URL without the password in it; a variable that stands for it is left there."""
    text = _IN_FRONT.sub(lambda found: _kept(found, ":") + f"@{found['rest']}", url)
    return _IN_QUERY.sub(lambda found: _kept(found, ""), text)


def _kept(found: re.Match[str], between: str) -> str:
    secret = found["secret"]
    return found["front"] + (between + secret if _VARIABLE.fullmatch(secret) else "")


def filled(url: str, key: str) -> str:
    """Return a URL with the values of the environment variables that it names as `${NAME}`.

    A value that is no URL of its own is quoted, so that a password may hold any character.

    Args:
        url: as the user wrote it.
        key: of the study file, for the error.

    Raises:
        MergetuneError: a variable is not set.
    """

    def value(found: re.Match[str]) -> str:
        text = os.environ.get(found[1])
        if text is None:
            raise MergetuneError(
                f"`{key}` takes the environment variable `{found[1]}`, which is not set. Set it, or write "
                "what stands for it."
            )
        return text if "://" in text or found[0] == url else quote(text, safe="")

    return _VARIABLE.sub(value, url)


def without_secrets(text: str, url: str) -> str:
    """Return a message without the passwords of a URL that was filled."""
    found = [_IN_FRONT.fullmatch(url), *_IN_QUERY.finditer(url)]
    secrets = [each["secret"] for each in found if each is not None and each["secret"]]
    for secret in secrets:
        text = text.replace(secret, "***").replace(unquote(secret), "***")
    return text


def _as_text(given: object) -> object:
    if not isinstance(given, str) or not given.strip():
        raise ValueError("must be a URL as text, but is not (it is not shown, since it may hold a password)")
    return given.strip()


# Whatever is written down of a study, such as its record, holds no password.
SecretUrl = Annotated[str, BeforeValidator(_as_text), PlainSerializer(without_password)]
