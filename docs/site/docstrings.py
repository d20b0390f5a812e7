"""For mkdocstrings: docstrings in this project's form become Markdown.

Sections are Args, Returns, Yields, Raises, Cost and Source. Each begins a line, with its text behind the colon or
indented below. Arguments are "name: text" or "name, name: text", continued where indented further.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

from griffe import Extension, Object

SECTION = re.compile(r"(Args|Returns|Yields|Raises|Cost|Source): ?(.*)")
ITEM = re.compile(r"([a-z_]\w*(?:, [a-z_]\w*)*): (.*)")


class Docstrings(Extension):
    """Rewrites each docstring once it is loaded."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(inspect.cleandoc(obj.docstring.value))


def markdown(text: str) -> str:
    """Return the text with its sections under bold words, and arguments as a list."""
    lines, section = [], ""
    for line in text.splitlines():
        if found := SECTION.fullmatch(line):
            section = found[1]
            lines += ["", f"**{section}:** {found[2]}".rstrip(), *([""] if section == "Args" else [])]
        elif (
            section == "Args" and (item := ITEM.fullmatch(line.strip())) and line.startswith("    ") and line[4] != " "
        ):
            names = ", ".join(f"`{name}`" for name in item[1].split(", "))
            lines.append(f"- {names}: {item[2]}")
        else:
            lines.append(line.strip() if section else line)
    return "\n".join(lines)
