"""The tests' own parts: cases are named by strings, thinned cases exist, comparisons compare."""

import ast
import copy
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.harness.compare import Rank, assert_continues, assert_same
from tests.harness.thinning import thinned

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
_CASE = re.compile(r"tests(\.\w+)+:\w+")


def cases_in(source: str) -> Iterator[str]:
    """Every "module:function" that a module has as a string, or as f"{MODULE}:function"."""
    tree = ast.parse(source)
    modules = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str(text)) if _CASE.fullmatch(text):
                yield text
            case ast.JoinedStr(
                values=[ast.FormattedValue(value=ast.Name(id=name)), ast.Constant(value=str(end))]
            ) if _CASE.fullmatch(f"{modules.get(name)}{end}"):
                yield f"{modules[name]}{end}"


def resolves(case: str) -> bool:
    """Whether its module defines its function; nothing is imported, as it may need Megatron."""
    module, function = case.split(":")
    path = (ROOT / module.replace(".", "/")).with_suffix(".py")
    return path.exists() and any(
        isinstance(node, ast.FunctionDef) and node.name == function
        for node in ast.parse(path.read_text("utf-8")).body
    )


def test_every_case_that_is_named_by_a_string_is_there() -> None:
    found = {
        (str(path.relative_to(ROOT)), case)
        for path in TESTS.rglob("*.py")
        if path != Path(__file__)
        for case in cases_in(path.read_text("utf-8"))
    }
    assert len(found) > 70
    assert not {(path, case) for path, case in found if not resolves(case)}


def test_misspelled_case_is_found() -> None:
    source = 'CASES = "tests.distributed.cases"\nf"{CASES}:trian"\n"tests.distributed.case:train"'
    found = list(cases_in(source))
    assert sorted(found) == ["tests.distributed.case:train", "tests.distributed.cases:trian"]
    assert not any(resolves(case) for case in found)
    assert resolves("tests.distributed.cases:train")


def test_every_folder_of_tests_is_a_package() -> None:
    folders = {path.parent for path in TESTS.rglob("*.py")}
    assert len(folders) > 6
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]


def test_thinned_cases_are_marked_and_a_name_that_is_no_case_is_refused() -> None:
    marked = {
        param.values: [mark.name for mark in param.marks]
        for param in thinned(["a", ("b", "c")], full=[("b", "c")])
    }
    assert marked == {("a",): [], ("b", "c"): ["full"]}
    with pytest.raises(ValueError, match=r"full=\['d'\]: must be among the cases"):
        thinned(["a"], full=["d"])


pytest_plugins = ["pytester"]


@pytest.mark.parametrize(
    ("arguments", "num_passed", "num_left_out"),
    [
        ((), 2, 1),
        (("--full",), 3, 0),
        (("--only-full",), 1, 2),
        (("test_it.py::test_case[b]",), 1, 0),
        (("test_it.py::test_case",), 2, 0),
    ],
)
def test_full_cases_run_when_they_are_asked_for(
    pytester: pytest.Pytester, arguments: tuple[str, ...], num_passed: int, num_left_out: int
) -> None:
    pytester.makeconftest((TESTS / "conftest.py").read_text("utf-8"))
    pytester.makeini("[pytest]\nmarkers = full: left out")
    pytester.makepyfile(
        test_it="""
        import pytest

        @pytest.mark.parametrize("x", ["a", pytest.param("b", marks=pytest.mark.full)])
        def test_case(x):
            pass

        def test_other():
            pass
        """
    )
    run = pytester.runpytest_inprocess("-p", "no:cacheprovider", *arguments)
    run.assert_outcomes(passed=num_passed, deselected=num_left_out)


def a_run(num_steps: int = 4) -> list[Rank]:
    """Two ranks, in the form of `tests.distributed.cases.train`."""
    exp_avg = torch.arange(3.0)
    shard = {"param": exp_avg + 1, "main_param": exp_avg + 1, "exp_avg": exp_avg}
    shard |= {"state": {"exp_avg": exp_avg}, "bytes_per_param": 4}
    part = {"classes": ("A", "B"), "groups": [{"step": num_steps}], "shards": [shard]}
    rank = {
        **{name: [float(step) for step in range(num_steps)] for name in ("losses", "grad_norms")},
        **{"skipped": [0] * num_steps, "counts": [num_steps], "model": {"weight": exp_avg + 2}},
        "parts": [part],
    }
    return [copy.deepcopy(rank) for _ in range(2)]


EVERYTHING = (
    *("losses", "grad_norms", "skipped", "counts", "model", "classes", "groups"),
    *("param", "main_param", "exp_avg", "state", "bytes_per_param"),
)


def disturb(run: list[Rank], what: str) -> None:
    """Change one value of the last rank."""
    rank = run[1]
    (part,) = rank["parts"]
    (shard,) = part["shards"]
    match what:
        case "model":
            rank["model"]["weight"][2] += 1
        case "classes":
            part["classes"] = ("A", "C")
        case "groups":
            part["groups"][0]["lr"] = 1.0
        case "state":
            shard["state"]["exp_avg"] = shard["state"]["exp_avg"] + 1
        case "bytes_per_param":
            shard[what] = 2
        case "param" | "main_param" | "exp_avg":
            shard[what] = shard[what] + 1
        case _:
            rank[what][-1] += 1


@pytest.mark.parametrize("what", EVERYTHING)
def test_one_value_of_one_rank_makes_two_runs_different(what: str) -> None:
    mine, theirs = a_run(), a_run()
    assert_same(mine, theirs, *EVERYTHING)
    disturb(mine, what)
    with pytest.raises(AssertionError, match="rank 1"):
        assert_same(mine, theirs, *EVERYTHING)
    assert_same(mine, theirs, *(name for name in EVERYTHING if name != what))


def test_runs_without_what_is_compared_are_no_proof() -> None:
    mine, theirs = a_run(), a_run()
    for rank in (*mine, *theirs):
        rank["losses"], rank["parts"][0]["shards"] = [], []
    with pytest.raises(AssertionError, match="no losses"):
        assert_same(mine, theirs, "losses")
    with pytest.raises(AssertionError, match="no shards"):
        assert_same(mine, theirs, "exp_avg")
    with pytest.raises(AssertionError):
        assert_same(mine[:1], theirs, "model")


def test_only_values_of_steps_are_compared_from_the_end() -> None:
    mine, theirs = a_run(), a_run()
    mine[0]["losses"][0] += 1
    assert_same(mine, theirs, "losses", last=3)
    mine[0]["counts"].insert(0, 7)
    with pytest.raises(AssertionError, match="counts of rank 0"):
        assert_same(mine, theirs, "counts", last=1)


def resumed_at(step: int) -> list[Rank]:
    run = a_run()
    for rank in run:
        for name in ("losses", "grad_norms", "skipped"):
            rank[name] = rank[name][step:]
    return run


@pytest.mark.parametrize("what", ["losses", "grad_norms", "skipped", "model", "param", "state"])
def test_resumed_run_that_differs_does_not_continue(what: str) -> None:
    assert_continues(resumed_at(3), a_run(), 3)
    run = resumed_at(3)
    disturb(run, what)
    with pytest.raises(AssertionError):
        assert_continues(run, a_run(), 3)


def test_resumed_run_has_the_rest_of_the_steps_and_exp_avg_alone() -> None:
    with pytest.raises(AssertionError):
        assert_continues(resumed_at(2), a_run(), 3)
    forgetful, fuller = resumed_at(3), resumed_at(3)
    forgetful[0]["parts"][0]["groups"][0]["step"] = 1
    fuller[0]["parts"][0]["shards"][0]["state"]["exp_avg_sq"] = torch.zeros(3)
    for run in (forgetful, fuller):
        with pytest.raises(AssertionError):
            assert_continues(run, a_run(), 3)
    near = resumed_at(3)
    near[1]["grad_norms"] = [3.0 * (1 + 1e-7)]
    assert_continues(near, a_run(), 3, norm_rtol=3e-7)


def test_cpu_seconds_of_a_test_count_the_processes_that_it_starts(
    pytester: pytest.Pytester,
) -> None:
    pytester.makeini("[pytest]\n")
    pytester.makepyfile(
        test_it="""
        import subprocess, sys

        BUSY = "import time\\nwhile time.process_time() < 0.4: pass"

        def test_case():
            subprocess.run([sys.executable, "-c", BUSY], check=True)
        """
    )
    options = ("-p", "tests.harness.cpu_times", "-p", "no:cacheprovider")
    run = pytester.runpytest_inprocess(*options)
    (seconds,) = re.findall(r"^ *([\d.]+)  test_it.py$", run.stdout.str(), re.MULTILINE)
    assert 0.4 <= float(seconds) < 10
    assert run.outlines[-1].startswith("=") and "1 passed" in run.outlines[-1]
