"""`megatron-adams convert`: turn an AdamW checkpoint into an AdamS checkpoint."""

import argparse
import shlex
from pathlib import Path

from megatron_adams.checkpoint import DamagedCheckpointError, convert
from megatron_adams.commands.terminal import fail, is_last, report

_DESCRIPTION = """\
Turn a checkpoint that Megatron saved with --optimizer adam into one for --optimizer adams:

  megatron-adams convert /checkpoints/adamw /checkpoints/adams

exp_avg_sq is left out. Everything else is copied unchanged, in the layout that it was saved in. The
formats are torch_dist and torch. A run that loads the new checkpoint needs no --adams-from-adam.
The Megatron that saved the checkpoint must be installed. One process is enough, without a GPU.
"""


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "convert",
        help="turn an AdamW checkpoint into an AdamS checkpoint",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="the checkpoint of AdamW; it is only read")
    parser.add_argument("destination", type=Path, help="a new or an empty folder")
    parser.set_defaults(run=lambda args: _convert(args.source, args.destination))


def _convert(source: Path, destination: Path) -> int:
    try:
        done = convert(source, destination, report=lambda line: report(line, is_last=is_last(line)))
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
