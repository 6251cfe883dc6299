"""tests/gpu/megatron_runs.py as far as it goes without a GPU: its rehearsal and comparison."""

import functools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest

from tests.gpu import megatron_runs
from tests.gpu.megatron_runs import Record
from tests.harness.cluster import REPO, Cluster

RECORDED = "tests.distributed.recorded_cases:pretrain"
TIMEOUT_S = 240


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(REPO / "tests/gpu/megatron_runs.py"), *arguments],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def records_of(out: Path) -> dict[str, dict[str, Any]]:
    return {record["name"]: record for record in json.loads(out.read_text())}


@pytest.mark.timeout(TIMEOUT_S + 30)
def test_rehearsal_makes_and_records_a_run_by_torchrun(tmp_path: Path) -> None:
    name = "adams, precision-aware, exp_avg bf16"
    done = launch("--out", str(tmp_path / "runs.json"), "--rehearse", "--only", name)
    assert done.returncode == 0, done.stdout + done.stderr
    (record,) = records_of(tmp_path / "runs.json").values()
    assert record["ok"] and len(record["losses"]) == 8, record["words"]
    assert f"{name}: ok" in done.stdout


class Forked:
    """Stands in for `subprocess.Popen`: a job of one rank, which the cluster forks at once."""

    def __init__(
        self,
        cluster: Cluster,
        command: list[str],
        *,
        env: dict[str, str],
        stdout: IO[str],
        **_: Any,
    ) -> None:
        script = command.index(str(megatron_runs.SCRIPT))
        assert command[script - 2 : script] == ["megatron_adams.launch", "--cpu-rehearsal"]
        flags = command[script + 1 :]
        run = cluster.run(RECORDED, flags=flags, record_file=env["RECORD_FILE"], check=False)
        stdout.write(run.log)
        (self._code,) = run.codes

    def wait(self, timeout: float | None = None) -> int:
        return self._code

    def terminate(self) -> None:
        """It has ended."""


def test_rehearsal_makes_every_run_and_records_it(
    cluster: Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All but torchrun, through which the test above goes."""
    started = SimpleNamespace(
        Popen=functools.partial(Forked, cluster),
        STDOUT=subprocess.STDOUT,
        TimeoutExpired=subprocess.TimeoutExpired,
    )
    monkeypatch.setattr(megatron_runs, "subprocess", started)
    out = tmp_path / "runs.json"
    monkeypatch.setattr(sys, "argv", ["megatron_runs.py", "--out", str(out), "--rehearse"])
    code = megatron_runs.main()
    told = capsys.readouterr().out
    assert code == 0, told
    records = records_of(out)
    assert list(records) == list(megatron_runs.RUNS)
    for record in records.values():
        assert record["ok"], record["words"]
        assert len(record["losses"]) == len(record["grad_norms"]) == 8
        assert record["step_ms"] > record["peak_mib"] == 0
        is_timed = "timing-log-level" in record["flags"]
        assert is_timed is not any(
            words in record["name"] for words in ("CUDA graph", "no clipping", "logs")
        )
        if is_timed:
            assert record["step_ms"] > record["optimizer_ms"] > record["inner_step_ms"] > 0
            assert record["logged_inner_step_ms"] > 0
    bytes_per_param = [round(r["state_bytes"] / r["num_params"]) for r in records.values()]
    assert bytes_per_param == [12, 8, 4, 8, 8, 8, 8, 8]
    assert records["adam"]["losses"][0] == records["adams"]["losses"][0]
    assert records["adam"]["losses"][-1] != records["adams"]["losses"][-1]
    assert "bit for bit" in records["adams, CUDA graph, no clipping"]["words"]
    # The table, with a line for each run.
    assert sum(line.startswith("| adam") for line in told.splitlines()) == len(records)


def test_without_a_gpu_it_says_that_it_did_not_run(tmp_path: Path) -> None:
    done = launch("--out", str(tmp_path / "runs.json"))
    assert (done.returncode, done.stdout.strip()) == (0, "not run: no GPU")


PLAIN = Record("adams", "", losses=[4.0, 3.0], grad_norms=[1.0, 1.0], weights=7, ok=True)


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"losses": [4.0, 3.0000001]}, "loss of step 2: 3.0000001 and 3.0"),
        ({"grad_norms": [1.000001, 1.0]}, "grad norm of step 1: 1.000001 and 1.0"),
        ({"weights": 8}, "the weights at the end"),
    ],
)
def test_other_bits_in_a_graph_fail_its_run(fields: dict[str, object], where: str) -> None:
    graph = replace(PLAIN, name="adams, CUDA graph", **fields)  # type: ignore[arg-type]
    megatron_runs.compare(graph, PLAIN, again=replace(PLAIN))
    assert not graph.ok
    assert where in graph.words and "a second run of 'adams' does not" in graph.words
    # A norm that is added up in another order.
    graph = replace(PLAIN, grad_norms=[1.0, 1.0 + 2**-23])
    megatron_runs.compare(graph, PLAIN, again=None)
    assert graph.ok and "bit for bit" in graph.words
    # A model whose own step is not repeatable says nothing about the graph.
    graph = replace(graph, **fields)  # type: ignore[arg-type]
    megatron_runs.compare(graph, PLAIN, again=replace(PLAIN, **fields))  # type: ignore[arg-type]
    assert "not repeatable" in graph.words
