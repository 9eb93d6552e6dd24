"""The command line: instant help, one clear line for what the user can mend."""

import errno
import os
import statistics
import subprocess
import sys
import types

import pytest

from zipperasr.cli import main as cli
from zipperasr.errors import UserError


def zipperasr(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "zipperasr.cli", *args], capture_output=True, text=True)


def cpu_seconds_of_help() -> float:
    """Not seconds on the clock, which other processes share."""
    before = os.times()
    assert zipperasr("--help").returncode == 0
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


@pytest.fixture
def verb(monkeypatch):
    """Installs a verb `it` that does what it is given."""

    def install(action) -> None:
        module = types.ModuleType("zipperasr.cli.it")
        module.add_arguments = lambda parser: None
        module.run = lambda args: action()
        monkeypatch.setitem(sys.modules, "zipperasr.cli.it", module)
        monkeypatch.setitem(cli.VERBS, "it", "does it")

    return install


def raiser(error: BaseException):
    def action():
        raise error

    return action


def test_help_is_instant():
    assert statistics.median(cpu_seconds_of_help() for _ in range(3)) < 0.5


def test_help_names_every_verb():
    assert all(verb in zipperasr("--help").stdout for verb in cli.VERBS)


@pytest.mark.parametrize("name", cli.VERBS)
def test_every_verb_has_help(name, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([name, "--help"])
    assert exit_.value.code == 0 and f"usage: zipperasr {name}" in capsys.readouterr().out


def test_an_unknown_verb_suggests_the_nearest(capsys):
    assert cli.main(["trian"]) == 1
    assert capsys.readouterr().err == "zipperasr: error: unknown verb 'trian'; did you mean 'train'?\n"


def test_a_user_error_is_one_line_and_status_1(verb, capsys):
    verb(raiser(UserError("cut 'a': 31.2 s exceeds 30 s; split it")))
    assert cli.main(["it"]) == 1
    assert capsys.readouterr().err == "zipperasr: error: cut 'a': 31.2 s exceeds 30 s; split it\n"


def test_an_interrupt_is_one_line_and_status_130(verb, capsys):
    verb(raiser(KeyboardInterrupt()))
    assert cli.main(["it"]) == 130
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), RuntimeError("write: No space left on device (os error 28)")],
)
def test_a_full_disk_is_one_line_whoever_meets_it(verb, capsys, error):
    verb(raiser(error))
    assert cli.main(["it"]) == 1
    assert "the disk is full" in capsys.readouterr().err


def test_a_full_disk_below_another_error_is_seen(verb, capsys):
    error = RuntimeError("could not save")
    error.__cause__ = OSError(errno.ENOSPC, "x")
    verb(raiser(error))
    assert cli.main(["it"]) == 1


def test_a_fault_of_ours_keeps_its_traceback(verb):
    verb(raiser(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["it"])


def test_overrides_may_stand_anywhere_on_the_line(tmp_path, capsys):
    assert cli.main(["check-config", "a=1", "--conf", str(tmp_path / "absent.yaml"), "b=2"]) == 1
    assert "absent.yaml: no such configuration" in capsys.readouterr().err


def test_a_reader_that_leaves_early_is_no_error():
    command = f"'{sys.executable}' -m zipperasr.cli --help | true; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert result.returncode in (0, 1) and not result.stderr
