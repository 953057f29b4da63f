"""`twogate evaluate` and `twogate attack`: what they are called with. What they compute: tests/hardening/measure."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.evaluate import _names, _pair
from cli.main import app
from hardening.measure.oblivious import ATTACKS
from model_store.errors import TwogateError
from tests.support.patterns import write_patterns

runner = CliRunner()


@pytest.mark.parametrize("command", ["evaluate", "attack"])
def test_help_shows_an_example(command: str) -> None:
    result = runner.invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert f"twogate {command} photos" in " ".join(result.output.split())


def test_unknown_attack_names_those_that_exist(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    result = runner.invoke(app, ["attack", "photos", "--data", str(tmp_path), "--out", str(tmp_path), "--attack", "pdg"])
    assert result.exit_code == 1
    assert "pap-ugs" in result.output


def test_a_task_needs_a_name_and_a_folder(tmp_path: Path) -> None:
    for task in ("nothing", "x=/does/not/exist", f"={tmp_path}"):
        result = runner.invoke(app, ["evaluate", "photos", "--task", task])
        assert result.exit_code == 1
        assert "NAME=DIR" in result.output
    assert _pair(f"flowers={tmp_path}") == ("flowers", tmp_path)


def test_no_traceback_for_a_number_that_is_none(tmp_path: Path) -> None:
    result = runner.invoke(app, ["evaluate", "photos", "--task", f"a={tmp_path}", "--epsilons", "8,ten"])
    assert result.exit_code == 1
    assert "'ten' is no number" in result.output


@pytest.mark.parametrize("seeds", ["0.7", "inf", "nan", "0,x"])
def test_a_seed_is_a_whole_number(seeds: str, tmp_path: Path) -> None:
    result = runner.invoke(app, ["evaluate", "photos", "--task", f"a={tmp_path}", "--seeds", seeds])
    assert result.exit_code == 1
    assert "is no whole number" in result.output


def test_a_task_has_one_folder(tmp_path: Path) -> None:
    result = runner.invoke(app, ["evaluate", "photos", "--task", f"a={tmp_path}", "--task", f"a={tmp_path.parent}"])
    assert result.exit_code == 1
    assert "--task a= is there twice" in result.output


@pytest.mark.parametrize("device", ["foo", "cuda:77"])
@pytest.mark.parametrize("command", [["evaluate", "--task", "a={}"], ["attack", "--data", "{}"]])
def test_a_device_that_is_not_there_is_one_line(command: list[str], device: str, tmp_path: Path) -> None:
    name, *options = (part.format(tmp_path) for part in command)
    result = runner.invoke(app, [name, "photos", *options, "--out", str(tmp_path / "out"), "--device", device])
    assert result.exit_code == 1
    assert f"there is no device '{device}' here" in result.output


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    write_patterns(tmp_path / "images", train=30)
    out = str(tmp_path / "out" / "below")
    result = runner.invoke(app, ["evaluate", "photos", "--task", f"a={tmp_path / 'images'}", "--out", out])
    assert result.exit_code == 1
    assert re.fullmatch(rf"twogate: {re.escape(out)}/data/a/\w+: Not a directory\n", result.output)


@pytest.mark.parametrize("epsilon", ["0", "0.5", "2.5", "65"])
def test_a_budget_is_refused_by_the_option_that_declares_it(epsilon: str, tmp_path: Path) -> None:
    options = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--epsilon", epsilon]
    result = runner.invoke(app, ["attack", "photos", *options])
    assert result.exit_code == 2
    assert "--epsilon" in result.output


def test_names() -> None:
    assert _names("all", ATTACKS) == ATTACKS
    assert _names("none", ATTACKS) == ()
    assert _names("pgd,uap", ATTACKS) == ("pgd", "uap")


def test_unknown_bundle_says_what_there_is(tmp_path: Path) -> None:
    result = runner.invoke(app, ["evaluate", "nobody", "--task", f"a={tmp_path}"])
    assert result.exit_code == 1
    assert "photos" in result.output
    assert not isinstance(result.exception, TwogateError)
