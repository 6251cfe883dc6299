"""A release: the tag's notes, and what its workflow may do."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import megatron_adams

ROOT = Path(__file__).resolve().parents[2]
WORKFLOW = ROOT / ".github" / "workflows" / "release.yml"
SCRIPT = ROOT / ".ci" / "release_notes.py"
PAGE = "https://host/owner/name"
notes = runpy.run_path(str(SCRIPT))["notes"]

CHANGELOG = """# Changelog

## [Unreleased]

- next

## [1.2.0] - 2027-01-01

### Added

- this ([docs](docs/this.md#how), [format](https://keep/it), [below](#below))

## [1.1.0] - 2026-12-01

- before
"""


def package(version: str) -> str:
    return f'"""Doc."""\n\n__version__ = "{version}"\n'


def test_notes_of_a_tag_are_its_part_of_the_changelog() -> None:
    assert notes("v1.1.0", CHANGELOG, package("1.1.0"), PAGE) == "- before"


def test_links_of_the_notes_lead_to_the_tags_files() -> None:
    assert notes("v1.2.0", CHANGELOG, package("1.2.0"), PAGE) == (
        "### Added\n\n- this ([docs](https://host/owner/name/blob/v1.2.0/docs/this.md#how), "
        "[format](https://keep/it), [below](#below))"
    )


@pytest.mark.parametrize(
    ("tag", "version", "message"),
    [
        ("v1.2.0", "1.2.1", "tag v1.2.0: the package says 1.2.1; tag v1.2.1, or change"),
        ("1.2.0", "1.2.0", "tag 1.2.0: the package says 1.2.0; tag v1.2.0"),
        ("v1.3.0", "1.3.0", "CHANGELOG.md has no part `## 1.3.0`"),
    ],
)
def test_tag_that_fits_nothing_is_refused(tag: str, version: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        notes(tag, CHANGELOG, package(version), PAGE)


def test_real_changelog_and_package_are_read() -> None:
    """There is no part of the version yet: the release names it."""
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    text = (ROOT / "megatron_adams" / "__init__.py").read_text("utf-8")
    version = megatron_adams.__version__
    named = changelog.replace("## [Unreleased]", f"## [{version}]", 1)
    assert "### Added" in notes(f"v{version}", named, text, PAGE)


def test_script_ends_a_release_whose_tag_fits_nothing() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "v0", PAGE], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("release_notes.py: tag v0: the package says ")
    assert done.stdout == ""


def test_workflow_builds_by_make_and_publishes_without_a_password() -> None:
    workflow = yaml.safe_load(WORKFLOW.read_text("utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    jobs = workflow["jobs"]
    assert "make dist" in [step.get("run") for step in jobs["build"]["steps"]]
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert jobs["notes"]["permissions"] == {"contents": "write"}
    assert not [name for name in ("build", "try") if "permissions" in jobs[name]]
    # Each waits for the one before: what is published is what was tried.
    needs = [jobs[name]["needs"] for name in ("try", "publish", "notes")]
    assert needs == ["build", "try", "publish"]
    assert "secrets." not in WORKFLOW.read_text("utf-8")


def test_workflow_tries_each_python_that_the_package_names() -> None:
    tried = yaml.safe_load(WORKFLOW.read_text("utf-8"))["jobs"]["try"]["strategy"]["matrix"]
    named = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text("utf-8"))
    assert tried["python"] == named
