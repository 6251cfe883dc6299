"""tests/gpu/run.py without a GPU: whatever a stage does, the next starts, and nothing is lost."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from tests.gpu import run, verdicts
from tests.gpu.records import Records, read_lines

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "gpu" / "run.py"
STAGES = ROOT / "tests" / "gpu" / "stages"
LARGEST_NUM_FILES = 7

# Runs stages of a test's own: programs of `folder`, by name and limit.
DRIVER = """
import sys
from pathlib import Path
from tests.gpu import run, verdicts

run.GRACE_S = 0.5
run.SHORTEST_S = 0.5
folder, *names = sys.argv[1:]
stages = []
for name in names:
    name, _, limit = name.partition(":")
    command = f"{folder}/{name}.py --results {{results}} --out {{out}}"
    stages.append(
        run.Stage(name, float(limit or 20), "a test", command, command, verdicts.checks,
                  needs_gpu=False)
    )
sys.exit(run.Run(run.parse_args(["--out", f"{folder}/out", "--seconds", "200"]), stages).run())
"""
PROGRAM = """
import argparse, os, signal, subprocess, sys, time
from pathlib import Path
from tests.gpu.records import Records

parser = argparse.ArgumentParser()
parser.add_argument("--results", type=Path)
parser.add_argument("--out", type=Path)
args = parser.parse_args()
name = Path(__file__).stem
here = Path(__file__).parent
Records(args.results).write(name, "begins", ok=True)
(args.out / f"{name}.csv").write_text("1,2")
"""
HANGS = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
# As torchrun starts its workers: in a session of their own.
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"],
                         start_new_session=True)
(here / "child").write_text(str(child.pid))
time.sleep(60)
"""
FAILS = "Records(args.results).write(name, 'second', ok=False, words='1 is not 2'); sys.exit(3)"


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


def write_programs(folder, **bodies):
    for name, body in bodies.items():
        (folder / f"{name}.py").write_text(PROGRAM + body)


def start(folder, *stages):
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(folder), *stages],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )


def finish(process, timeout_s=60):
    """Wait for a run; return what it printed."""
    try:
        return process.communicate(timeout=timeout_s)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        raise


def rows_of(text):
    """What the last table says of each stage: its result."""
    table = text[text.index("| stage |") :].splitlines()[2:]
    cells = (line.removeprefix("| ").split(" | ") for line in table if line.startswith("| "))
    return {stage: result for stage, result, *_ in cells}


def is_alive(pid):
    try:
        # A zombie has ended, whoever has not asked for it yet.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def files_of(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) <= LARGEST_NUM_FILES
    assert all(path.parent == folder for path in files)
    return {path.name for path in files}


@pytest.mark.timeout(240)
def test_a_rehearsal_of_stages_ends_with_the_whole_table(tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, str(SCRIPT), "--rehearse", "--out", str(tmp_path)),
            *("--only", "smoke", "graphs", "ncu", "sanitizer", "quality"),
        ],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(done.stdout)
    assert list(rows) == ["facts", "smoke", "graphs", "ncu", "sanitizer", "quality"]
    for name in ("smoke", "graphs", "ncu", "sanitizer"):
        assert rows[name].startswith("not run: no GPU; rehearsed: "), rows[name]
    assert "checks are right" in rows["smoke"] and "torch" in rows["facts"]
    assert rows["quality"] == "not run: the folder of --quality-data is missing"
    assert {"results.jsonl", "report.md", "log.txt"} <= files_of(tmp_path)
    assert rows_of((tmp_path / "report.md").read_text()) == rows
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    outcomes = [r["stage"] for r in map(json.loads, lines) if r["name"] == "outcome"]
    assert outcomes == list(rows)


def test_every_stage_of_a_run_without_a_gpu_says_so(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--only", "smoke", "sweep", "--out", str(tmp_path)],
        env={**environment(), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    rows = rows_of(done.stdout)
    assert rows["smoke"] == rows["sweep"] == "not run: no GPU"
    assert done.returncode == 1


def test_a_stage_that_hangs_is_ended_with_its_children_and_the_next_one_runs(tmp_path):
    write_programs(tmp_path, hangs=HANGS, works="")
    started = time.monotonic()
    process = start(tmp_path, "hangs:3", "works")
    output = finish(process)
    assert time.monotonic() - started < 30
    rows = rows_of(output)
    assert rows["hangs"].startswith("**failed**: stopped at its limit of 3 s. 1 of 1 checks")
    assert rows["works"] == "1 of 1 checks are right"
    assert process.returncode == 1
    assert not is_alive(int((tmp_path / "child").read_text()))
    assert files_of(tmp_path / "out") == {"results.jsonl", "report.md", "log.txt", "files.tar.gz"}
    with tarfile.open(tmp_path / "out" / "files.tar.gz") as archive:
        assert sorted(archive.getnames()) == ["hangs.csv", "works.csv"]


def test_sigterm_ends_the_stage_and_prints_the_table(tmp_path):
    write_programs(tmp_path, hangs=HANGS, works="")
    process = start(tmp_path, "hangs:50", "works")
    until = time.monotonic() + 40
    while not (tmp_path / "child").exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output = finish(process, 30)
    rows = rows_of(output)
    assert rows["hangs"].startswith("**failed**: stopped by SIGTERM. 1 of 1 checks are right")
    assert rows["works"] == "not run: SIGTERM came before"
    assert process.returncode == 1
    assert rows_of((tmp_path / "out" / "report.md").read_text()) == rows


def test_a_stage_that_fails_does_not_stop_the_next(tmp_path):
    large = "(args.out / 'large.bin').write_bytes(bytes(5 * 2**20))"
    write_programs(tmp_path, fails=FAILS, works=large, loud="while True: print('x' * 10**6)")
    process = start(tmp_path, "fails", "loud", "gone", "works")
    output = finish(process)
    rows = rows_of(output)
    words = "exit code 3. 1 of 2 checks are right; wrong are second: 1 is not 2"
    assert rows["fails"] == f"**failed**: {words}"
    assert "stopped, because it printed more than 64 MiB" in rows["loud"]
    assert (tmp_path / "out" / "log.txt").stat().st_size < 2 * run.KEPT_LOG
    assert "Not in files.tar.gz: large.bin is too large" in output
    with tarfile.open(tmp_path / "out" / "files.tar.gz") as archive:
        assert "large.bin" not in archive.getnames()
    assert "gone.py is missing" in rows["gone"] and rows["gone"].startswith("not run: ")
    assert rows["works"] == "1 of 1 checks are right"


def test_after_a_smoke_that_fails_the_sanitizer_comes_first_and_megatron_not_at_all(tmp_path):
    write_programs(tmp_path, smoke=FAILS, battery="", megatron="", sanitizer="", ncu="")
    process = start(tmp_path, "smoke", "battery:110", "megatron", "ncu", "sanitizer")
    output = finish(process)
    rows = rows_of(output)
    assert list(rows) == ["smoke", "megatron", "sanitizer", "battery", "ncu"]
    assert rows["megatron"] == "not run: smoke failed"
    assert rows["battery"] == "1 of 1 checks are right"
    assert "===== battery, at most 60 s" in (tmp_path / "out" / "log.txt").read_text()


def test_the_parent_imports_no_torch():
    code = "import sys\nfrom tests.gpu import run\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)


def test_every_stage_has_a_limit_and_the_first_ones_fit_into_the_time():
    limits = {stage.name: stage.limit_s for stage in run.STAGES}
    assert list(limits) == [
        *("facts", "smoke", "battery", "speed", "sweep", "confirm", "megatron", "graphs", "ncu"),
        *("sanitizer", "quality"),
    ]
    assert sum(limits[name] for name in list(limits)[:7]) + run.RESERVE_S <= 560


def test_a_line_that_a_kill_cut_in_two_is_left_out(tmp_path):
    records = Records(tmp_path / "results.jsonl")
    records.write("smoke", "a", ok=True)
    with records.path.open("a") as file:
        file.write('{"stage": "smoke", "na')
    assert [record["name"] for record in read_lines(records.path)] == ["a"]
    assert verdicts.checks(records.of_stage("smoke"), tmp_path).is_good


def test_a_number_that_is_not_there_is_not_measured(tmp_path):
    for verdict in (verdicts.speed, verdicts.confirm, verdicts.sweep, verdicts.megatron):
        words, is_good, _ = verdict([], tmp_path)
        assert words.startswith("not measured") and not is_good
    assert verdicts.quality([], tmp_path).words.startswith("not measured")
    (tmp_path / "megatron.json").write_text(json.dumps([{"name": "adam", "ok": True}]))
    assert "last loss not measured" in verdicts.megatron([], tmp_path).words


def test_bandwidth_and_ratios_are_those_of_the_rounds(tmp_path):
    rows = [
        {"name": name, "workload": "1G", "numel": 10**9, "mode": "m", "num_bytes": num_bytes}
        | {"times_s": times, "wall_s": 0.008}
        for name, num_bytes, times in (
            (verdicts.COPY, 4e9, [0.001, 0.002, 0.003]),
            (verdicts.ADAMS, 20e9, [0.010, 0.010, 0.020]),
            (verdicts.FUSED, 28e9, [0.015, 0.014, 0.028]),
        )
    ]
    (tmp_path / "step.json").write_text(
        json.dumps({"rows": rows, "missing": {"peer": "not there"}, "memory": []})
    )
    words, is_good, details = verdicts.speed([], tmp_path)
    # The middle of 5 * (0.1, 0.2, 0.15), and of 1.5, 1.4, 1.4.
    assert is_good
    assert words == "1G in m: 75% of a copy, torch AdamW, fused takes 1.4 times as long"
    assert "- peer: not measured, not there" in details


def test_a_test_that_failed_and_then_crashed_is_one(tmp_path):
    records = [
        {"name": "t::a", "result": "passed", "seconds": 1.0},
        {"name": "t::b", "result": "failed", "words": "AssertionError: 1", "seconds": 1.0},
        {"name": "t::b", "result": "failed", "words": "worker crashed", "seconds": 0.0},
        {"name": "t::c", "result": "skipped", "words": "not run: fewer than two GPUs"},
    ]
    words, is_good, details = verdicts.battery(records, tmp_path)
    assert words.startswith("tests passed: 1, failed: 1, not run: 1 (fewer than two GPUs)")
    assert not is_good and "- t::b: AssertionError: 1" in details


def test_the_profilers_table_is_read_by_launch(monkeypatch):
    monkeypatch.syspath_prepend(str(STAGES))
    import ncu

    text = """==PROF== Connected to process 1
==PROF== Disconnected
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","1","adams_update","Command line","dram__bytes_read.sum","Gbyte","1.2"
"0","1","adams_update","Command line","gpu__time_duration.sum","us","350,5"
"1","1","adams_update","Command line","dram__bytes_read.sum","Gbyte","0.6"
"""
    assert ncu.read_counters(text) == [
        {"dram__bytes_read.sum": "1.2 Gbyte", "gpu__time_duration.sum": "350,5 us"},
        {"dram__bytes_read.sum": "0.6 Gbyte"},
    ]
    assert ncu.read_counters("==ERROR== no permission") == []
