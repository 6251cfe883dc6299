"""GRPO on Countdown with AdamS and with AdamW: a sweep of rates, then the seeds that decide.

    python rl_study.py --short    # a run with each, of 40 steps
    python rl_study.py            # the whole study

The same command goes on where it was stopped. Both write runs.csv (a row a run), curves.jsonl,
rl_countdown.png and summary.md to --out.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import rl_plot
import torch
import transformers
import trl
from countdown import split_problems
from policy import Shape
from post_training import SETTINGS, Curves, Preset, post_train, teach
from rl_results import (
    DECIDING_SEEDS,
    RATES,
    SWEEP_SEED,
    Results,
    Run,
    append_curves,
    append_row,
    keep_settings,
    next_run,
    read_rows,
    results_of,
)
from shared.command import exit_code_of
from transformers import LlamaForCausalLM

transformers.utils.logging.disable_progress_bar()  # of loading a model

RUNS = Path(__file__).resolve().parents[2] / "runs"
FULL = Preset(
    shape=Shape(hidden=96, layers=2, heads=4),
    num_taught=1000,
    num_held_out=500,
    sft_steps=200,
    sft_batch=128,
    sft_lr=3e-3,
    grpo_steps=100,
    prompts=16,
    generations=8,
    evaluate_every=20,
)
SHORT = dataclasses.replace(FULL, grpo_steps=40, evaluate_every=10)
# Shows that the study runs; a model of this size solves next to nothing.
TINY = Preset(Shape(16, 1, 2), 40, 20, 4, 8, 3e-3, 2, 2, 4, 1)
# What --short and --tiny run: a rate from the middle of the sweep.
FEW_RUNS = [Run(optimizer, 1e-4, DECIDING_SEEDS[0]) for optimizer in RATES]


def row_of(
    run: Run, preset: Preset, curves: Curves, model: LlamaForCausalLM, seconds: tuple[float, float]
) -> dict[str, Any]:
    """Return a run's row of runs.csv; `seconds` are on the clock and of the processor."""
    tenth = max(1, len(curves.reward) // 10)
    return {
        **asdict(run),
        "held_out_before": round(curves.held_out[0], 4),
        "held_out": round(curves.held_out[-1], 4),
        "reward_last_tenth": round(statistics.mean(curves.reward[-tenth:]), 4),
        "steps": preset.grpo_steps,
        "answers_per_step": preset.prompts * preset.generations,
        "num_params": sum(param.numel() for param in model.parameters()),
        "num_held_out": preset.num_held_out,
        "wall_seconds": round(seconds[0], 1),
        "cpu_seconds": round(seconds[1], 1),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
    }


def study(preset: Preset, plan: Callable[[Results], Run | None], out: Path, scratch: Path) -> None:
    """Do the runs that `plan` asks for, one after the other; results are written after each.

    Args:
        plan: returns the next run from the results so far, or None at the end.
        scratch: where the taught model is kept, and where the trainers may write.
    Raises:
        ValueError: `out` holds a study with other settings.
    """
    out.mkdir(parents=True, exist_ok=True)
    keep_settings(out / "settings.json", {"optimizers": SETTINGS, **asdict(preset)})
    split = split_problems(preset.num_taught, preset.num_held_out)
    print(
        f"{len(split.train):,} problems to train on, {preset.num_taught:,} of them taught with "
        f"answers; {len(split.held_out):,} others are held out",
        flush=True,
    )
    taught = scratch / "taught"
    if not taught.exists():
        partial = scratch / "taught.partial"
        teach(preset, split, SWEEP_SEED, scratch / "trainer").save_pretrained(partial)
        partial.rename(taught)
    while (run := plan(results_of(read_rows(out / "runs.csv")))) is not None:
        model = LlamaForCausalLM.from_pretrained(taught)
        clock, cpu = time.monotonic(), time.process_time()
        curves = post_train(model, preset, split, **asdict(run), folder=scratch / "trainer")
        seconds = time.monotonic() - clock, time.process_time() - cpu
        append_curves(out / "curves.jsonl", asdict(run) | asdict(curves))
        append_row(out / "runs.csv", row_of(run, preset, curves, model, seconds))
        rl_plot.write(out)
    print((out / "summary.md").read_text())


def plan_of(runs: list[Run]) -> Callable[[Results], Run | None]:
    """Return a plan that has these runs done in their order."""
    return lambda results: next((run for run in runs if run not in results), None)


def main() -> int:
    """Run from the command line. The exit codes are `exit_code_of`'s."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--short", action="store_true", help="one seed and one rate, in fewer steps")
    size.add_argument(
        "--tiny", action="store_true", help="the same in seconds; only shows that it runs"
    )
    parser.add_argument(
        "--out", type=Path, help="results (runs/rl_countdown, runs/rl_countdown_short, ..._tiny)"
    )
    args = parser.parse_args()
    name = "rl_countdown" + ("_short" if args.short else "_tiny" if args.tiny else "")
    out = args.out or RUNS / name
    preset, plan = FULL, next_run
    if args.short or args.tiny:
        preset, plan = SHORT if args.short else TINY, plan_of(FEW_RUNS)
    return exit_code_of(lambda: study(preset, plan, out, RUNS / name))


if __name__ == "__main__":
    sys.exit(main())
