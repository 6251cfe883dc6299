"""`megatron-adams tune`: a learning rate for AdamS, from AdamW's."""

import argparse
import json
import math
import shlex
import signal
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from megatron_adams.checkpoint import DamagedCheckpointError, read_moments
from megatron_adams.commands.terminal import fail, is_last, report
from megatron_adams.tuning import TuneError, UpdateSizes, read_sizes, suggest, trial_of
from megatron_adams.tuning.rule import ACCURACY, BETA2, BETA2_REASON, REASON, RULE, Suggestion
from megatron_adams.tuning.trial import ADAMW_BETA2

_DESCRIPTION = """\
Suggest a learning rate for AdamS to somebody who has AdamW's. Three ways, the first is the best:

  megatron-adams tune -- torchrun --nproc-per-node 8 -m megatron_adams.launch \\
      pretrain_gpt.py --optimizer adams --lr 6e-4 ...
  megatron-adams tune --lr 6e-4 --log job.log
  megatron-adams tune --from-checkpoint /checkpoints/adamw

The first runs the job, with AdamW's --lr on its command line, for --steps steps; it saves nothing.
Behind AdamS it keeps AdamW's exp_avg_sq, 4 bytes a parameter, sharded as the optimizer's state. The
second reads the log of a job that you have run with --adams-log-adamw-rms. The third needs no job
but AdamW's checkpoint, and estimates AdamS's update from it.
"""
_WIDTH = 88


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "tune",
        help="suggest a learning rate for AdamS, from AdamW's",
        description=_DESCRIPTION,
        epilog=_words_below(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [options] [-- command of a job]",
    )
    parser.add_argument(
        "--lr",
        type=float,
        metavar="LR",
        help="AdamW's peak learning rate; by default the command's --lr, or the checkpoint's",
    )
    parser.add_argument(
        "--steps", type=int, metavar="N", help="steps of the trial, of its first N; by default 200"
    )
    parser.add_argument(
        "--adamw-beta2",
        type=float,
        metavar="X",
        help=f"beta2 of AdamW in the trial; by default {ADAMW_BETA2}",
    )
    parser.add_argument(
        "--log", metavar="FILE", help="the log of a job with --adams-log-adamw-rms; - is stdin"
    )
    parser.add_argument(
        "--from-checkpoint",
        type=Path,
        metavar="DIR",
        help="a checkpoint of Megatron's --optimizer adam (torch_dist or torch); only read",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("words", nargs="*", metavar="command", help=argparse.SUPPRESS)
    parser.set_defaults(run=lambda args: _run(args, parser))


def _words_below() -> str:
    return "\n".join(
        textwrap.fill(text, _WIDTH)
        for text in (
            f"Rule: {RULE}, {REASON}",
            f"Accuracy: {ACCURACY}",
            f"beta2 {BETA2}: {BETA2_REASON}",
        )
    )


def _run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    try:
        _check(args)
    except TuneError as exc:
        parser.error(str(exc))
    try:
        if args.from_checkpoint is not None:
            suggestion = _from_checkpoint(args.from_checkpoint, args.lr)
        elif args.log is not None:
            suggestion = _from_log(args.log, args.lr)
        else:
            suggestion = _from_trial(args)
    except (ValueError, OSError, DamagedCheckpointError) as exc:
        return fail(str(exc))
    except ImportError as exc:
        return fail(f"{exc}: the checkpoint has objects of Megatron's; install megatron-core")
    except KeyboardInterrupt:
        return 130
    if args.json:
        print(json.dumps(suggestion.to_json(), indent=2))
    else:
        _show(suggestion)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse arguments that contradict each other.

    Raises:
        TuneError: naming them.
    """
    sources = {
        "--log": args.log is not None,
        "--from-checkpoint": args.from_checkpoint is not None,
        "a command behind --": bool(args.words),
    }
    given = [name for name, is_given in sources.items() if is_given]
    if len(given) != 1:
        raise TuneError(
            f"{' and '.join(given) or 'no source'} given: must be one of {', '.join(sources)}; "
            f"{'remove the others' if given else 'add one'}"
        )
    if args.lr is not None and not (math.isfinite(args.lr) and args.lr > 0):
        raise TuneError(f"--lr {args.lr}: must be a finite number above 0, AdamW's learning rate")
    if args.log is not None and args.lr is None:
        raise TuneError("--log without --lr: must be AdamW's learning rate; add --lr")
    for flag, value in (("--steps", args.steps), ("--adamw-beta2", args.adamw_beta2)):
        if value is not None and not args.words:
            raise TuneError(f"{flag} {value}: concerns a trial; remove it, or give a command")
    if args.adamw_beta2 is not None and not 0 < args.adamw_beta2 < 1:
        raise TuneError(f"--adamw-beta2 {args.adamw_beta2}: must be in (0, 1), as AdamW has it")


def _from_trial(args: argparse.Namespace) -> Suggestion:
    trial = trial_of(
        args.words,
        lr=args.lr,
        num_steps=200 if args.steps is None else args.steps,
        adamw_beta2=ADAMW_BETA2 if args.adamw_beta2 is None else args.adamw_beta2,
    )
    report(f"running {shlex.join(trial.words)}", is_last=True, file=sys.stderr)

    def report_step(step: UpdateSizes) -> None:
        report(
            f"step {step.last} of {trial.num_steps}: update RMS {step.adams:.3f}, AdamW's would "
            f"be {step.adamw:.3f}",
            is_last=step.last >= trial.num_steps,
            file=sys.stderr,
        )

    with _sigterm_raises():
        sizes = trial.run(report_step)
    return _suggest(sizes, trial.lr_adamw)


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Have SIGTERM raise, as Ctrl-C does: otherwise Python ends at once, and the job goes on."""

    def end(number: int, frame: object) -> NoReturn:
        # The next one would interrupt what ends the job.
        signal.signal(number, signal.SIG_IGN)
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _from_log(path: str, lr: float) -> Suggestion:
    text = sys.stdin.read() if path == "-" else Path(path).read_text(errors="replace")
    return _suggest(read_sizes(text.splitlines(), "stdin" if path == "-" else path), lr)


def _suggest(sizes: UpdateSizes, lr: float) -> Suggestion:
    return suggest(
        lr_adamw=lr,
        rms_adams=sizes.adams,
        rms_adamw=sizes.adamw,
        origin=f"the job's steps {sizes.first} to {sizes.last}",
    )


def _from_checkpoint(source: Path, lr: float | None) -> Suggestion:
    moments = read_moments(
        source,
        adams_beta2=BETA2,
        report=lambda line: report(line, is_last=is_last(line), file=sys.stderr),
    )
    return suggest(
        lr_adamw=moments.lr if lr is None else lr,
        rms_adams=moments.adams_rms,
        rms_adamw=moments.adamw_rms,
        origin=f"AdamW's iteration {moments.iteration}; AdamS's is an estimate from exp_avg_sq",
    )


def _show(suggestion: Suggestion) -> None:
    lines = suggestion.lines()
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:<{width}}  {value}")
    print()
    print(_words_below())
