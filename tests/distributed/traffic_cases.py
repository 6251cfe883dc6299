"""What the rank of test_traffic.py runs: benchmarks/traffic.py."""

import sys
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def count(optimizer: str, more_flags: str = "") -> dict[str, Any]:
    """`traffic.count_step`, as plain containers: the tests' process does not import traffic."""
    sys.path.insert(0, str(BENCHMARKS))
    import traffic

    counted = traffic.count_step(optimizer, f"{traffic.FLAGS} {more_flags}")
    kinds = (traffic.CLIP, traffic.RMS, traffic.UPDATE, traffic.COPY, traffic.ELSEWHERE)
    return {
        "bytes": {tuple(key): value for key, value in counted.bytes_per_param.items()},
        "total": counted.total(*kinds),
        "derived": traffic.total(traffic.ADAMS),
        "derived_of_guarded": traffic.total(traffic.GUARDED_ADAMS),
        "derived_of_fused_adam": {step.kind: step.total for step in traffic.FUSED_ADAM},
        "params_are_unread": counted.params_are_unread,
        "grads_are_unwritten": counted.grads_are_unwritten,
    }
