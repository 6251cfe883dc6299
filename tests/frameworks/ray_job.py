"""A driver that never calls register(): actors of a local Ray cluster train, each in its process.

    python -m tests.frameworks.ray_job FOLDER NAME ...

test_ray.py starts it. It prints a line of JSON for each NAME, of ACTORS.
"""

import json
import os
import socket
import sys
from typing import Any

import ray

from tests.harness.log_lines import collect_log_lines

# What is given to Ray for an actor's process.
ACTORS: dict[str, dict[str, Any]] = {
    "plain": {},
    "with the variable": {"runtime_env": {"env_vars": {"MEGATRON_ADAMS_AUTOREGISTER": "1"}}},
}


class Trainer:
    """One rank, in a process that Ray has started."""

    def train(self) -> dict[str, Any]:
        """Train with Megatron's plain configuration, optimizer="adams".

        Returns:
            "lines": what the package logged; "parts": classes of the optimizers, or "error": class
            and text of what Megatron raised.
        """
        lines = collect_log_lines()

        from megatron_adams import cpu_rehearsal

        cpu_rehearsal.install()

        from tests.distributed import module_cases  # behind the stand-in

        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            port = unused.getsockname()[1]
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", WORLD_SIZE="1")
        try:
            trained = module_cases.train(build="plain config", num_steps=2)
        except ImportError as exc:
            return {"lines": lines, "error": f"{type(exc).__name__}: {exc}"}
        return {"lines": lines, "parts": trained["parts"]}


def main(folder: str, names: list[str]) -> None:
    ray.init(
        num_cpus=1,
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        _temp_dir=folder,
    )
    for name in names:
        actor = ray.remote(Trainer).options(num_cpus=0, **ACTORS[name]).remote()
        print("told", json.dumps(ray.get(actor.train.remote())), flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
