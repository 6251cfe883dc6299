"""Compare AdamS and AdamW on one CPU core, at several batch sizes; PLAN-CPU.md says how.

    python cpu_study.py [--parts 2] [--out FOLDER]

Writes quality.csv (one row per run) and curves.jsonl to --out. Runs that are in quality.csv are not
repeated, so a study that was stopped or killed goes on. The text is prepared at the first start.
"""

import argparse
import math
import sys
import sysconfig
import time
from pathlib import Path
from typing import TYPE_CHECKING

import cpu_schedule
import results
from cpu_schedule import PARTS, SETTINGS, VARIANTS, Setting
from shared.command import exit_code_of

if TYPE_CHECKING:
    from lab import Preset

RUNS = Path(__file__).resolve().parents[2] / "runs" / "quality"
SEQ_LENGTH = 64
# The held-out loss is that of the same tokens in all settings.
HELD_OUT_TOKENS = 49_152
# More tokens than these pass through the model in parts, whose gradients are added.
MAX_BATCH_TOKENS = 16_384
VOCAB_SIZE, DATA_BYTES = 512, 12_000_000


def prepare_data(folder: Path) -> None:
    """Turn the standard library of the running Python into tokens, if that is not done yet.

    Raises:
        ValueError: `tokenizers` is not installed, or there is too little text.
    """
    if (folder / "meta.json").exists():
        return
    import prepare

    print(f"Preparing the text in {folder}", flush=True)
    try:
        prepare.prepare([Path(sysconfig.get_path("stdlib"))], folder, DATA_BYTES, VOCAB_SIZE)
    except ImportError as exc:
        raise ValueError(f"{exc}: must be installed; pip install tokenizers") from exc


def study(args: argparse.Namespace) -> None:
    """Do runs until the chosen parts are complete or the time is over.

    Raises:
        ValueError: the data, existing results, or an argument cannot be used.
    """
    import torch
    from lab import Lab, OutOfTime
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    if not 1 <= args.parts <= len(PARTS):
        raise ValueError(f"--parts {args.parts}: must be from 1 to {len(PARTS)}")
    deadline = time.monotonic() + args.seconds
    prepare_data(args.data)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    labs: dict[str, Lab] = {}

    def lab_of(setting: Setting) -> Lab:
        if setting.name not in labs:
            labs[setting.name] = Lab(preset_of(setting), args.data, torch.device("cpu"), VARIANTS)
        return labs[setting.name]

    losses = results.losses_of(results.read_rows(args.out / "quality.csv"), results.PER_BYTE)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn()) as progress:
        say = progress.console.print
        say(f"{len(losses)} runs are done")
        while (run := cpu_schedule.next_run(losses, args.parts)) is not None:
            setting = SETTINGS[run.axis]
            bar = progress.add_task(f"{len(losses) + 1}: {run}", total=args.steps or setting.steps)
            try:
                row = lab_of(setting).record(
                    run,
                    args.steps or setting.steps,
                    args.out,
                    deadline=deadline,
                    on_step=lambda bar=bar: progress.advance(bar),
                )
            except OutOfTime as exc:
                say(f"end: {exc}")
                break
            finally:
                progress.remove_task(bar)
            losses[run] = float(row[results.PER_BYTE])
            say(f"{run}  held-out {losses[run]:.4f} nats a byte  {row['seconds']:.1f} s")
        else:
            say("end: every run of the chosen parts is done")
    if losses:
        import cpu_plot

        print(cpu_plot.write(args.out))
        print(f"The picture: {args.out / 'quality.png'}")


def preset_of(setting: Setting) -> "Preset":
    """Return the sizes of a setting's runs."""
    from lab import Preset

    batch_tokens = min(setting.tokens_per_step, MAX_BATCH_TOKENS)
    return Preset(
        model_name(setting),
        setting.num_layers,
        setting.width,
        setting.num_heads,
        SEQ_LENGTH,
        batch=batch_tokens // SEQ_LENGTH,
        min_steps=setting.steps,
        max_steps=setting.steps,
        max_eval_batches=HELD_OUT_TOKENS // batch_tokens,
        tied=setting.tied,
        batches_per_step={setting.name: setting.tokens_per_step // batch_tokens},
        ramp=setting.ramp,
    )


def model_name(setting: Setting) -> str:
    """Return what the column `model` says: layers x width."""
    return f"{setting.num_layers}x{setting.width}" + (" tied" if setting.tied else "")


def main() -> int:
    """Run the study from the command line. The exit codes are `exit_code_of`'s."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=RUNS / "cpu", help="results (%(default)s)")
    parser.add_argument("--data", type=Path, default=RUNS / "text", help="tokens (%(default)s)")
    parser.add_argument(
        "--parts", type=int, default=len(PARTS), help="the first parts of the plan (%(default)s)"
    )
    parser.add_argument("--steps", type=int, help="of every run, to try the study (the plan's)")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (%(default)s)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="end before they are over")
    args = parser.parse_args()
    return exit_code_of(lambda: study(args))


if __name__ == "__main__":
    sys.exit(main())
