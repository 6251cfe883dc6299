"""examples/nlu_ssl: committee_predict.py --ray-actors on a real Ray, on this machine."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.frameworks.conftest import installed

ROOT = Path(__file__).resolve().parents[2]
for package in ("num2words", "tokenizers", "safetensors", "datasets", "pandas"):
    pytest.importorskip(package, reason=f"needs {package}: pip install 'megatron-adams[nlu]'")
EXAMPLE = ROOT / "examples" / "nlu_ssl"
for example in (EXAMPLE, ROOT / "examples" / "nlu_teacher"):
    sys.path.append(str(example))

import labelled  # noqa: E402  (the example's files import each other by name)
import pool_files  # noqa: E402

from tests.unit.made_up_committee import write_members  # noqa: E402

BATCH = 512  # of committee_predict.py
COMMAND = (str(EXAMPLE / "committee_predict.py"),)
# Its actors finish in another order.
LATE = ("-m", "tests.frameworks.ray_committee")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Members, held-out utterances, and a pool of twelve batches of several lengths."""
    folder = tmp_path_factory.mktemp("committee")
    write_members(folder / "members", fails_at_unknown=True)
    held_out = [labelled.Utterance(text, "Play", ()) for text in ("play the song", "play ann now")]
    labelled.write_jsonl(folder / "held_out.jsonl", held_out)
    texts = [
        f"play {'the song of ' * (i % 5)}ann {'now ' * (i % 7)}" for i in range(12 * BATCH - 9)
    ]
    pool_files.write_pool(folder / "pool.arrow", [texts])
    write_lines(folder / "pool.jsonl", texts)
    return folder


def write_lines(path: Path, texts: list[str], *more: str) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts) + "".join(more))


@contextmanager
def started(
    program: tuple[str, ...], data: Path, pool: Path, out: Path, actors: int | None
) -> Iterator[subprocess.Popen[str]]:
    """Start it, with Ray on this machine; end it at the end."""
    words = ["--models", data / "members", "--pool", pool, "--held-out", data / "held_out.jsonl"]
    words += ["--out", out, *(() if actors is None else ("--ray-actors", actors))]
    (notes := out.with_name(f"{out.name}-notes")).mkdir()
    # Ray's sockets are below this folder, and an address has at most 108 bytes: tmp_path is longer.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        variables = {
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, installed("ray")))),
            "NOTES": str(notes),
            "RAY_TMPDIR": folder,
            # It writes a token into the home folder otherwise.
            "RAY_AUTH_MODE": "disabled",
            # It would end workers where other processes fill the memory.
            "RAY_memory_monitor_refresh_ms": "0",
        }
        process = subprocess.Popen(
            [sys.executable, *program, *map(str, words)],
            env={key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
            | variables,
            cwd=out.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            yield process
        finally:
            process.terminate()
            process.wait()


def finished(
    program: tuple[str, ...], data: Path, pool: Path, out: Path, actors: int | None
) -> tuple[int, str, str]:
    """Return its exit status and what it has said."""
    with started(program, data, pool, out, actors) as process:
        said, errors = process.communicate(timeout=280)
        return process.returncode, said, errors


def test_two_actors_write_the_bytes_of_one_process(data: Path, tmp_path: Path) -> None:
    """Both answer, and not in the order of the pool; an Arrow file is read as JSON lines are."""
    alone, sharded = tmp_path / "alone", tmp_path / "sharded"
    assert finished(COMMAND, data, data / "pool.jsonl", alone, None)[0] == 0
    status, said, errors = finished(LATE, data, data / "pool.arrow", sharded, 2)
    assert status == 0, errors
    assert "6,135 utterances of the pool and 2 held-out ones" in said
    assert "the committee answers: 6135utt" in errors
    for name in ("pool.npz", "held_out.npz"):
        assert (sharded / name).read_bytes() == (alone / name).read_bytes()


@pytest.mark.parametrize("wrong", ["a member", "the pool"])
def test_what_is_wrong_is_said_as_in_one_process(wrong: str, data: Path, tmp_path: Path) -> None:
    pool = tmp_path / "pool.jsonl"
    known = ["play ann"] * (BATCH + 88)
    if wrong == "a member":
        write_lines(pool, [*known, "play z"])
        rule = "utterances from 512 on: member 1 predicts [nan nan] for utterance 88"
    else:
        write_lines(pool, known, '{"text": "play", "intent": "Play"}\n')
        rule = f"{pool}, line 601: has 'intent': a pool with labels"
    found = [finished(COMMAND, data, pool, tmp_path / str(each), each) for each in (None, 1)]
    last = [errors.splitlines()[-1] for _, _, errors in found]
    assert [status for status, _, _ in found] == [2, 2], found
    assert last[0].startswith(f"committee_predict.py: {rule}") and last[0] == last[1]
    assert "Traceback" not in found[1][2]


def test_sigterm_ends_it_through_every_finally(data: Path, tmp_path: Path) -> None:
    write_lines(pool := tmp_path / "pool.jsonl", ["play the song of ann now"] * 100_000)
    with started(COMMAND, data, pool, tmp_path / "out", 1) as process:
        assert process.stderr is not None
        said = ""
        while "512utt" not in said:
            read = process.stderr.read(1)
            assert read, said
            said += read
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert errors.endswith("committee_predict.py: stopped\n")
