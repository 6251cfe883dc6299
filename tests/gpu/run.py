"""Run everything that only a GPU can show, in one command that ends by itself.

    python tests/gpu/run.py --out DIR [--seconds 560] [--only STAGE ...] [--skip STAGE ...]
    python tests/gpu/run.py --out DIR --rehearse       # without a GPU, in two minutes

README.md in this folder says what it needs and what it leaves in DIR. This script starts each stage
as a process of its own, with a time limit, and never imports torch. Whatever a stage does, the next
one starts, and the table is printed at the end, also at SIGTERM.
"""

import argparse
import importlib.util
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.gpu import verdicts
from tests.gpu.records import Records
from tests.gpu.verdicts import Verdict

ROOT = Path(__file__).resolve().parents[2]
# The time that is left after the last stage, for writing the report.
RESERVE_S = 15.0
# How long a stage's program may take to end after the seconds that it is given.
ENDING_S = 8.0
# With less time left, a stage is not started.
SHORTEST_S = 5.0
# The time between a request to end and killing the process.
GRACE_S = 3.0
# A file of more than 16 MiB may not come back from a borrowed machine. So log.txt keeps KEPT_LOG
# bytes of each stage, from its beginning and its end. A stage that prints more than LARGEST_LOG is
# stopped, and files above LARGEST_FILE are left out.
KEPT_LOG = 2**20
LARGEST_LOG = 64 * 2**20
LARGEST_FILE = 4 * 2**20
NO_GPU = "not run: no GPU"


@dataclass(frozen=True)
class Stage:
    """A part of the run.

    Attributes:
        name: for --only, --skip and the table.
        limit_s: the time after which it is stopped.
        settles: which question it answers, for the table.
        command: the program and its arguments, after `python`. {root}, {out}, {results}, {seconds}
            and {quality_data} are filled in.
        rehearsal: the same with --rehearse.
        verdict: puts its records and files into words.
        needs: files that must exist, or it is not started.
        modules: what it imports, other than torch.
        needs_gpu: whether it is left out if `facts` found no GPU.
    """

    name: str
    limit_s: float
    settles: str
    command: str
    rehearsal: str
    verdict: Callable[[list[dict[str, Any]], Path], Verdict]
    needs: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    needs_gpu: bool = True

    @property
    def script(self) -> Path:
        """The path of its program."""
        return ROOT / self.command.split()[0]


def _own(
    name: str, limit_s: float, settles: str, verdict: Callable[..., Verdict], **others: Any
) -> Stage:
    """Return a stage whose program is in stages/."""
    command = (
        f"tests/gpu/stages/{name}.py --results {{results}} --out {{out}} --seconds {{seconds}}"
    )
    return Stage(name, limit_s, settles, command, f"{command} --rehearse", verdict, **others)


# For a rehearsal: sizes are a ten-thousandth of those that are measured.
_SHRUNK = "--device cpu --shrink 10000 --rounds 1"
# The most telling stages come first. The first two read gigabytes of libraries from a cold disk.
STAGES = (
    _own("facts", 30, "what all numbers depend on", verdicts.facts, needs_gpu=False),
    _own(
        *("smoke", 60, "whether the kernel runs at all: bits, streams, a CUDA graph"),
        verdicts.checks,
    ),
    _own(
        *("battery", 110, "right in every mode: the bits of the host kernel and of the oracle"),
        verdicts.battery,
        modules=("pytest", "pytest_timeout"),
    ),
    Stage(
        *("speed", 70, "bandwidth as a part of a copy's, and other optimizers' times"),
        "benchmarks/step.py --device cuda --suite gpu --out {out} --seconds {seconds}",
        f"benchmarks/step.py {_SHRUNK} --suite gpu --out {{out}} --seconds 6",
        verdicts.speed,
    ),
    Stage(
        *("sweep", 70, "which constants the kernel of each mode should have"),
        "benchmarks/tune.py --device cuda --out {out} --seconds {seconds}",
        "benchmarks/tune.py --device cpu --out {out} --seconds 6",
        verdicts.sweep,
    ),
    Stage(
        *("confirm", 40, "whether the sweep's constants win, side by side with the product's"),
        "benchmarks/step.py --device cuda --suite confirm --tuning {out}/best.json --out {out} "
        "--seconds {seconds}",
        f"benchmarks/step.py {_SHRUNK} --suite confirm --tuning {{out}}/best.json --out {{out}} "
        "--seconds 4",
        verdicts.confirm,
        needs=("{out}/best.json",),
    ),
    Stage(
        *("megatron", 140, "Megatron on one GPU over NCCL in bf16: adams and adam"),
        "tests/gpu/megatron_runs.py --out {out}/megatron.json --seconds {seconds}",
        "tests/gpu/megatron_runs.py --out {out}/megatron.json --seconds {seconds} --rehearse",
        verdicts.megatron,
        modules=("megatron.core",),
    ),
    _own(
        *("graphs", 25, "what a replayed CUDA graph saves; its bits are those of plain steps"),
        verdicts.checks,
    ),
    _own("ncu", 40, "why the kernel is as fast as it is: the profiler's counters", verdicts.ncu),
    _own(
        *("sanitizer", 60, "no access beyond a tensor, or to memory that nothing wrote"),
        verdicts.checks,
    ),
    Stage(
        *("quality", 600, "held-out loss after equal training, adams and adamw"),
        "examples/quality/gpu_study.py --data {quality_data} --out {out} --seconds {seconds}",
        "examples/quality/gpu_study.py --data {quality_data} --out {out} --seconds 25 "
        "--device cpu --rehearse",
        verdicts.quality,
        needs=("{quality_data}",),
    ),
)


@dataclass
class Outcome:
    """The result of a stage.

    Attributes:
        state: "passed", "failed" or "not run".
        words: its text in the table.
        details: its lines in the report.
        wall_s: how long it took.
    """

    stage: Stage
    state: str
    words: str
    details: list[str] = field(default_factory=list)
    wall_s: float = 0.0


class Run:
    """One call of this script."""

    def __init__(self, args: argparse.Namespace, stages: Iterable[Stage]) -> None:
        self._deadline = time.monotonic() + args.seconds
        self._is_rehearsal = args.rehearse
        self._folder = args.out.resolve()
        self._folder.mkdir(parents=True, exist_ok=True)
        # For the stages' own files, which come back in one archive.
        self._work = Path(tempfile.mkdtemp(prefix="megatron-adams-gpu-"))
        self._log = self._folder / "log.txt"
        self._records = Records(self._folder / "results.jsonl")
        for old in (self._log, self._records.path, self._folder / "report.md"):
            old.unlink(missing_ok=True)
        self._paths = {
            "root": str(ROOT),
            "out": str(self._work),
            "results": str(self._records.path),
            "quality_data": str(args.quality_data or "the folder of --quality-data"),
        }
        self._environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(
                filter(None, (str(ROOT), os.environ.get("PYTHONPATH", "")))
            ),
            "PYTHONUNBUFFERED": "1",
        }
        if self._is_rehearsal:
            self._environment["CUDA_VISIBLE_DEVICES"] = ""
        self._pending = list(stages)
        self.outcomes: list[Outcome] = []
        self._left_out: list[str] = []
        self._stop_signal: int | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    def _stop(self, number: int, frame: object) -> None:
        self._stop_signal = number

    def run(self) -> int:
        """Run the stages. Return the exit code: 0 if all passed, or else 1."""
        while self._pending:
            stage = self._pending.pop(0)
            try:
                outcome = self._run(stage)
            except Exception as exc:  # such as a full disk: go on with the next stage
                outcome = Outcome(stage, "failed", f"run.py: {type(exc).__name__}: {exc}")
            self.outcomes.append(outcome)
            self._records.write(
                stage.name,
                "outcome",
                state=outcome.state,
                words=outcome.words,
                wall_s=round(outcome.wall_s, 1),
            )
            print(f"{stage.name}: {outcome.state}, {outcome.wall_s:.0f} s. {outcome.words}")
            sys.stdout.flush()
            self._write_report()
            if stage.name == "smoke" and outcome.state == "failed":
                self._look_into_the_smoke()
        shutil.rmtree(self._work, ignore_errors=True)
        print(f"\n{self._report()}", flush=True)
        if self._is_rehearsal:
            return int(any(outcome.state == "failed" for outcome in self.outcomes))
        passed = all(outcome.state == "passed" for outcome in self.outcomes)
        return 0 if passed and self.outcomes else 1

    def _look_into_the_smoke(self) -> None:
        """After a failed smoke test, find out where the kernel fails, and leave Megatron out."""
        by_name = {stage.name: stage for stage in self._pending}
        if battery := by_name.get("battery"):
            by_name["battery"] = replace(battery, limit_s=60)
        if megatron := by_name.pop("megatron", None):
            self.outcomes.append(Outcome(megatron, "not run", "not run: smoke failed"))
        first = [by_name.pop("sanitizer")] if "sanitizer" in by_name else []
        self._pending = [*first, *by_name.values()]

    def _run(self, stage: Stage) -> Outcome:
        if self._stop_signal is not None:
            return Outcome(stage, "not run", f"not run: {self._signal_name} came before")
        if reason := self._obstacle(stage):
            return Outcome(stage, "not run", f"not run: {reason}")
        left_s = self._deadline - time.monotonic() - RESERVE_S
        limit_s = min(stage.limit_s, left_s)
        if limit_s < SHORTEST_S:
            return Outcome(stage, "not run", f"not run: {max(left_s, 0):.0f} seconds were left")
        command = self._command(stage, limit_s)
        start = time.monotonic()
        log_start = self._log_size()
        with self._log.open("a") as log:
            log.write(f"\n===== {stage.name}, at most {limit_s:.0f} s: {' '.join(command)}\n")
            log.flush()
            ended = self._run_process(command, log, limit_s)
        self._shorten_log(log_start)
        wall_s = time.monotonic() - start
        try:
            verdict = stage.verdict(self._records.of_stage(stage.name), self._work)
        except Exception as exc:  # a file is incomplete or has another form: go on
            verdict = Verdict(f"its results cannot be read ({type(exc).__name__}: {exc})", False)
        words, is_good = verdict.words, verdict.is_good and not ended
        if ended:
            words = f"{ended}. {words}"
        if self._is_rehearsal and stage.needs_gpu and is_good:
            return Outcome(
                stage, "not run", f"{NO_GPU}; rehearsed: {words}", verdict.details, wall_s
            )
        state = "passed" if is_good else "failed"
        return Outcome(stage, state, words, verdict.details, wall_s)

    def _obstacle(self, stage: Stage) -> str | None:
        """Return why a stage cannot start, or None."""
        if not self._is_rehearsal and stage.needs_gpu and self._has_gpu() is False:
            return "no GPU"
        if not stage.script.exists():
            return f"{stage.command.split()[0]} is missing"
        for module in stage.modules:
            if not _is_importable(module):
                return f"{module} is not installed"
        for path in stage.needs:
            if not Path(path.format(**self._paths)).exists():
                return f"{path.format(**self._paths).removeprefix(f'{self._work}/')} is missing"
        return None

    def _has_gpu(self) -> bool | None:
        """Return whether `facts` found a GPU; None if it did not get that far."""
        return next(
            (bool(r["value"]) for r in self._records.of_stage("facts") if r["name"] == "GPUs"), None
        )

    def _command(self, stage: Stage, limit_s: float) -> list[str]:
        template = stage.rehearsal if self._is_rehearsal else stage.command
        values = {**self._paths, "seconds": f"{max(1.0, limit_s - ENDING_S):.0f}"}
        return [sys.executable, *(word.format(**values) for word in template.split())]

    def _run_process(self, command: list[str], log: Any, limit_s: float) -> str:
        """Run a stage's process. Return what went wrong with it; "" if it ended well."""
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        log_start = self._log_size()
        end = time.monotonic() + limit_s
        next_archive = time.monotonic() + 10
        reason = None
        while reason is None and process.poll() is None:
            time.sleep(0.1)
            if self._stop_signal is not None:
                reason = f"stopped by {self._signal_name}"
            elif time.monotonic() > end:
                reason = f"stopped at its limit of {limit_s:.0f} s"
            elif self._log_size() - log_start > LARGEST_LOG:
                reason = f"stopped, because it printed more than {LARGEST_LOG / 2**20:g} MiB"
            elif time.monotonic() > next_archive:
                self._archive()
                next_archive += 10
        end_processes(process, GRACE_S if reason else 0.0)
        if reason is not None:
            return reason
        return f"exit code {process.returncode}" if process.returncode else ""

    def _log_size(self) -> int:
        return _size(self._log)

    def _shorten_log(self, start: int) -> None:
        """If log.txt is too long from `start` on, remove the middle of that part."""
        if self._log_size() - start <= KEPT_LOG:
            return
        with self._log.open("r+b") as log:
            log.seek(-KEPT_LOG // 2, os.SEEK_END)
            last = log.read()
            log.truncate(start + KEPT_LOG // 2)
            log.seek(0, os.SEEK_END)
            log.write(b"\n===== the middle is left out\n" + last)

    @property
    def _signal_name(self) -> str:
        assert self._stop_signal is not None
        return signal.Signals(self._stop_signal).name

    def _archive(self) -> None:
        """Put the stages' files into files.tar.gz. At any time, that file is complete."""
        files = sorted(path for path in self._work.rglob("*") if path.is_file())
        large = {path for path in files if _size(path) > LARGEST_FILE}
        self._left_out = [f"{path.relative_to(self._work)} is too large" for path in sorted(large)]
        files = [path for path in files if path not in large]
        if not files:
            return
        partly = self._folder / "files.partly"
        with tarfile.open(partly, "w:gz") as archive:
            for path in files:
                # A running stage may remove it, or write to it.
                with suppress(FileNotFoundError):
                    content = path.read_bytes()
                    member = tarfile.TarInfo(str(path.relative_to(self._work)))
                    member.size, member.mtime = len(content), int(time.time())
                    archive.addfile(member, io.BytesIO(content))
        partly.replace(self._folder / "files.tar.gz")

    def _write_report(self) -> None:
        self._archive()
        (self._folder / "report.md").write_text(self._report())

    def _report(self) -> str:
        lines = ["| stage | result | s | what it settles |", "| --- | --- | ---: | --- |"]
        rest = [Outcome(stage, "not run", "not run yet") for stage in self._pending]
        for outcome in (*self.outcomes, *rest):
            words = outcome.words.replace("|", "/").replace("\n", " ")
            words = f"**failed**: {words}" if outcome.state == "failed" else words
            stage = outcome.stage
            lines.append(f"| {stage.name} | {words} | {outcome.wall_s:.0f} | {stage.settles} |")
        text = "\n".join(lines) + "\n"
        details = ""
        for outcome in self.outcomes:
            if outcome.details:
                details += f"## {outcome.stage.name}\n\n" + "\n".join(outcome.details) + "\n\n"
        if self._left_out:
            text += f"\nNot in files.tar.gz: {', '.join(self._left_out)}.\n"
        return f"{details}## all stages\n\n{text}"


def _size(path: Path) -> int:
    """Return a file's size in bytes; 0 if it does not exist."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _is_importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


def end_processes(process: "subprocess.Popen[bytes]", grace_s: float) -> None:
    """End a process and all processes that it has started.

    Args:
        grace_s: the time between the request to end and the kill. Processes in a group of their
            own, such as torchrun's workers, are only killed.
    """
    started = _descendants(process.pid)
    if grace_s:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for pid in started:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def _descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # State and parent follow the name, which is in parentheses and can contain anything.
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found = [pid]
    for parent in found:  # the list grows during the loop
        found += children.get(parent, [])
    return found[1:]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path("runs/gpu"), help="files; default: %(default)s"
    )
    parser.add_argument(
        "--seconds", type=float, default=560, help="the whole ends before; default: %(default)s"
    )
    parser.add_argument(
        "--only", nargs="+", choices=names, metavar="STAGE", help=f"these, of {', '.join(names)}"
    )
    parser.add_argument("--skip", nargs="+", choices=names, default=[], metavar="STAGE")
    parser.add_argument(
        "--quality-data", type=Path, help="what examples/quality/prepare.py wrote, for `quality`"
    )
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="without a GPU: every stage does what it can on the CPU, with small sizes",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    chosen = [
        stage
        for stage in STAGES
        # `facts` always runs: the numbers depend on it, and it finds out whether there is a GPU.
        if stage.name == "facts"
        or ((args.only is None or stage.name in args.only) and stage.name not in args.skip)
    ]
    return Run(args, chosen).run()


if __name__ == "__main__":
    sys.exit(main())
