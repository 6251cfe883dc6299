"""Registration by an environment variable, in real processes that someone else starts."""

from pathlib import Path

import pytest

from tests.distributed.module_runs import run
from tests.distributed.test_build import assert_same
from tests.harness.cluster import Cluster
from tests.harness.environment import (
    make_environment_with_wheel,
    run_without_checkout,
    told_in,
)


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_environment_with_wheel(tmp_path_factory.mktemp("environment"))


def torchrun(python: Path, **variables: str) -> str:
    words = ("-m", "torch.distributed.run", "--nproc-per-node", "1", "--standalone")
    job = ("-m", "tests.distributed.autoregister_job")
    done = run_without_checkout(python, *words, *job, **variables)
    return done.stdout + done.stderr


def test_torchrun_and_forked_and_spawned_processes_have_adams(python: Path) -> None:
    log = torchrun(python, MEGATRON_ADAMS_AUTOREGISTER="1")
    processes = told_in(log)
    assert [how for how, *_ in processes] == ["fork", "spawn", "torchrun"], log[-4000:]
    assert {tuple(parts) for _, parts, _ in processes} == {("AdamSDistributedOptimizer",)}
    assert len({tuple(norms) for *_, norms in processes}) == 1
    lines = [line for line in log.splitlines() if "registered --optimizer adams" in line]
    assert len(lines) == 3
    assert all("with megatron.core alone" in line and "by autoregister" in line for line in lines)


def test_take_over_reaches_names_that_were_imported_before(
    cluster: Cluster, plain_cluster: Cluster
) -> None:
    taken = run(plain_cluster, 2, build="autoregister take over")
    assert_same(taken, run(cluster, 2, build="config"))


def test_command_line_is_known_where_the_hook_is_installed(plain_cluster: Cluster) -> None:
    """Whoever parses it, by a name that was imported before."""
    told = plain_cluster.run("tests.distributed.register_cases:parse_by_hook").results[0]
    assert told["without"] == 2  # argparse's exit code
    assert told["optimizer"] == "adams"
    assert told["wrapped"] and not told["wrapped_before"]
