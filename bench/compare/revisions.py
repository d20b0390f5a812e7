"""Revisions by name: a git worktree each, its package built once and kept by commit under .bench-revisions/.

Built is the package alone, into a folder; torch and everything else come from the environment that compares, so nothing
is downloaded.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from bench.instrument import store
from bench.instrument.progress import say

FOLDER = ".bench-revisions"


@dataclass(frozen=True)
class Checkout:
    """A revision whose package lies ready in `site`. name: as it was asked for."""

    name: str
    commit: str
    folder: Path

    @property
    def tree(self) -> Path:
        return self.folder / "tree"

    @property
    def site(self) -> Path:
        return self.folder / "site"

    def __str__(self) -> str:
        short = self.commit[:10]
        return short if self.commit.startswith(self.name) else f"{self.name} ({short})"


def resolve(name: str, root: Path = store.ROOT) -> str:
    """Return the commit of a revision.

    Raises: ValueError when the folder is no checkout, git knows no such commit (a shallow clone has few), or the
        revision is the one checked out while tracked files differ from it: what would be compared is not what is there.
    """
    if store.git("rev-parse", "HEAD", root=root) is None:
        raise ValueError(f"{name}: got neither a row file nor, outside a git checkout, a revision")
    commit = store.git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}", root=root)
    if commit is None:
        shallow = store.git("rev-parse", "--is-shallow-repository", root=root) == "true"
        hint = "; this clone is shallow: git fetch --unshallow" * shallow
        raise ValueError(f"{name}: got neither a row file nor a git revision, expected two of either{hint}")
    changed = (store.git("status", "--porcelain", "--untracked-files=no", root=root) or "").splitlines()
    if changed and commit == store.git("rev-parse", "HEAD", root=root) and not commit.startswith(name):
        raise ValueError(
            f"{name}: got an uncommitted tree ({len(changed)} changed files, {changed[0].split()[-1]} first), expected "
            f"a clean one; commit them, or compare without them by the commit's own name, {commit[:10]}"
        )
    return commit


def checkout(name: str, root: Path = store.ROOT) -> Checkout:
    """Return the built checkout of a revision, kept from before or made now.

    Raises: ValueError as `resolve`; OSError when the revision does not build, with the log's last line and place.
    """
    commit = resolve(name, root)
    done = Checkout(name, commit, root / FOLDER / commit[:12])
    mark, key = done.folder / "built", f"{commit} {sys.version}"
    if mark.exists() and mark.read_text() == key:
        return done
    say(f"building {done}")
    shutil.rmtree(done.folder, ignore_errors=True)
    done.folder.mkdir(parents=True)
    (root / FOLDER / ".gitignore").write_text("*\n")
    with (done.folder / "build.log").open("w") as log:
        add = ["git", "-C", str(root), "worktree", "add", "--force", "--detach", str(done.tree), commit]
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        pip += ["--no-build-isolation", "--no-index", "--target", str(done.site), str(done.tree)]
        tools = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
        for command in (add, pip):
            if subprocess.run(command, stdout=log, stderr=log, env=tools, check=False).returncode:
                raise OSError(f"{done} does not build: {_last_line(done.folder / 'build.log')}; see {log.name}")
    mark.write_text(key)
    return done


def case_ids(checkout: Checkout, *arguments: str) -> list[str]:
    """Return what the revision's own `bench list` prints for these arguments; nothing where it has no such command."""
    path = os.pathsep.join([str(checkout.site), str(checkout.tree)])
    done = subprocess.run(
        [sys.executable, "-m", "bench", "list", *arguments],
        cwd=checkout.tree, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout.split() if done.returncode == 0 else []


def _last_line(log: Path) -> str:
    """Return the first line that names an error, else the last one."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return next((line for line in lines if "error:" in line.lower()), lines[-1] if lines else "no output")[:300]
