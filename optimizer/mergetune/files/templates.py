"""Pages of HTML that need nothing else: the templates of `reports/` and their style."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mergetune.files.library import shared_folder


def render_page(name: str, filters: Mapping[str, Callable[..., Any]], **values: object) -> str:
    """Return a template of `reports/` filled in; `style` is there as a value, too."""
    folder = shared_folder("reports")
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    style = (folder / "report.css").read_text(encoding="utf-8")
    return environment.get_template(name).render(style=style, **values)
