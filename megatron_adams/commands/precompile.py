"""`megatron-adams precompile`: fill the cache of compiled kernels."""

import argparse
import difflib
import itertools
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from megatron_adams.commands.terminal import fail, report
from megatron_adams.kernels.cache import ENVIRONMENT_VARIABLE, KernelCache
from megatron_adams.kernels.compile import (
    HOST_ARCHS,
    CompileError,
    Recipe,
    cuda_archs,
    cuda_recipe,
    host_arch,
    host_compiler,
    host_recipe,
)
from megatron_adams.kernels.modes import ALL_MODES, GUARDED_MODES, Mode

_DESCRIPTION = """\
Fill the cache of compiled kernels, so that a job compiles nothing. For container images:

  RUN megatron-adams precompile --arch sm_90 --cache-dir /opt/megatron-adams
  ENV MEGATRON_ADAMS_CACHE_DIR=/opt/megatron-adams

It needs NVRTC (which comes with torch's CUDA builds) to compile for GPUs, and a C++ compiler to
compile for CPUs. It needs no GPU.
"""


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "precompile",
        help="fill the cache of compiled kernels",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--arch",
        action="append",
        default=[],
        help="the architecture to compile for: a GPU's (sm_90) or a CPU's "
        f"({', '.join(HOST_ARCHS)}); can be given several times",
    )
    parser.add_argument("--host", action="store_true", help="compile for this machine's CPU")
    parser.add_argument(
        "--mode",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="the dtypes of gradient, param, exp_avg and main params, such as g32-pb16-m32-w32; a "
        "name with -rms at the end is the kernel that logs the update RMS, which --optimizer adams "
        "needs, too; before it stand -nesterov and -cautious for the flags of these names; by "
        f"default all {len(ALL_MODES)} modes, with and without -rms, for the paper's update",
    )
    parser.add_argument(
        "--cache-dir",
        type=Path,
        metavar="DIR",
        help="a folder that all users may read; it is made if it is missing; by default the folder "
        f"that this user's jobs use (${ENVIRONMENT_VARIABLE}, or in the home folder)",
    )
    parser.set_defaults(run=lambda args: _run(args, parser))


def _run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    try:
        archs = _archs(args.arch, host=args.host)
        modes = [_mode(name) for name in args.mode] or [*ALL_MODES, *GUARDED_MODES]
        recipes = _recipes(archs, modes)
    except ValueError as exc:
        parser.error(str(exc))
    except CompileError as exc:
        return fail(str(exc))
    return _precompile(recipes, KernelCache(args.cache_dir, for_others=args.cache_dir is not None))


def _archs(names: Sequence[str], *, host: bool) -> list[str]:
    archs = list(dict.fromkeys([*names, *([host_arch()] if host else [])]))
    if not archs:
        raise ValueError("nothing to compile for: give --arch sm_90 or the like, or --host")
    for arch in archs:
        if arch in HOST_ARCHS or (host and arch == host_arch()):
            continue
        if not re.fullmatch(r"sm_\d+[af]?", arch):
            raise ValueError(
                f"--arch {arch}: must be a GPU's architecture, such as sm_90 (compute capability "
                f"9.0), or one of {', '.join(HOST_ARCHS)}"
            )
        if arch.rstrip("af") not in cuda_archs():
            raise ValueError(
                f"--arch {arch}: must be one that the installed NVRTC compiles for: "
                f"{', '.join(cuda_archs())}; for others, install another CUDA version"
            )
    return archs


def _mode(name: str) -> Mode:
    modes = {
        mode.name: mode
        for plain in (*ALL_MODES, *GUARDED_MODES)
        for is_nesterov, is_cautious in itertools.product((False, True), repeat=2)
        for mode in [plain._replace(is_nesterov=is_nesterov, is_cautious=is_cautious)]
    }
    if name not in modes:
        raise ValueError(
            f"--mode {name}: must be g<gradient>-p<param>-m<exp_avg>-w<main param>; the "
            f"nearest are {', '.join(difflib.get_close_matches(name, modes, cutoff=0))}"
        )
    return modes[name]


def _recipes(archs: Sequence[str], modes: Sequence[Mode]) -> list[Recipe]:
    recipes = []
    for arch in archs:
        if arch.startswith("sm_"):
            recipes += [cuda_recipe(mode, arch) for mode in modes]
        elif compiler := host_compiler():
            recipes += [host_recipe(mode, arch, compiler) for mode in modes]
        else:
            raise CompileError(
                f"no C++ compiler for {arch}: CXX is not set, and neither g++ nor clang++ is on "
                "PATH; install one (apt-get install g++, dnf install gcc-c++)"
            )
    return recipes


def _precompile(recipes: Sequence[Recipe], kernels: KernelCache) -> int:
    """Compile missing kernels on all cores: NVRTC releases the GIL, and g++ is a process."""
    start = time.perf_counter()
    num_compiled = 0
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        futures = {pool.submit(_keep, recipe, kernels): recipe for recipe in recipes}
        try:
            for number, future in enumerate(as_completed(futures), 1):
                num_compiled += future.result()
                name = ".".join(futures[future].name.split(".")[:2])
                report(f"[{number}/{len(recipes)}] {name}", is_last=number == len(recipes))
        except (CompileError, OSError) as exc:
            return fail(str(exc))
        finally:
            pool.shutdown(cancel_futures=True)
    print(
        f"{num_compiled} compiled, {len(recipes) - num_compiled} already there, "
        f"{time.perf_counter() - start:.1f} s, in {kernels.folder}"
    )
    return 0


def _keep(recipe: Recipe, kernels: KernelCache) -> bool:
    """Put a kernel into the cache; return whether it had to be compiled."""
    if kernels.find(recipe.name) is not None:
        return False
    kernels.get(recipe.name, recipe.build)
    if kernels.find(recipe.name) is None:
        raise OSError(f"{recipe.name} is not in {kernels.folder}, for the reason above")
    return True
