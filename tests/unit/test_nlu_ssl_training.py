"""examples/nlu_ssl: what a pool and a teacher must be, the runs of a study, and CoNLL files.

A forked process does what needs Megatron, in nlu_ssl_cases.py.
"""

import csv
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.harness.forked import run_forked

ROOT = Path(__file__).resolve().parents[2]
for package in ("num2words", "tokenizers", "safetensors"):
    pytest.importorskip(package, reason=f"needs {package}: pip install 'megatron-adams[nlu]'")
for example in ("nlu_ssl", "nlu_teacher"):
    sys.path.append(str(ROOT / "examples" / example))

import conll  # noqa: E402  (the example's files import each other by name)
import finetune_nlu  # noqa: E402
import labelled  # noqa: E402
import method_training  # noqa: E402
import method_use  # noqa: E402
import torch  # noqa: E402
import train_ssl  # noqa: E402
from finetune_rows import OPTIMIZERS  # noqa: E402
from labels import LabelSet, Tagged, tag  # noqa: E402
from losses_ssl import Temperatures  # noqa: E402
from method_rows import Plan, Run, best_rate, read_rows  # noqa: E402
from method_training import Lesson, SslSettings  # noqa: E402

from tests.unit import nlu_cases  # noqa: E402

TEXTS = [
    *(f"play the {thing} of {name} again" for thing in ("list", "song") for name in "abcdef"),
    *(f"i want {name} right now" for name in ("ann", "bob", "gus", "hal")),
]


def write_pool(path: Path, texts: list[str] = TEXTS) -> Path:
    # Other keys, such as a selection's, are not read.
    lines = [json.dumps({"text": text, "score": 0.5}) for text in texts]
    path.write_text("\n".join(lines) + "\n")
    return path


# --- pools --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: is no JSON"),
        ('["play"]', "line 2: has no string 'text': each object must have one"),
        ('{"text": 5}', "line 2: has no string 'text': each object must have one"),
        ('{"text": "play", "intent": "Play"}', "line 2: has 'intent': a pool with labels"),
        ('{"text": "play", "intent": "a", "slots": []}', "line 2: has 'intent', 'slots': a pool"),
        ('{"text": "play", "tags": ["O"]}', "line 2: has 'tags': a pool with labels"),
    ],
)
def test_a_pools_line_is_refused_with_its_place(line: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "pool.jsonl").write_text('{"text": "stop"}\n' + line + "\n")
    with pytest.raises(ValueError, match=said):
        method_training.read_pool(tmp_path / "pool.jsonl")


@pytest.mark.parametrize("text", ["", '{"text": "?!"}\n{"text": ""}\n'])
def test_an_empty_pool_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "pool.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"no utterance with a spoken word among \d:"):
        method_training.read_pool(tmp_path / "pool.jsonl")


def test_a_pool_is_read_in_spoken_form_and_in_order(tmp_path: Path) -> None:
    pool = method_training.read_pool(write_pool(tmp_path / "pool.jsonl", ["Play It!", "?", "Stop"]))
    assert [each.words for each in pool] == [("play", "it"), ("stop",)]
    assert pool[1].place.endswith("pool.jsonl, utterance 3")
    assert [each.words for each in method_training.first_of(pool, 1, "p")] == [("play", "it")]
    assert method_training.first_of(pool, 0, "p") == pool
    with pytest.raises(ValueError, match="--pool-sizes 3: pool 'p' has 2 utterances"):
        method_training.first_of(pool, 3, "p")


def tagged(text: str, place: str = "") -> Tagged:
    words = tuple(text.split())
    return Tagged(words, ("O",) * len(words), "Play", place)


def test_a_pool_with_an_evaluated_utterance_is_refused() -> None:
    pool = [tagged("play it", "p:1"), tagged("stop it now", "p:2")]
    method_training.check_apart(pool, {"test": [tagged("stop it", "t:1")]})
    with pytest.raises(ValueError, match=r"p:2: 'stop it now' is in the set test \(t:7\)"):
        method_training.check_apart(pool, {"test": [tagged("stop it now", "t:7")]})


# --- teachers -----------------------------------------------------------------------------------


def test_a_teacher_with_other_labels_is_refused() -> None:
    ours = LabelSet(("Play", "Stop"), ("O", "B-name", "I-name"))
    method_training.check_teacher(ours, ours, "T")
    for theirs, said in (
        (LabelSet(("Play",), ours.tags), r"T has 1 intents, the student 2: .*'Stop'"),
        (LabelSet(ours.intents, ("O", "B-thing", "I-thing")), "differ in .*'B-name'"),
        (LabelSet(("Stop", "Play"), ours.tags), "in another order"),
    ):
        with pytest.raises(ValueError, match=said):
            method_training.check_teacher(theirs, ours, "T")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nlu_ssl") / "data"
    nlu_cases.write_data(folder)
    write_pool(folder / "pool.jsonl")
    return folder


COMMAND = "--model bilstm-crf --shots 8 --subsets 1 --batch-size 8 --unlabelled-batch-size 8"
COMMAND += " --evaluate-every 4 --validation-shots 0 --embedding-size 8 --hidden-size 8"
COMMAND += " --vocab-size 80"


def arguments(data: Path, out: Path, rest: str) -> list[str]:
    words = f"--labelled {data} --pool {data}/pool.jsonl --out {out} {COMMAND} {rest}"
    return words.split()


@pytest.fixture(scope="module")
def study(data: Path) -> dict[str, Any]:
    """Train by all methods at once, and in several goes in another folder."""
    rest = "--method pl kd vat cvt --rates 1e-2 --max-steps 8"
    for task in ("ic", "ner"):
        argv = arguments(data, data.parent / task, f"{rest} --task {task}")
        assert train_ssl.main(argv) == 0
    whole, parts = data.parent / "whole", data.parent / "parts"
    codes = [train_ssl.main(arguments(data, whole, rest))]
    codes.append(train_ssl.main(arguments(data, parts, f"{rest} --seconds 0")))
    few = "--method pl vat --rates 1e-2 --max-steps 8"
    codes.append(train_ssl.main(arguments(data, parts, few)))
    first = (parts / "rows.csv").read_text()
    # As a process leaves it that is killed while it writes a row.
    (parts / "rows.csv").write_text(first + "kd,both,bilst")
    codes.append(train_ssl.main(arguments(data, parts, rest)))
    codes.append(train_ssl.main(arguments(data, parts, rest)))
    return {"codes": codes, "whole": whole, "parts": parts, "first": first}


def without_times(folder: Path) -> dict[str, dict[str, str]]:
    times = ("wall_seconds", "cpu_seconds")
    rows = read_rows(folder / "rows.csv")
    assert len({row["method"] for row in rows}) == len(rows)
    return {row["method"]: {k: v for k, v in row.items() if k not in times} for row in rows}


def test_a_study_that_was_stopped_gives_what_an_uninterrupted_one_does(
    study: dict[str, Any],
) -> None:
    assert study["codes"] == [0, 3, 0, 0, 0]
    whole, parts = without_times(study["whole"]), without_times(study["parts"])
    assert list(whole) == ["supervised", "pl", "kd", "vat", "cvt"]
    assert whole == parts
    assert (study["parts"] / "rows.csv").read_text().startswith(study["first"])
    for name in whole:
        (mine,) = (study["whole"] / "losses").glob(f"{name}-*")
        assert mine.read_text() == (study["parts"] / "losses" / mine.name).read_text()


def test_the_methods_differ_and_learn_from_the_pool(study: dict[str, Any]) -> None:
    rows = without_times(study["whole"])
    assert rows["supervised"]["num_pool"] == "0" and rows["supervised"]["unlabelled_loss"] == ""
    assert {rows[name]["num_pool"] for name in ("pl", "kd", "vat", "cvt")} == {str(len(TEXTS))}
    assert len({row["supervised_loss"] for row in rows.values()}) == 5
    assert all(float(rows[name]["unlabelled_loss"]) > 0 for name in ("pl", "kd", "vat", "cvt"))


def test_the_losses_are_logged_apart(study: dict[str, Any]) -> None:
    expected = {
        "supervised": set(),
        "pl": {("pl", "intents"), ("pl", "tags")},
        "vat": {("vat", "intents"), ("vat", "tags")},
        "cvt": {
            *((f"cvt {view}", "tags") for view in ("forward", "backward", "future", "past")),
            *((f"cvt {view}", "intents") for view in ("forward", "backward")),
        },
    }
    for method, losses in expected.items():
        (path,) = (study["whole"] / "losses").glob(f"{method}-*")
        with path.open() as file:
            rows = list(csv.DictReader(file))
        assert {row["step"] for row in rows} == {"4", "8"}
        of_labels = {("labels", "intents"), ("labels", "tags")}
        assert {(row["loss"], row["part"]) for row in rows} == losses | of_labels
        assert all(math.isfinite(float(row["value"])) for row in rows)


def test_a_saved_teacher_gives_the_answers_that_were_written(
    study: dict[str, Any], data: Path
) -> None:
    name = "supervised-both-adams-0.01-8-0-0"
    model = train_ssl.load_model(study["whole"] / "models" / name)
    test = train_ssl.read_data(data, []).test
    lines = (study["whole"] / "predictions" / name / "test.jsonl").read_text().splitlines()
    for answer, line in zip(model.answer(test, batch_size=5), lines, strict=True):
        written = json.loads(line)
        assert (answer.intent, list(answer.tags)) == (written["intent"], written["tags"])


@pytest.mark.parametrize("task", ["ic", "ner"])
def test_a_task_alone_has_its_metrics_and_losses_alone(
    study: dict[str, Any], data: Path, task: str
) -> None:
    folder = data.parent / task
    assert list(without_times(folder)) == ["supervised", "pl", "kd", "vat", "cvt"]
    for row in read_rows(folder / "rows.csv"):
        assert (row["intent_error"] == "") == (task == "ner")
        assert (row["slot_f1"] == "") == (task == "ic") and row["frame_error"] == ""
    parts = set()
    for path in (folder / "losses").iterdir():
        with path.open() as file:
            parts |= {row["part"] for row in csv.DictReader(file)}
    assert parts == {{"ic": "intents", "ner": "tags"}[task]}


def test_another_setting_in_the_same_folder_is_refused(
    study: dict[str, Any], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = "--method vat --rates 1e-2 --max-steps 8 --epsilon 0.5"
    assert train_ssl.main(arguments(data, study["whole"], rest)) == 2
    assert "epsilon=0.5: must be 0.2" in capsys.readouterr().err


def test_a_teacher_whose_answers_are_no_numbers_is_refused_before_training(
    study: dict[str, Any], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = train_ssl.load_model(study["whole"] / "models" / "supervised-both-adams-0.01-8-0-0")
    pool = method_training.read_pool(data / "pool.jsonl")
    lessons = method_training.teach(model, pool, "both", Temperatures(1.0, 1.0))
    answers = model.answer(pool)
    for lesson, answer in zip(lessons, answers, strict=True):
        assert model.labels.intents[lesson.intent] == answer.intent
        assert tuple(model.labels.tags[each] for each in lesson.tags) == answer.tags
        certain = lesson.soft[0].exp().max().item(), lesson.soft[1].amax(-1).mean().exp().item()
        assert lesson.confidence == pytest.approx(min(certain))
    with torch.no_grad():
        model.intent_head.bias[0] = math.nan
    model.save(tmp_path / "teacher")
    rest = f"--method pl --teacher {tmp_path}/teacher --rates 1e-2 --max-steps 8"
    assert train_ssl.main(arguments(data, tmp_path / "out", rest)) == 2
    said = capsys.readouterr().err
    assert "confidence of 'play the list of a again' is [nan" in said and "must be a number" in said
    assert not (tmp_path / "out" / "rows.csv").exists()


def test_a_run_needs_an_utterance_that_the_teacher_is_sure_of(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    confidences = [0.2, 0.9, 0.5]

    def teach(*args: Any) -> list[Lesson]:
        empty = torch.zeros(1, 1, dtype=torch.float32, device=torch.device("cpu"))
        return [Lesson(0, [0], (empty[0], empty), each) for each in confidences]

    monkeypatch.setattr(method_training, "teach", teach)
    read = train_ssl.read_data(data, [])
    folder = data.parent / "tokenizer"
    train_ssl.train_tokenizer(folder, read, [], 80)
    beginning = train_ssl.BiLstmBeginning(folder, train_ssl.Sizes(8, 8, 40))
    model = beginning.model(read.labels, SslSettings(), 0)
    run = Run("pl", "both", "adams", 1e-2, 8, 0, 0, "pool", 0)
    pool = [tagged("play"), tagged("stop"), tagged("more")]
    for least, expected in ((0.0, 3), (0.5, 2), (0.9, 1)):
        settings = SslSettings(min_confidence=least)
        method = method_training.make_method(run, model, pool, settings, model)
        assert method.num_utterances == expected
    with pytest.raises(ValueError, match=r"sure of no utterance .* highest confidence is 0\.900"):
        method_training.make_method(run, model, pool, SslSettings(min_confidence=0.95), model)


def test_an_utterance_that_a_model_cannot_read_is_left_out(data: Path) -> None:
    read = train_ssl.read_data(data, [])
    folder = data.parent / "tokenizer"
    train_ssl.train_tokenizer(folder, read, [], 80)
    model = train_ssl.BiLstmBeginning(folder, train_ssl.Sizes(8, 8, 5)).model(
        read.labels, SslSettings(), 0
    )
    long = tagged("play the song of ann and then the next one")
    kept, encoded = method_training.fitting(model, [long, tagged("stop")])
    assert [each.words for each in kept] == [("stop",)] and len(encoded) == 1
    with pytest.raises(ValueError, match="can read none of the pool's 1 utterances"):
        method_training.fitting(model, [long])


# --- the plan -----------------------------------------------------------------------------------


def plan_of(**changes: Any) -> Plan:
    values = {
        "methods": ("pl", "supervised"),
        "tasks": ("ic",),
        "optimizers": ("adams",),
        "rates": (1e-3, 2e-3),
        "shots": (10,),
        "selections": ("random", "committee"),
        "pool_sizes": (100, 0),
        "subsets": 3,
        "seeds": 1,
    }
    return Plan(**{**values, **changes})


def test_a_rate_is_chosen_for_each_method_and_its_teacher_comes_first() -> None:
    plan = plan_of()
    # Two rates on two subsets for both methods; then three subsets, on four pools for PL.
    assert plan.num_runs() == 2 * 2 * 2 + 3 + 3 * 4
    scores: dict[Run, float] = {}
    done = []
    while (run := plan.next_run(scores)) is not None:
        if run.method == "pl":
            assert plan.teacher_of(run, scores) in scores
            assert plan.teacher_of(run, scores).lr == 2e-3
        done.append(run)
        best = 2e-3 if run.method == "supervised" else 1e-3
        scores[run] = 0.1 if run.lr == best else 0.2
    assert len(done) == len(set(done)) == plan.num_runs() == plan.num_done(scores)
    assert {run.lr for run in done if run.subset < 1000} == {1e-3, 2e-3}
    pools = {(run.selection, run.pool_size) for run in done if run.method == "pl"}
    assert pools == {(name, size) for name in ("random", "committee") for size in (100, 0)}
    assert {run.lr for run in done if run.method == "pl" and run.subset < 1000} == {1e-3}


def test_a_sweep_that_is_not_complete_chooses_no_rate_of_fewer_runs() -> None:
    plan = plan_of(methods=("supervised",))
    (setting,) = plan.settings()
    sweep = plan.sweep(setting)
    scores = dict.fromkeys(sweep[:3], 0.5) | {sweep[1]: 0.1}
    assert best_rate(scores, setting) == sweep[0].lr  # the other has one run of two


def test_the_cautious_form_leaves_an_element_that_would_go_against_its_gradient() -> None:
    moved = {}
    for name in OPTIMIZERS:
        param = torch.nn.Parameter(torch.ones(2, dtype=torch.float64, device="cpu"))
        optimizer = finetune_nlu.make_optimizer(name, [param])
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        for grad in ([1.0, 1.0], [-0.1, 1.0]):
            before = param.detach().clone()
            param.grad = torch.tensor(grad, dtype=torch.float64, device="cpu")
            optimizer.step()
        moved[name] = (param.detach() != before).tolist()
    assert moved == {
        "adams": [True, True],
        "adams-cautious": [False, True],
        "adamw": [True, True],
    }


def test_names_of_runs_differ() -> None:
    plan = plan_of(rates=(1e-3,), methods=("supervised", "pl", "vat"), tasks=("ic", "ner"))
    runs = plan.known_runs({})
    assert len({run.name for run in runs}) == len(runs) == plan.num_runs()


# --- the command line ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--method pl", "--method pl: must have a --pool"),
        ("--method supervised --pool POOL --model folder", "not supervised alone"),
        ("--method vat --pool POOL --teacher x", "--teacher: must go with pl or kd"),
        ("--method vat --pool POOL --epsilon 0", "--epsilon 0.0: must be over 0"),
        ("--method kd --pool POOL --temperature nan", "--temperature nan: must be over 0"),
        ("--method vat --pool POOL --pool-sizes -1", "--pool-sizes [-1]: must be 0 or more"),
        ("--method vat --pool POOL --pool-sizes 99", "pool 'pool' has 16 utterances"),
        ("--method vat --pool no.jsonl", "no.jsonl: no such file"),
        ("--method vat --pool POOL --pool POOL", "'pool' is there already"),
        ("--method vat --pool a/b=POOL", "a name has no slash"),
        ("--method vat vat --pool POOL", "must name each value once"),
        ("--method vat --pool POOL --random", "--random: must go with an encoder's folder"),
        ("--method pl --pool POOL --min-confidence 2", "--min-confidence 2.0: must be in [0, 1]"),
        ("--method pl --pool POOL --teacher nothing", "nothing: must be a folder"),
        ("--method supervised --max-steps 0", "--max-steps 0: must be 1 or more"),
        ("--method supervised --dropout 1", "--dropout 1.0: must be in"),
        ("--method supervised --rates 0", "--rates 0.0: must be over 0"),
        ("--method vat --pool LEAK", "is in the set test"),
        ("--method cvt --pool POOL --window 2", "--window 2: must be left out with --model bi"),
        ("--method cvt --pool POOL --model f --hidden-size 9", "--hidden-size 9: must be left out"),
        ("--method auto --pool POOL", "--method auto: must have --guidelines"),
        ("--method auto vat --guidelines x", "must go with one task, one optimizer"),
        ("--method auto --guidelines x", "x: must be a guidelines.json"),
        ("--method vat --pool POOL --guidelines x", "--guidelines x: must go with --method auto"),
    ],
)
def test_arguments_that_give_no_study_are_refused(
    flags: str, said: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leaked = labelled.read_jsonl(data / "test.jsonl")[0].text
    write_pool(tmp_path / "leak.jsonl", ["play it", leaked])
    flags = flags.replace("POOL", str(data / "pool.jsonl"))
    flags = flags.replace("LEAK", str(tmp_path / "leak.jsonl"))
    argv = ["--model", "bilstm-crf", "--labelled", str(data), *flags.split()]
    assert train_ssl.main([*argv, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and not (tmp_path / "out").exists()


# --- use ----------------------------------------------------------------------------------------


def guideline(shots: int, method: str | None, **changes: Any) -> dict[str, Any]:
    entry = {"task": "ic", "optimizer": "adams", "shots": shots, "method": method}
    return {**entry, "selection": "random", "pool_size": 0, "why": f"of {shots}", **changes}


def test_the_guideline_of_the_nearest_number_of_shots_is_followed() -> None:
    entries = [guideline(10, "vat"), guideline(100, "pl"), guideline(0, "kd"), guideline(30, None)]
    for shots, method in ((5, "vat"), (30, "vat"), (33, "pl"), (500, "pl"), (0, "kd")):
        found = method_use.choose(entries, "ic", "adams", shots, per_intent=11)
        assert found["method"] == method
        assert "on random all was recommended: of" in found["why"]
    # All utterances go by their number where the study had no such runs.
    for per_intent, method in ((25.5, "vat"), (40.0, "pl")):
        found = method_use.choose(entries[:2], "ic", "adams", 0, per_intent)
        assert found["method"] == method and f"with {found['shots']} shots" in found["why"]
    for asked in (("ner", "adams", 10), ("ic", "adamw", 10)):
        with pytest.raises(ValueError, match=r"no guideline for .* those of .*: ic with adams"):
            method_use.choose(entries, *asked)
    with pytest.raises(ValueError, match="those of the study: none"):
        method_use.choose([guideline(10, None)], "ic", "adams", 10)


def test_auto_trains_what_the_guidelines_say_and_writes_a_card(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "guidelines.json"
    path.write_text(json.dumps([guideline(10, "cvt", task="both")]))
    rest = f"--method auto --guidelines {path} --rates 1e-2 --max-steps 4"
    assert train_ssl.main(arguments(data, tmp_path / "out", rest)) == 0
    assert "cvt: with 10 shots, cvt on random all was recommended: of 10" in capsys.readouterr().out
    (row,) = read_rows(tmp_path / "out" / "rows.csv")
    assert row["method"] == "cvt"
    (card,) = (tmp_path / "out" / "models").glob("*/README.md")
    text = card.read_text()
    assert "Why cvt: with 10 shots" in text and f"| frame error | {row['frame_error']} |" in text
    assert f"{len(TEXTS)} unlabelled utterances of the pool pool" in text
    for name in ("set test", "pool pool", "model"):
        assert f"| {name} | `" in text
    path.write_text('[{"task": "ic"}]')
    with pytest.raises(ValueError, match=r"must be a guidelines\.json"):
        method_use.read_guidelines(path)


# --- CoNLL --------------------------------------------------------------------------------------

SENTENCES = """\
-DOCSTART- -X- -X- O

# id 1
U.N. NNP I-NP I-ORG
official NN I-NP O
Ann NNP I-NP B-PER
Lee NNP I-NP I-PER
Bob NNP I-NP B-PER
heads VBZ I-VP O
for IN I-PP O
Baghdad NNP I-NP I-LOC
. . O O

. . O O

Stop VB O O
"""


def test_conll_becomes_the_teacher_recipes_utterances(tmp_path: Path) -> None:
    path = tmp_path / "a.conll"
    path.write_text(SENTENCES)
    sentences, num_silent = conll.read_conll(path)
    assert num_silent == 1 and [each.place for each in sentences] == [f"{path}:4", f"{path}:16"]
    first, last = sentences
    assert first.text == "U.N. official Ann Lee Bob heads for Baghdad ."
    named = [(slot.name, first.text[slot.start : slot.end]) for slot in first.slots]
    assert named == [("ORG", "U.N."), ("PER", "Ann Lee"), ("PER", "Bob"), ("LOC", "Baghdad")]
    assert (last.text, last.slots, last.intent) == ("Stop", (), "sentence")
    tags = dict(zip(tag(first).words, tag(first).tags, strict=True))
    assert tags["lee"] == "I-PER" and tags["bob"] == "B-PER" and tags["baghdad"] == "B-LOC"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("Ann S-PER", r":2: Ann S-PER: .*BIOES"),
        ("Ann", ":2: Ann: must be a word and, last, its tag"),
        ("O", ":2: O: must be a word and, last, its tag"),
        ("Ann B-", ":2: Ann B-: must be a word"),
    ],
)
def test_a_line_that_is_no_conll_is_refused(line: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text(f"Stop O\n{line}\n")
    with pytest.raises(ValueError, match=said):
        conll.read_conll(tmp_path / "a.conll")


def test_conlls_command_writes_what_the_training_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = []
    for name, person in (("train", "Ann"), ("validation", "Bob"), ("test", "Eve")):
        more = f"{person} B-PER\nspoke O\n\n{person} B-LOC\nof O\nit B-ORG\n\n{SENTENCES}"
        (tmp_path / name).write_text(more)
        argv += [f"--{name}", str(tmp_path / name)]
    assert conll.main([*argv, "--out", str(tmp_path / "out")]) == 0
    assert "1 left out as nothing of them is spoken" in capsys.readouterr().out
    # What is in the test set as well is in no other set.
    read = train_ssl.read_data(tmp_path / "out", [])
    assert [len(each) for each in (read.train, read.validation, read.test)] == [2, 2, 4]
    assert conll.main([*argv[:5], "nothing", "--out", str(tmp_path / "out")]) == 2
    assert "nothing: cannot be read" in capsys.readouterr().err


# --- the encoder --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("encoder")
    run_forked(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        f"from pathlib import Path\nfrom tests.unit import nlu_ssl_cases\n"
        f"nlu_ssl_cases.run(Path({str(folder)!r}))",
        OMP_NUM_THREADS="1",
    )
    return json.loads((folder / "found.json").read_text())


def test_the_encoder_answers_as_the_teacher_recipes_model(found: Any) -> None:
    assert len(found["forward_difference"]) == 4
    assert max(found["forward_difference"].values()) < 1e-5


def test_the_encoders_views_see_the_sub_words_that_they_may(found: Any) -> None:
    notes = found["views"]
    names = {"forward", "backward", "window", "forward, intent", "backward, intent"}
    assert {each["view"] for each in notes} == names
    for name in names:
        mine = [each for each in notes if each["view"] == name]
        assert {each["seen"] for each in mine} == {True, False}
        assert all(each["equal"] != each["seen"] for each in mine), name


def test_the_encoders_views_of_the_intent_do_not_see_padding(found: Any) -> None:
    assert found["padded_views"].keys() == {"forward", "backward"}
    assert max(found["padded_views"].values()) < 1e-12


def test_vats_direction_for_the_encoder_is_that_of_finite_differences(found: Any) -> None:
    # As a share of the embeddings' norm, of which r_adv has 0.2.
    assert found["vat_direction"]["difference"] < 1e-5
    assert found["vat_direction"]["against_noise"] > 1.5


def test_all_methods_train_an_encoder(found: Any) -> None:
    command = found["command"]
    assert command["codes"] == [0, 0, 2]
    methods = [row["method"] for row in command["rows"]]
    assert methods == ["supervised", "pl", "kd", "vat", "cvt"]
    assert all(math.isfinite(float(row["validation_score"])) for row in command["rows"])
    # The teacher's folder gives what the supervised run's model did.
    (taught,) = command["taught"]
    (pl,) = (row for row in command["rows"] if row["method"] == "pl")
    for name in ("validation_score", "supervised_loss", "unlabelled_loss", "intent_error"):
        assert taught[name] == pl[name]
    assert "must be the same, and differ in ['Play', 'Sing']" in command["said"]
