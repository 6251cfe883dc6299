"""Print constraints under which pip keeps what is installed, and pins the rest.

    python docker/constraints.py constraints.txt [--replace NAME ...] > merged.txt
    python docker/constraints.py --verify merged.txt

NVIDIA's container has its own torch, and a TransformerEngine and an Apex that are compiled against
it. `pip install megatron-core` is satisfied with that torch, but any package on the way can ask for
another one, or for another NumPy. The container names its versions in $PIP_CONSTRAINT, a file that
is empty in many releases. So the order here is:

1. what is installed, at its installed version,
2. the container's own constraints, for packages that it does not have,
3. constraints.txt, for all others.

pip then fails, and names the conflict, where it would have replaced a package. `--replace` takes a
name off the first two lists.
"""

import argparse
import importlib.metadata
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from pip._vendor.packaging.version import InvalidVersion, Version

# What is compiled against each other in the container.
COMPILED = ("apex", "flash-attn", "torch", "torchvision", "transformer-engine", "triton")
_OWN = "megatron-adams"


def normalized(name: str) -> str:
    """Return a distribution's name as pip compares it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed() -> dict[str, str]:
    """Return the version of each installed distribution, the first on sys.path, as pip sees it.

    A version that is not PEP 440's, as some of Debian's are, cannot stand in a constraint: that
    distribution is left out, with a line on stderr.
    """
    versions: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        name = normalized(distribution.metadata["Name"] or "")
        if not name or name in versions or name == _OWN:
            continue
        try:
            versions[name] = str(Version(distribution.version))
        except (InvalidVersion, TypeError):
            print(f"not kept: {name} {distribution.version}: not a version", file=sys.stderr)
    return versions


def read(path: Path) -> dict[str, str]:
    """Return the constraints of a file by normalized name."""
    lines = (line.partition("#")[0].strip() for line in path.read_text("utf-8").splitlines())
    return {normalized(re.split(r"[\s<>=!~;@\[]", line)[0]): line for line in lines if line}


def merge(constraints: Path, containers: Iterable[Path], replaced: Iterable[str]) -> list[str]:
    """Return the constraints' lines, in the order of precedence of this file's first lines.

    Raises:
        ValueError: `replaced` names a package that others are compiled against.
    """
    names = {normalized(name) for name in replaced}
    if wrong := sorted(names & set(COMPILED)):
        raise ValueError(
            f"{', '.join(wrong)}: must not be replaced, since the container's packages are "
            "compiled against each other; choose another BASE_IMAGE"
        )
    merged = read(constraints)
    for path in containers:
        merged |= {name: line for name, line in read(path).items() if name not in names}
    kept = {name: version for name, version in installed().items() if name not in names}
    merged |= {name: f"{name}=={version}" for name, version in kept.items()}
    return [merged[name] for name in sorted(merged)]


def changed(merged: Path) -> list[str]:
    """Return what is installed at another version than the merged constraints pin it at."""
    versions = installed()
    wrong = []
    for name, line in read(merged).items():
        pin = re.fullmatch(r"\S+?\s*==\s*([^\s;,*]+)", line)
        if pin and name in versions and Version(versions[name]) != Version(pin[1]):
            wrong.append(f"{name} {versions[name]} is installed: it was to be {pin[1]}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, help="constraints.txt, or what to verify")
    parser.add_argument("--replace", nargs="*", default=[], metavar="NAME")
    parser.add_argument("--verify", action="store_true")
    args = parser.parse_args()
    if args.verify:
        wrong = changed(args.file)
        for line in wrong:
            print(f"constraints.py: {line}", file=sys.stderr)
        return 1 if wrong else 0
    containers = [Path(path) for path in os.environ.get("PIP_CONSTRAINT", "").split()]
    try:
        print("\n".join(merge(args.file, containers, args.replace)))
    except (ValueError, OSError) as exc:
        print(f"constraints.py: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
