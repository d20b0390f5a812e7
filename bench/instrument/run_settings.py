"""settings.json: what the files of a run's folder depend on, so that no other run goes on from them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

FILE = "settings.json"


def agree(folder: Path, settings: Mapping) -> None:
    """Write settings into a folder that has none, in one piece, or compare them with those that it has.

    Args: folder: of a run, called --out; settings: values of JSON.
    Raises: ValueError naming the settings that differ, what they are there and what was asked for.
    """
    path, settings = folder / FILE, json.loads(json.dumps(settings))
    if not path.exists():
        spare = path.with_suffix(".tmp")
        spare.write_text(json.dumps(settings, indent=1) + "\n")
        os.replace(spare, path)
        return
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"--out {folder}: {FILE} is damaged ({error}), expected none, or a run's") from None
    unlike = [
        f"{name} {found.get(name)!r} there, {settings.get(name)!r} now"
        for name in {**found, **settings}
        if found.get(name) != settings.get(name)
    ]
    if unlike:
        raise ValueError(
            f"--out {folder}: holds files of another run ({'; '.join(unlike)}), expected a folder of this one or none"
        )
