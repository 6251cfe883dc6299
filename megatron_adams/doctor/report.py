"""What the doctor says: checks, each with a status and, where it is needed, a remedy.

The JSON form is a promise (docs/doctor.md): FORMAT is raised when a key changes its meaning or
goes away, and not when one is added.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any

FORMAT = 1


class Status(str, Enum):
    """How a check ended. Only PROBLEM makes a machine unfit."""

    # Python 3.10 has no StrEnum.
    __str__ = str.__str__

    OK = "ok"
    NOT_KNOWN = "not known"
    """What is asked does not answer: neither healthy nor broken."""
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        name: stable, as "gpu.0.ecc"; for --json and --ignore.
        text: what was found, in words.
        remedy: what to do; "" where nothing is to be done.
    """

    name: str
    status: Status
    text: str
    remedy: str = ""

    @property
    def section(self) -> str:
        """The part of the name before its first dot."""
        return self.name.partition(".")[0]


def ok(name: str, text: str) -> Check:
    """A check that found what it should."""
    return Check(name, Status.OK, text)


def not_known(name: str, text: str, remedy: str = "") -> Check:
    """A check that had no answer."""
    return Check(name, Status.NOT_KNOWN, text, remedy)


def warning(name: str, text: str, remedy: str) -> Check:
    """A check that found what works, but not as well as it could."""
    return Check(name, Status.WARNING, text, remedy)


def problem(name: str, text: str, remedy: str) -> Check:
    """A check that found what a job would fail on, or should not run on."""
    return Check(name, Status.PROBLEM, text, remedy)


@dataclass
class Report:
    """All that was found on a machine.

    Attributes:
        purpose: "gpu" or "cpu-rehearsal".
        host: its name.
        facts: for --json: "versions", "driver", "gpus", "kernels", "flags".
        is_strict: whether what is not known and warnings make the machine unfit, too.
        ignored: shell patterns of names of checks that do not.
    """

    purpose: str
    host: str
    checks: list[Check] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    is_strict: bool = False
    ignored: tuple[str, ...] = ()

    def add(self, checks: Iterable[Check]) -> None:
        """Append checks."""
        self.checks += checks

    def count(self, status: Status) -> int:
        """How many checks have a status."""
        return sum(check.status is status for check in self.checks)

    def is_ignored(self, check: Check) -> bool:
        """Whether a check does not count, as the user asked."""
        return any(fnmatchcase(check.name, pattern) for pattern in self.ignored)

    @property
    def against(self) -> list[Check]:
        """The checks that make the machine unfit."""
        unfit = {Status.PROBLEM}
        if self.is_strict:
            unfit |= {Status.WARNING, Status.NOT_KNOWN}
        return [c for c in self.checks if c.status in unfit and not self.is_ignored(c)]

    @property
    def is_fit(self) -> bool:
        """Whether a job may start here."""
        return not self.against

    @property
    def exit_status(self) -> int:
        """0: fit; 1: not."""
        return 0 if self.is_fit else 1

    def as_json(self) -> dict[str, Any]:
        """The documented form."""
        return {
            "format": FORMAT,
            "host": self.host,
            "purpose": self.purpose,
            "fit": self.is_fit,
            "exit_status": self.exit_status,
            "counts": {status.value: self.count(status) for status in Status},
            "checks": [
                {
                    "name": check.name,
                    "status": check.status.value,
                    "text": check.text,
                    "remedy": check.remedy or None,
                    "ignored": self.is_ignored(check),
                }
                for check in self.checks
            ],
            **self.facts,
        }
