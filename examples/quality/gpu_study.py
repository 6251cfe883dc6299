"""Compare AdamS and AdamW on one GPU in a given time; PLAN-GPU-3.md, -2.md and PLAN.md say how.

    python gpu_study.py --data FOLDER --out FOLDER --seconds 150

prepare.py has written the folder --data. The script writes quality.csv (one row per run),
curves.jsonl and log.txt to --out. Runs that are in quality.csv are not repeated. The script ends by
itself before --seconds are over. They count from its start, imports included.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import cpu_schedule
import results
import schedule
from shared.command import exit_code_of

# A rehearsal of a plan with fixed steps has a fifth of them.
REHEARSED_SHARE = 1 / 5
# The time left at the end for the interpreter, the device and collecting the files.
RESERVE_S = 8.0
# How many runs of A should fit into the time. That is about as many as the plan has up to the end
# of axis B's first seed; runs of B take a third longer.
TARGET_RUNS = 20
# Compiling takes about 20 s. A shorter study does not regain them.
MIN_SECONDS_TO_COMPILE = 60.0
# The time that a run needs outside its steps: start values, order of the batches, held-out loss.
OVERHEAD_PER_RUN_S = 0.6


@dataclass(frozen=True)
class Plan:
    """What a plan runs.

    Attributes:
        preset, rehearsal: names of lab.PRESETS.
        axes: the runs' axes.
        variants: name -> variant.
        column: the loss that decides.
        parts: its runs, with the steps of cpu_schedule.SETTINGS; None: those of schedule.py, with
            as many steps as fit into the time.
    """

    preset: str
    rehearsal: str
    axes: tuple[str, ...]
    variants: Mapping[str, schedule.Variant]
    column: str
    parts: tuple[cpu_schedule.Part, ...] | None = None

    def next_run(self, losses: schedule.Losses) -> schedule.Run | None:
        """Return the next run, or None if the plan is complete."""
        if self.parts is None:
            return schedule.next_run(losses)
        return cpu_schedule.next_run(losses, parts=self.parts)

    def decide(self, losses: schedule.Losses) -> str:
        """Return what the finished runs decide."""
        if self.parts is None:
            return schedule.decide(losses)
        return cpu_schedule.decide(losses, self.axes)


PLANS = {
    1: Plan("25M", "rehearsal", ("A", "B"), schedule.VARIANTS, "held_out_loss"),
    2: Plan(
        *("25M, plan 2", "rehearsal, plan 2", cpu_schedule.GPU_SETTINGS, cpu_schedule.VARIANTS),
        *(results.PER_BYTE, cpu_schedule.GPU_PARTS),
    ),
    3: Plan(
        *("124M", "rehearsal, plan 3", cpu_schedule.GPU_3_SETTINGS, cpu_schedule.VARIANTS),
        *(results.PER_BYTE, cpu_schedule.GPU_3_PARTS),
    ),
}


def steps_for(seconds: float, seconds_per_step: float, min_steps: int, max_steps: int) -> int:
    """Return the steps of each run of A, so that TARGET_RUNS fit, or fewer if the time is short.

    Args:
        seconds: the time left for all runs.
    """

    def steps_of(num_runs: int) -> int:
        return int((seconds / num_runs - OVERHEAD_PER_RUN_S) / seconds_per_step)

    num_runs = TARGET_RUNS
    while num_runs > 1 and steps_of(num_runs) < min_steps:
        num_runs -= 1
    return max(min_steps, min(max_steps, steps_of(num_runs) // 5 * 5))


def study(args: argparse.Namespace, started: float) -> None:
    """Do runs until the time is over or no run is left.

    Raises:
        ValueError: the data, existing results, or an argument cannot be used.
    """
    # Imported here, because importing torch counts as time.
    import torch
    from lab import COMPILE_TIMEOUT_S, PRESETS, Lab, OutOfTime

    deadline = started + args.seconds - RESERVE_S
    args.out.mkdir(parents=True, exist_ok=True)
    say = _reporter(args.out / "log.txt", started)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: must be a GPU that torch sees; give --device cpu")
    plan = PLANS[args.plan]
    preset = PRESETS[plan.rehearsal if args.rehearse else plan.preset]
    rows = results.read_rows(args.out / "quality.csv")
    others = {row["model"] for row in rows} - {preset.name}
    if others:
        raise ValueError(f"{args.out}: must hold runs of {preset.name} alone, has {others}")
    _check_text(args.data, args.out)
    if strangers := {row["axis"] for row in rows} - set(plan.axes):
        raise ValueError(
            f"{args.out}: must hold runs of plan {args.plan} alone, has {strangers}; give another "
            "--out or --plan"
        )
    lab = Lab(preset, args.data, torch.device(args.device), plan.variants)
    say(
        f"{preset.name}: {lab.num_params:,} parameters, {len(lab.train_tokens):,} training tokens,"
        f" torch {torch.__version__}; {len(rows)} runs are done"
    )
    seconds_per_step = lab.seconds_per_batch(4)
    say(f"not compiled: {lab.batch_tokens / seconds_per_step:,.0f} tokens/s")
    lab.compile_optimizer()
    left = deadline - time.monotonic()
    pays = args.device == "cuda" and left >= MIN_SECONDS_TO_COMPILE
    if args.compile == "yes" or (args.compile == "auto" and pays):
        lab.compile(min(COMPILE_TIMEOUT_S, left / 2))
        say(f"compiled: {lab.compiled}")
        if lab.compiled == "yes":
            # Once, on an H100 with a busy host, a single measurement was three times too slow, and
            # the study went on without the compiled model, at half of its speed.
            compiled = min(lab.seconds_per_batch(8) for _ in range(3))
            say(f"compiled: {lab.batch_tokens / compiled:,.0f} tokens/s")
            if compiled < seconds_per_step:
                seconds_per_step = compiled
            else:
                lab.model.forget_compiled()
                lab.compiled = "no: slower"
    if plan.parts is not None:
        share = REHEARSED_SHARE if args.rehearse else 1.0
        steps_of = {axis: round(share * cpu_schedule.SETTINGS[axis].steps) for axis in plan.axes}
    else:
        steps = _steps_of_rows(rows)
        if steps is None:
            left = deadline - time.monotonic()
            steps = steps_for(left, seconds_per_step, preset.min_steps, preset.max_steps)
        steps_of = {axis: lab.steps_of(axis, steps) for axis in plan.axes}
    say("; ".join(f"{axis}: {num} steps a run" for axis, num in steps_of.items()))

    overhead = OVERHEAD_PER_RUN_S
    losses = results.losses_of(rows, plan.column)
    while (run := plan.next_run(losses)) is not None:
        num_steps = steps_of[run.axis]
        batches = sum(lab.batches_of_steps(run.axis, num_steps))
        needed = batches * seconds_per_step + overhead
        if time.monotonic() + needed > deadline:
            say(f"end: {run} would take {needed:.1f} s")
            break
        try:
            row = lab.record(run, num_steps, args.out, deadline=deadline, report=say)
        except OutOfTime as exc:
            say(f"end: {exc}")
            break
        rows.append(row)
        losses[run] = float(row[plan.column])
        seconds_per_step = max(0.0, row["seconds"] - overhead) / batches
        say(
            f"{run}  held-out {row['held_out_loss']:.4f}  train {row['train_loss']:.4f}  "
            f"{row['seconds']:.1f} s  {row['tokens_per_second']:,} tokens/s"
        )
    else:
        say("end: every run of the plan is done")
    if args.rehearse:
        say("A rehearsal: what follows is no result.")
    say(plan.decide(losses).replace("\n", " "))


def _check_text(data: Path, out: Path) -> None:
    """Keep the facts of the text beside the rows, and refuse another text later.

    The text comes from the installed packages, so another environment has another one, and losses
    on different texts cannot be compared.
    """
    meta, kept = data / "meta.json", out / "meta.json"
    if not meta.exists():
        raise ValueError(f"{data}: must hold train.bin, heldout.bin, meta.json; run prepare.py")
    if not kept.exists():
        kept.write_text(meta.read_text())
    elif json.loads(kept.read_text()) != json.loads(meta.read_text()):
        raise ValueError(
            f"{data}: must be the text of the runs in {out} (their meta.json differ); give "
            "the same --data or another --out"
        )


def _steps_of_rows(rows: list[dict[str, str]]) -> int | None:
    """Return the number of steps of the finished runs of A; None if there are none."""
    return next((int(row["steps"]) for row in rows if row["axis"] == "A"), None)


def _reporter(log: Path, started: float) -> Callable[[str], None]:
    def say(text: str) -> None:
        line = f"{time.monotonic() - started:6.1f} s  {text}"
        print(line, flush=True)
        with log.open("a") as file:
            file.write(line + "\n")

    return say


def main() -> int:
    """Run the study from the command line. The exit codes are `exit_code_of`'s."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder of prepare.py")
    parser.add_argument("--out", type=Path, required=True, help="results; a study there goes on")
    parser.add_argument(
        "--seconds", type=float, required=True, help="the script ends before they are over"
    )
    parser.add_argument(
        "--plan",
        type=int,
        choices=list(PLANS),
        default=max(PLANS),
        help="1: PLAN.md, 2: PLAN-GPU-2.md, 3: PLAN-GPU-3.md (%(default)s)",
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="%(default)s")
    parser.add_argument(
        "--rehearse", action="store_true", help="a tiny model: tries the study, measures nothing"
    )
    parser.add_argument(
        "--compile",
        choices=["auto", "yes", "no"],
        default="auto",
        help="compile the model with torch.compile; auto: on a GPU",
    )
    args = parser.parse_args()
    return exit_code_of(lambda: study(args, started))


if __name__ == "__main__":
    sys.exit(main())
