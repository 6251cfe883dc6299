"""committee_predict.py whose actors must work beside each other, and finish in another order.

    python -m tests.frameworks.ray_committee FLAGS

test_ray_committee.py starts it. The actor that has the pool's first batch holds it back until the
other actor has answered two, which leaves a file each in the folder NOTES names.
"""

import os
import pickle
import sys
import time
from pathlib import Path
from typing import Any

for example in ("nlu_ssl", "nlu_teacher"):
    sys.path.append(str(Path(__file__).resolve().parents[2] / "examples" / example))

import committee_predict  # noqa: E402  (the example's files import each other by name)
import ray_predict  # noqa: E402

_WAIT_S = 120.0


class Late(ray_predict.Teacher):
    """An actor of them."""

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """See ray_predict.Teacher."""
        start, _ = pickle.loads(row["pickled"])
        notes = Path(os.environ["NOTES"])
        end = time.monotonic() + _WAIT_S
        while start == 0 and len(list(notes.glob("*"))) < 2:
            if time.monotonic() > end:
                raise ValueError("no other actor answers")
            time.sleep(0.05)
        answer = super().__call__(row)
        if start > 0:
            (notes / str(start)).touch()
        return answer


if __name__ == "__main__":
    ray_predict.Teacher = Late  # type: ignore[misc]
    sys.exit(committee_predict.main())
