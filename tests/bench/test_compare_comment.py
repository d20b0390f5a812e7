"""The workflow that comments on pull requests treats what a fork's run left behind as data, and posts one comment."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest

WORKFLOWS = Path(__file__).parents[2] / ".github" / "workflows"
# Stands in for GitHub's client: hands out the artifact, knows pull request 7 and its comments, notes what is written.
GH = r"""#!/bin/bash
case "$*" in
  "run download 55 "*) [ -d "$ARTIFACT" ] && cp -r "$ARTIFACT"/. "${@: -1}" ;;
  *pulls/7\ --jq*) echo headsha ;;
  *pulls/*) echo othersha ;;
  *"--paginate"*) echo "$COMMENT" ;;
  *--method*) echo "$3 $4" >> "$WRITTEN"; cat "$6" >> "$WRITTEN" ;;
  *) exit 9 ;;
esac
"""
pytestmark = pytest.mark.skipif(
    not (shutil.which("jq") and shutil.which("iconv")), reason="jq or iconv is not installed"
)


def script() -> str:
    text = (WORKFLOWS / "comment.yml").read_text()
    return textwrap.dedent(re.search(r"        run: \|\n(.*)", text, re.DOTALL)[1])


@pytest.fixture
def post(tmp_path):
    """Return a function that runs the step on an artifact's files; it returns the process and what was written."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gh").write_text(GH)
    (tmp_path / "bin" / "gh").chmod(0o755)
    written = tmp_path / "written"

    def run(files: dict[str, str] | None, comment: str = "") -> tuple[subprocess.CompletedProcess, str]:
        for name, text in (files or {}).items():
            (tmp_path / "artifact").mkdir(exist_ok=True)
            (tmp_path / "artifact" / name).write_text(text)
        env = {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "ARTIFACT": str(tmp_path / "artifact"),
            "COMMENT": comment, "WRITTEN": str(written), "RUN": "55", "RAN": "headsha", "REPOSITORY": "o/r",
            "TMPDIR": str(tmp_path),
        }  # fmt: skip
        done = subprocess.run(
            ["bash", "-c", script()], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        return done, written.read_text() if written.exists() else ""

    return run


@pytest.mark.parametrize(
    ("comment", "target"), [("", "POST repos/o/r/issues/7/comments"), ("12", "PATCH repos/o/r/issues/comments/12")]
)
def test_one_comment_is_made_or_updated_and_calls_nobody(post, comment, target):
    text = '**1 SLOWER** @everyone "quotes" $(touch pwned) `touch pwned`\n' + "x" * 70000
    done, written = post({"number": "7\n", "comment.md": text}, comment)
    assert done.returncode == 0, done.stderr
    head, _, body = written.partition("\n")
    body = json.loads(body)["body"]
    assert head == target and len(body) < 65536
    assert body.startswith('<!-- bench compare -->\n**1 SLOWER** @\u200beveryone "quotes" $(touch pwned)')


@pytest.mark.parametrize("number", ["", "7; touch pwned", "$(touch pwned)", "-7", "07", "../7", "7 8", "9" * 12])
def test_a_number_that_is_none_is_refused(post, number, tmp_path):
    done, written = post({"number": number, "comment.md": "x"})
    assert done.returncode == 1 and not written and "expected digits" in done.stdout
    assert not (tmp_path / "pwned").exists()


def test_another_pull_request_is_not_commented(post):
    done, written = post({"number": "8", "comment.md": "x"})
    assert done.returncode == 1 and not written and "not the commit that ran" in done.stdout


@pytest.mark.parametrize(
    ("files", "said"), [(None, "left no artifact"), ({"number": "7"}, "no comparison was written")]
)
def test_nothing_to_post_is_no_failure(post, files, said):
    done, written = post(files)
    assert done.returncode == 0 and not written and said in done.stdout


def test_who_may_write_runs_no_code_of_the_pull_request_and_the_other_way_round():
    comment, compare = ((WORKFLOWS / f"{name}.yml").read_text() for name in ("comment", "compare"))
    assert "workflow_run:" in comment and "uses:" not in comment and "pull-requests: write" in comment
    assert "${{" not in script(), "nothing is pasted into the script: it comes in variables"
    assert "pull_request_target" not in compare and "write" not in re.sub(r"#.*", "", compare)
    assert "secrets." not in compare + comment and "persist-credentials: false" in compare
    run = re.search(r"run: \|\n(.*?)\n      - ", compare, re.DOTALL)[1]
    assert "${{" not in run and "--fail-on worse" in run
