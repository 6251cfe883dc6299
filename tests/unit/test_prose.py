"""Docstrings, comments and pages are free of a few forms that a reader has to decode.

The lists hold only what is always wrong, so that nobody has to argue with a test.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import megatron_adams

ROOT = Path(__file__).resolve().parents[2]
# A new file in one of these folders is looked at, too.
COVERED = (
    *("README.md", "CONTRIBUTING.md", "SECURITY.md", ".github/**/*", "docs/*", "patches/*"),
    *("megatron_adams/**/*", "docker/*", "tests/harness/**/*"),
    *("benchmarks/**/*", "examples/**/*", "tests/gpu/**/*"),
)
# The plan was written before the first run, and stays as it was.
KEPT = {"examples/quality/PLAN.md"}

# Anywhere in a docstring, a comment or a page -> what to write instead.
WORDS = {
    r"\b[Ll]ikewise\b": "'the same for ...', or what is meant",
    r"\banew\b": "'again'",
}
# At the beginning of a docstring or a comment -> what to write instead.
OPENINGS = {
    r"Of (a|an|the|each|all|one|those|what|whole|two)\b": "a sentence with a subject and a verb",
    r"As (\w+)'s\b": "'See AdamS.', or what it does",
    r"As upstream\b": "what it does, and what upstream does instead",
}


def texts_of(text: str, suffix: str) -> Iterator[tuple[int, str, bool]]:
    """The lines that are held to the rules: number, words, whether a text begins there."""
    if suffix == ".md":
        yield from ((number, line, False) for number, line in enumerate(text.splitlines(), 1))
        return
    comments: dict[int, str] = {}
    if suffix == ".py":
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                for index, line in enumerate((ast.get_docstring(node) or "").splitlines()):
                    yield node.body[0].lineno + index, line.strip(), index == 0
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                comments[token.start[0]] = token.string.lstrip("# ")
    else:
        for number, line in enumerate(text.splitlines(), 1):
            _, mark, words = line.partition("//")
            if mark:
                comments[number] = words.strip()
    for number, words in comments.items():
        yield number, words, not comments.get(number - 1)


def findings(text: str, suffix: str) -> list[str]:
    """What is wrong with a file, each with its line and a remedy."""
    found = []
    for number, words, is_first in texts_of(text, suffix):
        wrong = [(re.search(form, words), remedy) for form, remedy in WORDS.items()]
        if is_first:
            wrong += [(re.match(form, words), remedy) for form, remedy in OPENINGS.items()]
        found += [f"{number}: {match[0]!r}: write {remedy}" for match, remedy in wrong if match]
    return found


def covered_files() -> list[Path]:
    files = {path for pattern in COVERED for path in ROOT.glob(pattern)}
    texts = {path for path in files if path.suffix in {".py", ".md", ".h", ".cu", ".cpp"}}
    return sorted(texts - {ROOT / name for name in KEPT})


def test_no_text_has_a_form_that_must_be_decoded() -> None:
    files = covered_files()
    assert len(files) > 80
    found = [
        f"{path.relative_to(ROOT)}:{finding}"
        for path in files
        for finding in findings(path.read_text("utf-8"), path.suffix)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "suffix", "num_found"),
    [
        ('"""Of a step, the time."""\n', ".py", 1),
        ('def f():\n    """Return it.\n\n    Args:\n        x: likewise.\n    """\n', ".py", 1),
        ("x = 1  # As AdamS's.\n", ".py", 1),
        ("# As upstream, but for the copy.\n", ".py", 1),
        ("# The grad is written anew.\n", ".py", 1),
        ("int x;  // Of the table.\n", ".cpp", 1),
        ("// A chunk\n// Of the table.\n", ".cpp", 0),
        ('x = "likewise"\n', ".py", 0),
        ('"""Return the sum of a step."""\n', ".py", 0),
        ("Likewise, the file is written anew.\n", ".md", 2),
        ("Of the 13 ms, most are the norm.\n", ".md", 0),
    ],
)
def test_a_planted_form_is_found(text: str, suffix: str, num_found: int) -> None:
    assert len(findings(text, suffix)) == num_found


def test_the_citation_names_this_version_and_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert str(citation["version"]) == megatron_adams.__version__
    (paper,) = citation["references"]
    assert paper["url"] == "https://arxiv.org/abs/2505.16363"
