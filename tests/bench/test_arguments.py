"""Numbers on the command line that nobody can mean are refused before anything runs, with the option's name."""

from __future__ import annotations

import pytest

from bench.__main__ import main
from bench.instrument import cases


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("time layer --seconds nan", "--seconds: got nan, expected a finite number, at least 0"),
        ("time layer --seconds inf", "--seconds: got inf, expected a finite number, at least 0"),
        ("time layer --seconds=-1", "--seconds: got -1, expected a finite number, at least 0"),
        ("time layer --rounds 0", "--rounds: got 0, expected an integer, at least 1"),
        ("time layer --tokens 64,x", "--tokens: got x, expected an integer, at least 1"),
        ("time layer --threads 0", "--threads: got 0, expected an integer, at least 1"),
        ("time layer --depth 0", "--depth: got 0, expected an integer, at least 1"),
        ("peers --seconds nan", "--seconds: got nan, expected a finite number, at least 0"),
        ("peers --tokens 0", "--tokens: got 0, expected an integer, at least 1"),
        ("compare HEAD~1 HEAD --seconds 0", "--seconds: got 0, expected a positive number"),
        ("compare HEAD~1 HEAD --seconds nan", "--seconds: got nan, expected a positive number"),
        ("run --threads -1", "--threads: got -1, expected an integer, at least 1"),
        ("fid-coverage --repetitions 0", "--repetitions: got 0, expected an integer, at least 1"),
        ("gpu --out nowhere --minutes nan", "--minutes: got nan, expected a positive number"),
        ("tune --out nowhere --minutes nan", "--minutes: got nan, expected a positive number"),
    ],
)
def test_numbers_that_nobody_can_mean_are_refused(line, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(line.split())
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_numbers_that_can_be_meant_are_taken(monkeypatch):
    from bench import timing

    asked = []
    monkeypatch.setattr(timing.stages.Race, "run", lambda race: asked.append(race) or [])
    line = "time layer --shapes digits --tokens 32,64 --threads 1 --rounds 3 --seconds 0 --backends eager"
    assert main(line.split()) == 0
    assert [(race.case.T, race.case.threads, race.contenders) for race in asked] == [
        (32, 1, ("eager",)),
        (64, 1, ("eager",)),
    ]


@pytest.mark.parametrize("expression", ["native (fwd)", "native()", "(native)(fwd)", "not " * 9999 + "native"])
def test_words_that_are_no_expression_are_refused(expression, capsys):
    assert main(["list", "-k", expression]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "expected words with and, or, not and parentheses" in said
    with pytest.raises(ValueError, match="-k: got"):
        cases.keyword_filter(expression)
