"""The doctor on a stand-in for the driver: what is planted stops a job, with its remedy."""

import io
import json
import os
import re
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pynvml
import pytest

from megatron_adams import nvml
from megatron_adams.cli import main
from megatron_adams.doctor import Question, Report, Status, examine, kernels, software
from megatron_adams.doctor.view import show
from megatron_adams.kernels import compile as compile_module
from megatron_adams.kernels.cache import KernelCache
from megatron_adams.kernels.compile import cubin
from megatron_adams.kernels.modes import Mode
from tests.unit import fake_nvml
from tests.unit.fake_nvml import GIB, NODE, NOT_SUPPORTED, FakeDriver

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "doctor.md").read_text("utf-8")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return fake_nvml.build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def driver(library, tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return FakeDriver(library, tmp_path, monkeypatch)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder of compiled kernels, empty; what compiles for GPUs is fast."""
    folder = tmp_path / "kernels"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("MEGATRON_ADAMS_CACHE_DIR", str(folder))
    monkeypatch.setattr(compile_module, "compile_cuda", lambda text, defines, arch: b"cubin")
    return folder


def look(**question) -> Report:
    return examine(Question(imports_megatron=False, **question))


def found(report: Report, name: str):
    (check,) = [check for check in report.checks if check.name == name]
    return check


def against(report: Report) -> list[str]:
    return [check.name for check in report.against]


def prolog(capsys, *arguments: str) -> tuple[int, str]:
    """The exit status and the output of the command, without the seconds of importing Megatron."""
    code = main(["doctor", "--quick", *arguments])
    return code, capsys.readouterr().out


# --- a healthy node -----------------------------------------------------------------------------


def test_healthy_node_is_fit_and_is_told_of(driver, capsys):
    code, out = prolog(capsys, "--expect-gpus", "8", "--expect-driver", "580.65")
    assert code == 0, out
    assert "driver 580.65.06, as expected" in out and "8 of 8 GPUs visible, as expected" in out
    assert len(re.findall(r"^ok +gpu\d: NVIDIA H100 80GB HBM3, sm_90", out, re.MULTILINE)) == 8
    assert "all are NVIDIA H100 80GB HBM3, 80 GiB" in out
    assert out.splitlines()[-1].startswith("fit for a job on GPUs")


def test_every_call_has_the_name_and_the_values_of_nvml(driver):
    driver.say({"Processes.1": f"17:{GIB} 23:{2 * GIB}", "NvLinks.1": "110", "Reasons.1": "0xc04"})
    with nvml.session() as session:
        assert session.driver() == "580.65.06" and session.cuda() == (13, 0)
        gpu = session.gpus()[1]
    assert gpu == nvml.Gpu(
        index=1,
        uuid="GPU-00000001-1111-2222-3333-444444444444",
        name="NVIDIA H100 80GB HBM3",
        bus_id="00000000:2B:00.0",
        compute_capability=(9, 0),
        # Version 2: without what the driver reserves.
        memory=nvml.Memory(80 * GIB, 4 << 20, 80 * GIB - (4 << 20) - (500 << 20)),
        processes=(nvml.Process(17, GIB), nvml.Process(23, 2 * GIB)),
        sm_clock=nvml.Clock(345, 1980),
        memory_clock=nvml.Clock(2619, 2619),
        clock_limits=("SwPowerCap", "0xc00"),
        temperature_c=31,
        ecc_is_on=True,
        ecc_errors=nvml.EccErrors(0, 0),
        remapped_rows=nvml.RemappedRows(0, False, False),
        retired_pages_pending=nvml.Unanswered("not supported by this GPU"),
        nvlinks=nvml.NvLinks(3, 2),
        fabric=nvml.Fabric("completed", True),
        compute_mode="default",
        mig_instances=None,
    )
    assert gpu.failure is None and gpu.arch == "sm_90"


def test_bits_of_clock_limits_are_those_of_nvidia_ml_py():
    for bit, name in nvml._CLOCK_LIMITS.items():
        assert getattr(pynvml, f"nvmlClocksEventReason{name}") == bit
    names = {*vars(pynvml)}
    assert {*nvml._HARMLESS, *nvml._REFUSALS} <= names
    judged = {"GpuIdle", *gpus_module()._BAD_LIMITS, *gpus_module()._POOR_LIMITS}
    assert judged == set(nvml._CLOCK_LIMITS.values())


def gpus_module():
    from megatron_adams.doctor import gpus

    return gpus


def test_older_driver_is_asked_by_older_names(tmp_path, monkeypatch):
    library = fake_nvml.build(tmp_path, "-DOLD_DRIVER")
    FakeDriver(library, tmp_path, monkeypatch).say({"Reasons": "0x40"})
    with nvml.session() as session:
        gpu = session.gpus()[0]
    assert gpu.clock_limits == ("HwThermalSlowdown",)
    assert gpu.memory == nvml.Memory(80 * GIB, 4 << 20, 80 * GIB - (4 << 20))


# --- what is planted ----------------------------------------------------------------------------

# What the driver says -> the check that stops a job, words of what was found and of the remedy.
BROKEN = {
    "ecc": ({"EccSinceLoad.3": "2"}, "gpu3.ecc", "uncorrected ECC errors: 2 since", "drain"),
    "remap_pending": ({"Remapped.0": "0 1 1 0"}, "gpu0.repairs", "1 row of memory", "--gpu-reset"),
    "remap_failed": ({"Remapped.0": "0 512 0 1"}, "gpu0.repairs", "no spare row", "replaced"),
    "pages": (
        {"Remapped": None, "RetiredPending.2": "1", "RetiredPending": "0"},
        "gpu2.repairs",
        "pages of memory are to be retired",
        "reset",
    ),
    "hot": ({"Reasons.5": "0x48"}, "gpu5.clocks", "too hot (HwThermalSlowdown)", "cool"),
    "power_brake": ({"Reasons.5": "0x80"}, "gpu5.clocks", "power supply", "power cabling"),
    "memory_hot": ({"Reasons.5": "0x20"}, "gpu5.clocks", "SwThermalSlowdown", "cool"),
    "lost": ({"Handle.6": "error 15"}, "gpu6.alive", "GPU is lost", "Xid"),
    "lost_later": ({"Memory.6": "error 15"}, "gpu6.alive", "GPU is lost", "drain the node"),
    "unknown_error": ({"EccMode.1": "error 999"}, "gpu1.alive", "Unknown Error", "reboot"),
    "links": ({"NvLinks.4": "1" * 17 + "0"}, "gpus.nvlink", "GPU 4: 17 of 18", "nvlink -s"),
    "fabric": ({"Fabric": "1 0"}, "gpu0.fabric", "not started", "nvidia-fabricmanager"),
    "fabric_failed": ({"Fabric.0": "3 999"}, "gpu0.fabric", "failed", "nvidia-fabricmanager"),
    "prohibited": ({"ComputeMode.7": "2"}, "gpu7.mode", "prohibited", "--compute-mode=0"),
    "in_use": (
        {"Memory.2": f"{80 * GIB} {9 * GIB}", "Processes.2": f"4711:{9 * GIB}"},
        "gpu2.memory",
        "compute process 4711: 9.0 GiB are in use",
        "kill",
    ),
    "leaked": (
        {"Memory.2": f"{80 * GIB} {2 * GIB}"},
        "gpu2.memory",
        "by no process that is seen",
        "--gpu-reset",
    ),
    "no_mig_instance": ({"MigMode.0": "1"}, "gpu0.mig", "with 0 instances", "--mig=0"),
    "no_memory_call": ({"Memory.1": NOT_SUPPORTED}, "gpu1.memory", "not supported", "driver"),
    "no_capability": ({"Capability.1": NOT_SUPPORTED}, "gpu1.name", "not supported", "driver"),
    "old_cuda": ({"Cuda": "12080"}, "driver.cuda", "supports CUDA 12.8, and torch", "cuda-compat"),
    "old_gpu": ({"Capability": "3.7"}, "software.torch-archs", "none for sm_37", "install a torch"),
    "no_gpu": ({"Count": "0"}, "gpus.visible", "shows no GPU", "dmesg"),
    "uncounted": ({"Count": "error 999"}, "driver.nvml", "does not count", "reboot"),
    "not_loaded": ({"Init": "error 9"}, "driver.nvml", "not loaded", "modprobe nvidia"),
    "mismatch": ({"Init": "error 18"}, "driver.nvml", "different versions", "reboot the node"),
    "forbidden": ({"Init": "error 4"}, "driver.nvml", "/dev/nvidiactl", "group"),
    "no_start": ({"Init": "error 999"}, "driver.nvml", "Unknown Error", "dmesg"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_node_stops_a_prolog_and_the_remedy_is_said(driver, capsys, name):
    changes, check_name, words, remedy = BROKEN[name]
    driver.say(changes)
    code, out = prolog(capsys)
    assert code == 1
    lines = out.splitlines()
    (line,) = [line for line in lines if line.startswith(f"problem   {check_name}: ")]
    assert words in line
    assert remedy in lines[lines.index(line) + 1].partition("remedy: ")[2]
    assert lines[-1].startswith("NOT fit for a job on GPUs") and check_name in lines[-1]


@pytest.mark.parametrize("version", ["580.64", "58", "580.65.0", "570"])
def test_another_driver_stops_a_prolog(driver, capsys, version):
    code, out = prolog(capsys, "--expect-driver", version)
    assert code == 1
    assert f"driver 580.65.06, expected {version}" in out
    assert f"remedy: install driver {version} on this node" in out
    for same in ("580", "580.65", "580.65.06"):
        assert prolog(capsys, "--expect-driver", same)[0] == 0


def test_driver_of_unknown_version_is_not_the_expected_one(driver):
    driver.say({"Driver": NOT_SUPPORTED})
    assert found(look(), "driver.version").status is Status.NOT_KNOWN
    assert against(look(expected_driver="580")) == ["driver.version"]


@pytest.mark.parametrize(
    ("setting", "num", "words"),
    [
        ("", 0, "0 of 8 GPUs visible (CUDA_VISIBLE_DEVICES=): it hides every GPU"),
        ("-1", 0, "its entry '-1' names no GPU here"),
        ("NoDevFiles", 0, "its entry 'NoDevFiles' names no GPU here"),
        ("0,9,1", 1, "its entry '9' names no GPU here"),
        ("0,0", 1, "or one twice"),
        ("GPU-0000000", 0, "'GPU-0000000' names no GPU"),
    ],
)
def test_setting_that_hides_gpus_stops_a_prolog(driver, monkeypatch, setting, num, words):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
    report = look()
    assert against(report) == ["gpus.visible"]
    check = found(report, "gpus.visible")
    assert words in check.text and "CUDA_VISIBLE_DEVICES" in check.remedy
    assert sum(gpu["visible"] for gpu in report.facts["gpus"]) == num


def test_gpu_that_the_job_does_not_see_is_not_judged(driver, monkeypatch):
    driver.say({"EccSinceLoad.3": "5"})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-00000001,0, 2")
    report = look(expected_gpus=3)
    assert report.is_fit
    assert not any(check.name.startswith("gpu3") for check in report.checks)
    assert [gpu["visible"] for gpu in report.facts["gpus"]] == [True] * 3 + [False] * 5
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert against(look()) == ["gpu3.ecc"]


def test_missing_gpu_stops_a_prolog_that_expects_it(driver, capsys):
    driver.say({"Count": "7"})
    assert prolog(capsys)[0] == 0
    code, out = prolog(capsys, "--expect-gpus", "8")
    assert code == 1
    assert "7 of 7 GPUs visible, expected 8" in out and "Xid 79" in out


def test_unlike_gpus_are_a_warning(driver):
    driver.say({"Name.7": "NVIDIA A100", "Memory.6": f"{40 * GIB} 0"})
    check = found(look(), "gpus.alike")
    assert check.status is Status.WARNING and "CUDA_DEVICE_ORDER" in check.remedy
    assert "GPU 7: NVIDIA A100, 80 GiB; " not in check.text.partition("GPU 7")[0]
    assert "GPU 6: NVIDIA H100 80GB HBM3, 40 GiB" in check.text


def test_mig_instance_is_told_of_and_can_be_named(driver, monkeypatch):
    driver.say({"MigMode.0": "1", "MigUuid2.0": "MIG-aaaa", "MigMemory2.0": f"{10 * GIB} {GIB}"})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-aaaa")
    report = look(expected_gpus=1)
    assert report.is_fit
    check = found(report, "gpu0.mig")
    assert check.status is Status.WARNING and "with 1 instance:" in check.text
    assert report.facts["gpus"][0]["mig_instances"][0]["memory"]["total"] == 10 * GIB
    with nvml.session() as session:
        assert session.memory_of("aaaa").used == session.memory_of("MIG-aaaa").used == GIB
        assert session.memory_of(NODE["Uuid.1"].removeprefix("GPU-")).used == 4 << 20
        lost = session.memory_of("bbbb")
    assert isinstance(lost, nvml.Unanswered) and "bbbb" in lost.reason


# --- what is not supported ----------------------------------------------------------------------


@pytest.mark.parametrize("error", [3, 4, 13, 21, 25])
def test_unsupported_call_is_never_healthy_and_never_a_crash(driver, capsys, error):
    needed = {"Count", "Driver", "Cuda", "Name", "Memory", "Capability"}
    driver.say({name: f"error {error}" for name in NODE if name not in needed})
    code, out = prolog(capsys, "--json")
    report = json.loads(out)
    assert code == 0
    unknown = {check["name"] for check in report["checks"] if check["status"] == "not known"}
    for gpu in range(8):
        assert {f"gpu{gpu}.{name}" for name in ("clocks", "ecc", "repairs", "nvlink")} <= unknown
        facts = report["gpus"][gpu]
        assert all("not_known" in facts[name] for name in ("ecc_errors", "nvlinks", "fabric"))
    assert report["counts"]["not known"] == len(unknown) >= 32
    # A cluster whose GPUs support every call has this stop a job.
    code, out = prolog(capsys, "--strict")
    assert code == 1
    assert "not known: clocks, ecc, repairs, nvlink" in out
    assert "gpu0.ecc" in out.splitlines()[-1]


def test_call_that_an_older_nvidia_ml_py_lacks_is_not_supported(driver, monkeypatch):
    monkeypatch.delattr(pynvml, "nvmlDeviceGetGpuFabricInfoV")
    with nvml.session() as session:
        fabric = session.gpus()[0].fabric
    assert isinstance(fabric, nvml.Unanswered) and not fabric.is_failure
    assert "this nvidia-ml-py" in fabric.reason


# --- warnings, and what a user decides ----------------------------------------------------------

POOR = {
    "lifetime": ({"EccLifetime.1": "7"}, "gpu1.ecc", "7 in the GPU's life"),
    "ecc_off": ({"EccMode.1": "0"}, "gpu1.ecc", "ECC is off"),
    "power_cap": ({"Reasons.1": "0x4"}, "gpu1.clocks", "SwPowerCap"),
    "app_clocks": ({"Reasons.1": "0x2"}, "gpu1.clocks", "application clocks"),
    "nameless": ({"Reasons.1": "0x400"}, "gpu1.clocks", "without a name (0x400)"),
    "process": ({"Processes.1": "99:1000"}, "gpu1.memory", "compute process 99"),
    "links_down": ({"NvLinks": "0000"}, "gpu1.nvlink", "0 of 4 NVLinks up"),
}


@pytest.mark.parametrize("name", POOR)
def test_warning_leaves_the_exit_status_but_for_strict(driver, capsys, name):
    changes, check_name, words = POOR[name]
    driver.say(changes)
    code, out = prolog(capsys)
    assert code == 0
    assert re.search(rf"^warning +{check_name}: .*{re.escape(words)}", out, re.MULTILINE)
    assert prolog(capsys, "--strict", "--ignore", "software.*")[0] == 1
    ignored = [word for pattern in ("software.*", "gpu*") for word in ("--ignore", pattern)]
    assert prolog(capsys, "--strict", *ignored)[0] == 0


def test_ignored_check_is_shown_and_does_not_count(driver, capsys):
    driver.say({"EccSinceLoad.3": "2"})
    code, out = prolog(capsys, "--ignore", "gpu3.ecc")
    assert code == 0
    assert "ignored   gpu3.ecc: uncorrected ECC errors: 2" in out
    assert prolog(capsys, "--ignore", "gpu2.*")[0] == 1


def test_running_job_is_no_fault_of_its_own_machine(driver, capsys):
    job = {"Memory": f"{80 * GIB} {70 * GIB}", "Processes": f"7:{70 * GIB}", "Reasons": "0x4"}
    driver.say(job)
    assert prolog(capsys)[0] == 1
    assert prolog(capsys, "--while-running")[0] == 0
    assert found(look(), "gpu0.clocks").status is Status.WARNING
    assert found(look(is_running=True), "gpu0.clocks").status is Status.OK
    driver.say({**job, "EccSinceLoad.0": "1"})
    assert prolog(capsys, "--while-running")[0] == 1


# --- kernels ------------------------------------------------------------------------------------


def test_no_compiler_and_an_empty_cache_stops_a_prolog(driver, capsys, monkeypatch, cache):
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "cuda.bindings", None)
        code, out = prolog(capsys)
        report = look()
    assert code == 1
    assert "problem   kernel.sm_90: foreach backend (plain torch operations, several" in out
    assert "pip install 'megatron-adams[cu13]'" in out
    assert report.facts["kernels"]["backends"] == {"cuda": "foreach"}
    assert not [*cache.iterdir()]
    # The same machine, with what an image brings.
    for mode in kernels.modes_of({"bf16": True, "use_distributed_optimizer": True}):
        cubin(mode, "sm_90")
    code, out = prolog(capsys)
    assert code == 0
    assert "cuda backend: all 2 kernels for sm_90 are in the cache" in out
    assert look().facts["kernels"]["backends"] == {"cuda": "cuda"}


def test_no_nvrtc_stops_a_prolog(driver, capsys, monkeypatch):
    def none(function):
        raise compile_module._no_nvrtc(ImportError("libnvrtc.so"))

    monkeypatch.setattr(compile_module, "_nvrtc", none)
    code, out = prolog(capsys)
    assert code == 1
    assert "no NVRTC (libnvrtc.so)" in out and "pip install 'megatron-adams[cu13]'" in out


def test_gpu_that_nvrtc_does_not_know_stops_a_prolog(driver, capsys, monkeypatch):
    monkeypatch.setattr(kernels, "cuda_archs", lambda: ("sm_75", "sm_80"))
    code, out = prolog(capsys)
    assert code == 1
    assert "does not compile for sm_90, only for sm_75, sm_80" in out


def test_kernel_is_compiled_to_try_and_not_kept(driver, monkeypatch, cache):
    asked = []

    def compile_cuda(text, defines, arch):
        asked.append(arch)
        return b"cubin"

    monkeypatch.setattr(compile_module, "compile_cuda", compile_cuda)
    report = look()
    assert report.is_fit and asked == ["sm_90"] and not [*cache.iterdir()]
    assert "0 of 2 kernels that the job needs" in found(report, "kernel.cache").text
    assert report.facts["kernels"]["missing"] == [
        "g32-pb16-m32-w32.sm_90",
        "g32-pb16-m32-w32-rms.sm_90",
    ]


def test_compiler_that_fails_stops_a_prolog(driver, capsys, monkeypatch):
    def fail(text, defines, arch):
        raise compile_module.CompileError("NVRTC for sm_90: broken\nmore of it")

    monkeypatch.setattr(compile_module, "compile_cuda", fail)
    code, out = prolog(capsys)
    assert code == 1 and re.search("NVRTC for sm_90: broken$", out, re.MULTILINE)


@pytest.fixture
def as_nobody():
    """Without root's rights, for which no folder is closed."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_cache_without_permission_stops_a_prolog(driver, capsys, monkeypatch, as_nobody):
    def stopped() -> str:
        code, out = prolog(capsys)
        assert code == 1
        lines = out.splitlines()
        (line,) = [line for line in lines if line.startswith("problem   ")]
        assert line.startswith("problem   kernel.cache: ")
        return line + lines[lines.index(line) + 1].strip()

    with tempfile.TemporaryDirectory() as parent:
        driver.file = Path(parent) / "nvml.txt"
        monkeypatch.setenv("FAKE_NVML", str(driver.file))
        driver.say()
        closed = Path(parent) / "closed"
        closed.mkdir(mode=0o000)
        monkeypatch.setenv("MEGATRON_ADAMS_CACHE_DIR", str(closed))
        line = stopped()
        assert f"{closed}: Permission denied" in line
        assert "remedy: mend that, or set MEGATRON_ADAMS_CACHE_DIR to a folder" in line
        # It can be read, and not be written.
        closed.chmod(0o500)
        line = stopped()
        assert "0 of 2 kernels that the job needs, and it cannot be written (Permission" in line
        assert "remedy: make it writable, fill it as its owner (megatron-adams precompile)" in line
        # One that is not there, below it.
        monkeypatch.setenv("MEGATRON_ADAMS_CACHE_DIR", str(closed / "deeper" / "kernels"))
        assert f"{closed} cannot be written" in stopped()
        closed.chmod(0o700)
        assert prolog(capsys)[0] == 0


def test_warm_cache_needs_not_be_writable(driver, monkeypatch, cache):
    for mode in kernels.wanted(None, for_gpu=True).modes:
        cubin(mode, "sm_90")
    monkeypatch.setattr(KernelCache, "why_not_writable", lambda self: "Read-only file system")
    assert look().is_fit
    next(cache.iterdir()).unlink()
    assert against(look()) == ["kernel.cache"]


@pytest.mark.parametrize("fault", ["owner", "mode"])
def test_cache_of_others_stops_a_prolog(driver, capsys, monkeypatch, cache, fault):
    for mode in kernels.wanted(None, for_gpu=True).modes:
        cubin(mode, "sm_90")
    assert look().is_fit
    if fault == "mode":
        cache.chmod(0o770)
    elif os.geteuid() == 0:
        os.chown(cache, 4321, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 4321)
    code, out = prolog(capsys)
    assert code == 1
    assert re.search(r"problem   kernel.cache: .*owned by uid \d+ with mode 07[07]0", out)
    assert "chmod go-w" in out and "MEGATRON_ADAMS_CACHE_DIR" in out
    # What lies there is not taken.
    assert len(look().facts["kernels"]["missing"]) == 2


def test_full_disk_stops_a_prolog(driver, monkeypatch):
    def full(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(KernelCache, "_try_to_write", staticmethod(full))
    report = look()
    assert against(report) == ["kernel.cache"]
    assert "No space left on device" in found(report, "kernel.cache").text


def test_user_without_a_home_is_a_problem_with_a_remedy(driver, monkeypatch):
    monkeypatch.delenv("MEGATRON_ADAMS_CACHE_DIR")
    monkeypatch.setattr("megatron_adams.kernels.cache.default_folder", lambda: None)
    report = look()
    assert against(report) == ["kernel.cache"]
    assert "no home folder" in found(report, "kernel.cache").text


def test_looking_at_a_cache_makes_and_leaves_nothing(monkeypatch, tmp_path, cache):
    absent = tmp_path / "absent" / "kernels"
    folder = KernelCache(absent)
    assert folder.why_not_trusted() is None and folder.why_not_writable() is None
    assert not folder.has("*") and not absent.parent.exists()
    before = stat.S_IMODE(cache.stat().st_mode)
    assert KernelCache(cache).why_not_writable() is None
    assert not [*cache.iterdir()] and stat.S_IMODE(cache.stat().st_mode) == before


# --- which kernels ------------------------------------------------------------------------------


def test_offload_needs_kernels_on_both_devices(driver):
    offload = {
        "bf16": True,
        "use_distributed_optimizer": True,
        "use_precision_aware_optimizer": True,
        "optimizer_cpu_offload": True,
    }
    want = kernels.wanted({**offload, "optimizer_offload_fraction": 0.5}, for_gpu=True)
    assert (want.on_gpu, want.on_cpu) == (True, True)
    assert want.modes[0] == Mode("fp32", "bf16", "fp32", "remainder")
    want = kernels.wanted({**offload, "optimizer_offload_fraction": 1.0}, for_gpu=True)
    assert (want.on_gpu, want.on_cpu) == (False, True)
    found_kernels, _ = kernels.check(want, ["sm_90"])
    assert found_kernels.backends == {"cpu": "host"}


def test_job_of_another_optimizer_needs_no_kernel():
    found_kernels, checks = kernels.check(
        kernels.wanted({"optimizer": "adam", "bf16": True}, for_gpu=True), ["sm_90"]
    )
    assert not checks and not found_kernels.needed


def test_fp8_params_have_kernels_of_their_own():
    args = {"bf16": True, "use_distributed_optimizer": True, "fp8_param_gather": True}
    assert kernels.modes_of(args)[0] == Mode("fp32", "fp32", "fp32", "none")
    args |= {"use_precision_aware_optimizer": True, "fp8_recipe": "delayed"}
    names = {mode.name for mode in kernels.modes_of(args)}
    assert {"g32-pe4m3-m32-w32", "g32-pb16-m32-wr"} <= names


@pytest.mark.parametrize("requested", ["host", "cuda", "foreach"])
def test_kernel_that_is_asked_for_by_name(driver, requested):
    want = kernels.wanted({"adams_kernel": requested, "bf16": True}, for_gpu=True)
    _, checks = kernels.check(want, ["sm_90"])
    problems = [check.name for check in checks if check.status is Status.PROBLEM]
    assert problems == (["kernel.sm_90"] if requested == "host" else [])


# --- packages -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "built_for", "runs"),
    [
        ("sm_90", ("sm_80", "sm_90"), True),
        ("sm_86", ("sm_80",), True),
        ("sm_80", ("sm_86",), False),
        ("sm_90", ("sm_80",), False),
        ("sm_90", ("sm_80", "compute_80"), True),
        ("sm_100", ("sm_90a", "sm_90"), False),
        ("sm_90", ("sm_90a",), True),
        ("sm_120", ("sm_100",), False),
        ("sm_103", ("sm_100",), True),
    ],
)
def test_code_runs_on_gpus_of_its_major_version(arch, built_for, runs):
    assert software.runs_on(arch, built_for) is runs


def test_torch_without_cuda_is_a_problem_for_a_gpu_job(driver, monkeypatch):
    monkeypatch.setattr("torch.version.cuda", None)
    report = look()
    assert "software.torch" in against(report)
    assert "CUDA build" in found(report, "software.torch").remedy
    assert found(look(for_gpu=False), "software.torch").status is Status.OK


def test_versions_that_do_not_fit_are_a_problem(driver, monkeypatch):
    real = software._version
    monkeypatch.setattr(
        software, "_version", lambda name: "0.15.3" if name == "megatron-core" else real(name)
    )
    report = look()
    assert against(report) == ["software.requirements"]
    text = found(report, "software.requirements").text
    assert text.startswith("megatron-core 0.15.3, needed ") and ">=0.1" in text


def test_a_container_s_torch_of_the_range_is_taken(driver, monkeypatch):
    real = software._version
    version = "2.9.0a0+145a3a7bda.nv25.10"
    monkeypatch.setattr(software, "_version", lambda x: version if x == "torch" else real(x))
    assert found(look(), "software.requirements").status is Status.OK


def test_unrelated_packages_of_the_same_names_are_told_of(driver, monkeypatch, tmp_path):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    for name, version in (("apex", "0.9.8"), ("adams", "1.0.1")):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    report = look()
    assert against(report) == ["software.apex"]
    assert "apex 0.9.8 is not NVIDIA's" in found(report, "software.apex").text
    assert "pip uninstall apex" in found(report, "software.apex").remedy
    assert found(report, "software.adams").status is Status.WARNING
    (tmp_path / "apex" / "normalization").mkdir()
    assert look().is_fit


# --- the forms of the report --------------------------------------------------------------------


def test_json_has_the_documented_keys_and_no_other(driver, capsys):
    code, out = prolog(capsys, "--json")
    report = json.loads(out)
    assert code == report["exit_status"] == 0 and report["fit"] is True and report["format"] == 1
    documented = re.findall(r"^\| `(\w+)` \|", PAGE.partition("## JSON")[2], re.MULTILINE)
    assert {*report, *report["checks"][0]} == {*documented}
    assert len(report["gpus"]) == 8 and report["driver"] == {"version": "580.65.06", "cuda": "13.0"}


def test_every_check_is_documented(driver):
    """Those of a healthy node and those that are planted above."""
    names = {check.name for check in look().checks}
    names |= {check_name for _, check_name, *_ in BROKEN.values()}
    table = {name.replace("N", "") for name in re.findall(r"^\| `([\w.*-]+)`", PAGE, re.MULTILINE)}
    assert {re.sub(r"^gpu\d", "gpu", re.sub(r"sm_\d+", "ARCH", name)) for name in names} <= table


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("columns", [80, 160])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_terminal_has_every_word_within_its_width(driver, monkeypatch, columns, encoding):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm-256color")
    driver.say({"EccSinceLoad.3": "2", "Reasons.4": "0x4", "Remapped.5": None})
    report = look()
    terminal = Terminal()
    terminal.encoding = encoding
    show(report, terminal, is_verbose=False)
    text = re.sub(r"\x1b\[[\d;]*m", "", terminal.getvalue())
    assert max(map(len, text.splitlines())) <= columns
    words = " ".join(text.split())
    for check in report.checks:
        if check.status in (Status.PROBLEM, Status.WARNING):
            for word in (*check.text.split(), *check.remedy.split()):
                assert word in words, word
    marks = ("✗", "→") if encoding == "utf-8" else ("x", "->")
    assert all(mark in text for mark in marks)
    assert encoding == "utf-8" or "✓" not in text


def test_piped_report_has_no_escapes_and_a_line_for_each_check(driver, capsys):
    _, out = prolog(capsys, "--verbose")
    assert "\x1b" not in out
    lines = out.splitlines()
    assert sum(line.startswith("ok ") and " gpu0." in line for line in lines) == 6
    statuses = "|".join(status.value for status in Status)
    assert all(re.match(rf"(?:{statuses}|  ) +", line) for line in lines[1:-1])


# --- the command --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--expect-gpus", "0"], "--expect-gpus 0: must be at least 1"),
        (["--expect-gpus", "many"], "--expect-gpus"),
        (["--cpu-rehearsal", "--expect-gpus", "8"], "--expect-gpus with --cpu-rehearsal"),
        (["--cpu-rehearsal", "--expect-driver", "580"], "--expect-driver with --cpu-rehearsal"),
        (["--cpu-rehearsal", "--while-running"], "--while-running with --cpu-rehearsal"),
        (["pretrain_gpt.py"], "'pretrain_gpt.py': is no option"),
        (["--quick", "--", "--bf16"], "--quick with launch flags"),
        (["--world-size", "8"], "--world-size without launch flags"),
        (["--world-size", "0", "--", "--bf16"], "--world-size 0: must be at least 1"),
        (["--gpu"], "--gpu"),
    ],
)
def test_wrong_arguments_are_explained_and_exit_with_2(capsys, arguments, words):
    with pytest.raises(SystemExit) as error:
        main(["doctor", *arguments])
    assert error.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megatron_adams.cli", "doctor", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def test_machine_without_a_driver_says_what_is_missing(tmp_path):
    if any(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("this machine has a GPU")
    done = run("--quick")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "problem   driver.nvml: no NVIDIA driver: libnvidia-ml.so.1 is not found" in done.stdout
    assert "remedy: install the driver, or start the container with its GPUs" in done.stdout
    assert "kernel.compiler" in done.stdout and not done.stderr


def test_machine_without_nvidia_ml_py_says_so(driver, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    code, out = prolog(capsys)
    assert code == 1
    assert "nvidia-ml-py cannot be imported" in out
    assert "remedy: pip install 'megatron-adams[tools]'" in out


def test_real_prolog_with_a_driver_s_library(library, driver):
    """nvidia-ml-py loads the library by its name, and Megatron is imported beside it."""
    driver.say({"EccSinceLoad.3": "2"})
    paths = f"{library.parent}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    done = run("--expect-gpus", "8", LD_LIBRARY_PATH=paths)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.findall(r"^problem +([\w.]+):", done.stdout, re.MULTILINE) == ["gpu3.ecc"]
    assert re.search(r"^ok +megatron.import: Megatron-Core 0\.19", done.stdout, re.MULTILINE)


def test_rehearsal_passes_here_and_its_flags_are_judged():
    flags = (
        "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 "
        "--max-position-embeddings 32 --micro-batch-size 2 --global-batch-size 8 --lr 1e-3 "
        "--tensor-model-parallel-size 2 --optimizer adams --bf16 --use-distributed-optimizer"
    )
    done = run("--cpu-rehearsal", "--json", "--", *flags.split(), CUDA_DEVICE_MAX_CONNECTIONS="1")
    report = json.loads(done.stdout)
    assert done.returncode == 0, (report["checks"], done.stderr)
    assert report["flags"]["world_size"] == 2
    assert report["kernels"]["backends"] == {"cpu": "host"}
    assert all("g32-pb16-m32-w32" in name for name in report["kernels"]["needed"])
