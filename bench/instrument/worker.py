"""A persistent process in a Python, path and folder of choice: it builds one object and calls its methods on demand.

One JSON object per line in both directions. The worker reads {"method", "arguments"} and answers {"answer"} or
{"error"}; the method "build" takes the `target` module:callable whose result the later methods belong to. Between
requests it blocks on the pipe and burns nothing. What libraries print goes to a file of its own, never into the
answers; its end is quoted when the worker dies.

The process imports nothing of this package: the file runs as a script, and the target comes from the given path. So
the same worker serves another library's folder, another interpreter, or another revision's checkout.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

PATIENCE_S = 600.0  # for one answer; torch.compile takes a minute for a case


class WorkerError(RuntimeError):
    """What a worker raised, or how it died."""


class Worker:
    """A process that serves `build` and method calls until it is closed.

    Args:
        python: the interpreter. path: folders for PYTHONPATH, ahead of the interpreter's own packages.
        cwd: the folder it runs in; this process's by default.
        env: variables on top of this process's environment.
        path_first: let `path` win over packages that the interpreter has in editable mode, which come first otherwise.
    """

    def __init__(
        self,
        python: str = sys.executable,
        path: Sequence[str | Path] = (),
        cwd: str | Path | None = None,
        env: Mapping[str, str] | None = None,
        path_first: bool = False,
    ):
        self._said = tempfile.TemporaryFile()
        folders = os.pathsep.join(map(str, path))
        self._process = subprocess.Popen(
            [python, "-P", __file__, *["--path-first"] * path_first],  # -P: this file's folder is no package path
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": folders, **(env or {})},
        )
        self._broken: str | None = None

    @property
    def alive(self) -> bool:
        return self._broken is None and self._process.poll() is None

    def build(self, target: str, **arguments: Any) -> Any:
        """Make the object, module:callable(**arguments), that later calls go to; the one before is dropped first."""
        return self.call("build", target=target, **arguments)

    def call(self, method: str, **arguments: Any) -> Any:
        """Call a method of the object and return its answer. Raises: WorkerError."""
        self.send(method, **arguments)
        return self.receive()

    def send(self, method: str, **arguments: Any) -> None:
        """Ask without waiting, so that several workers can prepare at once; `receive` waits, and says who is dead."""
        line = json.dumps({"method": method, "arguments": arguments}) + "\n"
        with suppress(OSError, ValueError):  # a broken or closed pipe
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()

    def receive(self, patience_s: float = PATIENCE_S) -> Any:
        """Wait for the answer to `send`. Raises: WorkerError for what it raised, its death, or its silence."""
        if self._broken:
            raise WorkerError(self._broken)
        if not select.select([self._process.stdout], [], [], patience_s)[0]:
            self._broken = f"gave no answer in {patience_s:g} s"
            self.close()
            raise WorkerError(self._broken)
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(self._death())
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer["answer"]

    def close(self) -> None:
        """End the process; closing twice is fine."""
        self._broken = self._broken or "was closed"
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with suppress(OSError):  # a request that could not be flushed to a dead process
                stream.close()
        self._said.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _death(self) -> str:
        code = self._process.wait()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        self._said.seek(0)
        words = self._said.read().decode(errors="replace").strip().splitlines()
        self._broken = f"died with {how}" + (f": {words[-1].strip()[:200]}" if words else "")
        return self._broken


def serve() -> None:
    """Answer requests on the standard streams until the other end closes them."""
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # libraries write to stdout from Python and from C alike
    if "--path-first" in sys.argv:
        sys.meta_path.sort(key=lambda finder: type(finder).__module__.startswith("_editable_"))
    thing = None
    for line in requests:
        request = json.loads(line)
        method, arguments = request["method"], request["arguments"]
        try:
            if method == "build":
                thing = None
                module, _, name = arguments.pop("target").partition(":")
                thing = getattr(importlib.import_module(module), name)(**arguments)
                answer = {"answer": None}
            else:
                answer = {"answer": getattr(thing, method)(**arguments)}
        except (Exception, SystemExit) as error:  # whatever it raises is the answer, the next request may go well
            answer = {"error": f"{type(error).__name__}: {error}"[:600]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
