"""The launcher behaves like `python script.py`: both run the same scripts and are compared."""

import multiprocessing.spawn
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_adams
from megatron_adams.cpu_rehearsal import rehearsal_flags
from megatron_adams.launch import Job, _prepare_spawned_processes
from megatron_adams.launch import main as launch_main

REPOSITORY = Path(__file__).parents[2]

# A script that shows what it sees of itself.
SHOW = """
import sys
from pathlib import Path
import neighbor
print("argv", sys.argv)
print("path", sys.path[0])
print("main", __name__, __file__, __spec__, __package__)
print("module", vars(sys.modules["__main__"]) is globals(), sys.modules["__main__"].__file__)
"""

# A script whose children need what it defines, and what the launcher has set up.
SPAWN = """
import multiprocessing
import sys

print("imported as", __name__, sys.argv, sys.path[0])

class Result:
    def __init__(self, *values):
        self.values = values

def work(result):
    adams = "megatron_adams.megatron" in sys.modules
    torch = sys.modules.get("torch")
    gpu = torch is not None and torch.cuda.is_available()
    return Result(*result.values, __name__, f"adams={adams}", f"gpu={gpu}")

if __name__ == "__main__":
    with multiprocessing.get_context(sys.argv[1]).Pool(1) as pool:
        print(pool.apply(work, (Result(1, 2),)).values)
"""

# Megatron takes seconds to import, so most of these tests leave registration out, and what imports
# torch where nothing is rehearsed. test_registers_before_the_script_runs takes the real modules.
WITHOUT_MEGATRON = """
import os
import sys
import types

def fake(name, **contents):
    sys.modules[name] = module = types.ModuleType(name)
    vars(module).update(contents)

fake("megatron_adams.megatron", register=lambda replace: None)
if "TEST_REHEARSES" not in os.environ:
    fake("megatron_adams.optimizer", AdamS=None)
    fake("megatron_adams.cpu_rehearsal.stand_ins", STAND_INS=(), StandIn=None, install=None)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder for scripts, apart from the working directory."""
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "neighbor.py").write_text("")
    start = tmp_path / "start"
    start.mkdir()
    (start / "sitecustomize.py").write_text(WITHOUT_MEGATRON)
    return scripts


def python(
    folder: Path, *args: str, with_megatron: bool = False, **environment: str
) -> subprocess.CompletedProcess[str]:
    paths = [str(REPOSITORY)] if with_megatron else [str(folder.parent / "start"), str(REPOSITORY)]
    return subprocess.run(
        [sys.executable, *args],
        cwd=folder.parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def launch(folder: Path, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    if "--force-cpu-rehearsal" in args:
        environment["TEST_REHEARSES"] = "1"
    return python(folder, "-m", "megatron_adams.launch", *args, **environment)


def assert_same_as_python(folder: Path, source: str, *args: str) -> subprocess.CompletedProcess:
    """Output, tracebacks and exit code are those of `python script.py`; returns the launcher's."""
    (folder / "script.py").write_text(source)
    expected = python(folder, "scripts/script.py", *args)
    actual = launch(folder, "scripts/script.py", *args)
    assert actual.stdout == expected.stdout
    assert actual.stderr == expected.stderr
    assert actual.returncode == expected.returncode
    return actual


def test_script_sees_what_python_shows_it(folder: Path) -> None:
    result = assert_same_as_python(folder, SHOW, "--optimizer", "adams", "--", "--help", "-m", "x")
    assert result.returncode == 0 and f"path {folder}" in result.stdout


def test_script_behind_a_link_sees_its_own_folder(folder: Path) -> None:
    (folder / "script.py").write_text(SHOW)
    (folder.parent / "link.py").symlink_to(folder / "script.py")
    expected = python(folder, "link.py")
    actual = launch(folder, "link.py")
    assert (actual.stdout, actual.stderr) == (expected.stdout, "")
    assert f"path {folder}" in actual.stdout


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("", 0),
        ("sys.exit(7)", 7),
        ("sys.exit('a message')", 1),
        ("raise KeyboardInterrupt", -signal.SIGINT),
        ("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
        ("atexit.register(print, 'at exit'); sys.exit(3)", 3),
    ],
)
def test_exit_code_is_the_scripts(folder: Path, ending: str, code: int) -> None:
    result = assert_same_as_python(folder, f"import atexit, os, signal, sys\n{ending}\n")
    assert result.returncode == code


@pytest.mark.parametrize(
    "source",
    [
        "def fail():\n    raise KeyError('x')\n\ntry:\n    fail()\nexcept KeyError as e:\n"
        "    raise ValueError('y') from e\n",
        "def (:\n",
        "import no_such_module\n",
    ],
    ids=["chained", "syntax", "import"],
)
def test_traceback_is_pythons(folder: Path, source: str) -> None:
    result = assert_same_as_python(folder, source)
    assert result.returncode == 1
    assert "launch.py" not in result.stderr and "runpy" not in result.stderr


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_spawned_process_imports_the_script_and_the_setup(folder: Path, method: str) -> None:
    (folder / "script.py").write_text(SPAWN)
    result = launch(folder, "--force-cpu-rehearsal", "scripts/script.py", method)
    assert result.returncode == 0, result.stderr
    assert "(1, 2, '__mp_main__', 'adams=True', 'gpu=True')" in result.stdout
    argv = [str(folder / "script.py"), method, *rehearsal_flags([])]
    assert f"imported as __mp_main__ {argv} {folder}\n" in result.stdout


def test_spawned_process_finds_the_package_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    # The script's folder replaces the one where `python -m` may have found a checkout.
    monkeypatch.setattr(
        multiprocessing.spawn, "get_preparation_data", lambda name: {"sys_path": ["scripts"]}
    )
    monkeypatch.setenv("MEGATRON_ADAMS_LAUNCH", "restored after the test")
    _prepare_spawned_processes(Job("script.py", False, False, False))
    data = multiprocessing.spawn.get_preparation_data("worker")
    assert data["sys_path"] == ["scripts", str(REPOSITORY)]
    assert data["init_main_from_name"] == "megatron_adams.launch"


def test_module_runs_as_with_python_m(folder: Path) -> None:
    package = folder.parent / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text("from . import job")
    (package / "job.py").write_text(
        "import sys\nprint(__name__, __package__, sys.argv, sys.path[0])"
    )
    for module in ("package.job", "package"):
        expected = python(folder, "-m", module, "--flag")
        assert expected.returncode == 0
        assert launch(folder, "-m", module, "--flag").stdout == expected.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--cpu-rehersal", "scripts/script.py"], "unrecognized arguments: --cpu-rehersal"),
        ([], "no script given"),
        (["--cpu-rehearsal"], "no script given"),
        (["absent.py", "--optimizer", "adams"], "cannot read the script absent.py: No such file"),
        (["scripts"], "cannot read the script scripts: Is a directory"),
        (
            ["--force-cpu-rehearsal", "scripts/script.py", "--fp8-format", "hybrid"],
            "--fp8-format hybrid cannot be rehearsed on CPUs",
        ),
    ],
)
def test_wrong_command_is_one_line_and_exit_code_2(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    args: list[str],
    message: str,
) -> None:
    (folder / "script.py").write_text("print('ran')")
    monkeypatch.chdir(folder.parent)
    # All of these fail before anything is set up in this process.
    for local_rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        with pytest.raises(SystemExit) as exit_info:
            launch_main(args)
        assert exit_info.value.code == 2
        out, err = capsys.readouterr()
        assert out == ""
        # On eight ranks the line must not come eight times.
        assert (message in err and err.count("\n") == 1) if local_rank == "0" else err == ""


def test_help_says_what_a_rehearsal_is_for_and_what_it_leaves_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        launch_main(["--help"])
    assert exit_info.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "exact parallel layout of a cluster job" in text
    assert "does not model speed, GPU memory, NCCL" in text


def test_version_names_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        launch_main(["--version"])
    assert exit_info.value.code == 0
    assert capsys.readouterr().out == f"megatron-adams {megatron_adams.__version__}\n"


def test_rehearsal_flags_are_appended_and_printed_by_rank_0(folder: Path) -> None:
    (folder / "script.py").write_text("import sys; print(sys.argv[1:])")
    result = launch(folder, "--force-cpu-rehearsal", "scripts/script.py", "--optimizer", "adams")
    assert "['--optimizer', 'adams', '--distributed-backend', 'gloo'" in result.stdout
    assert result.stderr.startswith("CPU rehearsal: added --distributed-backend gloo")
    assert result.stderr.count("\n") == 1
    quiet = launch(folder, "--force-cpu-rehearsal", "scripts/script.py", RANK="1")
    assert quiet.stderr == ""


def test_registers_before_the_script_runs(folder: Path) -> None:
    (folder / "script.py").write_text(
        "import argparse\n"
        "from megatron.training.arguments import add_megatron_arguments\n"
        "parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))\n"
        "print(parser.parse_args(['--optimizer', 'adams']).optimizer)\n"
    )
    result = python(
        folder,
        *("-m", "megatron_adams.launch", "--force-cpu-rehearsal", "scripts/script.py"),
        with_megatron=True,
    )
    assert result.stdout.splitlines()[-1:] == ["adams"], result.stderr


def test_megatron_beside_the_script_is_the_one_that_is_registered(folder: Path) -> None:
    beside = folder / "megatron" / "core"
    beside.mkdir(parents=True)
    (beside / "__init__.py").write_text("raise ImportError('the Megatron beside the script')")
    (beside.parent / "__init__.py").write_text("")
    (folder / "script.py").write_text("")
    result = python(folder, "-m", "megatron_adams.launch", "scripts/script.py", with_megatron=True)
    assert "the Megatron beside the script" in result.stderr
