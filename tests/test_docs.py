"""README and docs/: examples run, commands exist, links lead somewhere, every public name is described."""

from __future__ import annotations

import importlib
import os
import re
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import moe_kernels
from bench.__main__ import main
from moe_kernels import distributed

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "results").glob("*.md")), *PAGES]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
LINK = re.compile(r"\]\(([^)\s]+)\)")
OBJECT = re.compile(r"^::: (\S+)$", re.M)
RANK = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}  # as torchrun sets
MAY_LACK = ("accelerate", "peft", "transformers")  # of the extra `ecosystem`
CHECKPOINTS = ("save", "load", "latest", "gather_dit_moe", "scatter_dit_moe")
PUBLIC = {*moe_kernels.__all__, *distributed.__all__, *CHECKPOINTS} - {"checkpoints"}  # a module, named by its content

each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def examples() -> list[tuple[str, str]]:
    found = []
    for path in (ROOT / "README.md", *PAGES):
        codes = [code for language, code in FENCED.findall(path.read_text()) if language == "python"]
        found += [(f"{path.stem}-{number}", code) for number, code in enumerate(codes, 1)]
    return found


EXAMPLES = examples()


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *arguments]
    where = {"cwd": ROOT, "env": {**os.environ, **environment}}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **where)


@pytest.mark.parametrize("name", [name for name, _ in EXAMPLES])
def test_examples_run(name):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    done = run("-c", dict(EXAMPLES)[name], MASTER_PORT=port, **RANK)
    for package in MAY_LACK:
        if f"No module named '{package}'" in done.stderr:
            pytest.skip(f"{package} is not installed")
    assert done.returncode == 0, done.stderr
    assert name != "README-1" or done.stdout.startswith("12 MoE blocks")


COMMANDS = re.findall(r"^\| `(python -m bench [^`]+)` \|", (ROOT / "docs/commands.md").read_text(), re.M)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_exist(command):
    words = command.replace("BASE HEAD", "").split()
    if words[3] in ("compare", "run", "record"):
        words = [*words[:4], "--help"]
    if words[-1] == "--help":  # here: a process would import torch first, to do as much
        with pytest.raises(SystemExit, match=r"^0$"):
            main(words[3:])
        return
    done = run(*words[1:])
    assert done.returncode == 0, done.stderr


def test_every_command_is_described():
    described = {command.split()[3] for command in COMMANDS}
    assert described == set(importlib.import_module("bench.__main__").COMMANDS)


def test_every_make_target_named_exists():
    makefile = (ROOT / "Makefile").read_text()
    text = "".join(path.read_text() for path in DOCUMENTS)
    named = set(re.findall(r"(?:`|^)make ([a-z][a-z-]*)", text, re.M))
    assert {"bench", "test", "docs"} <= named
    for target in named:
        assert re.search(rf"^(.* )?{target}( .*)?:", makefile, re.M), target


@cache
def anchors(path: Path) -> set[str]:
    """Return what the headings of a page are called in links, on GitHub and on the site."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", path.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def dead(path: Path, text: str) -> list[str]:
    """Return the links in a page's text that lead to no file of the repository, or to no heading of it."""
    found = []
    for link in LINK.findall(FENCED.sub("", text)):
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if re.match(r"[a-z]+:", link):
            continue
        if not target.is_file() or not target.is_relative_to(ROOT) or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


@each_document
def test_no_link_is_dead(path):
    assert not dead(path, path.read_text())


def test_dead_links_are_seen():
    page = ROOT / "docs/index.md"
    links = "[a](none.md) [b](speed.md#none) [c](#none) [d](speed.md#on-a-cpu) [e](../README.md) [f](https://x.y/z)"
    assert dead(page, links) == ["none.md", "speed.md#none", "#none"]


def public(name: str) -> object:
    owners = (moe_kernels, distributed, distributed.checkpoints)
    return next(getattr(owner, name) for owner in owners if hasattr(owner, name))


def test_the_reference_names_what_is_public():
    """Each object named exists, and each name of `__all__` is there, once.

    Where a module has the name of what it defines, the site would show the module: the object's own path is given then.
    """
    named = [(path, name) for path in PAGES for name in OBJECT.findall(path.read_text())]
    for path, name in named:
        owner, _, attribute = name.rpartition(".")
        thing = getattr(importlib.import_module(owner), attribute, None)
        assert thing is public(attribute), f"{name_of(path)}: no {name}"
        home = getattr(thing, "__module__", owner)
        if f".{attribute}" in f"{home} {name if name in sys.modules else ''}":
            assert owner == home, f"{name_of(path)}: {name} is a module, too; name it {home}.{attribute}"
    assert sorted(name.rpartition(".")[2] for _, name in named) == sorted(PUBLIC)


def test_the_site_has_every_page():
    """Without mkdocs: the navigation names each page of docs/ and each document that hooks.py brings in."""
    named = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    outside = [name for name in named if (ROOT / name).is_file()]
    assert sorted(set(named) - set(outside)) == [path.name for path in PAGES]
    hooks = (ROOT / "docs/site/hooks.py").read_text()
    assert outside and all(f'"{name}"' in hooks for name in outside)


@each_document
def test_nothing_comes_from_elsewhere(path):
    """Pictures lie in the repository: a page is whole without a network."""
    assert not re.findall(r"!\[[^]]*\]\(http", path.read_text())
    assert not re.findall(r"<(?:img|script|link)\b", path.read_text())


def test_sizes():
    words, lines = (ROOT / "README.md").read_text().split(), (ROOT / "README.md").read_text().splitlines()
    assert len(words) <= 950 and len(lines) <= 90, "README: move it to docs/"
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 110, "CONTRIBUTING: facts go to results/FACTS.md"


def test_the_docstrings_of_the_site():
    """docs/site/docstrings.py turns sections and arguments into Markdown (griffe comes with mkdocstrings)."""
    pytest.importorskip("griffe")
    spec = importlib.util.spec_from_file_location("docstrings", ROOT / "docs/site/docstrings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = "Do it.\n\nArgs:\n    a, b: two\n        lines.\nReturns: c: more.\nCost: none."
    expected = "Do it.\n\n\n**Args:**\n\n- `a`, `b`: two\nlines.\n\n**Returns:** c: more.\n\n**Cost:** none."
    assert module.markdown(text) == expected
