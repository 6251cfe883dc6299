"""A report in words: in columns and color on a terminal, a line for each check elsewhere."""

import textwrap
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_adams.doctor.report import Check, Report, Status

_MARKS = {Status.OK: "✓", Status.NOT_KNOWN: "?", Status.WARNING: "!", Status.PROBLEM: "✗"}
_ASCII_MARKS = {Status.OK: "+", Status.NOT_KNOWN: "?", Status.WARNING: "!", Status.PROBLEM: "x"}
_STYLES = {
    Status.OK: "green",
    Status.NOT_KNOWN: "cyan",
    Status.WARNING: "yellow",
    Status.PROBLEM: "bold red",
}
_TITLES = {
    "software": "Software",
    "driver": "Driver",
    "gpus": "GPUs",
    "megatron": "Megatron",
    "flags": "Launch flags",
    "kernel": "Kernels",
}
_PURPOSES = {"gpu": "a job on GPUs", "cpu-rehearsal": "a rehearsal on CPU processes"}


def show(report: Report, file: TextIO, *, is_verbose: bool) -> None:
    """Print a report.

    Args:
        file: where to; as a terminal or not decides on the form.
        is_verbose: GPUs whose checks are well have a line for each of them, and not one in all.
    """
    checks = report.checks if is_verbose else [*_shortened(report)]
    if file.isatty():
        _show_on_terminal(report, checks, Console(file=file, highlight=False))
        return
    print(f"megatron-adams doctor: {report.host}, {_PURPOSES[report.purpose]}", file=file)
    for check in checks:
        status = "ignored" if report.is_ignored(check) else check.status.value
        print(f"{status:<10}{check.name}: {check.text}", file=file)
        if check.remedy:
            print(f"{'':<10}remedy: {check.remedy}", file=file)
    print(verdict(report), file=file)


def _shortened(report: Report) -> Iterator[Check]:
    """The checks, those of a GPU without a problem or a warning in one."""
    for section, group in groupby(report.checks, lambda check: check.section):
        checks = [*group]
        quiet = {Status.OK, Status.NOT_KNOWN}
        if not section[3:].isdecimal() or any(check.status not in quiet for check in checks):
            yield from checks
            continue
        known = {check.name.partition(".")[2]: check for check in checks}
        unknown = [name for name, check in known.items() if check.status is Status.NOT_KNOWN]
        words = [known[name].text for name in ("name", "memory")]
        num = len(checks) - len(unknown)
        words.append(f"{num} checks ok")
        if unknown:
            words.append(f"not known: {', '.join(unknown)}")
        status = Status.NOT_KNOWN if unknown else Status.OK
        yield Check(section, status, "; ".join(words))


def verdict(report: Report) -> str:
    """Whether the machine is fit, in a line."""
    if report.is_fit:
        notes = [
            f"{report.count(status)} {status.value}{'s' * is_plural}"
            for status, is_plural in ((Status.WARNING, True), (Status.NOT_KNOWN, False))
            if report.count(status)
        ]
        return f"fit for {_PURPOSES[report.purpose]}" + (f" ({', '.join(notes)})" if notes else "")
    num = len(report.against)
    return (
        f"NOT fit for {_PURPOSES[report.purpose]}: {num} check{'s' * (num != 1)} against it: "
        f"{', '.join(check.name for check in report.against)}"
    )


def _show_on_terminal(report: Report, checks: Sequence[Check], console: Console) -> None:
    # Not every terminal's encoding has the marks.
    is_utf = console.encoding.lower().startswith("utf")
    marks = _MARKS if is_utf else _ASCII_MARKS
    arrow = "→" if is_utf else "->"
    console.print(
        Text.assemble(
            ("megatron-adams doctor", "bold"), f": {report.host}, {_PURPOSES[report.purpose]}"
        )
    )
    width = max(len(_label(check)) for check in checks)
    for section, group in groupby(checks, _title):
        console.print()
        console.print(Text(section, style="bold"))
        # The words beside their name, also where they are wrapped; folded, never cut off.
        table = Table.grid(padding=(0, 1))
        table.add_column(width=1)
        table.add_column(width=width, no_wrap=True)
        table.add_column(overflow="fold")
        for check in group:
            is_ignored = report.is_ignored(check)
            style = "dim" if is_ignored else _STYLES[check.status]
            words = Text(check.text + (" (ignored)" if is_ignored else ""))
            words.stylize("dim" if is_ignored else "")
            table.add_row(Text(marks[check.status], style=style), Text(_label(check)), words)
            if check.remedy:
                table.add_row("", "", Text(f"{arrow} {check.remedy}", style="italic"))
        console.print(table)
    console.print()
    style = _STYLES[Status.OK if report.is_fit else Status.PROBLEM]
    mark = marks[Status.OK if report.is_fit else Status.PROBLEM]
    lines = textwrap.wrap(f"{mark} {verdict(report)}", console.width, break_on_hyphens=False)
    console.print(Text("\n".join(lines), style=style))


def _title(check: Check) -> str:
    section = check.section
    return _TITLES.get(section, _TITLES["gpus"])


def _label(check: Check) -> str:
    """The name without the section, which stands above; a GPU's with its number."""
    section, _, rest = check.name.partition(".")
    return check.name if section not in _TITLES else rest
