"""`megatron-adams precompile`: fills the cache for a job, without a GPU."""

import os
import re
import shutil
import stat
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from megatron_adams.cli import main
from megatron_adams.kernels import compile as compile_module
from megatron_adams.kernels.compile import (
    CompileError,
    cubin,
    host_arch,
    host_compiler,
    host_library,
)
from megatron_adams.kernels.modes import ALL_MODES, GUARDED_MODES

MODES = ALL_MODES[:3]
NAMES = [mode.name for mode in MODES]
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def default_folder(tmp_path, monkeypatch):
    folder = tmp_path / "default"
    monkeypatch.setenv("MEGATRON_ADAMS_CACHE_DIR", str(folder))
    return folder


def fast_compilers(monkeypatch):
    """Put strings in the place of what the compilers make; return the list of what was asked."""
    asked = []

    def compile_cuda(text, defines, arch):
        asked.append((defines["ADAMS_GRAD"], arch))
        return b"cubin"

    def compile_host(text, defines, compiler, arch):
        asked.append((defines["ADAMS_GRAD"], arch))
        return b"library"

    monkeypatch.setattr(compile_module, "compile_cuda", compile_cuda)
    monkeypatch.setattr(compile_module, "compile_host", compile_host)
    return asked


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


def must_not_compile(*args):
    raise AssertionError("compiled, though it was precompiled")


def test_job_compiles_nothing_after_precompile(monkeypatch, capsys, default_folder):
    if host_compiler() is None:
        pytest.skip("no C++ compiler")
    archs = ["--arch", "sm_80", "--arch", "sm_90", "--host"]
    assert main(["precompile", *archs, "--mode", NAMES[0]]) == 0
    *progress, summary = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in progress] == ["[1/3]", "[2/3]", "[3/3]"]
    assert {line.split()[1] for line in progress} == {
        f"{NAMES[0]}.{arch}" for arch in ("sm_80", "sm_90", host_arch())
    }
    assert re.fullmatch(
        rf"3 compiled, 0 already there, \d+\.\d s, in {re.escape(str(default_folder))}", summary
    )

    monkeypatch.setattr(compile_module, "compile_cuda", must_not_compile)
    monkeypatch.setattr(compile_module, "compile_host", must_not_compile)
    assert cubin(MODES[0], "sm_90")[:4] == b"\x7fELF"
    assert host_library(MODES[0]).adams_update
    assert main(["precompile", *archs, "--mode", NAMES[0]]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("0 compiled, 3 already there, ")


def test_all_modes_are_the_default(monkeypatch, capsys, default_folder):
    asked = fast_compilers(monkeypatch)
    assert main(["precompile", "--arch", "sm_90"]) == 0
    count = len(ALL_MODES) + len(GUARDED_MODES)
    assert len(asked) == len(list(default_folder.iterdir())) == count == 288
    assert f"{count} compiled" in capsys.readouterr().out


def test_a_guarded_mode_has_a_name_of_its_own(monkeypatch, default_folder):
    fast_compilers(monkeypatch)
    assert main(["precompile", "--arch", "sm_90", "--mode", f"{NAMES[0]}-rms"]) == 0
    (entry,) = default_folder.iterdir()
    assert entry.name.startswith(f"{NAMES[0]}-rms.sm_90.")
    monkeypatch.setattr(compile_module, "compile_cuda", must_not_compile)
    assert cubin(MODES[0]._replace(is_guarded=True), "sm_90") == b"cubin"


def test_modes_and_archs_are_combined_once_each(monkeypatch, capsys):
    asked = fast_compilers(monkeypatch)
    arguments = ["--arch", "sm_90", "--arch", "sm_100", "--arch", "sm_90", "--mode", *NAMES[:2]]
    assert main(["precompile", *arguments, "--mode", NAMES[2]]) == 0
    grads = [mode.defines()["ADAMS_GRAD"] for mode in MODES]
    assert sorted(asked) == sorted((grad, arch) for grad in grads for arch in ("sm_90", "sm_100"))
    assert "6 compiled, 0 already there" in capsys.readouterr().out


def test_host_levels_of_other_machines(monkeypatch, default_folder):
    if host_compiler() is None:
        pytest.skip("no C++ compiler")
    asked = fast_compilers(monkeypatch)
    levels = ["x86-64-v2", "x86-64-v3", "x86-64-v4"]
    arguments = [word for level in levels for word in ("--arch", level)]
    assert main(["precompile", *arguments, "--mode", NAMES[0]]) == 0
    assert sorted(arch for _, arch in asked) == levels
    assert {path.suffix for path in default_folder.iterdir()} == {".so"}


def test_cache_of_an_image_is_for_all_users(monkeypatch, tmp_path, default_folder):
    fast_compilers(monkeypatch)
    folder = tmp_path / "opt" / "kernels"
    before = os.umask(0o077)
    try:
        arguments = ["--arch", "sm_90", "--mode", NAMES[0], "--cache-dir", str(folder)]
        assert main(["precompile", *arguments]) == 0
    finally:
        os.umask(before)
    (entry,) = folder.iterdir()
    assert [mode_of(tmp_path / "opt"), mode_of(folder), mode_of(entry)] == [0o755, 0o755, 0o644]
    assert not default_folder.exists()
    monkeypatch.setenv("MEGATRON_ADAMS_CACHE_DIR", str(folder))
    monkeypatch.setattr(compile_module, "compile_cuda", must_not_compile)
    assert cubin(MODES[0], "sm_90") == b"cubin"


def test_default_cache_stays_private(monkeypatch, default_folder):
    fast_compilers(monkeypatch)
    assert main(["precompile", "--arch", "sm_90", "--mode", NAMES[0]]) == 0
    (entry,) = default_folder.iterdir()
    assert [mode_of(default_folder), mode_of(entry)] == [0o700, 0o600]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["nothing to compile for", "--arch sm_90", "--host"]),
        (["--arch", "90"], ["--arch 90: must be", "sm_90", "x86-64-v3"]),
        (["--arch", "sm_90x"], ["--arch sm_90x: must be", "sm_90"]),
        (["--arch", "native"], ["--arch native: must be"]),
        (["--arch", "sm_1"], ["--arch sm_1: must be", "NVRTC", "sm_80, ", "another CUDA version"]),
        (["--arch", "sm_90", "--mode", "g32-p32-m32"], ["--mode g32-p32-m32: ", NAMES[0]]),
        (["--arch", "sm_90", "--mode", NAMES[0], "bf16"], ["--mode bf16: must be"]),
        (["--gpu"], ["--gpu"]),
    ],
)
def test_wrong_arguments_are_explained(monkeypatch, capsys, default_folder, arguments, words):
    asked = fast_compilers(monkeypatch)
    with pytest.raises(SystemExit) as error:
        main(["precompile", *arguments])
    assert error.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    for word in words:
        assert word in message
    assert not asked and not default_folder.exists()


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100f"])
def test_variants_of_an_architecture_are_taken(monkeypatch, default_folder, arch):
    asked = fast_compilers(monkeypatch)
    assert main(["precompile", "--arch", arch, "--mode", NAMES[0]]) == 0
    assert [asked_arch for _, asked_arch in asked] == [arch]


def test_missing_compiler_is_an_error(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert main(["precompile", "--host", "--mode", NAMES[0]]) == 1
    message = capsys.readouterr().err
    assert message.startswith("megatron-adams: no C++ compiler") and "apt-get" in message


def test_compiler_that_fails_is_quoted_and_ends_it(monkeypatch, capsys, default_folder):
    (default_folder.parent / "source").mkdir()
    (default_folder.parent / "source" / "device.cu").write_text("int wrong = nowhere;\n")
    monkeypatch.setattr(
        compile_module.source_text, "__defaults__", (default_folder.parent / "source",)
    )
    assert main(["precompile", "--arch", "sm_90", "--mode", *NAMES]) == 1
    message = capsys.readouterr().err
    assert "nowhere" in message and "NVRTC for sm_90" in message
    assert not list(default_folder.glob("*.cubin"))


def test_after_an_error_nothing_more_is_compiled(monkeypatch):
    asked = []

    def fail(text, defines, arch):
        asked.append(arch)
        time.sleep(0.02)
        raise CompileError("wrong")

    monkeypatch.setattr(compile_module, "compile_cuda", fail)
    assert main(["precompile", "--arch", "sm_90"]) == 1
    assert len(asked) < len(ALL_MODES)


def test_cache_that_cannot_be_used_is_an_error(monkeypatch, capsys, caplog, tmp_path):
    fast_compilers(monkeypatch)
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    arguments = ["--arch", "sm_90", "--mode", NAMES[0], "--cache-dir", str(folder)]
    assert main(["precompile", *arguments]) == 1
    assert str(folder) in capsys.readouterr().err
    assert "mode 0777" in caplog.text
    assert list(folder.iterdir()) == []


def test_progress_on_a_terminal_is_one_line(monkeypatch, capsys):
    fast_compilers(monkeypatch)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert main(["precompile", "--arch", "sm_90", "--mode", *NAMES]) == 0
    progress, summary, rest = capsys.readouterr().out.split("\n")
    assert (
        progress.count("\r\033[K[") == len(NAMES) and summary.startswith("3 compiled") and not rest
    )


def test_command_runs_as_a_module_without_megatron_and_without_the_tables_of_others():
    # rich draws the tables of plan and doctor; the other subcommands do not wait for it.
    code = (
        "import runpy, sys; sys.modules['megatron'] = sys.modules['rich'] = None;"
        "sys.argv[1:] = ['precompile', '--help'];"
        "runpy.run_module('megatron_adams.cli', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "--arch" in done.stdout and "MEGATRON_ADAMS_CACHE_DIR" in done.stdout


def test_wheel_has_the_command_and_the_sources(tmp_path):
    # A copy, as the build writes beside what it builds.
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "megatron_adams", tmp_path / "megatron_adams", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(tmp_path / "dist" / done.stdout.splitlines()[-1]) as wheel:
        names = wheel.namelist()
        (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
        commands = wheel.read(entry_points).decode().splitlines()
    assert "megatron-adams = megatron_adams.cli:main" in commands
    packaged = {name for name in names if name.startswith("megatron_adams/")}
    assert packaged == {
        str(path.relative_to(ROOT))
        for path in (ROOT / "megatron_adams").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
