"""Run a Megatron script with `--optimizer adams` available, as `python script.py` would run it.

    torchrun --nproc-per-node 8 -m megatron_adams.launch pretrain_gpt.py --optimizer adams ...

The script sees its own sys.argv, sys.path, `__main__` and exit code, and its tracebacks hold no frame of this file.
Processes that it spawns get the same setup: multiprocessing re-imports the main module in them, and is told that this is
the main module (`_prepare_spawned_processes`). Megatron's persistent checkpoint worker depends on that.
"""

from __future__ import annotations

import argparse
import builtins
import functools
import importlib.util
import io
import json
import multiprocessing.spawn
import os
import sys
from collections.abc import Sequence
from importlib.abc import InspectLoader
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType, TracebackType
from typing import Any, NamedTuple, NoReturn

import megatron_adams
from megatron_adams import cpu_rehearsal

# A spawned process inherits it: what to set up and which script to re-import.
_ENVIRONMENT_VARIABLE = "MEGATRON_ADAMS_LAUNCH"

_PACKAGE_FOLDER = str(Path(megatron_adams.__file__).parents[1])

_DESCRIPTION = """\
Run a Megatron script with --optimizer adams available. The script needs no change; everything after its name
belongs to it.

  torchrun --nproc-per-node 8 -m megatron_adams.launch pretrain_gpt.py \\
      --optimizer adams --use-distributed-optimizer ...
"""

_EPILOG = """\
CPU rehearsal:
  Runs the same script with the same flags on CPU processes over gloo: real Megatron, no GPU. It is for trying the exact
  parallel layout of a cluster job, shrunk, before queueing it: keep the parallel sizes, the optimizer's and the
  checkpoint's flags, and take a small hidden size, sequence and few iterations.

    torchrun --nproc-per-node 8 -m megatron_adams.launch --cpu-rehearsal pretrain_gpt.py --optimizer adams \\
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --hidden-size 64 --train-iters 5 ...

  It shows: flags that contradict each other, groups and shards that do not divide, schedules that deadlock, checkpoints
  that do not save, resume or reshard. It does not model: speed, GPU memory, NCCL, TransformerEngine and FP8 kernels,
  the asynchrony of streams, and bit-equality with a GPU's numerics. Flags that Megatron needs on CPUs are added and
  printed; flags that cannot be rehearsed are refused.
"""


class Job(NamedTuple):
    """What the command line asks for."""

    target: str
    is_module: bool
    rehearse: bool
    force_rehearsal: bool

    def set_up(self) -> None:
        """Install the stand-in where asked for, then register AdamS: in this order, both before the script runs."""
        if self.rehearse:
            cpu_rehearsal.install(force=self.force_rehearsal)
        megatron_adams.register()


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, printed once on each machine."""

    def error(self, message: str) -> NoReturn:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"megatron_adams.launch: error: {message}", file=sys.stderr)
        sys.exit(2)


def _parser() -> _Parser:
    parser = _Parser(
        prog="python -m megatron_adams.launch",
        usage="%(prog)s [--cpu-rehearsal] [-m] script [script arguments]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--cpu-rehearsal",
        action="store_true",
        help="run on CPU processes, without a GPU (see below)",
    )
    parser.add_argument(
        "--force-cpu-rehearsal",
        action="store_true",
        help="the same where a GPU is visible; it stays unused",
    )
    parser.add_argument(
        "-m", "--module", action="store_true", help="the script is a module's name, as in python -m"
    )
    parser.add_argument(
        "--version", action="version", version=f"megatron-adams {megatron_adams.__version__}"
    )
    parser.add_argument(
        "script", nargs="?", help="path of the script, or the module's name with -m"
    )
    parser.add_argument(
        "script_args", nargs=argparse.REMAINDER, metavar="...", help="the script's own arguments"
    )
    return parser


def _load(job: Job) -> tuple[CodeType, dict[str, Any]]:
    """The script's code, and the attributes that Python gives a main module of its kind.

    Raises:
        OSError: the script cannot be read.
        ImportError: there is no such module.
        SyntaxError: the script does not compile.
    """
    if job.is_module:
        spec = importlib.util.find_spec(job.target)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{job.target}.__main__")
        code = (
            spec.loader.get_code(spec.name)
            if spec and isinstance(spec.loader, InspectLoader)
            else None
        )
        if spec is None or code is None:
            raise ImportError(f"no module named {job.target} that can be run")
        return code, {
            "__file__": spec.origin,
            "__loader__": spec.loader,
            "__package__": spec.parent,
            "__spec__": spec,
        }
    path = os.path.abspath(job.target)
    with io.open_code(path) as file:
        code = compile(file.read(), path, "exec")
    return code, {"__file__": path, "__loader__": SourceFileLoader("__main__", path)}


def _run_as_main(job: Job, script_args: Sequence[str]) -> None:
    """Become the script: its sys.path and sys.argv, and a `__main__` of its own."""
    if not job.is_module and not sys.flags.safe_path:
        sys.path[0] = os.path.dirname(os.path.realpath(job.target))
    code, attributes = _load(job)
    main = ModuleType("__main__")
    main.__dict__.update(attributes, __builtins__=builtins)
    # The second name is the one under which spawned processes pickle what the script defines.
    sys.modules["__main__"] = sys.modules["__mp_main__"] = main
    sys.argv = [main.__file__ if job.is_module else job.target, *script_args]
    exec(code, main.__dict__)


def _prepare_spawned_processes(job: Job) -> None:
    """Have spawned processes re-import this module as their main module, and with it the script.

    A process started by spawn or forkserver, such as Megatron's persistent checkpoint worker (core/dist_checkpointing/
    strategies/async_utils.py:PersistentAsyncCaller), first re-imports its parent's main module. Left alone it would
    import the script without the stand-in and without AdamS.
    """
    os.environ[_ENVIRONMENT_VARIABLE] = json.dumps(job)
    prepare = multiprocessing.spawn.get_preparation_data

    @functools.wraps(prepare)
    def get_preparation_data(name: str) -> dict[str, Any]:
        data = prepare(name)
        data.pop("init_main_from_path", None)
        data["init_main_from_name"] = "megatron_adams.launch"
        # The script's folder has replaced the folder that `python -m` found this package in.
        data["sys_path"] = [*data["sys_path"], _PACKAGE_FOLDER]
        return data

    multiprocessing.spawn.get_preparation_data = get_preparation_data


def _main_module_of_spawned_process() -> dict[str, Any]:
    """Set up as the parent did, and re-import its script: the names of this process's main module."""
    job = Job(*json.loads(os.environ[_ENVIRONMENT_VARIABLE]))
    _prepare_spawned_processes(job)
    job.set_up()
    code, attributes = _load(job)
    main = ModuleType("__mp_main__")
    main.__dict__.update(attributes, __builtins__=builtins)
    sys.modules["__mp_main__"] = main
    exec(code, main.__dict__)
    return main.__dict__


def _hide_own_frames() -> None:
    """Leave this file's frames, and runpy's above them, out of the tracebacks of uncaught exceptions."""
    show = sys.excepthook

    @functools.wraps(show)
    def excepthook(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        while trace is not None and trace.tb_frame.f_code.co_filename in (
            __file__,
            "<frozen runpy>",
        ):
            trace = trace.tb_next
        show(kind, error.with_traceback(trace), trace)

    sys.excepthook = excepthook


def main(argv: Sequence[str] | None = None) -> None:
    """Set up and run the script; returns when it ends, as `python script.py` would."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.script is None:
        parser.error(
            "no script given: torchrun ... -m megatron_adams.launch pretrain_gpt.py --optimizer adams ..."
        )
    rehearse = arguments.cpu_rehearsal or arguments.force_cpu_rehearsal
    job = Job(arguments.script, arguments.module, rehearse, arguments.force_cpu_rehearsal)
    script_args = list(arguments.script_args)
    try:
        if not job.is_module:
            with open(job.target, "rb"):
                pass
        if job.rehearse:
            added = cpu_rehearsal.rehearsal_flags(script_args)
            cpu_rehearsal.install(force=job.force_rehearsal)
            script_args += added
            if os.environ.get("RANK", "0") == "0":
                print("CPU rehearsal: added", *added, file=sys.stderr)
    except OSError as error:
        parser.error(f"cannot read the script {job.target}: {error.strerror}")
    except (RuntimeError, ValueError) as error:
        parser.error(str(error))
    _hide_own_frames()
    _prepare_spawned_processes(job)
    job.set_up()
    _run_as_main(job, script_args)


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":
    globals().update(_main_module_of_spawned_process())
