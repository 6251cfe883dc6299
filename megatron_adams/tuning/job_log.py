"""The update RMS of AdamS and of AdamW in the log of a job with --adams-log-adamw-rms."""

import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from megatron_adams.tuning.rule import TuneError

# The exponential average of squared gradients starts at zero. At AdamW's usual beta2, 0.95, it has
# forgotten that after some tens of steps, but the RMS goes on falling until about step 60.
MIN_STEPS = 100
_MIN_LINES = 5
_LINE = re.compile(r"iteration\s+(\d+)/\s*\d+ \| update RMS: (\S+) \| AdamW's would be: (\S+) \|")


class UpdateSizes(NamedTuple):
    """The update RMS of a step, before lr and weight decay, or of several.

    Attributes:
        first, last: the steps; of the job's count.
        adams, adamw: of AdamS, and of AdamW for the same gradients.
    """

    first: int
    last: int
    adams: float
    adamw: float


def sizes_in(lines: Iterable[str]) -> Iterator[UpdateSizes]:
    """Yield what each logged step of a log says, as the lines come."""
    for line in lines:
        if found := _LINE.search(line):
            step = int(found[1])
            yield UpdateSizes(step, step, float(found[2]), float(found[3]))


def read_sizes(lines: Iterable[str], source: str) -> UpdateSizes:
    """Return the root mean square over the later half of the steps of a log.

    Args:
        lines: of the log.
        source: its name, for errors.
    Raises:
        TuneError: there are no such lines, too few, or numbers that are not finite.
    """
    return summary(list(sizes_in(lines)), source)


def summary(steps: list[UpdateSizes], source: str) -> UpdateSizes:
    """Return what `read_sizes` returns, of steps that have been read.

    Raises:
        TuneError: as `read_sizes`.
    """
    if not steps:
        raise TuneError(
            f"{source}: has no update RMS of AdamW's; must be of a job with --optimizer adams and "
            "--adams-log-adamw-rms; add that flag"
        )
    # A job that was started several times has several first steps in one log.
    begin = max(i for i, each in enumerate(steps) if not i or each.first <= steps[i - 1].first)
    steps = steps[begin:]
    num_steps = steps[-1].last - steps[0].first + 1
    later = [each for each in steps if each.first > steps[-1].last - num_steps / 2]
    if num_steps < MIN_STEPS or len(later) < _MIN_LINES:
        raise TuneError(
            f"{source}: has {len(steps)} logged steps, over {num_steps} steps; must be at least "
            f"{2 * _MIN_LINES} over {MIN_STEPS}, of which the later half counts; run the job for "
            "longer, with a smaller --log-interval"
        )
    if bad := [each for each in later if not math.isfinite(each.adams * each.adamw)]:
        raise TuneError(
            f"{source}: the update RMS of step {bad[0].first} is {bad[0].adams}, AdamW's "
            f"{bad[0].adamw}; must be finite; look for the NaN or inf in the gradients first"
        )
    return UpdateSizes(
        later[0].first,
        later[-1].last,
        math.sqrt(math.fsum(each.adams**2 for each in later) / len(later)),
        math.sqrt(math.fsum(each.adamw**2 for each in later) / len(later)),
    )
