"""A user's own job, run for some steps, without its files, with AdamW's update in the log."""

import os
import shlex
import subprocess
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from megatron_adams.tuning.job_log import MIN_STEPS, UpdateSizes, sizes_in, summary
from megatron_adams.tuning.rule import TuneError

ADAMW_BETA2 = 0.95
"""AdamW's, where none is given: that of --adams-log-adamw-rms."""

# Of AdamW's learning rate, for the trial itself: between 0.2 and 0.5, in the studies. The ratio of
# the RMS depends on the rate only weakly.
_TRIAL_RATIO = 0.3
# What a trial must not write into.
_DROPPED = (
    *("--save", "--tensorboard-dir"),
    *("--wandb-project", "--wandb-exp-name", "--wandb-save-dir", "--wandb-entity"),
)
# With them, updates have another size, and the best rate is nearer to AdamW's.
_OTHER_FORMS = ("--adams-cautious", "--adams-nesterov")
_RATES = ("--lr", "--min-lr", "--decoupled-lr", "--decoupled-min-lr", "--lr-warmup-init")
_NUM_LOGGED = 40
_TAIL_LINES = 25
# torchrun ends its workers within 30 s of SIGTERM.
_TERMINATION_TIMEOUT_S = 40


@dataclass(frozen=True)
class Trial:
    """A job's command, changed for a trial.

    Attributes:
        words: the command.
        lr_adamw: the learning rate that it had.
        num_steps: how many steps it takes.
    """

    words: tuple[str, ...]
    lr_adamw: float
    num_steps: int

    def run(self, report: Callable[[UpdateSizes], None]) -> UpdateSizes:
        """Run the job, and return what its log says of the updates.

        Args:
            report: is told each logged step.
        Raises:
            TuneError: the job ends with another exit code than 0, or its log says too little.
            OSError: it cannot be started.
        """
        tail: deque[str] = deque(maxlen=_TAIL_LINES)
        steps: list[UpdateSizes] = []
        with _started(self.words) as process:
            assert process.stdout is not None
            for line in process.stdout:
                tail.append(line)
                for step in sizes_in([line]):
                    steps.append(step)
                    report(step)
            code = process.wait()
        if code:
            raise TuneError(
                f"the job ended with exit code {code}: {shlex.join(self.words)}\n{''.join(tail)}"
            )
        return summary(steps, "the job's output")


@contextmanager
def _started(words: Sequence[str]) -> Iterator["subprocess.Popen[str]"]:
    """A process that is ended with what is inside."""
    process = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_TERMINATION_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        assert process.stdout is not None
        process.stdout.close()


def trial_of(
    words: Sequence[str], *, lr: float | None, num_steps: int, adamw_beta2: float
) -> Trial:
    """Change a job's command for a trial.

    Flags are added behind the command, where they win over those before. The trial is of the job's
    first steps, from its own start or, with --finetune, from the weights that it loads. It writes
    no checkpoint and no log of its own, does not evaluate, and keeps the job's schedule.

    Args:
        words: what starts the job, with --optimizer adams and AdamW's --lr.
        lr: AdamW's learning rate; None: the command's --lr.
        num_steps: after which the trial ends.
        adamw_beta2: AdamW's.
    Raises:
        TuneError: the command is of another optimizer, has no learning rate, trains too briefly, or
            goes on from an AdamW run.
    """
    if num_steps < MIN_STEPS:
        raise TuneError(
            f"--steps {num_steps}: must be at least {MIN_STEPS}, after which AdamW's exp_avg_sq "
            "has forgotten its start; give more steps"
        )
    optimizer = _value(words, "--optimizer")
    if optimizer != "adams":
        found = f"has --optimizer {optimizer}" if optimizer else "has no --optimizer"
        raise TuneError(
            f"the command {found}: must have --optimizer adams on it; give the whole command, "
            "started through megatron_adams.launch, or add --adams-log-adamw-rms to the job and "
            "give its log with --log"
        )
    for flag in _OTHER_FORMS:
        if flag in words:
            raise TuneError(
                f"{flag}: must not be there, the rule has been tried for the paper's update alone; "
                "remove it from the trial, or sweep around AdamW's learning rate with it "
                "(docs/hyperparameters.md)"
            )
    if "--adams-from-adam" in words:
        raise TuneError(
            "--adams-from-adam: must not be there, a trial is of a job's first steps; give AdamW's "
            "checkpoint with --from-checkpoint instead"
        )
    train_iters = _value(words, "--train-iters")
    if train_iters is not None and _number("--train-iters", train_iters) < num_steps:
        raise TuneError(
            f"--steps {num_steps}: must be at most the job's --train-iters {train_iters}; give "
            "fewer steps, or a longer job"
        )
    given = _value(words, "--lr")
    if lr is None and given is None:
        raise TuneError("the command has no --lr: must be AdamW's learning rate; add --lr")
    lr_adamw = _number("--lr", given) if lr is None else lr
    added = [
        *("--adams-log-adamw-rms", f"{adamw_beta2}", "--log-interval", _log_interval(num_steps)),
        *("--exit-interval", f"{num_steps}", "--eval-iters", "0"),
    ]
    for flag in _RATES:
        value = f"{lr_adamw}" if flag == "--lr" else _value(words, flag)
        if value is not None:
            added += [flag, f"{_TRIAL_RATIO * _number(flag, value):.6g}"]
    # Without --finetune a job that has been there before would go on where it was.
    dropped = _DROPPED if "--finetune" in words else (*_DROPPED, "--load")
    return Trial((*_without(words, dropped), *added), lr_adamw, num_steps)


def _log_interval(num_steps: int) -> str:
    """An interval that divides the steps, so that the last one is logged."""
    largest = max(1, num_steps // _NUM_LOGGED)
    return str(next(each for each in range(largest, 0, -1) if num_steps % each == 0))


def _number(flag: str, text: str | None) -> float:
    try:
        return float(str(text))
    except ValueError:
        raise TuneError(f"{flag} {text}: must be a number; write its value in its place") from None


def _value(words: Sequence[str], flag: str) -> str | None:
    """The last value of a flag, which is argparse's; None where it was not given."""
    value = None
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == flag:
            value = following
        elif word.startswith(f"{flag}="):
            value = word.partition("=")[2]
    return value


def _without(words: Sequence[str], flags: Sequence[str]) -> list[str]:
    """The words without some flags and their values."""
    kept: list[str] = []
    is_dropped = False
    for word in words:
        if word.startswith("-"):
            is_dropped = word.partition("=")[0] in flags
        if not is_dropped:
            kept.append(word)
        elif "=" in word:
            is_dropped = False
    return kept
