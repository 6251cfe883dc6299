"""Python, torch and the packages that a job needs: versions and what does not fit together.

Nothing is imported but torch: what importing Megatron shows, megatron.py asks in a process of its
own.
"""

import importlib.util
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement

import megatron_adams
from megatron_adams.doctor.gpus import Machine
from megatron_adams.doctor.report import Check, not_known, ok, problem, warning

_OWN = "megatron-adams"
# A job on Megatron and this command need these of the package's extras; "" is the package alone.
_EXTRAS = ("", "megatron", "tools")
# Distributions of a name and what of them is listed; the first that is installed.
_LISTED = {
    "megatron-core": ("megatron-core",),
    "transformer-engine": ("transformer-engine", "transformer-engine-torch"),
    "apex": ("apex",),
    "cuda-bindings": ("cuda-bindings",),
    "nvidia-ml-py": ("nvidia-ml-py",),
}


@dataclass(frozen=True)
class Versions:
    """None: not installed, or not by pip.

    Attributes:
        torch_cuda: the CUDA version that torch is built for.
        packages: the others, by name.
    """

    python: str
    torch: str
    torch_cuda: str | None
    own: str
    packages: dict[str, str | None]

    def facts(self) -> dict[str, Any]:
        """For --json."""
        return {
            "python": self.python,
            "torch": self.torch,
            "torch-cuda": self.torch_cuda,
            _OWN: self.own,
            **self.packages,
        }


def versions() -> Versions:
    """What is installed."""
    return Versions(
        python=platform.python_version(),
        torch=str(torch.__version__),
        torch_cuda=torch.version.cuda,
        own=megatron_adams.__version__,
        packages={
            name: next(filter(None, map(_version, names)), None) for name, names in _LISTED.items()
        },
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check(found: Versions, machine: Machine | None, *, for_gpu: bool) -> Iterator[Check]:
    """Judge what is installed.

    Args:
        machine: the GPUs; None where NVML does not answer.
        for_gpu: False: for a rehearsal on CPU processes.
    """
    yield ok("software.python", f"Python {found.python}, {_OWN} {found.own}")
    yield from _torch_checks(found, machine, for_gpu=for_gpu)
    yield from _requirement_checks()
    yield _of_transformer_engine(found, for_gpu=for_gpu)
    yield _of_apex(found)
    if _version("adams") is not None:
        yield warning(
            "software.adams",
            f"the package adams {_version('adams')} is installed, which is not this one ({_OWN})",
            "pip uninstall adams, unless something else needs it",
        )


def _torch_checks(found: Versions, machine: Machine | None, *, for_gpu: bool) -> Iterator[Check]:
    name = "software.torch"
    cuda = "without CUDA" if found.torch_cuda is None else f"for CUDA {found.torch_cuda}"
    words = f"torch {found.torch} {cuda}"
    if not for_gpu:
        yield ok(name, words)
        return
    if found.torch_cuda is None:
        yield problem(
            name, f"{words}: it uses no GPU", "install a CUDA build of torch (pytorch.org)"
        )
        return
    yield ok(name, words)
    if machine is None or not machine.archs:
        return
    built_for = compiled_archs()
    lacking = [arch for arch in machine.archs if not runs_on(arch, built_for)]
    words = f"torch has code for {', '.join(built_for)}"
    if lacking:
        yield problem(
            "software.torch-archs",
            f"{words}, and none for {', '.join(lacking)}: 'no kernel image is available'",
            "install a torch whose CUDA build has it (newer GPUs need a newer one, older GPUs an "
            "older one)",
        )
    else:
        yield ok("software.torch-archs", f"{words}: runs on {', '.join(machine.archs)}")


def compiled_archs() -> tuple[str, ...]:
    """What torch's CUDA code is compiled for, as ("sm_80", "sm_90", "compute_90")."""
    # torch.cuda.get_arch_list is this, but asks for a GPU before, in the older of the supported
    # versions, which initializes CUDA.
    flags = torch._C._cuda_getArchFlags() if torch.version.cuda else None
    return tuple((flags or "").split())


def runs_on(arch: str, built_for: tuple[str, ...]) -> bool:
    """Whether a GPU runs code of one of these: of its own major version, or PTX of any older one.

    Args:
        arch: of the GPU, as "sm_86".
        built_for: as `compiled_archs`; "sm_90a" is of its own GPU alone.
    """
    own = _number(arch)
    for built in built_for:
        kind, _, digits = built.partition("_")
        if not digits.isdecimal():
            if built.rstrip("af") == arch:
                return True
            continue
        number = int(digits)
        if number <= own and (kind == "compute" or number // 10 == own // 10):
            return True
    return False


def _number(arch: str) -> int:
    return int(arch.partition("_")[2])


def _requirement_checks() -> Iterator[Check]:
    """The versions that this package and its extras need, by what pip knows of it."""
    try:
        texts = metadata.requires(_OWN) or []
    except metadata.PackageNotFoundError:
        yield not_known(
            "software.requirements",
            f"{_OWN} is not installed by pip: which versions it needs is not known",
            f"pip install {_OWN}, or pip install -e . in its folder",
        )
        return
    lacking = []
    for text in texts:
        needed = Requirement(text)
        if needed.marker and not any(needed.marker.evaluate({"extra": e}) for e in _EXTRAS):
            continue
        version = _version(needed.name)
        if version is None and _is_importable(needed.name):
            continue  # from a checkout on PYTHONPATH: importing it will show
        # A container's torch calls itself a pre-release (2.9.0a0+...), which packaging before 26
        # would leave out.
        if version is None or not needed.specifier.contains(version, prereleases=True):
            lacking.append(f"{needed.name} {version or 'missing'}, needed {needed.specifier}")
    if lacking:
        yield problem(
            "software.requirements",
            "; ".join(lacking),
            f"pip install -U {_OWN}, or the named versions (a container: build it again)",
        )
    else:
        yield ok("software.requirements", "versions are those that this package needs")


def _is_importable(distribution: str) -> bool:
    module = distribution.replace("-", ".", 1) if distribution.startswith("megatron") else None
    return module is not None and importlib.util.find_spec(module) is not None


def _of_transformer_engine(found: Versions, *, for_gpu: bool) -> Check:
    name = "software.transformer-engine"
    if importlib.util.find_spec("transformer_engine") is not None:
        version = found.packages["transformer-engine"] or "of unknown version"
        return ok(name, f"TransformerEngine {version}")
    if not for_gpu:
        return ok(name, "no TransformerEngine, which a rehearsal does not need")
    return warning(
        name,
        "no TransformerEngine: Megatron's default layers and FP8 need it",
        "pip install 'megatron-adams[te]', use NVIDIA's PyTorch container, or give "
        "--transformer-impl local",
    )


def _of_apex(found: Versions) -> Check:
    name = "software.apex"
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return ok(name, "no Apex, which is not needed")
    version = found.packages["apex"] or "of unknown version"
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not any((folder / "normalization").is_dir() for folder in folders):
        # PyPI's apex is a toolkit for web applications. Megatron looks for the name alone.
        return problem(
            name,
            f"the package apex {version} is not NVIDIA's Apex: Megatron would take it for that",
            "pip uninstall apex; NVIDIA's is built from github.com/NVIDIA/apex",
        )
    return ok(name, f"Apex {version}")
