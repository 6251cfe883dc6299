"""`megatron-adams tune`: the rule, a job's log, a job's command, a process that ends badly."""

import json
import math
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_adams.cli import main
from megatron_adams.tuning import TuneError, read_sizes, suggest, trial_of
from megatron_adams.tuning.rule import ACCURACY

JOB = [
    *("torchrun", "--nproc-per-node", "2", "-m", "megatron_adams.launch", "pretrain_gpt.py"),
    *("--optimizer", "adams", "--lr", "1e-3", "--min-lr=1e-4", "--train-iters", "5000"),
]


def line(step: int, adams: float, adamw: float | None) -> str:
    words = f"[default1]: iteration {step:8d}/    5000 | update RMS: {adams:.6E} |"
    return words if adamw is None else f"{words} AdamW's would be: {adamw:.6E} |"


def log(last: int, every: int = 10, adamw: float | None = 0.2, first: int = 1) -> list[str]:
    steps = [first, *range(every, last + 1, every)]
    # The first half of the steps does not count.
    return [line(step, 0.8, adamw if step > last / 2 else 0.9) for step in steps]


def trial(words: Sequence[str], num_steps: int = 200, lr: float | None = None) -> list[str]:
    return [*trial_of(words, lr=lr, num_steps=num_steps, adamw_beta2=0.95).words]


def test_rate_moves_the_params_as_adamw_does() -> None:
    suggestion = suggest(lr_adamw=6e-4, rms_adams=0.8, rms_adamw=0.2, origin="x")
    assert suggestion.lr == pytest.approx(1.5e-4)
    assert suggestion.lr * 0.8 == pytest.approx(6e-4 * 0.2)


@pytest.mark.parametrize("name", ["lr_adamw", "rms_adams", "rms_adamw"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_numbers_that_are_none_are_refused(name: str, value: float) -> None:
    numbers = {"lr_adamw": 6e-4, "rms_adams": 0.8, "rms_adamw": 0.2, name: value}
    with pytest.raises(TuneError, match=f"is {value}: must be a finite number above 0; "):
        suggest(**numbers, origin="x")


def test_later_half_of_a_log_counts_and_of_its_last_start_alone() -> None:
    sizes = read_sizes([*log(400, adamw=0.7), "noise", *log(200)], "job.log")
    assert sizes == (110, 200, pytest.approx(0.8), pytest.approx(0.2))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "job.log: has no update RMS of AdamW's; must be of a job .* add that flag"),
        ([line(1, 0.8, None)], "job.log: has no update RMS of AdamW's; must be"),
        (log(90), "has 10 logged steps, over 90 steps; must be at least 10 over 100"),
        (log(200, every=50), "has 5 logged steps, over 200 steps; must be at least 10"),
        (log(200, adamw=math.nan), "update RMS of step 110 is 0.8, AdamW's nan; must be finite"),
    ],
)
def test_log_that_says_too_little_is_refused(lines: list[str], message: str) -> None:
    with pytest.raises(TuneError, match=message):
        read_sizes(lines, "job.log")


def test_trial_keeps_the_command_and_writes_nothing() -> None:
    written = ["--save", "/ckpt", "--tensorboard-dir=/tb", "--wandb-project", "p"]
    words = trial([*JOB, *written, "--bf16"])
    assert words[: len(JOB) + 1] == [*JOB, "--bf16"]
    assert not {"--save", "/ckpt", "--wandb-project", "p"} & {*words}
    added = words[len(JOB) + 1 :]
    assert added == [
        *("--adams-log-adamw-rms", "0.95", "--log-interval", "5"),
        *("--exit-interval", "200", "--eval-iters", "0"),
        *("--lr", "0.0003", "--min-lr", "3e-05"),
    ]
    assert trial_of(JOB, lr=None, num_steps=200, adamw_beta2=0.95).lr_adamw == 1e-3
    assert trial_of(JOB, lr=2e-3, num_steps=200, adamw_beta2=0.95).lr_adamw == 2e-3


def test_trial_begins_where_the_job_did() -> None:
    resuming = [*JOB, "--load", "/ckpt"]
    assert "--load" not in trial(resuming)
    assert trial([*resuming, "--finetune"])[: len(resuming)] == resuming


@pytest.mark.parametrize("num_steps", [100, 101, 150, 199, 1000])
def test_last_step_of_a_trial_is_logged_and_enough_of_those_before(num_steps: int) -> None:
    words = trial(JOB, num_steps)
    interval = int(words[words.index("--log-interval") + 1])
    assert num_steps % interval == 0 and num_steps / interval >= 20


@pytest.mark.parametrize(
    ("words", "num_steps", "message"),
    [
        (JOB, 99, "--steps 99: must be at least 100, .* give more"),
        (JOB, 6000, "--steps 6000: must be at most the job's --train-iters 5000; give fewer"),
        ([*JOB, "--optimizer", "adam"], 200, "has --optimizer adam: must have --optimizer adams"),
        (["bash", "job.sh"], 200, "has no --optimizer: must have --optimizer adams on it; give"),
        (["x", "--optimizer", "adams"], 200, "has no --lr: must be AdamW's learning rate; add"),
        ([*JOB, "--adams-from-adam"], 200, "--adams-from-adam: must not be there, a trial"),
        ([*JOB, "--adams-cautious"], 200, "--adams-cautious: must not be there, the rule has been"),
        ([*JOB, "--lr", "$LR"], 200, r"--lr \$LR: must be a number; write"),
    ],
)
def test_command_that_can_give_no_rate_is_refused_before_it_runs(
    words: list[str], num_steps: int, message: str
) -> None:
    with pytest.raises(TuneError, match=message):
        trial(words, num_steps)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no source given: must be one of --log, --from-checkpoint, a command behind --; add"),
        (["--log", "a", "--from-checkpoint", "b"], "--log and --from-checkpoint given: must be"),
        (["--log", "a"], "--log without --lr: must be AdamW's learning rate; add --lr"),
        (["--log", "a", "--lr", "nan"], "--lr nan: must be a finite number above 0"),
        (["--log", "a", "--lr", "1", "--steps", "9"], "--steps 9: concerns a trial; remove"),
        (["--adamw-beta2", "1", "--", "x"], r"--adamw-beta2 1.0: must be in \(0, 1\)"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["tune", *argv])
    assert message.replace("\\", "") in capsys.readouterr().err


def test_command_reads_a_log_and_says_rule_source_and_accuracy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "job.log"
    path.write_text("\n".join(log(200)))
    assert main(["tune", "--log", str(path), "--lr", "6e-4"]) == 0
    words = capsys.readouterr().out
    assert "suggested --lr for AdamS  0.00015, AdamW's times 0.25" in words
    for needed in ("Rule: ", "arXiv:2502.16982", "Accuracy: ", "beta2 0.95: "):
        assert needed in words
    assert main(["tune", "--log", str(path), "--lr", "6e-4", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["lr"] == pytest.approx(1.5e-4)
    assert told["lr_adamw"] == 6e-4 and told["adam_beta2"] == 0.95


def test_accuracy_that_is_printed_is_that_of_the_documented_jobs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "hyperparameters.md").read_text("utf-8")
    factors = [
        float(row.split("|")[-2])
        for row in page.splitlines()
        if re.match(r"\| (bytes|this repository's recipe|(\w+ )?GPU study|CPU study), ", row)
    ]
    near = [each for each in factors if 1 / 1.5 <= each <= 1.5]
    far = [each for each in factors if each not in near]
    assert f"in {len(near)} of {len(factors)} small jobs" in ACCURACY
    assert f"In the other {len(far)}, of 100 steps, it was up to {max(far)} times" in ACCURACY
    assert f"In {len(factors)} small jobs, AdamS's best swept rate was within" in page


def fake_job(program: str) -> list[str]:
    return ["tune", "--", sys.executable, "-c", program, *("--optimizer", "adams", "--lr", "1e-3")]


def test_trial_runs_the_command_and_shows_its_progress(
    capsys: pytest.CaptureFixture[str],
) -> None:
    program = f"print({chr(10).join(log(200))!r})"
    assert main(fake_job(program)) == 0
    told = capsys.readouterr()
    assert "suggested --lr for AdamS  0.00025" in told.out
    assert "step 200 of 200: update RMS 0.800, AdamW's would be 0.200" in told.err


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("print('no such file'); raise SystemExit(3)", "exit code 3: .*\nno such file\n"),
        ("print('hello')", "the job's output: has no update RMS of AdamW's"),
    ],
)
def test_job_that_fails_or_says_nothing_is_an_error(
    program: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(fake_job(program)) == 1
    assert re.search(message, capsys.readouterr().err, re.DOTALL)


def test_command_that_cannot_be_started_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--", "/no/such/program", *JOB[6:]]) == 1
    assert "/no/such/program" in capsys.readouterr().err


# It says that it is there, and ends tune, which has it for a child.
ENDS_ITS_PARENT = """
import os, pathlib, signal, sys, time
pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
os.kill(os.getppid(), signal.SIGTERM)
time.sleep(20)
"""


def test_sigterm_ends_the_job_too(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    command = fake_job(ENDS_ITS_PARENT)
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        with pytest.raises(SystemExit) as ended:
            main([*command[:5], str(note), *command[5:]])
        restored = signal.getsignal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)
    assert received == [] and restored not in (signal.SIG_DFL, signal.SIG_IGN)
