"""examples/nlu_ssl: `make ssl` and `nlu_ssl.py`, from a corpus to a report and a trained model."""

import itertools
import json
import random
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
for package in ("num2words", "tokenizers", "safetensors", "sklearn", "datasets", "matplotlib"):
    pytest.importorskip(package, reason=f"needs {package}: pip install 'megatron-adams[nlu]'")
EXAMPLE = ROOT / "examples" / "nlu_ssl"
for example in (EXAMPLE, ROOT / "examples" / "nlu_teacher"):
    sys.path.append(str(example))

import committee_predict  # noqa: E402  (the example's files import each other by name)
import divide_corpus  # noqa: E402
import labelled  # noqa: E402
import method_use  # noqa: E402
import nlu_ssl  # noqa: E402
import numpy as np  # noqa: E402
import pipeline  # noqa: E402
import pool_files  # noqa: E402
import torch  # noqa: E402
import train_ssl  # noqa: E402
from bilstm_crf import BiLstmCrf, Sizes  # noqa: E402
from divide_corpus import Settings, divide  # noqa: E402
from labels import LabelSet  # noqa: E402
from method_rows import METHODS, read_rows  # noqa: E402

from tests.unit.made_up_committee import write_members  # noqa: E402
from tests.unit.made_up_text import write_text  # noqa: E402

STEPS = EXAMPLE / "pipeline.toml"
FRAMES = {
    "Play": ("play the [thing : {t}] of [name : {n}] {w}", "i want the [thing : {t}] {w} please"),
    "Stop": ("stop the [thing : {t}] {w} now", "no more of [name : {n}] {w}"),
    "Call": ("call [name : {n}] {w}", "ring [name : {n}] up {w} please"),
}
NAMES = ("ann", "bob", "carla", "dmitri", "eve", "frank", "gus", "hal")
THINGS = ("song", "list", "movie", "station")
WHEN = ("again", "today", "at once", "tonight", "twice", "later")


def write_corpus(folder: Path) -> Path:
    """Write three sets, of which the largest part is for training."""
    found = {
        labelled.parse_brackets(frame.format(t=thing, n=name, w=when), intent, "")
        for intent, frames in FRAMES.items()
        for frame, thing, name, when in itertools.product(frames, THINGS, NAMES, WHEN)
    }
    utterances = sorted(found, key=lambda each: each.text)
    random.Random(0).shuffle(utterances)
    folder.mkdir(parents=True)
    for name, begin, end in (("validation", 0, 40), ("test", 40, 80), ("train", 80, None)):
        labelled.write_jsonl(folder / f"{name}.jsonl", utterances[begin:end])
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("ssl") / "corpus")


# --- the steps ----------------------------------------------------------------------------------


RECIPE = pipeline.FOLDER / "recipe.toml"
VARIABLES = {"work": Path("/nowhere"), "labelled": ["--format", "snips"], "recipe": RECIPE}


@pytest.mark.parametrize("size", [None, "quick", "full"])
def test_the_steps_follow_each_other(size: str | None) -> None:
    steps = pipeline.load_steps(STEPS, VARIABLES, size=size)
    assert not [word for step in steps for word in step.command if "$" in word]
    assert all((EXAMPLE / step.command[0]).is_file() for step in steps)
    needs = pipeline.needed(steps)
    is_full = size == "full"
    studies = {"ic", "ner"} | ({"adamw", "cautious"} if is_full else set())
    assert studies < needs["report"]
    commands = {step.name: step.command for step in steps}
    encoder = {"vocabulary", "stage1-data", "stage2-data", "leak-check", "stage1", "stage2"}
    encoder |= {"encoder", "encoder-report"}
    assert set(commands) - studies - (encoder if is_full else set()) == {
        *("public-text", "labelled", "corpus", "divide", "prepare", "members", "random"),
        *("submodular", "committee-predictions", "committee", "report"),
    }
    if is_full:
        # The encoder has read the pool, and no utterance that is evaluated on.
        assert needs["stage2"] == {"stage2-data", "leak-check", "stage1"}
        assert needs["leak-check"] >= {"vocabulary", "stage1-data", "stage2-data", "divide"}
        assert needs["encoder"] == {"divide", "random", "stage2"}
        assert needs["encoder-report"] == {"divide", "encoder"}
    for name in studies | ({"encoder"} if is_full else set()):
        assert {"divide", "random"} <= needs[name]
        args = train_ssl._parser().parse_args(commands[name][1:])
        train_ssl.check_arguments(args)
        assert args.method == list(METHODS)
    assert pipeline.default_work(STEPS, size).name == (f"ssl-{size}" if size else "ssl")


def plan_of(name: str, size: str | None) -> train_ssl.Plan:
    steps = pipeline.load_steps(STEPS, VARIABLES, size=size)
    (command,) = (step.command for step in steps if step.name == name)
    args = train_ssl._parser().parse_args(command[1:])
    pools = tuple(each.partition("=")[0] for each in args.pool)
    return train_ssl.Plan(
        *map(tuple, (args.method, args.task, args.optimizer, args.rates, args.shots)),
        pools,
        tuple(args.pool_sizes),
        args.subsets,
        args.seeds,
        args.sweeps,
    )


def test_the_full_study_has_what_the_question_asks_for() -> None:
    for name, tasks in (("ic", ("ic",)), ("ner", ("ner",))):
        plan = plan_of(name, "full")
        assert plan.tasks == tasks and plan.optimizers == ("adams",)
        assert plan.selections == ("random", "submodular", "committee")
        assert len(plan.shots) == len(plan.pool_sizes) == 2 and plan.subsets >= 5
        assert len(plan.rates) > 1
    for name, optimizer in (("adamw", "adamw"), ("cautious", "adams-cautious")):
        other = plan_of(name, "full")
        assert other.optimizers == (optimizer,) and other.rates == plan.rates
        # AdamS has the same runs, so that the report can pair them.
        assert set(other.pool_sizes) <= set(plan.pool_sizes) and other.shots == plan.shots
    encoder = plan_of("encoder", "full")
    assert encoder.tasks == other.tasks == ("ic", "ner")
    assert encoder.pools("pl") == other.pools("pl")
    # README.md says how many runs these are.
    names = ("ic", "ner", "adamw", "cautious", "encoder")
    assert [plan_of(name, "full").num_runs() for name in names] == [330, 330, 260, 260, 220]
    text = " ".join((EXAMPLE / "README.md").read_text().split())
    said = "1,400 runs: 330 for intents, 330 for slots, 260 each with AdamW and with AdamS's "
    said += "cautious form, and 220 with the encoder"
    assert said in text


@pytest.mark.timeout(900)  # 12 processes that import torch
def test_all_steps_run_in_the_quick_form(corpus: Path, tmp_path: Path) -> None:
    """All but the fetching of the text, which needs a network."""
    words = pipeline.labelled_words(f"jsonl={corpus}")
    variables = {"work": tmp_path, "labelled": words}
    fetch, *steps = pipeline.load_steps(STEPS, variables, size="quick")
    write_text(fetch.outputs[0])
    ran = pipeline.run_steps(steps, tmp_path, jobs=2)
    assert sorted(ran) == sorted(step.name for step in steps)
    assert pipeline.run_steps(steps, tmp_path) == []
    for name, num_pools in (("ic", 3), ("ner", 2)):
        rows = read_rows(tmp_path / name / "rows.csv")
        assert len(rows) == 1 + 4 * num_pools and {row["method"] for row in rows} == set(METHODS)
    report = (tmp_path / "report" / "report.md").read_text()
    record = json.loads((tmp_path / "prepared" / "pool.json").read_text())
    divided = json.loads((tmp_path / "divided" / "divided.json").read_text())
    assert record["read"] == divided["pool"] and record["other_domain"] > 0
    assert f"| other domain | {record['other_domain']:,} |" in report
    for text in ("## The pool", "| committee | 20 |", "## ic, adams, 4 shots", "## Guidelines"):
        assert text in report
    assert (tmp_path / "report" / "methods.png").is_file()


# --- the division -------------------------------------------------------------------------------


def test_a_corpus_is_divided_into_few_labels_and_a_pool(corpus: Path, tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.jsonl")
    settings = Settings(per_intent=6, other_share=0.25, other_for_filter=40, pool_size=90)
    record = divide(corpus, text, settings, tmp_path / "out")
    train = labelled.read_jsonl(tmp_path / "out" / "labelled" / "train.jsonl")
    counts = {name: sum(each.intent == name for each in train) for name in FRAMES}
    assert counts == {"Play": 6, "Stop": 6, "Call": 6}
    read = {
        name: pool_files.read_texts(tmp_path / "out" / name)
        for name in ("pool.jsonl", "mixed_in.jsonl", "other_domains.jsonl")
    }
    mixed, pool = set(read["mixed_in.jsonl"]), set(read["pool.jsonl"])
    assert (len(pool), len(mixed), len(read["other_domains.jsonl"])) == (120, 30, 40)
    assert mixed < pool and not mixed & set(read["other_domains.jsonl"])
    whole = {each.text for each in labelled.read_jsonl(corpus / "train.jsonl")}
    assert pool - mixed < whole - {each.text for each in train}
    # The sentences are among the utterances, and not behind them.
    places = [place for place, each in enumerate(read["pool.jsonl"]) if each in mixed]
    assert places[0] < 30 and places[-1] > 90
    for name in ("validation", "test"):
        mine = (tmp_path / "out" / "labelled" / f"{name}.jsonl").read_text()
        assert mine == (corpus / f"{name}.jsonl").read_text()
    assert record["pool"] == 120 and record["train"] == 18
    divide(corpus, text, settings, tmp_path / "again")
    for name in ("pool.jsonl", "labelled/train.jsonl"):
        mine, other = (tmp_path / each / name for each in ("out", "again"))
        assert mine.read_bytes() == other.read_bytes()


def test_each_slot_is_among_the_few_labels() -> None:
    utterances = [labelled.Utterance(f"play {i}", "Play", ()) for i in range(200)]
    rare = labelled.parse_brackets("play [genre : rock]", "Play", "")
    few, rest = divide_corpus.few_of([*utterances, rare], 2, random.Random(0))
    assert rare in few and len(few) == 2 and len(rest) == 199
    rares = [labelled.parse_brackets(f"[s{i} : rock]", "Play", "") for i in range(3)]
    with pytest.raises(ValueError, match=r"--per-intent 2: no utterance for the slots s\d is left"):
        divide_corpus.few_of(rares, 2, random.Random(0))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"per_intent": 0}, "--per-intent 0: must be 1 or more"),
        ({"per_intent": 900}, r"--per-intent 900: intent 'Call' has only \d+"),
        ({"other_share": 1.0}, r"--other-share 1\.0: must be from 0 to below 1"),
        ({"other_share": 0.9}, r"has 1,000 short sentences: must have 810 to mix in and 300 for"),
        ({"pool_size": 5000}, r"--pool-size 5000: \d+ utterances have no labels to keep"),
    ],
)
def test_a_corpus_that_cannot_be_divided_is_refused(
    change: dict[str, Any], said: str, corpus: Path, tmp_path: Path
) -> None:
    asked = {"per_intent": 6, "other_share": 0.2, "other_for_filter": 300, "pool_size": 90}
    text = write_text(tmp_path / "text.jsonl")
    with pytest.raises(ValueError, match=said):
        divide(corpus, text, Settings(**{**asked, **change}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- a committee of models ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_members(tmp_path_factory.mktemp("members"))


def test_a_member_answers_as_its_model_and_nothing_certain_where_it_cannot_read(
    members: Path,
) -> None:
    found = committee_predict.load_members(members)
    texts = ["play the song", "stop " * 40, "stop ann"]
    for member in found:
        intents, tags = member.intents(texts), member.tags(texts)
        assert np.allclose(intents.sum(1), 1) and np.allclose(intents[1], 1 / 2)
        assert [each.shape for each in tags] == [(3, 3), (40, 3), (2, 3)]
        assert np.allclose(tags[1], 1 / 3)
        for text, row, marginals in zip(texts, intents, tags, strict=True):
            if len(text) > 40:
                continue
            words = tuple(text.split())
            with torch.no_grad():
                alone = member.model(member.model.batch([member.model.encode(words, "")]))
                expected = [alone.intent_log_probs().exp()[0], alone.tag_log_probs().exp()[0]]
            for mine, theirs in zip((row, marginals), expected, strict=True):
                assert np.allclose(mine, theirs.numpy(), atol=1e-6)
    assert not np.allclose(found[0].intents(texts), found[1].intents(texts))
    # Other texts are answered anew.
    assert len(found[0].intents(texts[:1])) == 1


def test_members_that_are_no_committee_are_refused(members: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has 0 models: a committee must have at least two"):
        committee_predict.load_members(tmp_path)
    found = committee_predict.load_members(members)
    labels = LabelSet(("Play", "Sing"), ("O", "B-name", "I-name"))
    found[0].model.save(tmp_path / "a")
    other = BiLstmCrf(Sizes(8, 8, 24), labels, found[0].model.tokenizer)
    other.save(tmp_path / "b")
    with pytest.raises(ValueError, match=r"b has other labels than .*a: all members must have the"):
        committee_predict.load_members(tmp_path)


def predict(monkeypatch: pytest.MonkeyPatch, members: Path, folder: Path, *more: str) -> int:
    """Run committee_predict.py on a pool of three utterances and two held-out ones."""
    texts = ("play it", "stop ann", "play the song")
    pool, held_out = folder / "pool.jsonl", folder / "held_out.jsonl"
    pool.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    known = [labelled.Utterance(text, "Play", ()) for text in ("play", "play ann")]
    labelled.write_jsonl(held_out, known)
    words = ["--models", members, "--pool", pool, "--held-out", held_out, "--out", folder / "out"]
    monkeypatch.setattr(sys, "argv", ["committee_predict.py", *map(str, words), *more])
    return committee_predict.main()


def test_a_pool_is_answered_without_ray(
    members: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With it, see tests/frameworks/test_ray_committee.py."""
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    assert predict(monkeypatch, members, tmp_path) == 0
    said = capsys.readouterr()
    assert "3 utterances of the pool and 2 held-out ones" in said.out
    assert "the committee answers: 3utt" in said.err
    with np.load(tmp_path / "out" / "pool.npz") as file:
        assert file["probabilities"].shape == (2, 3, 2)


@pytest.mark.parametrize(
    ("actors", "is_installed", "address", "said"),
    [
        ("0", True, None, "--ray-actors 0: must be 1 or more; leave it out for one process"),
        ("2", False, None, r"--ray-actors 2: needs Ray Data, .*; pip install 'ray\[data\]'"),
        (
            "2",
            True,
            "127.0.0.1:1",
            r"RAY_ADDRESS=127\.0\.0\.1:1: must be HOST:PORT .* none answers",
        ),
        ("2", True, "auto", r"RAY_ADDRESS=auto: must be HOST:PORT .*; correct it, or unset it"),
    ],
)
def test_actors_that_cannot_be_are_refused_before_anything_is_read(
    actors: str,
    is_installed: bool,
    address: str | None,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("ray", "ray.data"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name) if is_installed else None)
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    assert predict(monkeypatch, tmp_path / "no models", tmp_path, "--ray-actors", actors) == 2
    assert re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


# --- one command --------------------------------------------------------------------------------


def write_guidelines(path: Path, **changes: Any) -> Path:
    entry = {"task": "ic", "optimizer": "adams", "shots": 10, "method": "cvt", "why": "it is best"}
    entry |= {"selection": "submodular", "pool_size": 30, **changes}
    path.write_text(json.dumps([entry]))
    return path


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["nlu_ssl.py", *map(str, words)])
    return nlu_ssl.main()


@pytest.mark.timeout(900)  # five of them
def test_auto_does_all_that_the_guidelines_say(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    texts = [each.text for each in labelled.read_jsonl(corpus / "train.jsonl")]
    pool = tmp_path / "pool.jsonl"
    pool.write_text("".join(json.dumps({"text": f"{text} now"}) + "\n" for text in texts[:60]))
    few = tmp_path / "train.jsonl"
    few.write_text("".join((corpus / "train.jsonl").open().readlines()[60:120]))
    out, path = tmp_path / "out", write_guidelines(tmp_path / "guidelines.json")
    words = ("--labelled", few, "--pool", pool, "--task", "ic", "--guidelines", path)
    more = ("--steps", 4, "--rates", "1e-2", "--min-count", 2, "--out", out)
    assert run(monkeypatch, *words, *more) == 0
    said = capfd.readouterr().out
    assert "ic: cvt, as with 10 shots, cvt on submodular 30 was recommended: it is best" in said
    (row,) = read_rows(out / "ic" / "rows.csv")
    assert (row["method"], row["selection"], row["num_pool"]) == ("cvt", "submodular-30", "30")
    (card,) = (out / "ic" / "models").glob("*/README.md")
    assert str(card) in said and "Why cvt: with 10 shots, cvt on submodular 30" in card.read_text()
    # A pool that is smaller than the study's is taken whole; and a pool may be left alone.
    write_guidelines(path, pool_size=4000)
    work = nlu_ssl.Work(nlu_ssl.parse([str(each) for each in (*words, *more)]))
    kept = json.loads((out / "pool" / "pool.json").read_text())["kept"]
    assert work.guideline("ic")["pool_size"] == kept
    write_guidelines(path, method="supervised", selection="", pool_size=0)
    assert run(monkeypatch, *words, *more, "--optimizer", "adams") == 0
    (row,) = read_rows(out / "ic" / "rows.csv")
    assert (row["method"], row["selection"]) == ("supervised", "")


def test_a_committee_is_trained_before_it_selects(tmp_path: Path) -> None:
    for each in ("a.jsonl", "p.jsonl"):
        (tmp_path / each).write_text("{}")
    words = f"--labelled {tmp_path}/a.jsonl --pool {tmp_path}/p.jsonl --out {tmp_path}/out"
    work = nlu_ssl.Work(nlu_ssl.parse(f"{words} --method kd --budget 9".split()))
    steps = [*work.data(), *work.select("committee", 9)]
    steps.append(work.train("ner", steps[-1].outputs[0], None))
    names = ["labelled", "pool", "members", "predictions", "committee-9", "ner"]
    assert [step.name for step in steps] == names
    needs = pipeline.needed(steps)
    assert needs["predictions"] == {"labelled", "pool", "members"}
    assert needs["ner"] == {"labelled", "committee-9"}
    for step in steps:
        assert (EXAMPLE / step.command[0]).is_file()
        if step.command[0] == "train_ssl.py":
            train_ssl.check_arguments(train_ssl._parser().parse_args(step.command[1:]))
    assert work.guideline("ner")["selection"] == "submodular"


def test_a_corpus_is_read_by_its_name(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a", "b", "c")]
    for each in files:
        each.touch()
    given = f"conll={files[0]},{files[1]},{files[2]}"
    assert nlu_ssl.reader_of(given)[:3] == ["conll.py", "--train", str(files[0])]
    assert nlu_ssl.reader_of(str(files[0]))[1:3] == ["--format", "jsonl"]
    assert nlu_ssl.reader_of(f"snips={tmp_path}")[1:3] == ["--format", "snips"]
    assert nlu_ssl.reader_of("home-assistant=en")[1:] == [
        *("--format", "home-assistant", "--source", "en")
    ]
    for bad in (f"conll={files[0]}", "conll=a,b,c"):
        with pytest.raises(ValueError, match="three files that are there"):
            nlu_ssl.reader_of(bad)
    with pytest.raises(ValueError, match="must be NAME=PATH"):
        nlu_ssl.reader_of("/nowhere/train.jsonl")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--pool /nowhere", "/nowhere: no such file: must be a pool"),
        ("--method supervised --budget 9", "must go without --selection and --budget"),
        ("--method vat", "--method vat: must have a --budget"),
        ("--budget 0", "--budget 0: must be 1 or more"),
        ("--labelled conll=a,b,c", "must go with --task ner"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_before_anything_runs(
    words: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "p.jsonl").touch()
    base = f"--labelled {tmp_path}/p.jsonl --pool {tmp_path}/p.jsonl --out {tmp_path}/out"
    assert run(monkeypatch, *f"{base} {words}".split()) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_guidelines_of_the_example_can_be_followed() -> None:
    guidelines = method_use.read_guidelines(nlu_ssl.GUIDELINES)
    for task in ("ic", "ner"):
        found = method_use.choose(guidelines, task, "adams", 0, per_intent=25.0)
        assert found["selection"] in ("", *nlu_ssl.SELECTIONS) and found["method"] in METHODS
