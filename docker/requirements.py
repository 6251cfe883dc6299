"""Print what the package needs, as pip requirements: pyproject.toml's dependencies and extras.

    python docker/requirements.py pyproject.toml recipes gpu

The image's dependencies are installed from this list, in a layer of their own: a change of the
package's code leaves the list, and so the layer, as it is.
"""

import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path


def requirements(project: dict, extras: Iterable[str]) -> list[str]:
    """Return the requirements of a [project] table and of its extras, without duplicates.

    An extra that names the project's own extras ("megatron-adams[recipes]") brings theirs.

    Raises:
        ValueError: an extra that the project does not have.
    """
    optional = project.get("optional-dependencies", {})
    found = dict.fromkeys(project["dependencies"])
    todo = list(extras)
    for extra in todo:
        if extra not in optional:
            raise ValueError(f"extra {extra}: must be one of {', '.join(sorted(optional))}")
        for requirement in optional[extra]:
            if own := re.fullmatch(rf"{re.escape(project['name'])}\[([\w,-]+)\]", requirement):
                todo += [name for name in own[1].split(",") if name not in todo]
            else:
                found[requirement] = None
    return list(found)


def main(argv: list[str]) -> int:
    path, *extras = argv
    project = tomllib.loads(Path(path).read_text("utf-8"))["project"]
    try:
        print("\n".join(requirements(project, extras)))
    except ValueError as exc:
        print(f"requirements.py: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
