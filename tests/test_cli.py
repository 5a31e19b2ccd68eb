"""The command line's entry: verbs, help, exit codes, the nearest verb, and what is imported for an answer."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import subprocess
import sys
import types
from typing import Any

import pytest

import mvp_fast
from mvp_fast import errors
from mvp_fast.cli import main as entry
from mvp_fast.cli.main import EXIT_CODES, MACHINE_TROUBLE, VERBS, main

# Prints the exit code of one call and which heavy modules it has imported.
HEAVY = """
import sys
from mvp_fast.cli.main import main
try:
    code = main(sys.argv[1:])
except SystemExit as end:
    code = end.code
heavy = sorted({"torch", "torchvision", "timm", "open_clip", "nvidia", "numba", "pyarrow", "scipy"} & set(sys.modules))
print("HEAVY", heavy, code)
"""


def verb_that(monkeypatch: pytest.MonkeyPatch, act: Any) -> None:
    """Put a verb `act` beside the others, whose module's main is `act`."""
    module = types.ModuleType("mvp_fast_test_verb")
    module.main = act  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(entry.VERBS, "act", (module.__name__, "for a test"))


def test_help_lists_every_verb_and_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--help"], ["-h"]):
        assert main(argv) == 0
        shown = capsys.readouterr()
        assert shown.err == ""
        for verb, (_, line) in VERBS.items():
            assert f"  {verb} " in shown.out
            assert line in shown.out
        assert EXIT_CODES in shown.out


def test_no_verb_is_a_usage_error_that_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: mvp-fast" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == main(["-V"]) == 0
    assert capsys.readouterr().out == f"mvp-fast {mvp_fast.__version__}\n" * 2


def test_arguments_come_from_the_process_where_none_are_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["mvp-fast", "--version"])
    assert main() == 0
    assert mvp_fast.__version__ in capsys.readouterr().out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_main_and_its_own_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert callable(importlib.import_module(VERBS[verb][0]).main)
    with pytest.raises(SystemExit) as ended:
        main([*verb.split(), "--help"])
    assert ended.value.code == 0
    assert f"usage: mvp-fast {verb} " in capsys.readouterr().out


def test_groups(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "--help"]) == 0
    shown = capsys.readouterr()
    assert "usage: mvp-fast data VERB" in shown.out
    assert all((f"  {verb} " in shown.out) == verb.startswith("data ") for verb in VERBS)
    assert main(["data"]) == 2
    assert "usage: mvp-fast data VERB" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["trian"], "there is no verb `trian`. Did you mean `train`?"),
        (["exprot", "run"], "there is no verb `exprot`. Did you mean `export`?"),
        (["data", "indx", "folder"], "there is no verb `data indx`. Did you mean `data index`?"),
        (["dta", "scenes"], "there is no verb `dta`. Did you mean `data scenes`?"),
        (["data", "qqqqqqqqqqqq"], "there is no verb `data qqqqqqqqqqqq`. `mvp-fast --help` lists them all."),
        (["qqqqqqqq"], "there is no verb `qqqqqqqq`. `mvp-fast --help` lists them all."),
        (["--config", "x.yaml"], "there is no verb `--config`."),
        ([""], "there is no verb ``."),
    ],
)
def test_nearest_verb(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("mvp-fast: usage error: ")
    assert says in shown.err
    assert shown.err.count("\n") == 1


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"], ["export", "--help"], ["data", "index", "--help"]])
def test_help_imports_nothing_heavy(argv: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", HEAVY, *argv], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "HEAVY [] 0", done.stderr


def test_the_heavy_list_is_not_blind() -> None:
    code = HEAVY.replace("code = main(sys.argv[1:])", "import numba; code = 0")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "numba" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.ConfigError, 2),
        (errors.DataError, 3),
        (errors.EnvironmentProblem, 4),
        (errors.TrainingDiverged, 5),
        (errors.Preempted, 75),
    ],
)
def test_user_errors_are_one_paragraph_and_their_exit_code(
    kind: type[errors.UserError], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def act(argv: list[str]) -> int:
        raise kind("It broke\nin two", where="a place", fix="Mend it")

    verb_that(monkeypatch, act)
    assert main(["act"]) == code == kind.exit_code
    assert capsys.readouterr().err == f"mvp-fast act: {kind.kind}: It broke in two (a place). Mend it.\n"
    assert f"{code} " in EXIT_CODES


@pytest.mark.parametrize("number", sorted(MACHINE_TROUBLE))
def test_what_the_machine_refuses_is_an_environment_error(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def act(argv: list[str]) -> int:
        raise OSError(number, os.strerror(number), argv[0])

    verb_that(monkeypatch, act)
    assert main(["act", "some/file"]) == 4
    told = capsys.readouterr().err
    assert told.startswith(f"mvp-fast act: environment error: The machine refused to go on: {os.strerror(number)}")
    assert "(some/file)" in told
    assert MACHINE_TROUBLE[number] in told


def test_a_real_full_device_is_an_environment_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def act(argv: list[str]) -> int:
        with open("/dev/full", "w", buffering=1) as file:
            file.write("a line\n")
        return 0

    verb_that(monkeypatch, act)
    assert main(["act"]) == 4
    assert "No space left on device" in capsys.readouterr().err


def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """A defect of ours must be visible as one."""

    def broken(argv: list[str]) -> int:
        raise OSError(errno.ENOENT, "x") if argv else ValueError("x")

    verb_that(monkeypatch, broken)
    with pytest.raises(ValueError, match="x"):
        main(["act"])
    with pytest.raises(FileNotFoundError):
        main(["act", "-"])


def test_ctrl_c_ends_without_a_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def act(argv: list[str]) -> int:
        signal.raise_signal(signal.SIGINT)
        return 0

    verb_that(monkeypatch, act)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        assert main(["act"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "mvp-fast act: stopped.\n"


def test_a_reader_that_goes_away_is_no_error() -> None:
    """`mvp-fast ... | head -1`: the pipe's end is closed before the output comes."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "mvp_fast", "train", "--print-config"]
    for unbuffered in ("", "1"):  # met at the end, or at the first line
        environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, env=environment, text=True, timeout=120)
        assert (done.returncode, done.stderr) == (0, "")
    os.close(write)


def test_print_config_shows_the_settings_in_force(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--print-config", "--train.steps", "7"]) == 0
    assert "steps: 7" in capsys.readouterr().out


def test_an_option_without_its_value(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "--config"])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert "mvp-fast train: error: argument --config: expected one argument" in told
