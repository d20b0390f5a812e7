"""Templates to pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def render(template: str, **view: Any) -> str:
    """Fill a page of bench/page/templates."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(template).render(view)
