"""Which kernels a job needs, whether they are in the cache, and whether they can be compiled.

The cache is looked at and never made or filled: a prolog often runs as another user than the job.
"""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_adams.doctor.report import Check, ok, problem, warning
from megatron_adams.kernels.cache import ENVIRONMENT_VARIABLE, KernelCache
from megatron_adams.kernels.compile import (
    INSTALL_NVRTC,
    CompileError,
    Recipe,
    cuda_archs,
    cuda_recipe,
    host_arch,
    host_cache_pattern,
    host_compiler,
    host_recipe,
    nvrtc_version,
)
from megatron_adams.kernels.modes import Mode

# Where no flags are given, the job trains in bf16 with the distributed optimizer.
_USUAL = {"bf16": True, "use_distributed_optimizer": True}
_CUDA_REMEDY = f"{INSTALL_NVRTC}, of torch's CUDA version"
_FOREACH = "foreach backend (plain torch operations, several times slower)"


@dataclass(frozen=True)
class Wanted:
    """What the optimizer of a job runs on.

    Attributes:
        modes: of its kernels.
        requested: --adams-kernel.
        on_gpu, on_cpu: where it has params.
    """

    modes: tuple[Mode, ...]
    requested: str
    on_gpu: bool
    on_cpu: bool


def wanted(arguments: Mapping[str, Any] | None, *, for_gpu: bool) -> Wanted:
    """What a job needs.

    Args:
        arguments: as launch_check.check_flags returns them; None: of the usual job.
        for_gpu: False: a rehearsal, where all params are on the CPU.
    """
    args: Mapping[str, Any] = _USUAL if arguments is None else arguments
    offloads = bool(args.get("optimizer_cpu_offload"))
    is_whole = args.get("optimizer_offload_fraction") == 1
    is_adams = args.get("optimizer", "adams") == "adams"
    return Wanted(
        modes=modes_of(args),
        requested=args.get("adams_kernel") or "auto",
        on_gpu=is_adams and for_gpu and not (offloads and is_whole),
        on_cpu=is_adams and (offloads or not for_gpu),
    )


def modes_of(args: Mapping[str, Any]) -> tuple[Mode, ...]:
    """The modes that AdamS compiles kernels for at the start of a job with these arguments.

    It follows megatron/adoption.py and fsdp.py; tests/distributed/test_doctor.py compares it with
    what runs of Megatron ask for.
    """
    half = "bf16" if args.get("bf16") else "fp16" if args.get("fp16") else None
    is_aware = bool(args.get("use_precision_aware_optimizer"))
    exp_avg = _codec(args.get("exp_avg_dtype")) if is_aware else "fp32"
    grad = _codec(args.get("main_grads_dtype")) if is_aware else "fp32"
    # Megatron keeps the main params of fp8 params with other recipes than delayed scaling.
    keeps_main = is_aware and args.get("fp8_recipe") in (None, "delayed")
    quantizes = bool(args.get("fp8_param_gather"))
    if args.get("use_megatron_fsdp"):
        plain = [_fsdp_mode(args, half or "fp32", exp_avg)]
    elif half is None:
        plain = [Mode(grad, "fp32", exp_avg, "none")]
    elif keeps_main:
        main = _codec(args.get("main_params_dtype"))
        keeps_rest = half == "bf16" and main == "fp32" and not args.get("adams_no_param_remainders")
        plain = [Mode(grad, half, exp_avg, "remainder" if keeps_rest else main)]
        if quantizes:
            plain.append(Mode(grad, "e4m3", exp_avg, main))
    elif is_aware or quantizes or not args.get("use_distributed_optimizer"):
        # The inner optimizer has Megatron's fp32 copies, and Megatron writes the params.
        plain = [Mode("fp32", "fp32", exp_avg, "none")]
    else:
        plain = [Mode("fp32", half, exp_avg, "fp32")]
    plain = [
        mode._replace(
            is_nesterov=bool(args.get("adams_nesterov")),
            is_cautious=bool(args.get("adams_cautious")),
        )
        for mode in plain
    ]
    scales = args.get("adams_match_rms") or args.get("adams_max_update_rms")
    guarded = [mode._replace(is_guarded=True) for mode in plain]
    # The steps that are logged count their updates, and the others do not.
    return tuple(guarded if scales else [*plain, *guarded])


def _fsdp_mode(args: Mapping[str, Any], own: str, exp_avg: str) -> Mode:
    """Megatron-FSDP's main params and gradients; None: "auto", the dtype of the params."""
    main = args["megatron_fsdp_main_params_dtype"] or own
    grad = args["megatron_fsdp_main_grads_dtype"] or own
    if not args.get("use_precision_aware_optimizer"):
        grad = main
    return Mode(grad, main, exp_avg, "none")


def _codec(name: str | None) -> str:
    return "e4m3" if name == "fp8" else name or "fp32"


@dataclass(frozen=True)
class Kernels:
    """What was found.

    Attributes:
        backends: device -> what computes the step there.
        folder: the cache; None: this user has no home folder.
        needed, missing: names of kernels, as "g32-pb16-m32-w32.sm_90".
    """

    backends: dict[str, str]
    folder: Path | None
    needed: tuple[str, ...]
    missing: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """For --json."""
        return {
            "backends": self.backends,
            "cache": None if self.folder is None else str(self.folder),
            "needed": [*self.needed],
            "missing": [*self.missing],
        }


def check(
    want: Wanted, gpu_archs: Sequence[str], kernels: KernelCache | None = None
) -> tuple[Kernels, list[Check]]:
    """Look for what a job needs.

    Args:
        want: as `wanted` returns it.
        gpu_archs: of the GPUs; () where none is seen.
        kernels: the cache; by default the one that this user's jobs look into.
    """
    kernels = kernels or KernelCache()
    distrust = kernels.why_not_trusted()
    checks: list[Check] = []
    backends: dict[str, str] = {}
    needed: list[str] = []
    missing: list[str] = []
    for device, arch in (
        *((("cuda", arch) for arch in gpu_archs) if want.on_gpu else ()),
        *((("cpu", host_arch()),) if want.on_cpu else ()),
    ):
        names = [f"{mode.name}.{arch}" for mode in want.modes]
        own = "host" if device == "cpu" else "cuda"
        check_name = f"kernel.{arch}"
        if want.requested == "foreach":
            backends[device] = "foreach"
            checks.append(ok(check_name, "foreach backend: --adams-kernel foreach asks for it"))
            continue
        if want.requested not in ("auto", own) and not (want.on_gpu and want.on_cpu):
            backends[device] = want.requested
            checks.append(
                problem(
                    check_name,
                    f"--adams-kernel {want.requested} for params on {device}: it cannot read them",
                    f"give --adams-kernel {own}, or leave it out",
                )
            )
            continue
        needed += names
        try:
            lost, recipe = _missing(device, arch, want.modes, kernels)
            missing += lost
            if recipe is not None:
                # Not into the cache. One: the others differ in dtypes alone.
                recipe.build()
        except CompileError as exc:
            backends[device] = "foreach" if want.requested == "auto" else own
            first = str(exc).strip().splitlines()[0]
            checks.append(_cannot(check_name, first, device, want, names))
            missing += [name for name in names if name not in missing]
            continue
        backends[device] = own
        how = f"all {len(names)} kernels for {arch} are in the cache"
        if lost:
            how = f"a kernel for {arch} was compiled, to try"
        checks.append(ok(check_name, f"{own} backend: {how}"))
    if want.on_gpu and not gpu_archs and want.requested in ("auto", "cuda"):
        checks.append(_of_compiler())
    found = Kernels(backends, kernels.folder, tuple(needed), tuple(missing))
    checks += _cache_checks(found, kernels, distrust)
    return found, checks


def _missing(
    device: str, arch: str, modes: Sequence[Mode], kernels: KernelCache
) -> tuple[list[str], Recipe | None]:
    """The names of kernels that are not in the cache, and how the first of them is compiled.

    Raises:
        CompileError: one is missing, and nothing here compiles it.
    """
    lost: list[str] = []
    first: Recipe | None = None
    compiler = host_compiler() if device == "cpu" else None
    if device == "cuda":
        _check_nvrtc(arch)
    for mode in modes:
        if device == "cuda":
            recipe = cuda_recipe(mode, arch)
            pattern = recipe.name
        elif compiler is not None:
            recipe = host_recipe(mode, arch, compiler)
            pattern = recipe.name
        else:
            recipe, pattern = None, host_cache_pattern(mode, arch)
        if not kernels.has(pattern):
            lost.append(f"{mode.name}.{arch}")
            first = first or recipe
    if lost and device == "cpu" and compiler is None:
        raise CompileError("no C++ compiler: CXX is not set, and no g++ or clang++ is on PATH")
    return lost, first


def _of_compiler() -> Check:
    """Whether CUDA kernels can be compiled, where no GPU says for what."""
    name = "kernel.compiler"
    try:
        _check_nvrtc(None)
    except CompileError as exc:
        return problem(name, f"CUDA kernels: {exc}", _CUDA_REMEDY)
    return ok(name, f"NVRTC {nvrtc_version()} compiles kernels, once a GPU is seen")


def _check_nvrtc(arch: str | None) -> None:
    """NVRTC is asked even where all kernels are kept: its version is in their names.

    Raises:
        CompileError: there is none, or not for this GPU.
    """
    version = nvrtc_version()
    if arch is not None and arch not in cuda_archs():
        raise CompileError(
            f"NVRTC {version} does not compile for {arch}, only for {', '.join(cuda_archs())}"
        )
    try:
        importlib.import_module("cuda.bindings.driver")
    except ImportError as exc:
        raise CompileError(f"cuda.bindings, which launches kernels, is missing: {exc}") from exc


def _cannot(name: str, reason: str, device: str, want: Wanted, names: Sequence[str]) -> Check:
    """A kernel that is neither in the cache nor can be compiled."""
    arch = names[0].rpartition(".")[2]
    is_auto = want.requested == "auto"
    outcome = _FOREACH if is_auto else f"a job with --adams-kernel {want.requested} would not start"
    if device == "cuda":
        remedy = _CUDA_REMEDY
    else:
        remedy = "install a compiler (apt-get install g++, dnf install gcc-c++)"
    remedy += f"; or fill the cache where there is one: megatron-adams precompile --arch {arch}"
    is_rehearsal = device == "cpu" and not want.on_gpu and want.requested == "auto"
    # A rehearsal shows layouts and not speed.
    return (warning if is_rehearsal else problem)(name, f"{outcome}: {reason}", remedy)


def _cache_checks(found: Kernels, kernels: KernelCache, distrust: str | None) -> list[Check]:
    name, folder = "kernel.cache", found.folder
    elsewhere = f"or set {ENVIRONMENT_VARIABLE} to a folder that the job's user owns and can write"
    if folder is None:
        return [
            problem(
                name,
                "this user has no home folder for compiled kernels: each process compiles its own",
                f"set {ENVIRONMENT_VARIABLE} to a folder that the job's user owns and can write",
            )
        ]
    if distrust is not None:
        return [problem(name, f"{folder}: {distrust}", f"mend that, {elsewhere}")]
    num = len(found.needed) - len(found.missing)
    words = f"{folder}: {num} of {len(found.needed)} kernels that the job needs"
    if not found.missing:
        return [ok(name, words)] if found.needed else []
    if refusal := kernels.why_not_writable():
        return [
            problem(
                name,
                f"{words}, and it cannot be written ({refusal}): each process compiles its own",
                f"make it writable, fill it as its owner (megatron-adams precompile), {elsewhere}",
            )
        ]
    return [ok(name, f"{words}; the first process that needs one compiles it, in under a second")]
