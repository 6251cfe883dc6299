"""Run a Megatron script with `--optimizer adams` available, as `python script.py` would run it.

    torchrun --nproc-per-node 8 -m megatron_adams.launch pretrain_gpt.py --optimizer adams ...

The script sees its own sys.argv, sys.path, `__main__` and exit code, and its tracebacks contain no
frame of this file. Processes that it spawns are set up in the same way: multiprocessing imports
this module in them, in place of the main one (`_prepare_spawned_processes`). This module never
imports Megatron; `megatron_adams.register()` does.
"""

import argparse
import builtins
import functools
import importlib.util
import io
import json
import multiprocessing.spawn
import os
import signal
import sys
from collections.abc import Sequence
from importlib.abc import InspectLoader
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType, TracebackType
from typing import Any, NamedTuple, NoReturn

import megatron_adams
from megatron_adams import cpu_rehearsal

# Spawned processes inherit this variable. It holds the Job that they set up.
_ENVIRONMENT_VARIABLE = "MEGATRON_ADAMS_LAUNCH"
_PACKAGE_PARENT = str(Path(megatron_adams.__file__).parents[1])

_DESCRIPTION = """\
Run a Megatron script with --optimizer adams available. The script needs no change; everything
after its name belongs to it.

  torchrun --nproc-per-node 8 -m megatron_adams.launch pretrain_gpt.py \\
      --optimizer adams --use-distributed-optimizer ...
"""

_EPILOG = """\
CPU rehearsal:
  Runs the same script with the same flags on CPU processes over gloo: real Megatron, no GPU. Use it
  to try the exact parallel layout of a cluster job before you queue it. Keep the parallel sizes and
  the flags of the optimizer and of checkpoints. Choose a small hidden size, a short sequence and
  few iterations.

    torchrun --nproc-per-node 8 -m megatron_adams.launch --cpu-rehearsal pretrain_gpt.py \\
        --optimizer adams --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 \\
        --hidden-size 64 --train-iters 5 ...

  It shows flags that contradict each other, sizes that do not divide, schedules that deadlock,
  and checkpoints that do not save, resume or reshard. It does not model speed, GPU memory, NCCL,
  TransformerEngine and FP8 kernels, the asynchrony of streams, nor a GPU's numerics bit for bit.
  Flags that Megatron needs on CPUs are added and printed; flags that cannot be rehearsed are
  refused.
"""


class Job(NamedTuple):
    """What the launcher's own part of the command line asks for."""

    target: str  # the script's path, or a module's name
    is_module: bool
    rehearse: bool
    force_rehearsal: bool

    def set_up(self) -> None:
        """Install the stand-in if asked to. Then register AdamS, which imports Megatron."""
        if self.rehearse:
            cpu_rehearsal.install(force=self.force_rehearsal)
        megatron_adams.register()


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser that prints an error as one line, once per machine."""

    def error(self, message: str) -> NoReturn:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"megatron_adams.launch: error: {message}", file=sys.stderr, flush=True)
        sys.exit(2)


def _parser() -> _Parser:
    parser = _Parser(
        prog="python -m megatron_adams.launch",
        usage="%(prog)s [--cpu-rehearsal] [-m] script [the script's arguments]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--cpu-rehearsal", action="store_true", help="run on CPU processes, without a GPU"
    )
    parser.add_argument(
        "--force-cpu-rehearsal",
        action="store_true",
        help="the same, also where a GPU is visible; it stays unused",
    )
    parser.add_argument(
        "-m", "--module", action="store_true", help="script is a module's name, as in python -m"
    )
    version = f"megatron-adams {megatron_adams.__version__}"
    parser.add_argument("--version", action="version", version=version)
    return parser


def _load(job: Job) -> tuple[CodeType, dict[str, Any]]:
    """Return the script's code, and the attributes that Python would give its main module.

    Raises:
        OSError: the script cannot be read.
        ImportError: there is no such module, or it cannot be run.
        SyntaxError: the script does not compile.
    """
    if not job.is_module:
        path = os.path.abspath(job.target)
        with io.open_code(path) as file:
            code = compile(file.read(), path, "exec", dont_inherit=True)
        return code, {"__file__": path, "__loader__": SourceFileLoader("__main__", path)}
    spec = importlib.util.find_spec(job.target)
    if spec is not None and spec.submodule_search_locations is not None:
        spec = importlib.util.find_spec(f"{job.target}.__main__")
    if spec is None or not isinstance(spec.loader, InspectLoader):
        raise ImportError(f"no module named {job.target} that can be run")
    module_code = spec.loader.get_code(spec.name)
    if module_code is None:
        raise ImportError(f"no code object available for {job.target}")
    return module_code, {
        "__file__": spec.origin,
        "__loader__": spec.loader,
        "__package__": spec.parent,
        "__spec__": spec,
    }


def _main_module(name: str, attributes: dict[str, Any]) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(attributes, __builtins__=builtins)
    # Spawned processes pickle what the script defines under the second name, and this process under
    # the first.
    sys.modules[name] = sys.modules["__mp_main__"] = module
    return module


def _run_as_main(job: Job, script_args: Sequence[str]) -> None:
    """Become the script, with its sys.argv and a `__main__` of its own."""
    code, attributes = _load(job)
    main_module = _main_module("__main__", attributes)
    sys.argv = [str(main_module.__file__) if job.is_module else job.target, *script_args]
    exec(code, main_module.__dict__)


def _prepare_spawned_processes(job: Job) -> None:
    """Make spawned processes import this module as their main module, and run the script from it.

    A process started by spawn or forkserver first imports its parent's main module again. Without
    this function it would import the script without the stand-in and without AdamS. Megatron's
    persistent checkpoint worker is such a process, and calls torch.cuda
    (core/dist_checkpointing/strategies/async_utils.py:PersistentAsyncCaller, 0.19.2).
    """
    os.environ[_ENVIRONMENT_VARIABLE] = json.dumps(job)
    prepare = multiprocessing.spawn.get_preparation_data

    @functools.wraps(prepare)
    def get_preparation_data(name: str) -> dict[str, Any]:
        data = prepare(name)
        data.pop("init_main_from_path", None)
        data["init_main_from_name"] = "megatron_adams.launch"
        # The script's folder has replaced the folder in which `python -m` found this package.
        data["sys_path"] = [*data["sys_path"], _PACKAGE_PARENT]
        return data

    multiprocessing.spawn.get_preparation_data = get_preparation_data


def _leave_sigterm_to_the_rank() -> None:
    """With --exit-signal-handler, ignore SIGTERM, on which the rank saves and ends.

    torchrun signals the whole process group of a rank. The rank ends its step and saves; but it
    saves with processes that it spawned at its first save (core/dist_checkpointing/strategies/
    filesystem_async.py:get_write_results_queue and async_utils.py:PersistentAsyncCaller, 0.19.2),
    and these would die of the signal. The rank ends them when it ends.
    """
    if "--exit-signal-handler" in sys.argv:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _run_in_spawned_process() -> dict[str, Any]:
    """Set up as the parent did, and run its script again; return the main module's names."""
    _leave_sigterm_to_the_rank()
    job = Job(*json.loads(os.environ[_ENVIRONMENT_VARIABLE]))
    _prepare_spawned_processes(job)
    job.set_up()
    code, attributes = _load(job)
    main_module = _main_module("__mp_main__", attributes)
    # runpy has put this file's path there.
    sys.argv[0] = str(main_module.__file__)
    exec(code, main_module.__dict__)
    return main_module.__dict__


def _hide_own_frames() -> None:
    """Leave the frames of runpy and of this file out of the tracebacks of uncaught exceptions."""
    show = sys.excepthook

    @functools.wraps(show)
    def excepthook(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        own = (__file__, "<frozen runpy>")
        while trace is not None and trace.tb_frame.f_code.co_filename in own:
            trace = trace.tb_next
        show(kind, error.with_traceback(trace), trace)

    sys.excepthook = excepthook


def main(argv: Sequence[str] | None = None) -> None:
    """Set up and run the script. Returns when it ends, and raises what it raises.

    Args:
        argv: the launcher's flags, the script and the script's own arguments. None: sys.argv.
    """
    argv = sys.argv[1:] if argv is None else argv
    # No launcher flag takes a value, so the script is the first argument that is no flag.
    num_flags = next((i for i, arg in enumerate(argv) if not arg.startswith("-")), len(argv))
    parser = _parser()
    flags = parser.parse_args(argv[:num_flags])
    if num_flags == len(argv):
        parser.error("no script given; see --help")
    target, *script_args = argv[num_flags:]
    rehearse = flags.cpu_rehearsal or flags.force_cpu_rehearsal
    job = Job(target, flags.module, rehearse, flags.force_cpu_rehearsal)
    try:
        if not job.is_module:
            # Fail now, not after the seconds that the set-up takes.
            io.open_code(os.path.abspath(target)).close()
        if job.rehearse:
            added = cpu_rehearsal.rehearsal_flags(script_args)
            cpu_rehearsal.install(force=job.force_rehearsal)
            script_args += added
            if added and os.environ.get("RANK", "0") == "0":
                print("CPU rehearsal: added", *added, file=sys.stderr, flush=True)
    except OSError as error:
        parser.error(f"cannot read the script {target}: {error.strerror}")
    except cpu_rehearsal.RehearsalError as error:
        parser.error(str(error))
    _hide_own_frames()
    _prepare_spawned_processes(job)
    # Python 3.10 has no safe_path.
    if not job.is_module and not getattr(sys.flags, "safe_path", False):
        # Before Megatron is imported: a script in a Megatron-LM tree brings Megatron with it.
        sys.path[0] = os.path.dirname(os.path.realpath(target))
    job.set_up()
    _run_as_main(job, script_args)


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":
    globals().update(_run_in_spawned_process())
