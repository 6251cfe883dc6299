"""The README is a door: short, narrow, with code to copy, and every link leads somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text("utf-8")


def anchors(page: str) -> set[str]:
    """The ids that GitHub and the site give to the headings of a Markdown page."""
    prose = re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)", prose, re.MULTILINE)
    return {
        re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings
    }


def dead_links(page: Path) -> list[str]:
    """The links of a Markdown page, within the repository, that lead nowhere."""
    text = page.read_text("utf-8")
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        found = target.exists()
        if not found or (anchor and anchor not in anchors(target.read_text("utf-8"))):
            dead.append(link)
    return dead


def test_readme_is_short_and_narrow() -> None:
    assert len(README.split()) <= 1000
    assert max(len(line) for line in README.splitlines()) <= 120


def test_readme_says_what_ran_where_before_it_says_how_to_install() -> None:
    assert 0 < README.index("> **Status.**") < README.index("## Install")


def test_code_is_fenced_and_names_its_language() -> None:
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "patches" / "README.md"]:
        text = page.read_text("utf-8")
        fences = re.findall(r"^```(.*)$", text, re.MULTILINE)
        assert len(fences) % 2 == 0, page
        assert set(fences[::2]) <= {"bash", "json", "python", "text", "yaml"}, page
        assert not any(fences[1::2]), page
        # Code by indentation alone has no language.
        unfenced = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
        blocks = re.findall(r"(?:^|\n)\n    (?![-*\d`])\S.*", unfenced)
        assert not [block for block in blocks if "options:" not in block], page
    assert README.count("```") >= 12


@pytest.mark.parametrize(
    "page",
    ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "patches/README.md", "docs"],
)
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    pages = sorted(path.glob("*.md")) if path.is_dir() else [path]
    assert pages
    assert {str(page): dead_links(page) for page in pages} == {str(page): [] for page in pages}


def test_a_dead_link_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One heading's name\n[a](#one-headings-name) [b](#two) [c](gone.md)\n")
    assert dead_links(page) == ["#two", "gone.md"]
