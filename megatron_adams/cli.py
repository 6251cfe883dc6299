"""The command `megatron-adams`, also `python -m megatron_adams.cli`.

    megatron-adams precompile --arch sm_90 --cache-dir /opt/megatron-adams
    megatron-adams convert /checkpoints/adamw /checkpoints/adams

It must not import Megatron, and needs no GPU.
"""

import argparse
import difflib
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from megatron_adams.checkpoint import DamagedCheckpointError, convert
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

_PRECOMPILE = """\
Fill the cache of compiled kernels, so that a job compiles nothing. For container images:

  RUN megatron-adams precompile --arch sm_90 --cache-dir /opt/megatron-adams
  ENV MEGATRON_ADAMS_CACHE_DIR=/opt/megatron-adams

Needs NVRTC (which comes with torch's CUDA builds) for GPUs, a C++ compiler for CPUs, and no GPU.
"""


_CONVERT = """\
Make a checkpoint for --optimizer adams of one that Megatron saved with --optimizer adam:

  megatron-adams convert /checkpoints/adamw /checkpoints/adams

exp_avg_sq stays behind; all else is copied as it is, in the formats torch_dist and torch, and in
the layout that it was saved in. The run needs no --adams-from-adam then. Needs the Megatron that
saved it to be installed, one process, and no GPU.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code: 1 if it fails, 2 (SystemExit) for wrong arguments.

    Args:
        argv: by default sys.argv[1:].
    """
    parser = argparse.ArgumentParser(prog="megatron-adams", description="Tools of megatron-adams.")
    commands = parser.add_subparsers(dest="command", required=True)
    precompile = commands.add_parser(
        "precompile",
        help="fill the cache of compiled kernels",
        description=_PRECOMPILE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    precompile.add_argument(
        "--arch",
        action="append",
        default=[],
        help=f"what to compile for: a GPU's (sm_90) or a CPU's ({', '.join(HOST_ARCHS)}); can be "
        "given several times",
    )
    precompile.add_argument("--host", action="store_true", help="compile for this machine's CPU")
    precompile.add_argument(
        "--mode",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="the dtypes of gradient, param, exp_avg and master weights, as g32-pb16-m32-w32, with "
        "-rms behind it for the kernel that --optimizer adams logs the update RMS with; by default "
        f"all {len(ALL_MODES)} modes, both ways",
    )
    precompile.add_argument(
        "--cache-dir",
        type=Path,
        metavar="DIR",
        help="a folder that all users may read, made where missing; by default the one that this "
        f"user's jobs look into (${ENVIRONMENT_VARIABLE}, or in the home folder)",
    )
    convert_command = commands.add_parser(
        "convert",
        help="make an AdamS checkpoint of an AdamW one",
        description=_CONVERT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    convert_command.add_argument("source", type=Path, help="read only")
    convert_command.add_argument("destination", type=Path, help="a new or an empty folder")
    args = parser.parse_args(argv)
    if args.command == "convert":
        return _convert(args.source, args.destination)
    try:
        archs = _archs(args.arch, host=args.host)
        modes = [_mode(name) for name in args.mode] or [*ALL_MODES, *GUARDED_MODES]
        recipes = _recipes(archs, modes)
    except ValueError as exc:
        precompile.error(str(exc))
    except CompileError as exc:
        return _fail(str(exc))
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
    modes = {mode.name: mode for mode in (*ALL_MODES, *GUARDED_MODES)}
    if name not in modes:
        raise ValueError(
            f"--mode {name}: must be g<gradient>-p<param>-m<exp_avg>-w<master weights>; the "
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
    """Compile what is missing, on all cores: NVRTC releases the GIL, and g++ is a process."""
    start = time.perf_counter()
    num_compiled = 0
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        futures = {pool.submit(_keep, recipe, kernels): recipe for recipe in recipes}
        try:
            for number, future in enumerate(as_completed(futures), 1):
                num_compiled += future.result()
                name = ".".join(futures[future].name.split(".")[:2])
                _report(f"[{number}/{len(recipes)}] {name}", is_last=number == len(recipes))
        except (CompileError, OSError) as exc:
            return _fail(str(exc))
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


def _convert(source: Path, destination: Path) -> int:
    try:
        done = convert(
            source, destination, report=lambda line: _report(line, is_last=_is_last(line))
        )
    except (ValueError, OSError, DamagedCheckpointError) as exc:
        return _fail(str(exc))
    except ImportError as exc:
        return _fail(f"{exc}: the checkpoint has objects of Megatron's; install megatron-core")
    saved = done.bytes_before - done.bytes_after
    print(
        f"{done.folder}: {done.bytes_after:,} bytes of {done.bytes_before:,}, {saved:,} saved "
        f"({saved / done.bytes_before:.0%}); resume with --optimizer adams --load "
        f"{shlex.quote(str(destination))}"
    )
    return 0


def _is_last(line: str) -> bool:
    """Of lines "[2/3] name"."""
    number, _, total = line[1:].partition("]")[0].partition("/")
    return number == total


def _report(line: str, *, is_last: bool) -> None:
    if sys.stdout.isatty():
        print(f"\r\033[K{line}", end="\n" if is_last else "", flush=True)
    else:
        print(line, flush=True)


def _fail(message: str) -> int:
    print(f"megatron-adams: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
