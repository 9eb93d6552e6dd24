"""run.sh and the shell around it: every wrong use is one line and a non-zero status."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RUN = ROOT / "egs" / "multilingual12" / "run.sh"


CREDENTIALS = ("MDC_API_KEY", "WENETSPEECH_PASSWORD", "HF_TOKEN")


def run(*args: str, cwd: Path = ROOT, script: Path = RUN) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name not in CREDENTIALS}
    return subprocess.run([str(script), *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--stage", "9"], "unknown stage '9'; stages are 0 to 8"),
        (["--stop-stage", "two"], "unknown stage 'two'"),
        (["--stage", "5", "--stop-stage", "4"], "--stage 5 comes after --stop-stage 4"),
        (["--stge", "1"], "unknown option '--stge'; known: --stage --stop-stage --conf"),
        (["--stage"], "option --stage needs a value"),
        (["3"], "unexpected argument '3'"),
        (["--encoder", "half"], "unknown encoder 'half'; known: full, chunked"),
        (["--nj", "0"], "--nj and --num-jobs take a number above 0, not '0'"),
        (["--num-jobs", "x"], "--nj and --num-jobs take a number above 0, not 'x'"),
        (["--ngpu", "all"], "--ngpu 'all' is not a number"),
        (["--ngpu", "99"], "--ngpu 99, but this machine has "),
        (["--hostfile", "no-such-file"], "no hostfile 'no-such-file'"),
        (["--hostfile", "README.md", "--stage", "4"], "say with --ngpu how many GPUs each node has"),
        (["--conf", "nano"], "no configuration 'nano'; give a file, or one of: mini.yaml paper.yaml"),
        (["--method", "zipper", "--stage", "8"], "known methods: vanilla, flylora, independent"),
    ],
)
def test_a_wrong_option_is_one_line_and_status_1(args, message):
    result = run(*args)
    assert result.returncode == 1
    assert message in result.stderr and result.stderr.count("\n") == 1


def test_help_lists_every_option():
    result = run("--help")
    assert result.returncode == 0
    options = "stage stop-stage conf method encoder data-dir exp-dir ngpu hostfile nj num-jobs".split()
    assert all(f"--{option} " in result.stdout for option in options)


def test_a_configuration_with_an_unknown_language_stops_the_recipe(tmp_path):
    conf = tmp_path / "mine.yaml"
    conf.write_text(f"base: {RUN.parent / 'conf' / 'mini.yaml'}\ncorpora: {{read: {{langs: [de, xx]}}}}\n")
    result = run("--conf", "mine.yaml", "--stage", "8", cwd=tmp_path)
    assert result.returncode == 1 and "unknown language 'xx'" in result.stderr and result.stderr.count("\n") == 1


def test_corpora_that_need_an_account_are_named_with_the_way_to_get_them(tmp_path):
    result = run(
        "--conf", "paper", "--stop-stage", "0", "--data-dir", str(tmp_path), "--exp-dir", str(tmp_path / "exp")
    )
    assert result.returncode == 1
    for corpus, variable in zip(("commonvoice", "wenetspeech", "msr86k"), CREDENTIALS):
        assert f"{corpus}: {variable} is not set. To get the corpus:\n  1. " in result.stderr


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.sh"
    path.write_text(
        "#!/usr/bin/env bash\n# Usage: it\n# It does.\n\nset -euo pipefail\n"
        "num_jobs=4   # how many\nname=  # of whom\n"
        f". '{ROOT}/utils/parse_options.sh'\n"
        'echo "$num_jobs|$name|$*"\nlater=1 # no option\n'
    )
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("args", "output"),
    [
        ([], "4||"),
        (["--num-jobs", "2", "a", "b"], "2||a b"),
        (["--num-jobs=2", "--name", "x y"], "2|x y|"),
        (["--name=a=b"], "4|a=b|"),
        (["--name="], "4||"),
        (["--name", "-1"], "4|-1|"),
    ],
)
def test_options_set_the_variables_of_the_script(script, args, output):
    assert run(*args, script=script).stdout == f"{output}\n"


def test_only_what_stands_above_is_an_option(script):
    result = run("--later", "2", script=script)
    assert result.returncode == 1
    assert result.stderr == "script.sh: unknown option '--later'; known: --num-jobs --name (--help explains them)\n"


def test_help_is_the_first_comment_and_the_options(script):
    expected = "Usage: it\nIt does.\n  --num-jobs     how many (default: 4)\n  --name         of whom\n"
    assert run("--help", script=script).stdout == expected


@pytest.fixture
def checkout(tmp_path):
    """A copy of what path.sh needs, with a fake Python that notes what it is asked to do."""
    for name in ("path.sh", "constraints.txt", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "utils", tmp_path / "utils")
    fake = tmp_path / "python"
    fake.write_text(
        "#!/usr/bin/env bash\n"
        f'case "$*" in *torch.version*) exit 1 ;; -c*|--version) exec "{sys.executable}" "$@" ;; esac\n'
        f'echo "$*" >>{tmp_path}/asked\n'
        f'case "$*" in "-m venv .venv") mkdir -p .venv/bin; cp {fake} .venv/bin/python ;;'
        ' *openai*|*"--editable"*) [ -z "${FAIL:-}" ] || { echo "no network"; exit 1; } ;; esac\n'
    )
    fake.chmod(0o755)
    return tmp_path


def source_path_sh(checkout: Path, **env: str) -> subprocess.CompletedProcess:
    command = ["bash", "-c", "set -euo pipefail; . ./path.sh; echo $PATH"]
    env = {**os.environ, "PYTHON": str(checkout / "python"), **env}
    return subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True)


def asked(checkout: Path) -> list[str]:
    lines = (checkout / "asked").read_text().splitlines() if (checkout / "asked").exists() else []
    (checkout / "asked").unlink(missing_ok=True)
    return lines


def test_the_environment_is_made_once(checkout):
    first = source_path_sh(checkout)
    assert first.returncode == 0 and first.stdout.startswith(f"{checkout}/.venv/bin:")
    assert [line.split()[1] for line in asked(checkout)] == ["venv", "pip", "pip", "pip"]
    second = source_path_sh(checkout)
    assert second.returncode == 0 and not second.stderr and not asked(checkout)


def test_an_interrupted_environment_is_made_anew(checkout):
    failed = source_path_sh(checkout, FAIL="yes")
    assert failed.returncode == 1 and not failed.stdout
    assert "no network" in failed.stderr and "zipperasr failed" in failed.stderr
    asked(checkout)
    assert source_path_sh(checkout).returncode == 0
    assert asked(checkout)[0] == "-m venv .venv"


def test_changed_pins_bring_the_environment_up_to_date(checkout):
    source_path_sh(checkout)
    asked(checkout)
    (checkout / "constraints.txt").write_text("torch==0\n")
    assert source_path_sh(checkout).returncode == 0
    assert [line.split()[1] for line in asked(checkout)] == ["pip", "pip", "pip"]


def test_a_failed_update_leaves_the_environment_for_the_next_try(checkout):
    source_path_sh(checkout)
    (checkout / "constraints.txt").write_text("torch==0\n")
    assert source_path_sh(checkout, FAIL="yes").returncode == 1
    asked(checkout)
    assert source_path_sh(checkout).returncode == 0
    assert [line.split()[1] for line in asked(checkout)] == ["pip", "pip", "pip"]


def test_a_moved_checkout_gets_a_new_environment(checkout, tmp_path):
    source_path_sh(checkout)
    (checkout / ".venv" / ".complete").write_text("/elsewhere 0 -\n")
    asked(checkout)
    assert source_path_sh(checkout).returncode == 0
    assert asked(checkout)[0] == "-m venv .venv"


def test_no_python_is_one_line(checkout):
    tools = checkout / "tools"
    tools.mkdir()
    for tool in ("bash", "dirname", "readlink", "cat", "sha256sum", "flock", "mkdir", "touch", "rm"):
        (tools / tool).symlink_to(shutil.which(tool))
    result = source_path_sh(checkout, PATH=str(tools), PYTHON="")
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert "no Python 3.11 or newer" in result.stderr and "apt-get install" in result.stderr
