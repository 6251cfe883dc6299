"""examples/pretrain_gpt without its training: data, command line, log and summary."""

import dataclasses
import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "pretrain_gpt"
sys.path.insert(0, str(EXAMPLE))

import job  # noqa: E402  (the example's files import each other by name)
import prepare_data  # noqa: E402
import sweep  # noqa: E402
import train  # noqa: E402
from prepare_data import Document  # noqa: E402

SMALL_TEXT = b"the quick brown fox jumps over the lazy dog\n" * 3000


@pytest.fixture
def folder_of_text(tmp_path: Path) -> Path:
    """60 different files of 2.5 kB, one of them twice, with files that are not text beside them."""
    folder = tmp_path / "text"
    (folder / "sub").mkdir(parents=True)
    for number in range(60):
        words = "".join(f"line {line} of file {number}\n" for line in range(120))
        (folder / ("sub" if number % 2 else ".") / f"{number}.txt").write_text(words)
    (folder / "copy.txt").write_bytes((folder / "0.txt").read_bytes())
    (folder / "picture.bin").write_bytes(b"\x00\x01" * 5000)
    (folder / "empty.txt").touch()
    (folder / ".hidden").write_text("secret " * 100)
    return folder


def test_entropies_of_a_text_with_known_answer() -> None:
    # After a comes b or c, each half of the time; a follows both; the end follows an a.
    text = Document("text", b"abac" * 10_000 + b"a")
    stats = prepare_data.measure([text], [text])
    assert stats.held_out_tokens == stats.train_tokens == 40_002
    # Half of the tokens are a, and b and c a quarter each: 1.5 bits. Of the bigrams, those after an
    # a are one bit each, and the others none: 0.5 bits.
    assert stats.unigram_entropy == pytest.approx(1.5 * math.log(2), abs=2e-3)
    assert stats.bigram_entropy == pytest.approx(0.5 * math.log(2), abs=2e-3)
    # Adding one to every count of a row of 20,000 moves 257 / 20,257 of its probability.
    assert stats.bigram_cross_entropy == pytest.approx(0.5 * math.log(2), abs=2e-2)


def test_bigram_cross_entropy_reads_the_training_counts() -> None:
    train_text, held_out = Document("1", b"ab" * 5000), Document("2", b"ba" * 5000 + b"cc")
    stats = prepare_data.measure([train_text], [held_out])
    table = prepare_data.count_bigrams([train_text]) + 1
    tokens = [prepare_data.END_OF_DOCUMENT, *held_out.data, prepare_data.END_OF_DOCUMENT]
    losses = [
        -math.log(table[context, token] / table[context].sum())
        for context, token in itertools.pairwise(tokens)
    ]
    assert stats.bigram_cross_entropy == pytest.approx(float(np.mean(losses)), rel=1e-12)
    assert stats.bigram_cross_entropy > stats.bigram_entropy


def test_no_file_is_in_both_parts_of_the_split(folder_of_text: Path) -> None:
    documents = prepare_data.read_documents(folder_of_text)
    assert len(documents) == 60  # without the copy, the binary, the empty and the hidden file
    train_part, held_out = prepare_data.split_documents(documents, 0.1)
    assert {d.data for d in train_part}.isdisjoint({d.data for d in held_out})
    assert sorted(d.name for d in train_part + held_out) == sorted(d.name for d in documents)
    held_out_bytes = sum(len(d.data) for d in held_out)
    assert 0.05 < held_out_bytes / sum(len(d.data) for d in documents) <= 0.1


def test_a_single_file_is_divided_at_a_line_end(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(SMALL_TEXT)
    (first,), (second,) = prepare_data.split_documents(prepare_data.read_documents(path), 0.05)
    assert first.data + second.data == SMALL_TEXT
    assert first.data.endswith(b"\n")
    assert 0.04 < len(second.data) / len(SMALL_TEXT) <= 0.05


def test_a_file_without_line_ends_is_divided_too() -> None:
    train_part, held_out = prepare_data.split_documents([Document("x", b"x" * 1000)], 0.1)
    assert [len(d.data) for d in train_part + held_out] == [900, 100]


def test_default_corpus_is_deterministic_and_leaves_out_near_copies() -> None:
    names = [document.name for document in prepare_data.read_documents(None)]
    assert names == [document.name for document in prepare_data.read_documents(None)]
    assert "argparse.py" in names
    assert not any(name.startswith(("encodings/", "test/", "site-packages/")) for name in names)


def test_indexed_dataset_holds_the_bytes_and_document_ends(
    folder_of_text: Path, tmp_path: Path
) -> None:
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    dataset = prepare_data.prepare(folder_of_text, tmp_path / "data", 0.1)
    train_part, held_out = prepare_data.split_documents(
        prepare_data.read_documents(folder_of_text), 0.1
    )
    for prefix, documents in (
        (dataset.train_prefix, train_part),
        (dataset.held_out_prefix, held_out),
    ):
        stored = indexed_dataset.IndexedDataset(str(prefix))
        assert len(stored) == len(stored.document_indices) - 1 == len(documents)
        for tokens, document in zip(stored, documents, strict=True):
            assert tokens.tolist() == [*document.data, prepare_data.END_OF_DOCUMENT]
    assert dataset.statistics == prepare_data.measure(train_part, held_out)


def test_changed_text_gives_another_dataset_and_the_same_text_the_same(
    folder_of_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    monkeypatch.setattr(
        prepare_data, "write_indexed_dataset", lambda prefix, documents: written.append(prefix)
    )
    first = prepare_data.prepare(folder_of_text, tmp_path / "data")
    assert prepare_data.prepare(folder_of_text, tmp_path / "data") == first
    assert len(written) == 2  # nothing was written the second time
    (folder_of_text / "2.txt").write_text("something else\n" * 100)
    changed = prepare_data.prepare(folder_of_text, tmp_path / "data")
    assert changed.train_prefix != first.train_prefix
    assert len(written) == 4


def test_an_interrupted_preparation_leaves_nothing(
    folder_of_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(prefix: Path, documents: object) -> None:
        Path(f"{prefix}.bin").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_data, "write_indexed_dataset", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare_data.prepare(folder_of_text, tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file or folder"),
        (lambda path: path.mkdir(), "0 bytes of text in 0 files"),
        (lambda path: path.write_bytes(b""), "0 bytes of text in 0 files"),
        (lambda path: path.write_bytes(b"too little"), "10 bytes of text in 1 files; at least"),
        (lambda path: path.write_bytes(b"\x00" * 10**6), "0 bytes of text in 0 files"),
    ],
    ids=["missing", "empty folder", "empty file", "small", "binary"],
)
def test_text_that_cannot_be_used_is_refused(tmp_path: Path, make: object, message: str) -> None:
    path = tmp_path / "given"
    make(path)  # type: ignore[operator]
    with pytest.raises(ValueError, match=message) as error:
        prepare_data.read_documents(path)
    assert str(path) in str(error.value)


def test_an_unreadable_file_is_refused_by_name(
    folder_of_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path) -> bytes:  # a test may run as root, who can read everything
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ValueError, match=r"0\.txt: cannot be read \(Permission denied\)"):
        prepare_data.read_documents(folder_of_text)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 0.6, float("nan")])
def test_held_out_fraction_is_checked(fraction: float) -> None:
    with pytest.raises(ValueError, match="held_out_fraction="):
        prepare_data.split_documents([Document("x", SMALL_TEXT)], fraction)


def test_wrong_text_ends_train_with_2_and_one_line() -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLE / "train.py", "--text", "/no/such/text", "--out", "/no/such/out"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == (
        "train.py: --text /no/such/text: no such file or folder; without --text, the Python "
        "standard library is used\n"
    )


# Lines of Megatron-Core 0.19.2.
ITERATION_LINE = (
    " [2026-11-23 06:05:06.078863] iteration       10/      40 | consumed samples:          160 | "
    "elapsed time per iteration (ms): 1415.0 | learning rate: 1.000000E-03 | global batch size:    "
    "16 | lm loss: 4.417601E+00 | loss scale: 1.0 | grad norm: 5.352 | number of skipped "
    "iterations:   0 | number of nan iterations:   0 |\n"
)
VALIDATION_LINE = (
    " validation loss at iteration 40 on validation set | lm loss value: 2.576934E+00 | "
    "lm loss PPL: 1.315674E+01 | \n"
)


def test_log_lines_are_read() -> None:
    assert job.parse_line(ITERATION_LINE) == job.Progress(10, 40, 1415.0, 1e-3, 4.417601)
    assert job.parse_line(VALIDATION_LINE) == (40, 2.576934)
    assert job.parse_line(VALIDATION_LINE.replace(" on validation set", "")) == (40, 2.576934)
    assert job.parse_line("  eval_iters ...................... 24\n") is None


def test_run_collects_losses_and_keeps_the_log(tmp_path: Path) -> None:
    program = f"print({ITERATION_LINE + VALIDATION_LINE!r})"
    lines: list[str] = []
    curves = job.run([sys.executable, "-c", program], tmp_path / "log.txt", lines.append)
    assert curves == job.Curves(train=[(10, 4.417601)], held_out=[(40, 2.576934)])
    assert (tmp_path / "log.txt").read_text() == ITERATION_LINE + VALIDATION_LINE + "\n"
    assert lines == [
        "step   10/40  loss 4.418  lr 1.0e-03  1415 ms/step  42 s left",
        "step   40  held-out loss 2.577",
    ]


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("raise SystemExit('no such flag')", r"exit code 1(?s:.*)no such flag"),
        ("print('done')", "it logged no loss"),
        (f"print({ITERATION_LINE + VALIDATION_LINE!r}); raise SystemExit(3)", "exit code 3"),
        # torchrun's own report, longer than what is shown, must not hide what the rank said
        (
            "print('the reason'); print('E torch/distributed/elastic/multiprocessing/api.py:1]');"
            "print('report\\n' * 100); raise SystemExit(1)",
            "the reason",
        ),
    ],
)
def test_a_failed_run_says_how_and_where_the_log_is(
    tmp_path: Path, program: str, message: str
) -> None:
    log = tmp_path / "log.txt"
    with pytest.raises(job.RunError, match=message) as error:
        job.run([sys.executable, "-c", program], log, print)
    assert str(log) in str(error.value)


def test_an_interrupted_run_leaves_no_process(tmp_path: Path) -> None:
    # The report is called between a process's lines, as Ctrl-C comes.
    program = (
        "import os, time\n"
        f"print({ITERATION_LINE!r}, flush=True)\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        "time.sleep(60)\n"
    )

    def interrupt(line: str) -> None:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            pass
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job.run([sys.executable, "-c", program], tmp_path / "log.txt", interrupt)
    assert not Path("/proc", (tmp_path / "pid").read_text()).exists()


def test_recipe_gives_all_optimizers_the_same_settings() -> None:
    recipe = job.Recipe.load()
    assert set(train.COMPARED) < recipe.optimizers.keys() == train.LABELS.keys()
    adamw = recipe.flags("adamw", num_gpus=0)
    assert adamw["optimizer"] == "adam"
    for name in ("adams", "adams-paper"):
        adams = recipe.flags(name, num_gpus=0)
        differing = {key for key in adams.keys() | adamw.keys() if adams.get(key) != adamw.get(key)}
        form = {"adams-cautious"} if name == "adams" else set()
        assert differing == {"optimizer", "lr", "min-lr"} | form
    steps, interval = int(str(adamw["train-iters"])), int(str(adamw["eval-interval"]))
    assert steps % interval, "the last evaluation would run twice"


def test_a_wrong_recipe_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    for text in ("not toml", "[unknown]\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match=str(path)):
            job.Recipe.load(path)


@pytest.mark.parametrize(
    ("micro_batch", "num_gpus", "ranks", "micro_batch_used"),
    [
        (None, 0, 2, 4),
        (None, 1, 1, 8),
        (None, 3, 2, 4),
        (None, 16, 8, 1),
        (4, 0, 2, 4),
        (4, 8, 2, 4),
    ],
)
def test_ranks_divide_the_batch(
    micro_batch: int | None, num_gpus: int, ranks: int, micro_batch_used: int
) -> None:
    flags: job.Flags = {"global-batch-size": 8, "bf16": True, "fp16": False}
    if micro_batch:
        flags["micro-batch-size"] = micro_batch
    command = job.torchrun_command(flags, num_gpus=num_gpus)
    assert command[command.index("--nproc-per-node") + 1] == str(ranks)
    assert command[command.index("--micro-batch-size") + 1] == str(micro_batch_used)
    assert command[command.index("--global-batch-size") + 1] == "8"
    assert "--bf16" in command
    assert "--fp16" not in command
    assert ("--cpu-rehearsal" in command) == (num_gpus == 0)


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="global-batch-size=8: must be a multiple of micro"):
        job.num_ranks({"global-batch-size": 8, "micro-batch-size": 3}, num_gpus=0)


def test_optimizer_bytes_are_read_from_the_checkpoint(tmp_path: Path) -> None:
    prefix = "optimizer.distributed.dp_group_idx_0.bucket_idx_0"
    tensors = {
        "decoder.weight": torch.zeros(7),
        f"{prefix}.param": torch.zeros(100),
        f"{prefix}.exp_avg": torch.zeros(100, dtype=torch.bfloat16),
        f"{prefix}.exp_avg_sq": torch.zeros(100),
    }
    dcp.save(tensors, checkpoint_id=tmp_path / "iter_0000300", no_dist=True)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("300")
    assert job.saved_optimizer_bytes(tmp_path) == {
        "param": 400,
        "exp_avg": 200,
        "exp_avg_sq": 400,
    }


def test_summary_shows_the_losses_and_the_bytes_of_the_moments(tmp_path: Path) -> None:
    statistics = prepare_data.measure([Document("1", SMALL_TEXT)], [Document("2", SMALL_TEXT)])
    curves = job.Curves(train=[(1, 4.0), (10, 2.0)], held_out=[(10, 1.875)])
    results = {
        "adams": train.Result(curves, {"param": 4 << 20, "exp_avg": 4 << 20}, 61.0),
        "adamw": train.Result(
            dataclasses.replace(curves, held_out=[(10, 2.125)]),
            {"param": 4 << 20, "exp_avg": 4 << 20, "exp_avg_sq": 4 << 20},
            62.0,
        ),
    }
    lines = train.summary_lines(results, statistics)
    assert " ".join(lines[1].split()) == "AdamS cautious 1.875 nats 4.00 MiB exp_avg 4.00 MiB 61 s"
    assert lines[2].split()[:5] == ["AdamW", "2.125", "nats", "8.00", "MiB"]
    assert f"{statistics.bigram_entropy:.3f}" in lines[3]
    train.write_summary(results, statistics, tmp_path)
    assert (tmp_path / "summary.png").read_bytes().startswith(b"\x89PNG")
    assert '"held_out_loss": 1.875' in (tmp_path / "summary.json").read_text()


def test_sweep_table_marks_the_best_of_each_optimizer(tmp_path: Path) -> None:
    points = [
        sweep.Point("adams", 120, 1e-3, 2.0, 2.0),
        sweep.Point("adams", 120, 5e-4, 2.0, 2.25),
        sweep.Point("adamw", 120, 1e-3, 2.0, 2.125),
        sweep.Point("adamw", 60, 1e-3, 2.0, 1.0),
    ]
    sweep.write_results(points, 120, job.Recipe.load(), tmp_path, num_gpus=0)
    assert sweep.read_points(tmp_path / "lr_sweep.csv") == sorted(points)
    rows = (tmp_path / "lr_sweep.md").read_text().splitlines()[-2:]
    assert rows == ["| 0.0005 | 2.250 |  |  |", "| 0.001 | **2.000** |  | **2.125** |"]
