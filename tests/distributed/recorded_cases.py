"""What the rank of test_megatron_runs.py runs: one of its runs, without torchrun."""

import os
import sys

from megatron_adams.cpu_rehearsal import rehearsal_flags


def pretrain(flags: list[str], record_file: str) -> None:
    """Run recorded_pretrain.py with these flags; it records the run in a file."""
    from tests.gpu import recorded_pretrain

    os.environ["RECORD_FILE"] = record_file
    sys.argv = [recorded_pretrain.__file__, *flags, *rehearsal_flags(flags)]
    recorded_pretrain.main()
