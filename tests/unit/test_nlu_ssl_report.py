"""examples/nlu_ssl: what the report says of studies whose errors are made up."""

import csv
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

for package in ("num2words", "tokenizers", "safetensors", "matplotlib", "datasets"):
    pytest.importorskip(package, reason=f"needs {package}: pip install 'megatron-adams[nlu]'")
for example in ("nlu_ssl", "nlu_teacher"):
    sys.path.append(str(Path(__file__).resolve().parents[2] / "examples" / example))

import labelled  # noqa: E402  (the example's files import each other by name)
import method_report  # noqa: E402
import pool_files  # noqa: E402
import pool_prepare  # noqa: E402
import pool_report  # noqa: E402
from finetune_rows import write_answers  # noqa: E402
from labels import Tagged, load_tagged  # noqa: E402
from method_report import Results  # noqa: E402
from method_rows import COLUMNS, Run, append_row  # noqa: E402

NUM = 120  # of the utterances that the rule reads, and of the others
KEY = ("ic", "adams", 10)


class Study:
    """A folder with rows and answers, whose errors are as many as is said."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.labelled = folder / "study", folder / "labelled"
        self.folder.mkdir()
        self.labelled.mkdir()
        utterances = [labelled.Utterance(f"word{i}", "Play", ()) for i in range(2 * NUM)]
        labelled.write_jsonl(self.labelled / "test.jsonl", utterances)
        self.test = load_tagged(self.labelled / "test.jsonl")

    def add(
        self,
        run: Run,
        num_wrong: int,
        *,
        score: float = 0.5,
        cpu: float = 10.0,
        num_wrong_unread: int | None = None,
    ) -> None:
        """Add a run that answers some utterances of each half wrongly, others in each subset."""
        numbers = (num_wrong, num_wrong if num_wrong_unread is None else num_wrong_unread)
        wrong = [{(11 * run.subset + 7 * i) % NUM for i in range(number)} for number in numbers]
        answers = [
            Tagged(each.words, each.tags, "Stop" if i // 2 in wrong[i % 2] else "Play")
            for i, each in enumerate(self.test)
        ]
        write_answers(self.folder / "predictions" / run.name / "test.jsonl", answers)
        row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
        row |= vars(run) | {"validation_score": score, "cpu_seconds": cpu, "model": "m"}
        append_row(self.folder / "rows.csv", row)

    def add_all(
        self, method: str, num_wrong: int, selection: str = "random", num: int = 5, **row: Any
    ) -> None:
        """Add a run of each few-shot subset."""
        pool = ("", 0) if method == "supervised" else (selection, 100)
        for subset in range(num):
            self.add(Run(method, "ic", "adams", 1e-3, 10, subset, 0, *pool), num_wrong, **row)

    def report(self, out: Path) -> tuple[str, list[dict[str, Any]]]:
        argv = ["--study", str(self.folder), "--labelled", str(self.labelled), "--out", str(out)]
        assert method_report.main(argv) == 0
        assert (out / "methods.png").stat().st_size > 5000
        answers = json.loads((out / "guidelines.json").read_text())
        return (out / "report.md").read_text(), answers


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(tmp_path)


def test_the_cheapest_of_the_best_methods_is_recommended(study: Study, tmp_path: Path) -> None:
    study.add_all("supervised", 40, score=0.40)
    study.add_all("pl", 40, score=0.39, cpu=1.0)
    study.add_all("kd", 40, score=0.38)
    study.add_all("vat", 12, score=0.10, cpu=50.0)
    study.add_all("cvt", 12, score=0.12, cpu=20.0)
    text, (answer,) = study.report(tmp_path / "out")
    assert (answer["method"], answer["selection"], answer["pool_size"]) == ("cvt", "random", 100)
    assert "it is as good as vat, random 100, and takes less CPU time" in answer["why"]
    assert "-70.0%" in answer["why"] and "ic, adams, 10 shots: cvt, random 100" in text
    assert "| VAT and CVT against PL and KD | ic, adams, 10 shots | -70.0% [" in text
    with (tmp_path / "out" / "table.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert float(rows["vat"]["error"]) == pytest.approx(0.1)
    assert float(rows["vat"]["change"]) == pytest.approx(-0.7)
    assert rows["vat"]["verdict"] == "better" and rows["pl"]["verdict"] == "open"
    # PL's one second, and its teacher's ten.
    assert float(rows["pl"]["cpu_seconds"]) == 11.0 and float(rows["vat"]["cpu_seconds"]) == 50.0


def test_a_cheaper_method_that_is_worse_than_the_best_is_not_recommended(
    study: Study, tmp_path: Path
) -> None:
    study.add_all("supervised", 60)
    study.add_all("vat", 12, score=0.10, cpu=50.0)
    study.add_all("cvt", 40, score=0.30, cpu=20.0)
    _, (answer,) = study.report(tmp_path / "out")
    assert answer["method"] == "vat" and "best validation score" in answer["why"]


def test_a_cheaper_method_that_may_be_worse_is_not_recommended(
    study: Study, tmp_path: Path
) -> None:
    """Its error is above the best one's by 4%, and the interval goes to more than 10%."""
    study.add_all("supervised", 60)
    study.add_all("vat", 24, score=0.10, cpu=50.0)
    for subset, num_wrong in enumerate((18, 30, 24, 27, 26)):
        run = Run("cvt", "ic", "adams", 1e-3, 10, subset, 0, "random", 100)
        study.add(run, num_wrong, score=0.30, cpu=20.0)
    _, (answer,) = study.report(tmp_path / "out")
    assert answer["method"] == "vat"
    results = Results([study.folder], study.test)
    pairs = results.paired(KEY, ("cvt", "random", 100), ("vat", "random", 100))
    assert results.compare(pairs, "intent_error").verdict == "open"


def test_what_is_said_of_a_guideline_is_of_utterances_that_did_not_decide(
    study: Study, tmp_path: Path
) -> None:
    study.add_all("supervised", 40, num_wrong_unread=60)
    study.add_all("vat", 20, score=0.10, num_wrong_unread=45)
    study.add_all("cvt", 40, score=0.05, num_wrong_unread=10)
    _, (answer,) = study.report(tmp_path / "out")
    assert answer["method"] == "vat"
    assert "changes by -25.0% [" in answer["why"] and "that did not decide" in answer["why"]


@pytest.mark.parametrize(("num_wrong", "verdict"), [(40, "open"), (70, "worse")])
def test_supervised_training_is_recommended_where_nothing_is_better(
    study: Study, tmp_path: Path, num_wrong: int, verdict: str
) -> None:
    study.add_all("supervised", 40)
    study.add_all("vat", num_wrong, score=0.0)
    text, (answer,) = study.report(tmp_path / "out")
    assert answer["method"] == "supervised" and "no method's intent error" in answer["why"]
    assert f"| {verdict} |" in text


def test_few_subsets_give_no_guideline_and_no_verdict(study: Study, tmp_path: Path) -> None:
    study.add_all("supervised", 60, num=4)
    study.add_all("vat", 5, num=4)
    text, (answer,) = study.report(tmp_path / "out")
    assert answer["method"] is None and "fewer than 5 subsets" in answer["why"]
    assert "open: fewer than 5 subsets" in text and "no guideline" in text


def test_selections_are_compared_on_the_same_runs(study: Study, tmp_path: Path) -> None:
    study.add_all("supervised", 60)
    for selection, num_wrong in (("random", 50), ("committee", 20), ("submodular", 20)):
        study.add_all("vat", num_wrong, selection)
        study.add_all("pl", num_wrong + 5, selection)
    text, _ = study.report(tmp_path / "out")
    lines = [line for line in text.splitlines() if "| selection" in line]
    assert len(lines) == 3
    assert all("| better |" in line for line in lines if "against random" in line)
    (other,) = (line for line in lines if "submodular against committee" in line)
    assert "+0.0%" in other and "| open |" in other


def test_the_optimizers_are_compared_in_points(study: Study) -> None:
    for optimizer, num_wrong in (("adams", 12), ("adams-cautious", 36), ("adamw", 24)):
        for subset in range(5):
            study.add(Run("supervised", "ic", optimizer, 1e-3, 10, subset, 0), num_wrong)
    found = method_report.optimizers(Results([study.folder], study.test))
    assert [each.optimizer for each in found] == ["adams", "adams-cautious"]
    changes = [each.comparison.change for each in found]
    assert [change and change.value for change in changes] == pytest.approx([-0.1, 0.1])
    verdicts = ["no worse than 0.5 points", "worse by more than 0.5 points"]
    assert [each.verdict for each in found] == verdicts


def test_what_chose_a_rate_or_diverged_is_left_out(study: Study, tmp_path: Path) -> None:
    for lr, score in ((1e-3, 0.2), (2e-3, 0.1)):
        for subset in (1000, 1001):
            study.add(Run("supervised", "ic", "adams", lr, 10, subset, subset), 3, score=score)
        study.add(Run("supervised", "ic", "adams", lr, 10, 0, 0), 30, score=0.1)
    study.add(Run("supervised", "ic", "adams", 2e-3, 10, 1, 0), 30, score=math.inf)
    results = Results([study.folder], study.test)
    assert [(run.lr, run.subset) for run in results.rows] == [(2e-3, 0)]
    assert results.num_diverged == 1
    text, _ = study.report(tmp_path / "out")
    assert "1 runs, 240 test utterances; 1 runs diverged" in text


def test_a_study_without_runs_is_refused(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--study", str(study.folder), "--out", str(tmp_path / "out")]
    assert method_report.main([*argv, "--labelled", str(study.labelled)]) == 2
    assert "no run that is done" in capsys.readouterr().err
    assert method_report.main([*argv, "--labelled", str(tmp_path)]) == 2
    assert "test.jsonl: no such file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_several_studies_are_one_report(study: Study, tmp_path: Path) -> None:
    (tmp_path / "second").mkdir()
    second = Study(tmp_path / "second")
    study.add_all("supervised", 60)
    second.add_all("vat", 30)
    results = Results([study.folder, second.folder], study.test)
    pairs = results.paired(KEY, ("vat", "random", 100), method_report.BASELINE)
    change = results.compare(pairs, "intent_error").change
    assert change is not None and change.value == pytest.approx(-0.5)
    second.add_all("supervised", 60, num=1)
    with pytest.raises(ValueError, match=r"second/study: has supervised-.*, as has .*study: each"):
        Results([study.folder, second.folder], study.test)


def test_a_packed_study_gives_the_same_report(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study.add_all("supervised", 60)
    study.add_all("vat", 30, num_wrong_unread=20)
    expected = study.report(tmp_path / "out")
    argv = ["--labelled", str(study.labelled), "--out", str(tmp_path / "again")]
    packed = tmp_path / "packed" / "study"
    pack = ["--pack", str(packed.parent)]
    assert method_report.main([*argv, "--study", str(study.folder), *pack]) == 0
    assert sorted(path.name for path in packed.iterdir()) == ["counts.npz", "rows.csv"]
    assert method_report.main([*argv, "--study", str(packed)]) == 0
    for name, text in (("report.md", expected[0]), ("guidelines.json", None), ("table.csv", None)):
        again = (tmp_path / "again" / name).read_text()
        assert again == (text or (tmp_path / "out" / name).read_text())

    (tmp_path / "other").mkdir()
    other = Study(tmp_path / "other")
    slots = (labelled.Slot("genre", 0, 1),)
    utterances = [labelled.Utterance(f"word{i}", "Play", slots) for i in range(2 * NUM)]
    labelled.write_jsonl(other.labelled / "test.jsonl", utterances)
    argv[1] = str(other.labelled)
    assert method_report.main([*argv, "--study", str(packed)]) == 2
    assert "counts.npz: is of another test set" in capsys.readouterr().err
    (tmp_path / "twice").mkdir()
    twice = Study(tmp_path / "twice")
    twice.add_all("cvt", 40)
    argv[1] = str(study.labelled)
    both = ["--study", str(study.folder), str(twice.folder)]
    assert method_report.main([*argv, *both, *pack]) == 2
    assert "--pack: the studies study, study: must have names" in capsys.readouterr().err


def write_texts(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def test_the_report_says_what_was_selected(tmp_path: Path) -> None:
    prepared, mixed = tmp_path / "prepared", tmp_path / "mixed.jsonl"
    texts = [f"play song {name} again" for name in ("one", "two", "six")]
    pool_files.write_pool(prepared / "pool.arrow", [[*texts, "Granite is old."]])
    record = {"read": 9, "domain_filter": None} | dict.fromkeys(pool_prepare.REASONS, 0)
    (prepared / "pool.json").write_text(json.dumps(record | {"kept": 4, "other_domain": 5}))
    write_texts(tmp_path / "picked" / "selection.jsonl", [texts[0], "granite is old"])
    threshold = {"value": 0.25, "rate": 0.125, "admitted": 8, "held_out": 9}
    chosen = tmp_path / "picked" / "selection.json"
    chosen.write_text(json.dumps({"thresholds": {"intents": threshold}}))
    write_texts(mixed, ["Granite is old."])
    lines = pool_report.pool_section(prepared, {"picked": chosen.parent}, mixed)
    for line in (
        "| kept | 4 |",
        "| other domain | 5 |",
        "| all | 9 |",
        # 3-grams: three utterances of two each, which are all different, and one of one.
        "| the pool, cleaned | 4 | 3.8 | 0.250 | 7 |",
        "| picked | 2 | 3.5 | 0.500 | 3 |",
        "`picked`: intents up to 0.25 nats are admitted, of which 0.125 are wrong on the held-out "
        "set.",
    ):
        assert line in lines, line
    filtered = record | {
        "domain_filter": {"recall": 0.9, "precision": 0.8, "false_positive_rate": 0.1}
    }
    (prepared / "pool.json").write_text(json.dumps(filtered))
    text = "\n".join(pool_report.pool_section(prepared, {}, None))
    assert "recall 0.900, precision 0.800, and 0.100 of other text stays" in text
    assert "| the pool, cleaned | 4 | 3.8 | - | 7 |" in text
    with pytest.raises(ValueError, match=r"nothing/pool\.json: cannot be read .* pool_prepare\.py"):
        pool_report.pool_section(tmp_path / "nothing", {}, None)
