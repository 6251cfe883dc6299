"""`megatron-adams convert`: make an AdamS checkpoint of an AdamW one."""

import argparse
import shlex
from pathlib import Path

from megatron_adams.checkpoint import DamagedCheckpointError, convert
from megatron_adams.commands.terminal import fail, report

_DESCRIPTION = """\
Make a checkpoint for --optimizer adams of one that Megatron saved with --optimizer adam:

  megatron-adams convert /checkpoints/adamw /checkpoints/adams

exp_avg_sq stays behind; all else is copied as it is, in the formats torch_dist and torch, and in
the layout that it was saved in. The run needs no --adams-from-adam then. Needs the Megatron that
saved it to be installed, one process, and no GPU.
"""


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "convert",
        help="make an AdamS checkpoint of an AdamW one",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="read only")
    parser.add_argument("destination", type=Path, help="a new or an empty folder")
    parser.set_defaults(run=lambda args: _convert(args.source, args.destination))


def _convert(source: Path, destination: Path) -> int:
    try:
        done = convert(
            source, destination, report=lambda line: report(line, is_last=_is_last(line))
        )
    except (ValueError, OSError, DamagedCheckpointError) as exc:
        return fail(str(exc))
    except ImportError as exc:
        return fail(f"{exc}: the checkpoint has objects of Megatron's; install megatron-core")
    saved = done.bytes_before - done.bytes_after
    print(
        f"{done.folder}: {done.bytes_after:,} bytes of {done.bytes_before:,}, {saved:,} saved "
        f"({saved / done.bytes_before:.0%}); resume with --optimizer adams --load "
        f"{shlex.quote(str(destination))}"
    )
    return 0


def _is_last(line: str) -> bool:
    """Of lines "[2/3] name"."""
    number, _, total = line[1:].partition("]")[0].partition("/")
    return number == total
