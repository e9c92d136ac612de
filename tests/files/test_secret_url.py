"""URLs with passwords: filled from the environment, and shown without them."""

from __future__ import annotations

import pytest
from sqlalchemy.engine import make_url

from mergetune.errors import MergetuneError
from mergetune.files.secret_url import filled, without_password, without_secrets


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:pa55@host/db", "postgresql://me@host/db"),
        ("postgresql+psycopg://me:p/a:5@5?@host:5432/db", "postgresql+psycopg://me@host:5432/db"),
        (
            "postgresql://me@host/db?password=pa55&sslmode=require",
            "postgresql://me@host/db?password=&sslmode=require",
        ),
        ("https://me:pa55@mlflow.example.com", "https://me@mlflow.example.com"),
        ("postgresql://me:${PASSWORD}@host/db", "postgresql://me:${PASSWORD}@host/db"),
        ("${URL}", "${URL}"),
        ("postgresql://me@host:5432/db", "postgresql://me@host:5432/db"),
        ("sqlite:////folder/a:b.db", "sqlite:////folder/a:b.db"),
    ],
)
def test_a_url_is_written_down_without_its_password(url: str, shown: str) -> None:
    assert without_password(url) == shown


def test_variables_are_filled_in_whatever_is_in_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "p/a:s@s %{}")
    monkeypatch.setenv("URL", "mysql://me:x@host/db")
    url = filled("postgresql://me:${SECRET}@host/db", "storage")
    assert make_url(url).password == "p/a:s@s %{}"
    assert filled("${URL}", "storage") == "mysql://me:x@host/db"
    with pytest.raises(MergetuneError, match="`storage` takes the environment variable `NONE`"):
        filled("${NONE}", "storage")


def test_no_message_holds_the_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "p/a:s")
    url = filled("postgresql://me:${SECRET}@host/db", "storage")
    said = without_secrets(f"cannot connect to {url} as me with p/a:s", url)
    assert said == "cannot connect to postgresql://me:***@host/db as me with ***"
