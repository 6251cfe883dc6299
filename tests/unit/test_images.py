"""The container images' install steps, run outside of Docker; what the Dockerfiles say.

The steps run in environments that look to pip like NVIDIA's container: a folder of links to what is
installed here, with a torch of NVIDIA's version, and no package index.
"""

import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from packaging.requirements import Requirement

import megatron_adams

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
SITE_PACKAGES = Path(sysconfig.get_path("purelib"))

# The version that the 26.08 release of NVIDIA's container has. No index has it.
NVIDIAS_TORCH = "2.14.0a0+4fdf77b940.nv26.8.63802676"
# What the container lacks, in these tests: pip finds it in a folder of wheels.
TO_INSTALL = ("aniso8601", "Flask-RESTful", "megatron-core", "pytz")
NORMALIZED = {re.sub("[-_.]+", "_", name).lower() for name in (*TO_INSTALL, "megatron-adams")}


# --- the Dockerfiles ------------------------------------------------------------------------------


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile, each as its name and the rest, on one line."""
    lines = [line for line in dockerfile.read_text("utf-8").splitlines() if line[:1] != "#"]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [
        (name, " ".join(rest.split()))
        for name, _, rest in (line.partition(" ") for line in joined.splitlines() if line.strip())
    ]


def of(dockerfile: Path, name: str) -> list[str]:
    return [rest for each, rest in instructions(dockerfile) if each == name]


pytest_images = pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)


@pytest_images
def test_every_install_step_is_a_script(dockerfile: Path) -> None:
    steps = [
        step
        for run in of(dockerfile, "RUN")
        for step in re.sub(r"--mount=\S+ ", "", run).split(" && ")
    ]
    assert len(steps) > 4
    for step in steps:
        if step == "python -m venv /opt/venv":
            continue
        script = DOCKER / Path(step.split()[0]).name
        assert os.access(script, os.X_OK), step


@pytest_images
def test_base_images_are_pinned_by_digest(dockerfile: Path) -> None:
    (base,) = (arg for arg in of(dockerfile, "ARG") if arg.startswith("BASE_IMAGE="))
    assert re.search(r":\d[\w.-]+@sha256:[0-9a-f]{64}$", base)
    assert {image.split()[0] for image in of(dockerfile, "FROM")} == {"${BASE_IMAGE}", "scratch"}


@pytest_images
def test_image_runs_as_a_user_and_asks_the_doctor(dockerfile: Path) -> None:
    (user,) = of(dockerfile, "USER")
    (created,) = re.findall(r"create-user\.sh \w+ (\d+)", dockerfile.read_text("utf-8"))
    assert user == created != "0"
    doctor = ["megatron-adams", "doctor"]
    rehearsal = ["--cpu-rehearsal"] if dockerfile.stem == "cpu" else []
    (command,) = of(dockerfile, "CMD")
    assert json.loads(command) == doctor + rehearsal
    (health,) = of(dockerfile, "HEALTHCHECK")
    check = json.loads(health.partition("CMD ")[2])
    # A container that is asked for its health runs a job.
    assert check == [*doctor, "--quick", *(rehearsal or ["--while-running"])]


@pytest_images
def test_jobs_look_for_kernels_where_they_were_compiled(dockerfile: Path) -> None:
    text = dockerfile.read_text("utf-8")
    (folder,) = re.findall(r"install-kernels\.sh (\S+)", text)
    assert f"MEGATRON_ADAMS_CACHE_DIR={folder}\n" in text


@pytest_images
def test_labels_come_last_so_that_a_commit_leaves_the_layers(dockerfile: Path) -> None:
    names = [name for name, _ in instructions(dockerfile)]
    assert names[-4:] == ["ARG", "ARG", "ARG", "LABEL"]
    (label,) = of(dockerfile, "LABEL")
    for key in ("version", "revision", "created"):
        assert f'org.opencontainers.image.{key}="${{{key.upper()}}}"' in label


def test_images_are_built_of_what_is_in_their_context_and_nothing_else_is() -> None:
    first, *rules = [
        line for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line[:1] != "#"
    ]
    assert first == "*"
    admitted = {rule.removeprefix("!") for rule in rules if rule[:1] == "!"}
    copied = {
        source
        for dockerfile in DOCKERFILES
        for copy in of(dockerfile, "COPY")
        if not copy.startswith("--from")
        for source in copy.split()[:-1]
    }
    assert all(list(ROOT.glob(source.rstrip("/"))) for source in copied)
    assert {source.partition("/")[0] for source in copied} == admitted


def test_the_containers_torch_is_one_that_the_package_admits() -> None:
    text = (DOCKER / "gpu.Dockerfile").read_text("utf-8")
    (stated,) = re.findall(r"^# PyTorch (\S+), CUDA", text, re.MULTILINE)
    assert NVIDIAS_TORCH.startswith(stated)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    (torch,) = (each for each in map(Requirement, project["dependencies"]) if each.name == "torch")
    assert torch.specifier.contains(NVIDIAS_TORCH, prereleases=True)


# --- build.sh -------------------------------------------------------------------------------------


def build(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [DOCKER / "build.sh", *words],
        cwd="/",
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_build_labels_the_image_with_version_commit_and_date() -> None:
    command = build(
        "gpu", "--tool", "docker", "--print", "--", "--pull", SOURCE_DATE_EPOCH="1767225600"
    ).stdout.split()
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    version = megatron_adams.__version__
    assert command[:2] == ["docker", "build"]
    assert {f"VERSION={version}", "CREATED=2026-01-01T00:00:00Z", "--pull"} <= set(command)
    assert {f"REVISION={head}", f"REVISION={head}-dirty"} & set(command)
    assert f"megatron-adams:{version}-gpu" in command
    assert "SOURCE_DATE_EPOCH=1767225600" in command
    assert "docker/gpu.Dockerfile" in command


@pytest.mark.parametrize("tool", ["buildah", "podman"])
def test_build_keeps_the_health_check_with_other_tools(tool: str) -> None:
    """An image in the OCI format, which is what they build by default, has none."""
    command = build("cpu", "--tool", tool, "--tag", "mine:1", "--print").stdout
    assert command.startswith(f"{tool} build --format docker ")
    assert "--tag mine:1 " in command
    assert "--file docker/cpu.Dockerfile " in command


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "give gpu or cpu"),
        (["tpu"], "tpu: must be gpu, cpu or an option"),
        (["cpu", "--tool", "kaniko"], "--tool kaniko: must be docker, podman or buildah"),
        (["cpu", "--tag"], "--tag: needs a value"),
    ],
)
def test_build_says_what_is_wrong(words: list[str], error: str) -> None:
    built = build(*words)
    assert built.returncode == 2
    assert error in built.stderr


def test_build_without_a_tool_says_which_to_install(tmp_path: Path) -> None:
    for name in ("bash", "dirname", "env"):
        (tmp_path / name).symlink_to(shutil.which(name) or "")
    built = build("cpu", PATH=str(tmp_path))
    assert built.returncode == 2
    assert "none of docker, podman and buildah is on PATH" in built.stderr


# --- the install steps ----------------------------------------------------------------------------


class Container(NamedTuple):
    """An environment that has what NVIDIA's container has, to pip's eyes."""

    folder: Path
    wheels: Path

    @property
    def site_packages(self) -> Path:
        return self.folder / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"

    def run(self, script: str, *words: object, **environment: str) -> str:
        """Run a step; AssertionError with its output if it fails."""
        done = self.try_to_run(script, *words, **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def try_to_run(
        self, script: str, *words: object, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        own = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("PIP_", "PYTHON", "MEGATRON_ADAMS"))
        }
        return subprocess.run(
            [DOCKER / script, *map(str, words)],
            cwd="/",
            env={
                **own,
                "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
                "PIP_CONFIG_FILE": "/dev/null",
                "PIP_NO_INDEX": "1",
                "PIP_FIND_LINKS": str(self.wheels),
                **environment,
            },
            capture_output=True,
            text=True,
        )

    def installed(self) -> dict[str, str]:
        """What pip has installed here, beside what was there."""
        found = metadata.distributions(path=[str(self.site_packages)])
        return {
            re.sub("[-_.]+", "-", each.metadata["Name"]).lower(): each.version for each in found
        }


def write_wheel(folder: Path, name: str, version: str, *requires: str) -> None:
    """A wheel without any code."""
    info = f"{name}-{version}.dist-info"
    lines = "".join(f"Requires-Dist: {each}\n" for each in requires)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{lines}"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


def repack(folder: Path, name: str) -> None:
    """The wheel of a distribution that is installed here."""
    distribution = metadata.distribution(name)
    tag = re.findall(r"^Tag: (\S+)", distribution.read_text("WHEEL") or "", re.MULTILINE)[-1]
    stem = f"{re.sub('[-_.]+', '_', name)}-{distribution.version}"
    with zipfile.ZipFile(folder / f"{stem}-{tag}.whl", "w") as wheel:
        for file in distribution.files or []:
            if ".." not in file.parts and file.suffix != ".pyc":
                wheel.write(file.locate(), str(file))


def make_container(folder: Path, wheels: Path, *, without: str = "") -> Container:
    """Links to everything that is installed here but TO_INSTALL and `without`."""
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", folder / "environment"], check=True
    )
    container = Container(folder / "environment", wheels)
    there = folder / "container"
    there.mkdir()
    left_out = NORMALIZED | {"torch", without}
    for entry in SITE_PACKAGES.iterdir():
        stem = re.sub("[-_.]+", "_", re.sub(r"-\d.*", "", entry.name)).lower()
        # Packages without a folder of their distribution's name stay: pip looks at dist-info alone.
        if (
            entry.suffix in (".dist-info", ".pth")
            and stem.removeprefix("__editable___") in left_out
        ):
            continue
        if entry.suffix != ".pth" and not entry.name.startswith(("megatron", "__editable__")):
            (there / entry.name).symlink_to(entry)
    if without != "torch":
        info = there / f"torch-{NVIDIAS_TORCH}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: torch\nVersion: {NVIDIAS_TORCH}\n", "utf-8"
        )
    (container.site_packages / "container.pth").write_text(f"{there}\n", "utf-8")
    return container


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pip finds: TO_INSTALL, newer releases, a package that wants another torch."""
    folder = tmp_path_factory.mktemp("wheels")
    for name in (*TO_INSTALL, "setuptools"):
        repack(folder, name)
    pinned = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text("utf-8"), re.M)
    assert pinned is not None
    write_wheel(folder, "torch", pinned[1])
    write_wheel(folder, "wants_torch", "1.0", f"torch=={pinned[1]}")
    write_wheel(folder, "aniso8601", "99.0")
    write_wheel(folder, "only_here", "1.0")
    write_wheel(folder, "only_here", "2.0")
    write_wheel(folder, "setuptools", "999.0")
    return folder


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What build-wheel.sh makes."""
    return build_wheel(ROOT, tmp_path_factory.mktemp("dist"), "--no-build-isolation")


@pytest.fixture(scope="module")
def container(tmp_path_factory: pytest.TempPathFactory, wheels: Path) -> Container:
    return make_container(tmp_path_factory.mktemp("nvidia"), wheels)


def build_wheel(root: Path, out: Path, *options: str, umask: int = -1, **environment: str) -> Path:
    subprocess.run(
        [root / "docker" / "build-wheel.sh", out, "recipes", *options],
        cwd="/",
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            **environment,
        },
        umask=umask,
        check=True,
    )
    return out


def test_wheel_follows_from_the_sources_alone(dist: Path, wheels: Path, tmp_path: Path) -> None:
    """Not from the time, the builder's umask, or the newest setuptools."""
    copied = tmp_path / "checkout"
    copied.mkdir()
    for name in ("docker", "megatron_adams"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, copied / name, ignore=ignored, copy_function=shutil.copyfile)
    single = "pyproject.toml setup.py megatron-adams.pth constraints.txt README.md LICENSE"
    for name in single.split():
        shutil.copyfile(ROOT / name, copied / name)
    for file in (copied / "docker").glob("*.sh"):
        file.chmod(0o700)
    os.utime(copied / "megatron_adams" / "cli.py", (1e9, 1e9))
    again = build_wheel(
        copied,
        tmp_path / "dist",
        umask=0o077,
        PIP_CONFIG_FILE="/dev/null",
        PIP_NO_INDEX="1",
        PIP_FIND_LINKS=str(wheels),
    )
    (one,), (other,) = dist.glob("*.whl"), again.glob("*.whl")
    assert one.name == other.name
    assert hashlib.sha256(one.read_bytes()).digest() == hashlib.sha256(other.read_bytes()).digest()


def test_requirements_are_those_of_the_wheel_and_its_extra(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    (info,) = (path for path in zipfile.Path(wheel).iterdir() if path.name.endswith(".dist-info"))
    required = map(Requirement, metadata.PathDistribution(info).requires or [])
    listed = set(map(Requirement, (dist / "requirements.txt").read_text("utf-8").splitlines()))
    assert len(listed) > 5
    extras = ("recipes", "megatron", "tools")  # the first brings the others
    assert {(each.name, each.specifier) for each in listed} == {
        (each.name, each.specifier)
        for each in required
        if each.name != "megatron-adams"
        and (each.marker is None or any(each.marker.evaluate({"extra": e}) for e in extras))
    }


def test_unknown_extra_is_refused() -> None:
    refused = subprocess.run(
        [sys.executable, DOCKER / "requirements.py", ROOT / "pyproject.toml", "gpus"],
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 1
    assert "extra gpus: must be one of " in refused.stderr


def test_requirements_are_installed_and_nvidias_torch_stays(
    container: Container, dist: Path, tmp_path: Path
) -> None:
    """The container's own constraints come before constraints.txt, and both before the newest."""
    own = tmp_path / "constraint.txt"
    own.write_text("only-here==1.0  # of the container\n", "utf-8")
    container.run(
        "install-requirements.sh",
        dist / "requirements.txt",
        ROOT / "constraints.txt",
        "only-here",
        PIP_CONSTRAINT=str(own),
    )
    assert container.installed() == {
        **{name.lower(): metadata.version(name) for name in TO_INSTALL},
        "only-here": "1.0",
    }


def test_a_package_that_wants_another_torch_is_not_installed(
    container: Container, tmp_path: Path
) -> None:
    (tmp_path / "requirements.txt").write_text("wants-torch\n", "utf-8")
    failed = container.try_to_run(
        "install-requirements.sh", tmp_path / "requirements.txt", ROOT / "constraints.txt"
    )
    assert failed.returncode != 0
    assert "wants-torch 1.0 depends on torch==" in failed.stdout
    assert f"The user requested (constraint) torch=={NVIDIAS_TORCH}" in failed.stdout
    assert not {"torch", "wants-torch"} & container.installed().keys()


def constraints(container: Container, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [container.folder / "bin" / "python", DOCKER / "constraints.py", *map(str, words)],
        capture_output=True,
        text=True,
    )


def test_a_package_may_be_exchanged_by_name(container: Container) -> None:
    here = metadata.version("packaging")
    pinned = constraints(container, ROOT / "constraints.txt").stdout.splitlines()
    assert f"packaging=={here}" in pinned
    (container.folder / "fewer.txt").write_text("packaging==99.0\n", "utf-8")
    kept = constraints(container, container.folder / "fewer.txt").stdout.splitlines()
    assert f"packaging=={here}" in kept
    replaced = constraints(container, container.folder / "fewer.txt", "--replace", "Packaging")
    assert "packaging==99.0" in replaced.stdout.splitlines()


def test_what_is_compiled_against_each_other_is_never_exchanged(container: Container) -> None:
    refused = constraints(container, ROOT / "constraints.txt", "--replace", "torch", "einops")
    assert refused.returncode == 1
    assert "torch: must not be replaced" in refused.stderr
    assert not refused.stdout


def test_an_exchanged_package_is_found_afterwards(container: Container, tmp_path: Path) -> None:
    merged = tmp_path / "merged.txt"
    merged.write_text(f"torch=={NVIDIAS_TORCH}\nnumpy>=1\n", "utf-8")
    assert constraints(container, "--verify", merged).returncode == 0
    merged.write_text("torch==2.14.1\nnumpy>=1\n", "utf-8")
    found = constraints(container, "--verify", merged)
    assert found.returncode == 1
    assert f"torch {NVIDIAS_TORCH} is installed: it was to be 2.14.1" in found.stderr


def test_an_installation_that_exchanges_torch_fails(container: Container, tmp_path: Path) -> None:
    """With a pip that does it, whatever the constraints say."""
    exchanged = container.site_packages / "torch-2.14.1.dist-info"
    (tmp_path / "python").write_text(
        "#!/bin/sh\n"
        f'case "$*" in *"-m pip"*) mkdir {exchanged} && '
        f'printf "Name: torch\\nVersion: 2.14.1\\n" >{exchanged}/METADATA ;;\n'
        f'*) exec {container.folder}/bin/python "$@" ;;\nesac\n',
        "utf-8",
    )
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "requirements.txt").touch()
    failed = container.try_to_run(
        "install-requirements.sh",
        tmp_path / "requirements.txt",
        ROOT / "constraints.txt",
        PATH=f"{tmp_path}:{os.environ['PATH']}",
    )
    shutil.rmtree(exchanged)
    assert failed.returncode != 0
    assert f"torch 2.14.1 is installed: it was to be {NVIDIAS_TORCH}" in failed.stderr


def test_plugin_and_kernels_are_installed_for_all_users(container: Container, dist: Path) -> None:
    container.run("install-plugin.sh", dist)
    assert container.installed()["megatron-adams"] == megatron_adams.__version__
    kernels = container.folder / "opt" / "kernels"
    container.run("install-kernels.sh", kernels, "sm_90 host", "g32-pb16-m32-w32")
    names = [path.name for path in kernels.iterdir() if path.name[0] != "."]
    for mode in ("g32-pb16-m32-w32.", "g32-pb16-m32-w32-rms."):
        assert len([name for name in names if name.startswith(mode)]) == 2, names
    assert [name for name in names if ".sm_90." in name]
    for path in (kernels, *(kernels / name for name in names)):
        assert stat.S_IMODE(path.stat().st_mode) & 0o044 == 0o044
        assert stat.S_IMODE(path.stat().st_mode) & 0o022 == 0


def test_cpu_image_gets_torchs_cpu_build_and_keeps_it(
    tmp_path: Path, wheels: Path, dist: Path
) -> None:
    """From an index that has nothing else."""
    version = re.findall(
        r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE
    )[0]
    index = tmp_path / "index" / "torch"
    index.mkdir(parents=True)
    write_wheel(index, "torch", f"{version}+cpu", "not-in-this-index")
    (index / "index.html").write_text(
        "".join(f'<a href="{path.name}">{path.name}</a>' for path in index.glob("*.whl")), "utf-8"
    )
    bare = make_container(tmp_path, wheels, without="torch")
    bare.run(
        "install-torch-cpu.sh",
        ROOT / "constraints.txt",
        f"file://{index.parent}",
        PIP_NO_INDEX="0",
        PIP_FIND_LINKS="",
    )
    assert bare.installed() == {"torch": f"{version}+cpu"}
    kept = constraints(bare, ROOT / "constraints.txt").stdout.splitlines()
    assert f"torch=={version}+cpu" in kept
    # The wheel alone: what it needs, pip would find.
    bare.run("install-plugin.sh", dist)
    assert bare.installed().keys() == {"torch", "megatron-adams"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root creates users")
def test_user_is_created_with_a_home_folder(tmp_path: Path) -> None:
    for name in ("passwd", "group", "shadow", "gshadow", "login.defs"):
        (tmp_path / "etc").mkdir(exist_ok=True)
        shutil.copy(f"/etc/{name}", tmp_path / "etc" / name)
    (tmp_path / "home").mkdir()
    subprocess.run(
        [DOCKER / "create-user.sh", "megatron", "10001", "--prefix", tmp_path],
        check=True,
        capture_output=True,
    )
    users = (tmp_path / "etc" / "passwd").read_text("utf-8").splitlines()
    assert "megatron:x:10001:10001::/home/megatron:/bin/bash" in users
    assert (tmp_path / "home" / "megatron").stat().st_uid == 10001


@pytest.mark.skipif(not shutil.which("apt-get"), reason="no apt-get: not a Debian machine")
def test_packages_are_installed_and_their_lists_removed(tmp_path: Path) -> None:
    """With apt's own simulation, without sources, and with lists in another folder."""
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "old").touch()
    (tmp_path / "apt.conf").write_text(
        'APT::Get::Simulate "true";\n'
        'Dir::Etc::sourcelist "/dev/null";\nDir::Etc::sourceparts "/dev/null";\n'
        f'Dir::State::lists "{lists}";\nDir::Cache "{tmp_path}";\n',
        "utf-8",
    )

    def install(package: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [DOCKER / "install-packages.sh", package],
            env={**os.environ, "APT_CONFIG": str(tmp_path / "apt.conf")},
            capture_output=True,
            text=True,
        )

    assert (done := install("bash")).returncode == 0, done.stderr
    assert not list(lists.iterdir())
    (lists / "old").touch()
    assert "no-such-package" in (failed := install("no-such-package")).stderr
    assert failed.returncode != 0


# --- GitHub's workflows ---------------------------------------------------------------------------

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_workflows_match_githubs_schema() -> None:
    subprocess.run(
        [
            *(sys.executable, "-m", "check_jsonschema"),
            *("--builtin-schema", "vendor.github-workflows", *WORKFLOWS),
        ],
        check=True,
    )


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_of_workflows_are_pinned_and_a_checkout_keeps_no_credentials(path: Path) -> None:
    used = re.findall(r"uses: (\S+)(.*)", path.read_text("utf-8"))
    assert used
    for action, comment in used:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action)
        assert re.fullmatch(r" # v\d+\.\d+\.\d+", comment)
    for job in yaml.safe_load(path.read_text("utf-8"))["jobs"].values():
        assert job["timeout-minutes"] > 0
        for step in job["steps"]:
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"] == {"persist-credentials": False}


@pytest.mark.parametrize(
    "path",
    [path for path in WORKFLOWS if path.stem != "release"],  # test_release.py
    ids=lambda path: path.stem,
)
def test_workflow_runs_a_make_target_with_read_access_alone(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text("utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    (job,) = workflow["jobs"].values()
    steps = job["steps"]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    commands = [step["run"] for step in steps if "run" in step]
    if path.stem == "megatron-main":  # it makes a wheel of Megatron first
        assert commands[0] == "make setup"
        assert commands[-1].startswith("make test-versions MEGATRON=")
        assert {"setup", "test-versions"} < {*targets}
    else:
        assert commands == [f"make {path.stem}"]
        assert path.stem in targets
