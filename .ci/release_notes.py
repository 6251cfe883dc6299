"""Print a tag's notes, which are its part of CHANGELOG.md: release_notes.py v0.1.0 REPOSITORY

REPOSITORY is the address of the repository's page: a release's page is not beside the files that
the changelog links to. It fails where the tag is not the package's version, or CHANGELOG.md has no
such part.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def notes(tag: str, changelog: str, package: str, repository: str) -> str:
    """Return the lines below the heading of the tag's version.

    Args:
        tag: "v" and the version.
        changelog: with a heading "## <version>" for each release, and anything behind it.
        package: the text of the module that has __version__.
        repository: the address that links to files begin with, as "https://host/owner/name".
    Raises:
        ValueError: the tag is that of another version, or the changelog does not have it.
    """
    version = tag.removeprefix("v")
    (own,) = re.findall(r'^__version__ = "(.+)"$', package, re.MULTILINE)
    if tag != f"v{own}":
        raise ValueError(f"tag {tag}: the package says {own}; tag v{own}, or change __version__")
    parts = re.split(r"^## (.+)$", changelog, flags=re.MULTILINE)[1:]
    for heading, text in zip(parts[::2], parts[1::2], strict=True):
        if heading.split()[0].strip("[]") == version:
            return re.sub(r"\]\((?![a-z]+:|#)", f"]({repository}/blob/{tag}/", text.strip())
    raise ValueError(f"tag {tag}: CHANGELOG.md has no part `## {version}`; name the release there")


def main(tag: str, repository: str) -> int:
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    package = (ROOT / "megatron_adams" / "__init__.py").read_text("utf-8")
    try:
        print(notes(tag, changelog, package, repository))
    except ValueError as exc:
        print(f"release_notes.py: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
