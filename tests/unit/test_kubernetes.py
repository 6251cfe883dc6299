"""The jobs for Kubernetes match their schemas, resume by themselves, and start the recipes."""

import copy
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

import megatron_adams

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "jobs" / "kubernetes"
Object = dict[str, Any]

# Kinds that kubernetes-validate knows nothing of, and their pydantic models.
MODELS = {
    "JobSet": "JobsetV1alpha2JobSet",
    "TrainingRuntime": "TrainerV1alpha1TrainingRuntime",
    "TrainJob": "TrainerV1alpha1TrainJob",
}
# What the API server requires, and the models make optional.
REQUIRED = {
    "JobSet": ("spec.replicatedJobs",),
    "TrainingRuntime": ("spec.template.spec.replicatedJobs",),
    "TrainJob": ("spec.runtimeRef.name",),
}
API_VERSIONS = {
    "JobSet": "jobset.x-k8s.io/v1alpha2",
    "TrainingRuntime": "trainer.kubeflow.org/v1alpha1",
    "TrainJob": "trainer.kubeflow.org/v1alpha1",
}


def objects(name: str) -> list[Object]:
    return list(yaml.safe_load_all((FOLDER / name).read_text("utf-8")))


def job_of(thing: Object) -> Object:
    """The Job that is in a JobSet's or a TrainingRuntime's only replicated job."""
    spec = thing["spec"]["template"]["spec"] if "template" in thing["spec"] else thing["spec"]
    (replicated,) = spec["replicatedJobs"]
    job = replicated["template"]
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": replicated["name"], **job.get("metadata", {})},
        "spec": job["spec"],
    }


def lost(given: Any, kept: Any, path: str = "") -> Iterator[str]:
    """The paths of what a model has dropped or changed."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for key, value in given.items():
            yield from lost(value, kept.get(key), f"{path}.{key}")
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        for index, value in enumerate(given):
            yield from lost(value, kept[index], f"{path}[{index}]")
    elif given != kept and str(given) != str(kept):  # 8 of nvidia.com/gpu becomes a quantity, "8"
        yield path


def check(thing: Object) -> None:
    """Raise ValueError, or a validator's own error, where an object is not one of its kind."""
    kind = thing["kind"]
    if kind not in MODELS:
        kubernetes_validate.validate(thing, "1.37", strict=True)
        return
    if thing["apiVersion"] != API_VERSIONS[kind] or "name" not in thing["metadata"]:
        raise ValueError(f"{kind}: {thing['apiVersion']}, {thing['metadata']}")
    for path in REQUIRED[kind]:
        value: Any = thing
        for key in path.split("."):
            value = value.get(key)
            if not value:
                raise ValueError(f"{kind}: {path} is missing")
    # A module of its own: the package imports all of its 200 models.
    model = getattr(importlib.import_module("kubeflow_trainer_api.models"), MODELS[kind])
    if dropped := list(lost(thing, model.from_dict(copy.deepcopy(thing)).to_dict())):
        raise ValueError(f"{kind}: unknown, or of another type: {', '.join(dropped)}")
    if kind != "TrainJob":
        kubernetes_validate.validate(job_of(thing), "1.37", strict=True)


FILES = sorted(path.name for path in FOLDER.glob("*.yaml"))
JOBS = [thing for name in FILES for thing in objects(name) if thing["kind"] in MODELS]
TEMPLATES = [thing for thing in JOBS if thing["kind"] != "TrainJob"]


def by_kind(thing: Object) -> str:
    return str(thing["kind"])


@pytest.mark.parametrize("name", FILES)
def test_every_object_matches_its_schema(name: str) -> None:
    for thing in objects(name):
        check(thing)


def renamed(thing: Object, path: str) -> Object:
    """A copy in which the last key of a path is misspelled."""
    copied = copy.deepcopy(thing)
    *parents, last = path.split(".")
    place: Any = copied
    for key in parents:
        place = place[int(key)] if key.isdecimal() else place[key]
    place[last + "x"] = place.pop(last)
    return copied


POD = "replicatedJobs.0.template.spec.template.spec"


@pytest.mark.parametrize(
    ("name", "index", "path"),
    [
        ("storage.yaml", 0, "spec.accessModes"),
        ("jobset.yaml", 0, "spec.failurePolicy"),
        ("jobset.yaml", 0, "spec.failurePolicy.rules.0.onJobFailureReasons"),
        ("jobset.yaml", 0, "spec.replicatedJobs"),
        ("jobset.yaml", 0, "spec.replicatedJobs.0.template.spec.podFailurePolicy.rules.0.action"),
        ("jobset.yaml", 0, f"spec.{POD}.terminationGracePeriodSeconds"),
        ("jobset.yaml", 0, f"spec.{POD}.containers.0.resources.limits"),
        ("trainjob.yaml", 0, "spec.mlPolicy.numNodes"),
        ("trainjob.yaml", 0, f"spec.template.spec.{POD}.initContainers.0.image"),
        ("trainjob.yaml", 0, f"spec.template.spec.{POD}.volumes.2.emptyDir.sizeLimit"),
        ("trainjob.yaml", 1, "spec.runtimeRef.name"),
        ("trainjob.yaml", 1, "spec.trainer.numProcPerNode"),
        ("trainjob.yaml", 1, "spec.trainer.resourcesPerNode.limits"),
    ],
)
def test_a_misspelled_field_is_found(name: str, index: int, path: str) -> None:
    thing = objects(name)[index]
    check(thing)
    with pytest.raises((ValueError, kubernetes_validate.ValidationError)):
        check(renamed(thing, path))


def test_a_kind_without_a_schema_is_found() -> None:
    claim = objects("storage.yaml")[0]
    with pytest.raises(kubernetes_validate.SchemaNotFoundError):
        check({**claim, "apiVersion": "v2"})


@pytest.mark.parametrize("thing", TEMPLATES, ids=by_kind)
def test_a_failed_pod_starts_the_whole_job_again(thing: Object) -> None:
    spec = thing["spec"]["template"]["spec"] if "template" in thing["spec"] else thing["spec"]
    job = job_of(thing)["spec"]
    assert spec["failurePolicy"]["maxRestarts"] > 0
    assert job["backoffLimit"] == 0
    # podFailurePolicy is for pods that the kubelet does not start again itself.
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    (rule,) = spec["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    (pod_rule,) = job["podFailurePolicy"]["rules"]
    assert pod_rule["action"] == "FailJob"
    assert [condition["type"] for condition in pod_rule["onPodConditions"]] == ["DisruptionTarget"]


@pytest.mark.parametrize("thing", TEMPLATES, ids=by_kind)
def test_a_pod_has_time_for_its_last_checkpoint(thing: Object) -> None:
    pod = job_of(thing)["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    environment = {each["name"]: each.get("value") for each in container["env"]}
    timeout_s = int(environment["PET_SHUTDOWN_TIMEOUT"])
    assert pod["terminationGracePeriodSeconds"] >= timeout_s + 60
    # A shell in between would not pass SIGTERM on.
    assert "command" not in container


@pytest.mark.parametrize("thing", TEMPLATES, ids=by_kind)
def test_pods_ask_the_doctor_first_and_run_without_privileges(thing: Object) -> None:
    pod = job_of(thing)["spec"]["template"]["spec"]
    (doctor,) = pod["initContainers"]
    num_gpus = doctor["resources"]["limits"]["nvidia.com/gpu"]
    assert doctor["args"] == ["megatron-adams", "doctor", f"--expect-gpus={num_gpus}"]
    assert num_gpus == train_job()["spec"]["trainer"]["numProcPerNode"]
    context = pod["securityContext"]
    assert context["runAsNonRoot"] is True
    for dockerfile in (ROOT / "docker").glob("*.Dockerfile"):
        assert f"\nUSER {context['runAsUser']}\n" in dockerfile.read_text("utf-8")
    for container in (doctor, *pod["containers"]):
        assert container["image"].endswith(f"/megatron-adams:{megatron_adams.__version__}-gpu")
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("thing", TEMPLATES, ids=by_kind)
def test_volumes_are_claimed_mounted_and_written_to(thing: Object) -> None:
    claims = {claim["metadata"]["name"]: claim for claim in objects("storage.yaml")}
    pod = job_of(thing)["spec"]["template"]["spec"]
    mounts = {mount["name"]: mount for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    for volume in pod["volumes"]:
        if "persistentVolumeClaim" in volume:
            claim = claims.pop(volume["persistentVolumeClaim"]["claimName"])
            assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
        else:
            assert volume["emptyDir"]["medium"] == "Memory"
            assert mounts[volume["name"]]["mountPath"] == "/dev/shm"
    assert not claims
    assert "readOnly" not in mounts["runs"]
    assert any(f"--out={mounts['runs']['mountPath']}/" in arg for arg in arguments(thing))
    assert any(f"--data={mounts['data']['mountPath']}/" in arg for arg in arguments(thing))


def train_job() -> Object:
    (thing,) = (thing for thing in JOBS if thing["kind"] == "TrainJob")
    return thing


def arguments(thing: Object) -> list[str]:
    """What the container of a job runs. A TrainingRuntime has it from its TrainJob."""
    if thing["kind"] == "TrainingRuntime":
        return list(train_job()["spec"]["trainer"]["args"])
    return list(job_of(thing)["spec"]["template"]["spec"]["containers"][0]["args"])


def torchrun_environment(thing: Object) -> dict[str, str]:
    """The PET_ variables of a job's second pod, as Kubernetes or Trainer sets them."""
    (container,) = job_of(thing)["spec"]["template"]["spec"]["containers"]
    given = {each["name"]: each.get("value", "1") for each in container["env"]}
    if thing["kind"] == "TrainingRuntime":
        trainer, name = train_job()["spec"]["trainer"], train_job()["metadata"]["name"]
        # Kubeflow Trainer, pkg/runtime/framework/plugins/torch/torch.go, EnforceMLPolicy.
        given |= {
            "PET_NNODES": str(trainer["numNodes"]),
            "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
            "PET_NODE_RANK": "1",
            "PET_MASTER_ADDR": f"{name}-node-0-0.{name}",
            "PET_MASTER_PORT": "29500",
        }
    return given


def test_the_runtime_of_the_train_job_is_there() -> None:
    (runtime,) = (thing for thing in JOBS if thing["kind"] == "TrainingRuntime")
    reference = train_job()["spec"]["runtimeRef"]
    assert reference["name"] == runtime["metadata"]["name"]
    assert reference["kind"] == runtime["kind"]
    # The names by which Trainer finds the container that it sets the arguments and variables of.
    job = job_of(runtime)
    assert job["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    assert job["metadata"]["name"] == job["spec"]["template"]["spec"]["containers"][0]["name"]
    assert job["metadata"]["name"] == "node"


def test_pods_of_the_jobset_find_the_first_one() -> None:
    (jobset,) = (thing for thing in JOBS if thing["kind"] == "JobSet")
    environment, job = torchrun_environment(jobset), job_of(jobset)["spec"]
    assert int(environment["PET_NNODES"]) == job["parallelism"] == job["completions"]
    assert job["completionMode"] == "Indexed"
    name = jobset["metadata"]["name"]
    assert environment["PET_MASTER_ADDR"] == f"{name}-node-0-0.{name}"
    (container,) = job["template"]["spec"]["containers"]
    ports = [str(port["containerPort"]) for port in container["ports"]]
    assert ports == [environment["PET_MASTER_PORT"]]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(
        environment["PET_NPROC_PER_NODE"]
    )


def test_the_recipe_takes_the_arguments_and_the_variables(tmp_path: Path) -> None:
    """With the volumes in a folder of this machine, and the second pod's variables."""
    jobset, runtime = sorted(TEMPLATES, key=by_kind)
    assert arguments(jobset) == arguments(runtime)
    assert torchrun_environment(jobset) == torchrun_environment(runtime)
    (tmp_path / "data" / "llama2").mkdir(parents=True)
    tokenizer = {
        "flags": {"tokenizer-type": "HuggingFaceTokenizer", "tokenizer-model": "tokenizer"}
    }
    record = json.dumps({"tokenizer": tokenizer})
    (tmp_path / "data" / "llama2" / "dataset.json").write_text(record, "utf-8")
    words = [re.sub("=/(data|runs)/", rf"={tmp_path}/\1/", word) for word in arguments(jobset)]
    assert words[0] == "python"
    own = {key: value for key, value in os.environ.items() if not key.startswith("PET_")}
    printed = subprocess.run(
        [sys.executable, *words[1:], "--print", "--no-plan"],
        cwd=ROOT,
        env={**own, **torchrun_environment(jobset)},
        capture_output=True,
        text=True,
    )
    assert printed.returncode == 0, printed.stderr
    command = shlex.split(printed.stdout.strip().splitlines()[-1])
    assert "--standalone" not in command  # several nodes, by the PET_ variables
    assert {"PET_NNODES=2", "PET_NODE_RANK=1"} <= set(command)
    assert "--exit-signal-handler" in command
    after = dict(pairwise(command))
    assert after["--optimizer"] == "adams"
    assert after["--save"] == after["--load"]
    assert after["--load"].startswith(f"{tmp_path}/runs/llama2-7b-adams")
