"""examples/nlu_teacher/assistant.py and simulate_assistant.py: what is done for which labels."""

import json
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "nlu_teacher"
sys.path.append(str(EXAMPLE))

pytest.importorskip("num2words", reason="needs num2words: pip install 'megatron-adams[nlu]'")
pytest.importorskip("tokenizers", reason="needs tokenizers: pip install 'megatron-adams[nlu]'")
import labelled  # noqa: E402  (the example's files import each other by name)
import labels  # noqa: E402
import simulate_assistant as simulate  # noqa: E402
from assistant import Assistant  # noqa: E402
from finetune_rows import COLUMNS, Run, append_row, write_answers  # noqa: E402
from labels import Tagged  # noqa: E402


def request(text: str, intent: str = "PlayMusic") -> Tagged:
    return labels.tag(labelled.parse_brackets(text, intent, "x:1"))


@pytest.fixture
def assistant(tmp_path: Path) -> Assistant:
    catalogue = [
        request("play [track : let it be] by [artist : the beatles]"),
        request("play [artist : the who]"),
        request("weather in [city : paris]", "GetWeather"),
        request("dim the [area : living room]", "HassLightSet"),
    ]
    return Assistant.create(tmp_path / "catalogue.sqlite", catalogue)


# --- what is done -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labelled_as", "answered_as", "is_same"),
    [
        ("play [artist : the beatles]", "play [artist : the beatles]", True),
        ("play [artist : the beatles]", "play the [artist : beatles]", True),  # found all the same
        ("play [artist : the beatles]", "play [artist : the] beatles", False),
        ("play [artist : the beatles]", "play the beatles", False),
        ("play [artist : the beatles]", "play [track : the beatles]", False),
        ("play the [music_item : song]", "play the song", True),  # not needed
        ("play [track : let it be]", "play [album : let it be]", True),  # both are works
        ("from [year : 1999]", "from [year : nineteen ninety] nine", False),
    ],
)
def test_an_action_depends_on_what_its_rule_names(
    assistant: Assistant, labelled_as: str, answered_as: str, is_same: bool
) -> None:
    mine, other = request(labelled_as), request(answered_as)
    assert simulate.is_satisfied(assistant, mine, other) is is_same


def test_another_intent_does_something_else(assistant: Assistant) -> None:
    mine, other = request("stop"), request("stop", "GetWeather")
    assert not simulate.is_satisfied(assistant, mine, other)


def test_a_place_is_one_whatever_it_is_called_and_a_time_loses_its_preposition(
    assistant: Assistant,
) -> None:
    first, second, third = (
        request(text, "GetWeather")
        for text in (
            "weather [timeRange : at noon] in [city : paris]",
            "weather at [timeRange : noon] in [state : paris]",
            "weather at [timeRange : noon] in [spatial_relation : paris]",
        )
    )
    assert simulate.is_satisfied(assistant, first, second)
    assert not simulate.is_satisfied(assistant, first, third)


def test_an_unknown_intent_depends_on_all_its_slots(assistant: Assistant) -> None:
    right = request("dim the [area : living room]", "HassLightSet")
    assert simulate.is_satisfied(assistant, right, right)
    assert not simulate.is_satisfied(
        assistant, right, request("dim the living room", "HassLightSet")
    )


def test_what_is_done_is_in_the_database(assistant: Assistant) -> None:
    operation, arguments = assistant.do(request("play [artist : the who] from [year : 1999]"))
    assert operation == "play"
    name = "SELECT name FROM things WHERE id = ?"
    ((_, thing, _),) = [each for each in arguments if each[0] == "artist"]
    assert assistant.database.execute(name, (thing,)).fetchone() == ("the who",)
    assert ("year", None, "nineteen ninety nine") in arguments and len(arguments) == 2
    found = assistant.database.execute("SELECT COUNT(*) FROM arguments").fetchone()
    assert found == (2,)


def test_a_thing_that_is_not_there_is_not_found(assistant: Assistant) -> None:
    assert assistant.find("artist", "queen") is None
    assert assistant.find("artist", "who is it") is None  # one word of four in common
    assert assistant.find("work", "the who") is None  # another kind
    assert assistant.find("artist", "who") == assistant.find("artist", "the who")


# --- the replay ---------------------------------------------------------------------------------


def test_tries_are_counted_by_dialogue(assistant: Assistant) -> None:
    right, wrong = request("play [artist : the who]"), request("play the who")
    turns = [1, 2, 2, 2, 1]
    asked = [right] * sum(turns)
    answers = [right, wrong, right, wrong, wrong, right, wrong, wrong]
    #          one    second try    neither       first try     alone
    counts = simulate.replay(assistant, turns, asked, answers)
    assert counts.tolist() == [[2, 1, 3], [1, 1, 2]]
    sums = counts.sum(0)
    assert simulate.unsatisfied_rate(sums) == 3 / 5 and simulate.abandoned_rate(sums) == 2 / 5


def test_a_second_try_has_the_values_in_other_words() -> None:
    first, wording = (
        labelled.parse_brackets(text, "PlayMusic", "x:1")
        for text in (
            "play [track : x y] and [track : z] by [artist : me]",
            "from [artist : him] i want [track : a], then [track : b].",
        )
    )
    second = simulate.rephrase(first, wording)
    assert second.text == "from me i want x y, then z."
    assert [(s.name, second.text[s.start : s.end]) for s in second.slots] == [
        ("artist", "me"),
        ("track", "x y"),
        ("track", "z"),
    ]


def test_a_request_without_such_wording_is_said_once() -> None:
    test, wordings = (
        [labelled.parse_brackets(text, "PlayMusic", "x:1") for text in texts]
        for texts in (["play [artist : me]", "stop"], ["i want [artist : him]"])
    )
    pairs = {first.text: second for first, second in simulate.requests_of(test, wordings, 0)}
    second = pairs["play me"]
    assert second is not None and second.text == "i want me" and pairs["stop"] is None


def test_the_commands_measure_a_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, folder, study = tmp_path / "data", tmp_path / "assistant", tmp_path / "study"
    data.mkdir()
    for name, texts in {
        "train": ["play [artist : the beatles] now"],
        "validation": ["i want [artist : queen]"],
        "test": ["play [artist : the who]", "play [artist : queen]", "stop it"],
    }.items():
        utterances = [labelled.parse_brackets(text, "PlayMusic", "x:1") for text in texts]
        labelled.write_jsonl(data / f"{name}.jsonl", utterances)
    assert simulate.main(["make", "--data", str(data), "--out", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "3 requests\n2 with a second try\n3 things in the catalogue" in said
    asked = labels.load_tagged(folder / "requests.jsonl")
    turns = json.loads((folder / "turns.json").read_text())
    assert len(asked) == sum(turns) == 5
    run = Run("S", "adams", 1e-3, 20, 0, 0)
    named = {name: getattr(run, name, 0) for name in COLUMNS}
    study.mkdir()
    append_row(study / "rows.csv", named)
    # Only "stop it" is answered rightly: no slot at all.
    (study / "predictions" / run.name).mkdir(parents=True)
    argv = ["run", "--assistant", str(folder), "--study", str(study)]
    assert simulate.main(argv) == 2
    assert "--also requests=" in capsys.readouterr().err
    answers = [Tagged(each.words, ("O",) * len(each.words), each.intent) for each in asked]
    write_answers(study / "predictions" / run.name / "requests.jsonl", answers)
    assert simulate.main(argv) == 0
    table = (study / "dissatisfaction.csv").read_text().splitlines()
    assert table[1] == f"{run.name},0.66667,0.66667,3"
