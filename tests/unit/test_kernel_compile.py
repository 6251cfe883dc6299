"""Sources to kernels: what is compiled, by which compiler and flags, and under which name."""

import ctypes
import os
import re
import stat
import subprocess
import sys

import pytest

from megatron_adams.kernels import compile as compile_module
from megatron_adams.kernels.cache import KernelCache
from megatron_adams.kernels.compile import (
    CompileError,
    Compiler,
    compile_cuda,
    compile_host,
    cubin,
    cuda_archs,
    cuda_recipe,
    host_arch,
    host_compiler,
    host_flags,
    host_library,
    host_recipe,
    load_library,
    nvrtc_version,
    source_text,
)
from megatron_adams.kernels.modes import ALL_MODES

MODE, OTHER_MODE = ALL_MODES[0], ALL_MODES[1]
GXX = Compiler(("g++",), "g++ (GCC) 12.2.0")
CUDA_ARCHS = ("sm_80", "sm_90", "sm_100")
# a * b is 1 - 2^-46, which rounds to 1: a * b + c is 0 and fma(a, b, c) is not.
A, B, C = 1 + 2.0**-23, 1 - 2.0**-23, -1.0
HOST_SOURCE = """
extern "C" float multiply_add(float a, float b, float c) { return a * b + c; }
extern "C" int value() { return VALUE; }
"""
CUDA_SOURCE = """
float helper(float x) { return sqrtf(x) / (x + VALUE); }
extern "C" __global__ void multiply_add(float* x) {
    x[threadIdx.x] = x[threadIdx.x] * x[threadIdx.x + 32] + x[threadIdx.x + 64];
}
extern "C" __global__ void root(float* x) { x[threadIdx.x] = helper(x[threadIdx.x]); }
"""


@pytest.fixture
def kernels(tmp_path):
    return KernelCache(tmp_path / "kernels")


@pytest.fixture
def small_sources(tmp_path, monkeypatch):
    """Put two small sources in the place of the package's; return their folder."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "host.cpp").write_text('extern "C" int answer() { return 42; }\n')
    (folder / "device.cu").write_text('extern "C" __global__ void answer(int* x) { *x = 42; }\n')
    monkeypatch.setattr(source_text, "__defaults__", (folder,))
    return folder


@pytest.fixture
def fake_path(tmp_path, monkeypatch):
    """An empty PATH; returns a function that puts a compiler there which only says its version."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CXX", raising=False)
    compile_module._identify.cache_clear()

    def add(name):
        script = folder / name
        script.write_text(f'#!/bin/sh\necho "{name} 1.0 $LC_ALL $*"\necho "more"\n')
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        return str(script)

    yield add
    compile_module._identify.cache_clear()


@pytest.fixture(scope="module")
def compiler():
    if (found := host_compiler()) is None:
        pytest.skip("no C++ compiler")
    return found


def must_not_compile(*args):
    raise AssertionError("compiled, though it is in the cache")


def sass(image, path):
    triton = pytest.importorskip("triton", reason="no triton, whose wheel brings nvdisasm")
    path.write_bytes(image)
    disassembler = os.path.join(
        os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "nvdisasm"
    )
    return subprocess.run(
        [disassembler, str(path)], check=True, capture_output=True, text=True
    ).stdout


# Sources


def test_includes_stand_in_place_once_and_keep_their_line_numbers(tmp_path):
    (tmp_path / "a.cpp").write_text('// a1\n#include "b.h"\n#include "c.h"\nint a4;\n')
    (tmp_path / "b.h").write_text('  #  include "c.h"  // first\nint b2;\n')
    (tmp_path / "c.h").write_text("int c1;\n")
    assert source_text("a.cpp", tmp_path).splitlines() == [
        '#line 1 "a.cpp"', "// a1",
        '#line 1 "b.h"',
        '#line 1 "c.h"', "int c1;",
        '#line 2 "b.h"', "int b2;",
        '#line 3 "a.cpp"',
        '#line 4 "a.cpp"', "int a4;",
    ]  # fmt: skip


def test_error_in_a_header_is_reported_with_its_file_and_line(tmp_path, compiler):
    (tmp_path / "a.cpp").write_text('\n#include "b.h"\nint a;\n')
    (tmp_path / "b.h").write_text("int b;\n\nint wrong() { return nowhere; }\n")
    text = source_text("a.cpp", tmp_path)
    with pytest.raises(CompileError, match=r"b\.h:3:.*nowhere"):
        compile_host(text, {}, compiler, host_arch())
    with pytest.raises(CompileError, match=r"b\.h\(3\).*nowhere"):
        compile_cuda(text, {}, "sm_90")


@pytest.mark.parametrize(
    ("name", "headers"), [("host.cpp", ["#include <immintrin.h>"]), ("device.cu", [])]
)
def test_sources_of_the_package_are_whole_and_need_no_header_but_the_compiler_s(name, headers):
    text = source_text(name)
    assert [line for line in text.splitlines() if "#include" in line] == headers
    assert f'#line 1 "{name}"' in text and '#line 1 "element.h"' in text


# The host compiler


def test_cxx_is_taken_with_its_arguments(fake_path, monkeypatch):
    fake_path("g++")
    mine = fake_path("mine")
    monkeypatch.setenv("CXX", f"{mine} -m64 '-a b'")
    assert host_compiler() == Compiler((mine, "-m64", "-a b"), "mine 1.0 C -m64 -a b --version")


def test_gxx_comes_before_clang_and_none_is_none(fake_path):
    assert host_compiler() is None
    clang = fake_path("clang++")
    assert host_compiler() == Compiler((clang,), "clang++ 1.0 C --version")
    gxx = fake_path("g++")
    assert host_compiler() == Compiler((gxx,), "g++ 1.0 C --version")


@pytest.mark.parametrize("command", ["false", "/nowhere/g++"])
def test_cxx_that_does_not_work_is_named(monkeypatch, command):
    monkeypatch.setenv("CXX", command)
    with pytest.raises(CompileError, match=re.escape(f"{command} --version")):
        host_compiler()


def test_without_a_compiler_the_error_says_what_to_install(fake_path, kernels):
    with pytest.raises(CompileError, match=r"apt-get install g\+\+") as error:
        host_library(MODE, kernels)
    assert f"precompile --arch {host_arch()}" in str(error.value)


def test_without_a_compiler_the_library_of_any_is_taken(
    compiler, small_sources, kernels, monkeypatch
):
    kernels.get(*host_recipe(MODE, host_arch(), compiler))
    monkeypatch.setattr(compile_module, "host_compiler", lambda: None)
    with pytest.raises(CompileError, match="no C"):
        host_library(OTHER_MODE, kernels)
    assert host_library(MODE, kernels).answer() == 42
    (small_sources / "host.cpp").write_text("// another source\n")
    with pytest.raises(CompileError, match="no C"):
        host_library(MODE, kernels)


def test_compiler_that_fails_is_quoted(compiler):
    with pytest.raises(CompileError) as error:
        compile_host("int x = nowhere;", {"VALUE": "1"}, compiler, host_arch())
    for part in (*compiler.command, "-O3", "-DVALUE=1", "exit code 1", "nowhere"):
        assert part in str(error.value)


def test_compiler_that_writes_nothing_is_an_error(fake_path):
    with pytest.raises(CompileError, match="no library"):
        compile_host("", {}, Compiler((fake_path("g++"),), ""), host_arch())


def test_no_room_for_temporary_files_is_a_compile_error(compiler, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    with pytest.raises(CompileError, match="Not a directory"):
        compile_host("", {}, compiler, host_arch())


# Architecture and flags

V2 = "fpu cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3"
V3 = f"{V2} abm avx avx2 bmi1 bmi2 f16c fma movbe xsave"
V4 = f"{V3} avx512f avx512bw avx512cd avx512dq avx512vl"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu sse sse2", "x86-64"),
        (V2, "x86-64-v2"),
        (V3, "x86-64-v3"),
        (V4, "x86-64-v4"),
        (V4.replace("avx512vl", ""), "x86-64-v3"),  # Knights Landing
        (V3.replace("fma", ""), "x86-64-v2"),
        (V4.replace("movbe", ""), "x86-64-v2"),
    ],
)
def test_level_is_the_highest_that_the_cpu_has_whole(monkeypatch, tmp_path, flags, expected):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t: fma\n\nflags\t: {V4}\n")
    monkeypatch.setattr(compile_module, "_CPUINFO", cpuinfo)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert host_arch() == expected
    assert f"-march={expected}" in host_flags(expected)


def test_other_machines_have_no_level(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert host_arch() == "aarch64"
    assert not [flag for flag in host_flags("aarch64") if "march" in flag]


def test_host_arithmetic_is_not_contracted(compiler):
    """An FMA would return -2^-46; there is one from x86-64-v3 on, and on every aarch64."""
    library = load_library(
        compile_host(HOST_SOURCE, {"VALUE": "7"}, compiler, host_arch()), "multiply_add"
    )
    library.multiply_add.argtypes = [ctypes.c_float] * 3
    library.multiply_add.restype = ctypes.c_float
    assert library.multiply_add(A, B, C) == 0.0
    assert library.value() == 7


# NVRTC, without a GPU


@pytest.mark.parametrize("arch", CUDA_ARCHS)
def test_cubin_is_compiled_without_a_gpu_and_rounds_every_operation(arch, tmp_path):
    image = compile_cuda(CUDA_SOURCE, {"VALUE": "1.5f"}, arch)
    assert image[:4] == b"\x7fELF"
    text = sass(image, tmp_path / "kernel.cubin")
    assert arch in text
    multiply_add = re.search(r"\.text\.multiply_add:(.*?)\.L_x_\d+:", text, re.S)[1]
    assert "FMUL " in multiply_add and "FADD " in multiply_add  # with .FTZ: subnormals are lost
    assert "FFMA" not in multiply_add
    # The correctly rounded root and quotient have a slow path, and the fast ones have none.
    assert "sqrt_rn_f32_slowpath" in text and "div_rn_noftz_f32_slowpath" in text


def test_nvrtc_that_fails_is_quoted():
    with pytest.raises(CompileError, match=r"NVRTC for sm_1 with \{'VALUE': '1'\}.*"):
        compile_cuda(CUDA_SOURCE, {"VALUE": "1"}, "sm_1")
    with pytest.raises(CompileError, match='"VALUE" is undefined'):
        compile_cuda(CUDA_SOURCE, {}, "sm_90")


def test_nvrtc_says_what_it_is():
    assert re.fullmatch(r"1\d\.\d+", nvrtc_version())
    assert set(CUDA_ARCHS) <= set(cuda_archs())


def test_threads_can_compile_at_once_from_the_first_time():
    code = """
import sys
from concurrent.futures import ThreadPoolExecutor
from megatron_adams.kernels.compile import compile_cuda
assert "cuda.bindings.nvrtc" not in sys.modules
sys.setswitchinterval(1e-6)
source = 'extern "C" __global__ void kernel() {}'
with ThreadPoolExecutor(8) as pool:
    print(len(list(pool.map(lambda _: compile_cuda(source, {}, "sm_90"), range(8)))))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "8\n", done.stderr


def test_without_nvrtc_the_error_says_what_to_install(monkeypatch, kernels):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    with pytest.raises(CompileError, match=r"megatron-adams\[cu13\]"):
        cubin(MODE, "sm_90", kernels)


def test_without_the_library_the_error_says_what_to_install(monkeypatch):
    pathfinder = pytest.importorskip("cuda.pathfinder")

    def not_found():
        raise pathfinder.DynamicLibNotFoundError("libnvrtc.so.13")

    monkeypatch.setattr("cuda.bindings.nvrtc.nvrtcVersion", not_found)
    with pytest.raises(CompileError, match=r"libnvrtc\.so\.13.*megatron-adams\[cu13\]"):
        nvrtc_version()


# Through the cache


def test_library_is_compiled_once_and_works(compiler, small_sources, kernels, monkeypatch):
    assert host_library(MODE, kernels).answer() == 42
    monkeypatch.setattr(compile_module, "compile_host", must_not_compile)
    assert host_library(MODE, kernels).answer() == 42


def test_cubin_is_compiled_once(small_sources, kernels, monkeypatch):
    image = cubin(MODE, "sm_90", kernels)
    assert image[:4] == b"\x7fELF"
    monkeypatch.setattr(compile_module, "compile_cuda", must_not_compile)
    assert cubin(MODE, "sm_90", kernels) == image


def test_default_cache_is_the_one_of_the_environment(small_sources, tmp_path, monkeypatch):
    monkeypatch.setenv("MEGATRON_ADAMS_CACHE_DIR", str(tmp_path / "mine"))
    cubin(MODE, "sm_90")
    assert [path.suffix for path in (tmp_path / "mine").iterdir()] == [".cubin"]


def test_name_says_all_that_a_library_depends_on(small_sources, monkeypatch):
    def name(mode=MODE, arch="x86-64-v3", compiler=GXX):
        return host_recipe(mode, arch, compiler).name

    base = name()
    assert base.startswith(f"{MODE.name}.x86-64-v3.")
    # The same compiler at another place, as on another node.
    assert name(compiler=Compiler(("/opt/bin/g++",), GXX.version)) == base
    others = [
        name(mode=OTHER_MODE),
        name(arch="x86-64-v4"),
        name(compiler=GXX._replace(version="g++ (GCC) 12.3.0")),
        name(compiler=GXX._replace(command=("g++", "-m64"))),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(compile_module, "_HOST_FLAGS", (*compile_module._HOST_FLAGS, "-g"))
        others.append(name())
    with monkeypatch.context() as patch:
        patch.setattr(type(MODE), "defines", lambda mode: {"ADAMS_GRAD": "another"})
        others.append(name())
    with monkeypatch.context() as patch:
        patch.setattr(compile_module, "_FORMAT", 0)
        others.append(name())
    (small_sources / "host.cpp").write_text("// another")
    others.append(name())
    assert len({base, *others}) == len(others) + 1


def test_name_says_all_that_a_cubin_depends_on(small_sources, monkeypatch):
    def name(mode=MODE, arch="sm_90"):
        return cuda_recipe(mode, arch).name

    base = name()
    assert base.startswith(f"{MODE.name}.sm_90.")
    others = [name(mode=OTHER_MODE), name(arch="sm_100")]
    with monkeypatch.context() as patch:
        patch.setattr(compile_module, "nvrtc_version", lambda: "14.0")
        others.append(name())
    with monkeypatch.context() as patch:
        patch.setattr(compile_module, "_CUDA_FLAGS", (*compile_module._CUDA_FLAGS, "--fmad=true"))
        others.append(name())
    with monkeypatch.context() as patch:
        patch.setattr(type(MODE), "defines", lambda mode: {"ADAMS_GRAD": "another"})
        others.append(name())
    with monkeypatch.context() as patch:
        patch.setattr(compile_module, "_FORMAT", 0)
        others.append(name())
    (small_sources / "device.cu").write_text("// another")
    others.append(name())
    assert len({base, *others}) == len(others) + 1


# Loading


def test_libraries_loaded_from_memory_are_not_taken_for_each_other(compiler):
    images = [compile_host(HOST_SOURCE, {"VALUE": str(n)}, compiler, host_arch()) for n in (1, 2)]
    first, second, again = (load_library(images[n], "same name") for n in (0, 1, 0))
    assert [first.value(), second.value(), again.value()] == [1, 2, 1]


def test_library_that_cannot_be_loaded_is_a_compile_error():
    with pytest.raises(CompileError, match="g32 cannot be loaded"):
        load_library(b"no library", "g32")


def test_library_is_loaded_where_it_cannot_be_kept(compiler, small_sources, tmp_path):
    (tmp_path / "file").touch()
    kernels = KernelCache(tmp_path / "file" / "kernels")
    assert host_library(MODE, kernels).answer() == 42
