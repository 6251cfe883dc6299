"""The pages in docs/ name nothing that is not there, and leave out nothing that a user can give."""

import argparse
import ast
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

import megatron_adams
from megatron_adams.megatron.config import ADAMS
from megatron_adams.megatron.training.arguments import wrap_add_megatron_arguments

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = {path.name: path.read_text("utf-8") for path in sorted(DOCS.glob("*.md"))}
EVERYTHING = "\n".join([(ROOT / "README.md").read_text("utf-8"), *PAGES.values()])


# --- the support matrix -------------------------------------------------------------------------

SUPPORT = PAGES["support.md"]


def rows(page: str) -> list[list[str]]:
    """The cells of every row of a page's tables, headings left out."""
    lines = re.findall(r"^\| (.*?)\s*\|$", page, re.MULTILINE)
    cells = [[cell.strip() for cell in re.split(r"\s*\|\s?", line)] for line in lines]
    rules = [index for index, row in enumerate(cells) if set("".join(row)) <= set("-: ")]
    return [row for i, row in enumerate(cells) if i not in rules and i + 1 not in rules]


def footnotes() -> dict[str, list[str]]:
    """The tests that each footnote of the support matrix names."""
    notes = re.findall(r"^\[\^([\w-]+)\]:((?:.*\n(?:    .*\n)*))", SUPPORT, re.MULTILINE)
    return {name: re.findall(r"`([^`]+)`", text) for name, text in notes}


def test_every_row_of_the_support_matrix_has_its_test() -> None:
    notes = footnotes()
    used: set[str] = set()
    matrix = rows(SUPPORT)
    assert len(matrix) > 100
    for row in matrix:
        assert len(row) == 3, row
        cited = re.findall(r"\[\^([\w-]+)\]", row[2])
        if row[2].startswith(("not tested", "not run")):
            assert not cited, row
            continue
        assert cited, row
        assert all(notes.get(name) for name in cited), row
        used.update(cited)
    assert used == set(notes), "a footnote that no row cites"


def test_every_test_that_is_named_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(test_\w+))?`", EVERYTHING)
    assert len(named) > 60
    for file, test in named:
        text = (ROOT / file).read_text("utf-8")
        assert not test or f"def {test}(" in text, f"{file}::{test}"


def test_every_refused_flag_is_in_a_test_of_its_row() -> None:
    notes = footnotes()
    num_flags = 0
    for _, flags, result in rows(SUPPORT):
        if not result.startswith("refused"):
            continue
        files = [
            test.partition("::")[0]
            for name in re.findall(r"\[\^([\w-]+)\]", result)
            for test in notes[name]
        ]
        text = "\n".join((ROOT / file).read_text("utf-8") for file in files)
        for flag in re.findall(r"--[\w-]+", flags):
            num_flags += 1
            assert re.search(rf"{flag}(?![\w-])", text), (flag, files)
    assert num_flags > 25


@pytest.mark.parametrize(
    ("file", "section"),
    [
        ("test_flags.py", ""),
        ("test_cuda_graph.py", "## CUDA graph\n"),
        ("test_fsdp.py", "## Megatron-FSDP\n"),
        ("test_update_rms.py", "## Cap and target of the update\n"),
    ],
)
def test_every_refusal_that_is_tested_is_in_the_support_matrix(file: str, section: str) -> None:
    text = (ROOT / "tests" / "distributed" / file).read_text("utf-8")
    (refused,) = [
        node.value
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "REFUSED"
    ]
    assert isinstance(refused, ast.Dict)
    errors = [
        ast.literal_eval(value.elts[-1] if isinstance(value, ast.Tuple) else value)
        for value in refused.values
    ]
    flags = {match[0] for error in errors if (match := re.search(r"--[a-z][\w-]*", error))}
    assert flags
    part = SUPPORT[SUPPORT.index(section) :]
    part = part.partition("\n## ")[0] if section else SUPPORT
    lost = {flag for flag in flags if not re.search(rf"{flag}(?![\w-])", part)}
    assert not lost


# --- the tree -----------------------------------------------------------------------------------

TREE = PAGES["architecture.md"].partition("## The tree")[2].partition("\n## ")[0]


def tree_of_files() -> list[str]:
    """The paths of the section "The tree", by indentation."""
    paths, folders = [], [""]
    for line in TREE.partition("```text\n")[2].partition("```")[0].splitlines():
        entry = re.match(r"( *)(\S+(?:, \S+)*)(?:  |$)", line)
        assert entry is not None, line
        depth = len(entry[1]) // 2
        folders[depth + 1 :] = []
        paths += [folders[depth] + name for name in entry[2].split(", ")]
        folders.append(paths[-1])
    return paths


def test_every_file_of_the_tree_exists() -> None:
    paths = tree_of_files()
    assert len(paths) > 45
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_every_module_is_in_the_tree() -> None:
    paths = {(ROOT / path).resolve() for path in tree_of_files()}
    modules = (ROOT / "megatron_adams").rglob("*.py")
    missing = {m for m in modules if m.name != "__init__.py" and "__pycache__" not in m.parts}
    assert not {str(m.relative_to(ROOT)) for m in missing - paths}


# --- names that a user can give -----------------------------------------------------------------


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make (\w+)", EVERYTHING, re.MULTILINE))
    assert {"train", "test", "docs"} <= named <= targets


def test_own_flags_are_documented_and_no_other() -> None:
    def add_megatron_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser.add_argument("--optimizer", choices=["adam", "sgd"])
        parser.add_argument("--adam-beta2", type=float, default=0.999, help="")
        parser.add_argument("--exp-avg-sq-dtype", default="fp32")
        return parser

    parser = wrap_add_megatron_arguments(add_megatron_arguments)(argparse.ArgumentParser())
    own = {flag for flag in parser._option_string_actions if flag.startswith(f"--{ADAMS}-")}
    assert own
    assert own == set(re.findall(rf"--{ADAMS}-[\w-]+", PAGES["flags.md"]))
    assert own == set(re.findall(rf"--{ADAMS}-[\w-]+", EVERYTHING))


@pytest.mark.parametrize(
    ("section", "command"),
    [
        ("## The launcher", ["-m", "megatron_adams.launch"]),
        ("## megatron-adams precompile", ["-m", "megatron_adams.cli", "precompile"]),
        ("## megatron-adams convert", ["-m", "megatron_adams.cli", "convert"]),
        ("## megatron-adams doctor", ["-m", "megatron_adams.cli", "doctor"]),
        ("## megatron-adams plan", ["-m", "megatron_adams.cli", "plan"]),
    ],
)
def test_command_line_page_has_every_option(section: str, command: list[str]) -> None:
    shown = subprocess.run(
        [sys.executable, *command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    arguments = re.findall(r"^  (--?[\w-]+(?:, --[\w-]+)?|source|destination)", shown, re.MULTILINE)
    options = {name for argument in arguments for name in argument.split(", ")} - {"-h", "--help"}
    assert options
    first_cells = PAGES["cli.md"].partition(section)[2].partition("\n## ")[0]
    cells = [row[0] for row in rows(first_cells)]
    documented = {name for cell in cells for name in re.findall(r"`(-{0,2}[\w-]+)", cell)}
    assert documented == options


def test_command_line_page_has_every_subcommand() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "megatron_adams.cli", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    commands = re.search(r"\{([\w,-]+)\}", shown)
    assert commands is not None
    headings = re.findall(r"^## megatron-adams (\w+)$", PAGES["cli.md"], re.MULTILINE)
    assert sorted(headings) == sorted(commands[1].split(","))


@pytest.mark.parametrize("name", ["minimal", "trainer"])
def test_examples_are_shown_as_they_are(name: str) -> None:
    script = (ROOT / "examples" / f"{name}.py").read_text("utf-8")
    assert f"```python\n{script}```\n" in PAGES["quickstart.md"]


@pytest.mark.parametrize(
    ("copy", "original"),
    [
        ("step.png", "benchmarks/results/step.png"),
        ("gpu-h100.png", "benchmarks/results/gpu-h100-80gb-hbm3.png"),
        ("quality.png", "examples/quality/results/quality.png"),
        ("quality-cpu.png", "examples/quality/results/cpu/quality.png"),
        ("quality-gpu-2.png", "examples/quality/results/gpu-2/quality.png"),
        ("quality-gpu-3.png", "examples/quality/results/gpu-3/quality.png"),
        ("lr_sweep.png", "examples/pretrain_gpt/sweep/lr_sweep.png"),
    ],
)
def test_pictures_are_those_of_the_measurements(copy: str, original: str) -> None:
    assert (DOCS / "images" / copy).read_bytes() == (ROOT / original).read_bytes()


def test_lines_are_narrow() -> None:
    for name, page in PAGES.items():
        assert [line for line in page.splitlines() if len(line) > 120] == [], name
        # What a page shows of a block of code without scrolling, on a wide screen.
        blocks = re.findall(r"^```\w+\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
        code = [line for block in blocks for line in block.splitlines()]
        assert [line for line in code if len(line) > 84] == [], name


# --- the site -----------------------------------------------------------------------------------


class _Links(HTMLParser):
    """Collects the ids, the links and the sources of a page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.navigation: set[str] = set()
        self.fetched: list[str] = []
        self.feed(page.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value}
        self.ids.update(given[name] for name in ("id", "name") if name in given)
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
            if "md-nav__link" in given.get("class", ""):
                self.navigation.add(given["href"].removeprefix("./"))
        elif tag == "link" and "href" in given:
            self.fetched.append(given["href"])
        elif "src" in given:
            self.fetched.append(given["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site, of copies: the build writes into the folder that it is in."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(DOCS, folder / "docs")
    shutil.copy(ROOT / "zensical.toml", folder)
    (folder / "megatron_adams").symlink_to(ROOT / "megatron_adams")
    built = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    # A docstring that the API page shows a part of only; the build itself does not stop at it.
    assert "Failed to get 'name: description' pair" not in built.stdout + built.stderr
    return folder / "build" / "docs"


def test_site_has_every_page_and_every_page_is_in_its_navigation(site: Path) -> None:
    navigation = _Links(site / "index.html").navigation
    for name in PAGES:
        assert (site / name).with_suffix(".html").exists(), name
        assert name.replace(".md", ".html") in navigation, name


def test_links_and_pictures_of_the_site_lead_somewhere(site: Path) -> None:
    pages = {page: _Links(page) for page in sorted(site.glob("*.html")) if page.stem != "404"}
    assert len(pages) == len(PAGES)
    dead = []
    for page, links in pages.items():
        for link in [*links.links, *links.fetched]:
            if link.startswith("https://"):
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / unquote(path)).resolve() if path else page
            target = target / "index.html" if target.is_dir() else target
            is_there = target.exists()
            if not is_there or (anchor and unquote(anchor) not in pages[target].ids):
                dead.append((page.name, link))
    assert not dead


def test_pages_fetch_nothing_from_elsewhere(site: Path) -> None:
    for page in site.glob("*.html"):
        assert [link for link in _Links(page).fetched if "://" in link] == [], page.name
    for sheet in [*site.rglob("*.css")]:
        assert not re.search(r"url\(\W?https?:", sheet.read_text("utf-8")), sheet.name


def test_api_page_has_every_public_name(site: Path) -> None:
    from megatron_adams import megatron

    ids = _Links(site / "api.html").ids
    text = (site / "api.html").read_text("utf-8")
    places = {
        # A package gives the names of its modules as its own.
        f"{module.__name__}.{name}": {
            f"{owner}.{name}"
            for owner in (each.__module__, each.__module__.rpartition(".")[0], module.__name__)
        }
        for module in (megatron_adams, megatron)
        for name in module.__all__
        if not isinstance(each := getattr(module, name), str)
    }
    assert {"megatron_adams.AdamS", "megatron_adams.megatron.AdamSOptimizerConfig"} <= set(places)
    assert not {name for name, either in places.items() if not either & ids}
    assert all(name in text for name in megatron_adams.__all__)
    public = {name for name in vars(megatron_adams.AdamS) if not name.startswith("_")}
    own = {name for name in public if callable(getattr(megatron_adams.AdamS, name))}
    assert not {name for name in own if f"megatron_adams.optimizer.AdamS.{name}" not in ids}
    for name in re.findall(r"^::: ([\w.]+)", PAGES["api.md"], re.MULTILINE):
        assert name in ids
