"""What commands write: never over what they were given, and no path of this machine in what is meant to be shared."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ABSOLUTE = re.compile(r"(?<![\w./:])~?(?:/[\w.+@%-]+){2,}/?")


def check_targets(targets: Mapping[str, Path | None], given: Mapping[str, Path | None]) -> None:
    """Refuse to write files over those that were given, or over each other; links to a file are that file.

    Args: targets, given: paths by the arguments that name them; None for arguments that were left out.
    Raises: ValueError naming both arguments; a folder that is not there, or a folder where a file belongs.
    """
    written = {name: path for name, path in targets.items() if path}
    for name, path in written.items():
        keep_given(name, path, given)
        if not path.parent.is_dir():
            raise ValueError(f"{name} {path}: there is no folder {path.parent}")
        if path.is_dir():
            raise ValueError(f"{name} {path}: expected a file, got a folder")
    for (name, path), (other, second) in combinations(written.items(), 2):
        if _same(path, second):
            raise ValueError(f"{name} {path}: is the file of {other}, expected two files")


def keep_given(name: str, path: Path, given: Mapping[str, Path | None]) -> None:
    """Raise ValueError where a path that will be written is a file that was given."""
    for other, source in given.items():
        if source and _same(path, source):
            raise ValueError(f"{name} {path}: is the file given as {other}, which is never written over")


def check_folder(argument: str, folder: Path, given: Mapping[str, Path | None]) -> None:
    """Refuse a folder whose files are made anew and forgotten, where one of them, or a link to it, was given.

    Raises: ValueError naming both arguments.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{argument} {folder}: expected a folder, got a file")
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        keep_given(argument, path, given)


def command() -> str:
    """Return the command line that reproduces the run, quoted for a shell, without paths of this machine."""
    script = Path(sys.argv[0])
    start = ["python", "-m", script.parent.name] if script.name == "__main__.py" else [script.name]
    return shlex.join([*start, *map(_short, sys.argv[1:])])


def without_paths(value: Any) -> Any:
    """Return a value of a row with the absolute paths in its strings cut to the names of files."""
    if isinstance(value, str):
        for folder in (ROOT, Path.home()):
            value = value.replace(f"{folder}/", "") if folder.parent != folder else value
        return ABSOLUTE.sub(lambda found: Path(found[0]).name, value)
    if isinstance(value, Mapping):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_paths(item) for item in value]
    return value


def _same(path: Path, other: Path) -> bool:
    if path.exists() and other.exists():
        return path.samefile(other)
    return path.resolve() == other.resolve()


def _short(word: str) -> str:
    """Cut a path in a word of the command line, also behind `--option=`, to what lies inside the current folder."""
    option, equals, value = word.rpartition("=") if word.startswith("-") else ("", "", word)
    path = Path(value)
    if path.is_absolute() or ".." in path.parts:
        inside = path.resolve().is_relative_to(Path.cwd())
        value = str(path.resolve().relative_to(Path.cwd())) if inside else path.name
    return f"{option}{equals}{value}"
