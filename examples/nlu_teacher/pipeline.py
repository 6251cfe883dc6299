"""Run a whole pipeline on this machine: the steps of pipeline.toml, or of another such file.

    pipeline.py                          # all of it; `make nlu` is this
    pipeline.py --quick                  # the same steps in minutes: shows that they run, not more
    pipeline.py --labelled snips=FOLDER  # SNIPS in place of Home Assistant's templates
    pipeline.py --until T2               # the steps up to one
    pipeline.py --steps ../nlu_ssl/pipeline.toml    # `make ssl` is this; it has a --full, too

Steps that do not wait for each other run beside each other: --jobs.

A step is a command with its inputs and outputs. What it did is kept in WORK/steps/NAME.json: its
command, and a hash of every input and output. It is not run again while these are the same. A step
that was stopped goes on from what it has made. One with another command or other inputs begins from
nothing: its outputs are removed. --again NAME does that, too, for a step whose code alone is
changed.

A file of steps has [numbers], further tables of them for --quick and --full, and a [[step]] for
each. A step with `only` is one of these sizes alone."""

import argparse
import hashlib
import json
import os
import shlex
import shutil
import signal
import string
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

from shared.command import (
    REPOSITORY,
    RunError,
    exit_code_of,
    num_visible_gpus,
    training_environment,
)

FOLDER = Path(__file__).resolve().parent
STEPS = FOLDER / "pipeline.toml"
SIZES = ("quick", "full")
"""Tables of a file of steps whose numbers take the place of those of [numbers]."""

# How a corpus is asked for, and what labelled.py then reads.
CORPORA = {"snips": "snips", "massive": "massive", "jsonl": "jsonl"}
_HOME_ASSISTANT = ["--format", "home-assistant", "--source", "en"]

# A training is one process on a CPU, so that this many steps run beside each other.
_CPU_JOBS = 2

_TERMINATION_TIMEOUT_S = 60
_HASH_BLOCK = 2**20


@dataclass(frozen=True)
class Step:
    """A step with its variables filled in.

    Attributes:
        command: a script and its words.
        inputs, outputs: files and folders.
        removes: what else is removed, with the outputs, before it begins from nothing.
        folder: that the script's path begins from, which is that of the file of steps.
    """

    name: str
    command: tuple[str, ...]
    inputs: tuple[Path, ...]
    outputs: tuple[Path, ...]
    removes: tuple[Path, ...] = ()
    folder: Path = FOLDER


def _filled(words: Sequence[str], variables: dict[str, Any], where: str) -> list[str]:
    """Fill ${NAME} in; a list of words takes the place of a whole word."""
    result: list[str] = []
    for word in words:
        name = word[2:-1] if word.startswith("${") and word.endswith("}") else None
        if name is not None and isinstance(variables.get(name), list):
            result += [str(value) for value in variables[name]]
            continue
        try:
            result.append(string.Template(word).substitute(variables))
        except (KeyError, ValueError) as exc:
            raise ValueError(
                f"{where}: {word!r} has a variable that is not set ({exc}); the file's [numbers] "
                "and the work folder's names are known"
            ) from exc
    return result


def read_tables(path: Path, size: str | None) -> dict[str, Any]:
    """Read a file of steps: its tables, of which [numbers] has the numbers of a size.

    Raises:
        ValueError: it is no such file, or has no such size.
    """
    try:
        tables = tomllib.loads(path.read_text())
        others = tables[size] if size else {}
        return tables | {"numbers": tables["numbers"] | others, "step": tables["step"]}
    except (OSError, tomllib.TOMLDecodeError, KeyError) as exc:
        asked = f", [{size}]" if size else ""
        raise ValueError(
            f"{path}: cannot be read ({type(exc).__name__}: {exc}); it must have "
            f"[numbers]{asked} and [[step]]; leave --quick or --full out if it has no such size"
        ) from exc


def load_steps(path: Path, variables: dict[str, Any], *, size: str | None = None) -> list[Step]:
    """Read a file of steps.

    Args:
        variables: what ${...} stands for, besides the file's own numbers, whose words have them.
        size: one of SIZES, or None for the numbers of [numbers] alone.

    Raises:
        ValueError: it is no such file, two steps have a name, or an input is nobody's output.
    """
    tables = read_tables(path, size)
    numbers = {
        name: _filled(value, variables, f"{path}, {name}") if _is_words(value) else value
        for name, value in tables["numbers"].items()
    }
    steps = [
        _load_step(entry, numbers | variables, path)
        for entry in tables["step"]
        if size in entry.pop("only", [size])
    ]
    _check_order(steps, path)
    return steps


def _is_words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _load_step(entry: dict[str, Any], variables: dict[str, Any], path: Path) -> Step:
    fields = {"name", "command", "inputs", "outputs"}
    if entry.keys() - {"removes"} != fields:
        raise ValueError(
            f"{path}: step {entry.get('name')!r} has {', '.join(sorted(entry))}; it must have "
            f"{', '.join(sorted(fields))}"
        )
    where = f"{path}, step {entry['name']}"
    filled = {
        name: _filled(entry.get(name, []), variables, where)
        for name in ("command", "inputs", "outputs", "removes")
    }
    paths = [tuple(map(Path, filled[name])) for name in ("inputs", "outputs", "removes")]
    return Step(entry["name"], tuple(filled["command"]), *paths, folder=path.parent)


def _check_order(steps: Sequence[Step], path: Path) -> None:
    names = [step.name for step in steps]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{path}: step {', '.join(sorted(repeated))} stands there twice")
    made: set[Path] = set()
    for step in steps:
        for given in step.inputs:
            if (
                given not in made
                and not any(p in made for p in given.parents)
                and not given.exists()
            ):
                raise ValueError(
                    f"{path}, step {step.name}: its input {given} is there neither now nor as an "
                    "output of a step before; correct the path, or the order"
                )
        made.update(step.outputs)


def hash_of(path: Path) -> str | None:
    """Return a hash of a file, or of a folder's files and their names; None if there is nothing."""
    if not path.exists():
        return None
    result = hashlib.sha256()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        name = str(file.relative_to(path)).encode()
        result.update(len(name).to_bytes(4, "big") + name + file.stat().st_size.to_bytes(8, "big"))
        with file.open("rb") as data:
            while block := data.read(_HASH_BLOCK):
                result.update(block)
    return result.hexdigest()


def _hashes(paths: Sequence[Path]) -> dict[str, str | None]:
    return {str(path): hash_of(path) for path in paths}


def _record_path(work: Path, step: Step) -> Path:
    return work / "steps" / f"{step.name}.json"


def is_done(step: Step, work: Path) -> bool:
    """Say whether a step has run with this command and these inputs, and its outputs are there."""
    try:
        record = json.loads(_record_path(work, step).read_text())
    except (OSError, json.JSONDecodeError):
        return False
    return bool(
        record["command"] == list(step.command)
        and record["inputs"] == _hashes(step.inputs)
        and record["outputs"] == _hashes(step.outputs)
    )


class _Stopped(Exception):
    """Another step failed."""


class _Processes:
    """The processes of the steps that run now."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._is_stopped = False

    def add(self, process: subprocess.Popen[str]) -> None:
        """Know a process until `remove`."""
        with self._lock:
            self._running.add(process)
            if self._is_stopped:
                process.terminate()

    def remove(self, process: subprocess.Popen[str]) -> None:
        """Forget a process that has ended."""
        with self._lock:
            self._running.discard(process)

    def stop(self) -> None:
        """End all of them, and any that is added later."""
        with self._lock:
            self._is_stopped = True
            for process in self._running:
                process.terminate()

    def check(self) -> None:
        """Raise _Stopped after `stop`."""
        if self._is_stopped:
            raise _Stopped


@contextmanager
def _running(command: Sequence[str], processes: _Processes) -> Iterator[subprocess.Popen[str]]:
    """Run a command in a session of its own, and end it on the way out."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=training_environment(len(os.sched_getaffinity(0))),
        start_new_session=True,
    )
    processes.add(process)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_TERMINATION_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
        processes.remove(process)


def _begin(step: Step, work: Path, inputs: dict[str, str | None], *, afresh: bool) -> None:
    """Remove what a run with other inputs or another command has left, and say what begins."""
    path = work / "steps" / f"{step.name}.begun.json"
    begun = {"command": list(step.command), "inputs": inputs}
    if afresh or not path.exists() or json.loads(path.read_text()) != begun:
        for left in (*step.outputs, *step.removes):
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink(missing_ok=True)
    path.write_text(json.dumps(begun, indent=2) + "\n")


def run_step(
    step: Step,
    work: Path,
    label: str,
    *,
    afresh: bool = False,
    processes: _Processes | None = None,
) -> float:
    """Run a step, show its last line while it works, and record what it did.

    Args:
        afresh: begin from nothing, also where a run with this command was stopped.
        processes: what ends the step when another one fails.

    Returns:
        Its seconds.

    Raises:
        RunError: its command failed, or made no output that it declares.
    """
    inputs = _hashes(step.inputs)
    log = work / "steps" / f"{step.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    _record_path(work, step).unlink(missing_ok=True)
    _begin(step, work, inputs, afresh=afresh)
    command = [sys.executable, str(step.folder / step.command[0]), *step.command[1:]]
    start, shown = time.monotonic(), 0.0
    processes = processes or _Processes()
    with _running(command, processes) as process, log.open("w") as file:
        file.write(shlex.join(command) + "\n")
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            file.flush()
            now = time.monotonic()
            if line.strip() and now - shown > 10:
                print(f"{label}  {now - start:5.0f} s  {line.strip()[:100]}", flush=True)
                shown = now
        code = process.wait()
    seconds = time.monotonic() - start
    processes.check()
    if code:
        end = "".join(log.read_text().splitlines(keepends=True)[-20:])
        raise RunError(f"step {step.name} failed (exit code {code}):\n{end}\nits log: {log}")
    outputs = _hashes(step.outputs)
    if missing := [path for path, digest in outputs.items() if digest is None]:
        raise RunError(f"step {step.name} has not made {', '.join(missing)}; its log: {log}")
    record = {
        "command": list(step.command),
        "inputs": inputs,
        "outputs": outputs,
        "seconds": round(seconds, 1),
    }
    _record_path(work, step).write_text(json.dumps(record, indent=2) + "\n")
    return seconds


def needed(steps: Sequence[Step]) -> dict[str, set[str]]:
    """Return for each step the steps before it that make one of its inputs, or of their folders."""
    makers: dict[Path, str] = {}
    needs: dict[str, set[str]] = {}
    for step in steps:
        places = {place for given in step.inputs for place in (given, *given.parents)}
        needs[step.name] = {makers[place] for place in places & makers.keys()}
        makers |= dict.fromkeys(step.outputs, step.name)
    return needs


def run_steps(
    steps: Sequence[Step], work: Path, again: Sequence[str] = (), jobs: int = 1
) -> list[str]:
    """Run the steps that are not done.

    Args:
        jobs: how many run beside each other, where one does not need the other. Of those that could
            begin, the first in the file does.

    Returns:
        The names of those that ran, in the order in which they ended.

    Raises:
        RunError: a step failed. Those beside it are ended, and go on the next time.
    """
    (work / "steps").mkdir(parents=True, exist_ok=True)
    numbers = {step.name: number for number, step in enumerate(steps, 1)}
    ran: list[str] = []
    start = time.monotonic()
    processes = _Processes()

    def run(step: Step) -> None:
        label = f"[{numbers[step.name]}/{len(steps)} {step.name}]"
        if step.name not in again and is_done(step, work):
            print(f"{label}  done before", flush=True)
            return
        processes.check()
        print(f"{label}  {shlex.join(step.command)[:200]}", flush=True)
        afresh = step.name in again
        seconds = run_step(step, work, label, afresh=afresh, processes=processes)
        ran.append(step.name)
        print(f"{label}  {seconds:.0f} s; {time.monotonic() - start:.0f} s in all", flush=True)

    needs = needed(steps)
    waiting, running = list(steps), dict[Future[None], str]()
    with ThreadPoolExecutor(jobs) as pool:
        try:
            while waiting or running:
                unfinished = {step.name for step in waiting} | set(running.values())
                ready = [step for step in waiting if not needs[step.name] & unfinished]
                for step in ready[: jobs - len(running)]:
                    waiting.remove(step)
                    running[pool.submit(run, step)] = step.name
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    del running[future]
                    future.result()
        except BaseException:
            processes.stop()
            raise
    return ran


def labelled_words(value: str | None) -> list[str]:
    """Return labelled.py's words for a corpus that is given as NAME=PATH.

    Raises:
        ValueError: there is no such name or path.
    """
    if value is None:
        return _HOME_ASSISTANT
    name, _, source = value.partition("=")
    if name not in CORPORA or not source or not Path(source).exists():
        raise ValueError(
            f"--labelled {value}: must be NAME=PATH, with a NAME of {', '.join(CORPORA)} and a "
            "PATH that is there"
        )
    return ["--format", CORPORA[name], "--source", str(Path(source).resolve())]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    sizes = parser.add_mutually_exclusive_group()
    for size, what in zip(SIZES, ("minutes: shows that the steps run", "hours"), strict=True):
        sizes.add_argument(f"--{size}", dest="size", action="store_const", const=size, help=what)
    add("--work", type=Path, help="all that is made (a folder of runs/ that the steps name)")
    add("--labelled", metavar="NAME=PATH", help="a corpus; default: Home Assistant's templates")
    add("--steps", type=Path, default=STEPS, help="the file of steps (%(default)s)")
    add("--until", metavar="NAME", help="the last step to run")
    add("--again", nargs="+", default=[], metavar="NAME", help="run these, even if they are done")
    add("--jobs", type=int, help="steps beside each other (2, or 1 on one core or with GPUs)")
    add("--list", action="store_true", help="say what is done, and run nothing")
    return parser


def default_work(path: Path, size: str | None) -> Path:
    """Return the folder of runs/ that a file of steps names, for a size.

    Raises:
        ValueError: see `read_tables`; or it names none.
    """
    name = read_tables(path, size).get("work")
    if not name:
        raise ValueError(f"{path}: has no 'work': must name a folder of runs/; or give --work")
    return REPOSITORY / "runs" / (f"{name}-{size}" if size else name)


def _num_jobs(asked: int | None) -> int:
    """Return how many steps run beside each other."""
    if asked is None:  # a training takes all GPUs
        return 1 if num_visible_gpus() else min(_CPU_JOBS, len(os.sched_getaffinity(0)))
    if asked < 1:
        raise ValueError(f"--jobs {asked}: must be at least 1")
    return asked


def _chosen(steps: list[Step], args: argparse.Namespace) -> list[Step]:
    names = [step.name for step in steps]
    if unknown := sorted({*args.again, *([args.until] if args.until else [])} - set(names)):
        raise ValueError(f"step {', '.join(unknown)}: must be one of {', '.join(names)}")
    return steps[: names.index(args.until) + 1] if args.until else steps


def main() -> int:
    """Run the pipeline from the command line."""

    def program() -> None:
        args = _parser().parse_args()
        work = args.work or default_work(args.steps, args.size)
        variables = {
            "work": work.resolve(),
            "labelled": labelled_words(args.labelled),
            "recipe": FOLDER / "recipe.toml",
        }
        jobs = _num_jobs(args.jobs)
        steps = _chosen(load_steps(args.steps, variables, size=args.size), args)
        if args.list:
            for step in steps:
                print(f"{'done' if is_done(step, work) else '-':5} {step.name}")
            return
        run_steps(steps, work, args.again, jobs)

    return exit_code_of(program)


if __name__ == "__main__":
    sys.exit(main())
