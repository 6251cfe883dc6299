"""examples/nlu_teacher/nlu_report.py: figures of a study with known errors, and the verdicts."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "nlu_teacher"
sys.path.append(str(EXAMPLE))

pytest.importorskip("num2words", reason="needs num2words: pip install 'megatron-adams[nlu]'")
pytest.importorskip("tokenizers", reason="needs tokenizers: pip install 'megatron-adams[nlu]'")
import labelled  # noqa: E402  (the example's files import each other by name)
import labels  # noqa: E402
import nlu_report as report  # noqa: E402
from finetune_rows import COLUMNS, SWEEP, Run, append_row, write_answers  # noqa: E402
from labels import Tagged  # noqa: E402
from metrics import Interval  # noqa: E402
from nlu_report import Claim  # noqa: E402

NUM = 60
# Of the NUM utterances, how many each model answers with another intent.
WRONG = {"T1": 30, "T2": 15, "S": 45}


def answer(utterance: Tagged, is_wrong: bool) -> Tagged:
    intent = "Stop" if is_wrong else utterance.intent
    return Tagged(utterance.words, utterance.tags, intent)


def make_study(folder: Path, subsets: int, seeds: int) -> report.Study:
    data, study = folder / "data", folder / "study"
    data.mkdir()
    texts = [f"play [artist : {'x' * (index + 1)}]" for index in range(NUM)]
    utterances = [labelled.parse_brackets(text, "Play", "x:1") for text in texts]
    labelled.write_jsonl(data / "test.jsonl", utterances)
    test = labels.load_tagged(data / "test.jsonl")
    study.mkdir()
    for optimizer in ("adams", "adamw"):
        for model, wrong in WRONG.items():
            sweep = [Run(model, optimizer, lr, 20, SWEEP, SWEEP) for lr in (1e-3, 2e-3)]
            deciding = [
                Run(model, optimizer, 1e-3, 20, i, j) for i in range(subsets) for j in range(seeds)
            ]
            # A run at a rate that a longer sweep has found not to be the best.
            stale = Run("T2", optimizer, 2e-3, 20, 0, 0)
            for run in (*sweep, *deciding, *([stale] if model == "T2" else [])):
                values = dict.fromkeys(COLUMNS, 0) | {"state_bytes": 8, "slot_error": 0.5}
                values |= {name: getattr(run, name) for name in COLUMNS[:6]}
                values["validation_score"] = run.lr
                append_row(study / "rows.csv", values)
                # Runs of the sweep and at another rate have no error, and must not count.
                number = (
                    0
                    if run.subset == SWEEP or run == stale
                    else wrong // (2 if optimizer == "adamw" else 1)
                )
                answers = [answer(each, index < number) for index, each in enumerate(test)]
                write_answers(study / "predictions" / run.name / "test.jsonl", answers)
    return report.Study(study, data)


CLAIMS = [
    Claim("two over one", ("intent_error",), "T2", "T1", {"intent_error": "-3.86"}),
    Claim("student over teacher", ("intent_error",), "S", "T1"),
    Claim("no such model", ("intent_error", "semer"), "S_via", "T1"),
    Claim("never", ("slot_error",), untestable="no weights"),
]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> report.Study:
    return make_study(tmp_path_factory.mktemp("full"), 5, 2)


def test_a_change_is_that_of_the_errors(study: report.Study) -> None:
    first, second, *_ = report.figures_of(study, CLAIMS, "adams")
    assert first.change is not None and second.change is not None
    assert first.change.value == pytest.approx(15 / 30 - 1)
    assert second.change.value == pytest.approx(45 / 30 - 1)
    assert (first.num_subsets, first.num_seeds, first.shots) == (5, 2, 20)
    assert first.verdict == "holds"
    assert second.verdict == "does not hold here: more errors"


def test_what_cannot_be_computed_says_why(study: report.Study) -> None:
    *_, missing, semer, never = report.figures_of(study, CLAIMS, "adams")
    assert missing.verdict == "not testable here: the study has no run of S_via"
    assert semer.verdict == missing.verdict and semer.change is None
    assert never.verdict == "not testable here: no weights"
    (of_assistant,) = report.figures_of(study, [Claim("x", ("unsatisfied",), "T2", "T1")], "adams")
    assert of_assistant.verdict == "not testable here: run simulate_assistant.py first"


@pytest.mark.parametrize(("subsets", "seeds"), [(4, 2), (5, 1)])
def test_few_runs_give_no_verdict(tmp_path: Path, subsets: int, seeds: int) -> None:
    small = make_study(tmp_path, subsets, seeds)
    (figure,) = report.figures_of(small, CLAIMS[:1], "adams")
    assert figure.change is not None and figure.change.high < 0
    assert figure.verdict.startswith("no verdict: fewer than 5 subsets with 2 seeds")


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (-0.3, -0.01, "holds"),
        (-0.3, 0.01, "does not hold here: the interval has 0"),
        (0.01, 0.3, "does not hold here: more errors"),
        (np.nan, np.nan, "not testable here: the baseline has no errors"),
    ],
)
def test_a_verdict_is_read_off_the_interval(low: float, high: float, said: str) -> None:
    assert report.verdict(Interval(0.0, low, high), 5, 2).startswith(said)


def test_the_files_have_the_figures(study: report.Study, tmp_path: Path) -> None:
    speed = {"median_ms": 1.5, "p95_ms": 2, "file_bytes": 1234, "parameters": 99, "utterances": 7}
    text = report.write(study, CLAIMS, "adams", {"S": speed}, tmp_path)
    assert (tmp_path / "report.md").read_text() == text
    row = next(line for line in text.splitlines() if line.startswith("| two over one"))
    assert "| -3.86 | -50.0 [" in row and row.endswith("| 5 x 2 | holds |")
    # AdamS has twice AdamW's errors here, at the same number of slots.
    adams = next(
        line for line in text.splitlines() if line.startswith("| T1 | adams | 20 | 5 x 2 |")
    )
    assert "| +100.0 [" in adams and adams.endswith("| 8 | 8 |")
    assert "| S | 99 | 1,234 | 1.50 | 2.00 | 7 |" in text
    assert "0.001, an edge" in text
    with (tmp_path / "claims.csv").open() as file:
        table = list(csv.DictReader(file))
    assert float(table[0]["change"]) == pytest.approx(-0.5) and table[0]["paper"] == "-3.86"
    assert table[2]["change"] == "" and len(table) == 5
    assert (tmp_path / "nlu.png").read_bytes().startswith(b"\x89PNG")


def test_the_claims_file_is_read_and_a_wrong_one_is_refused(tmp_path: Path) -> None:
    claims = report.read_claims(EXAMPLE / "claims.toml")
    assert len(claims) >= 6 and all(claim.model or claim.untestable for claim in claims)
    path = tmp_path / "claims.toml"
    for text, said in {
        "[[claims]]\ntext = 'x'\nmetrics = ['wer']": "metric 'wer': must be of",
        "[[claims]]\ntext = 'x'\nmetrics = []\nname = 3": "must have",
        "[[claims": "must have",
        "": "must have",
    }.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=said):
            report.read_claims(path)


def test_a_study_without_runs_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--study", str(tmp_path), "--data", str(tmp_path), "--out", str(tmp_path)]
    assert report.main(argv) == 2
    assert "rows.csv: must have runs" in capsys.readouterr().err
    assert report.main([*argv, "--benchmark", "S=missing.json"]) == 2
    assert "must be NAME=FILE" in capsys.readouterr().err
