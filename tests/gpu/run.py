"""All GPU tests and the benchmark on a borrowed machine, and one table of what came of it.

    python tests/gpu/run.py [folder for logs and the benchmark's results]

It needs torch with CUDA, pytest and cuda.bindings and cuda.core, but no network, and installs
nothing. Exits with 1 if a test failed, or nothing could be run.
"""

import importlib.util
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).parents[2]
_MODULES = {
    "torch": "a CUDA build of PyTorch",
    "pytest": "it runs the tests",
    "cuda.bindings": "it launches the kernel; pip install cuda-bindings",
    "cuda.core": "it compiles the kernel; pip install cuda-core",
}


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that the module is in
        return False


def _describe() -> list[tuple[str, str]]:
    import torch

    from megatron_adams.kernels.compile import CompileError, nvrtc_version

    rows = [
        (f"device {i}", torch.cuda.get_device_name(i)) for i in range(torch.cuda.device_count())
    ]
    rows.append(("torch", f"{torch.__version__}, CUDA {torch.version.cuda}"))
    try:
        smi = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(smi, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown: no nvidia-smi"
    rows.append(("driver", driver))
    try:
        rows.append(("NVRTC", nvrtc_version()))
    except CompileError as error:
        rows.append(("NVRTC", f"missing: {error}"))
    return rows


def _test(file: Path, folder: Path, environment: dict[str, str]) -> tuple[str, bool]:
    """Run a file's tests; return its counts, and whether it is without failures."""
    report = folder / f"{file.stem}.xml"
    report.unlink(missing_ok=True)
    # Without the plugins and the options of pyproject.toml, which may not be installed.
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rs",
        "-c",
        os.devnull,
        "--rootdir",
        str(ROOT),
    ]
    with (folder / f"{file.stem}.log").open("w") as log:
        done = subprocess.run(
            [*command, f"--junitxml={report}", str(file)],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if not report.exists():
        return f"did not start, exit code {done.returncode}: see {log.name}", False
    suite = next(ElementTree.parse(report).iter("testsuite"))
    total, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
    failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    counts = f"{total - skipped - failed} passed, {failed} failed, {skipped} not run"
    for reason in sorted({skip.get("message", "") for skip in suite.iter("skipped")}):
        counts += f" ({reason.removeprefix('not run: ')})"
    return counts, done.returncode == 0


def main() -> int:
    sys.path.insert(0, str(ROOT))
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "gpu-results").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", ""))),
    }
    missing = [name for name in _MODULES if not _is_there(name)]
    rows = [(f"missing: {name}", _MODULES[name]) for name in missing]
    if "torch" not in missing:
        import torch

        if not torch.cuda.is_available():
            missing.append("GPU")
            rows.append(("missing: GPU", "torch.cuda.is_available() is False"))
        rows += _describe()
    succeeded = not missing
    benchmark = "not run"
    if not missing:
        for file in sorted(Path(__file__).parent.glob("test_*.py")):
            counts, is_sound = _test(file, folder, environment)
            rows.append((str(file.relative_to(ROOT)), counts))
            succeeded = succeeded and is_sound
        command = [sys.executable, str(ROOT / "benchmarks/step.py"), "--out", str(folder)]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        succeeded = succeeded and done.returncode == 0
        rows.append(("benchmarks/step.py", f"exit code {done.returncode}, results in {folder}"))
        benchmark = done.stdout if done.returncode == 0 else done.stdout + done.stderr
    print("| what | result |\n| --- | --- |")
    for what, result in rows:
        print(f"| {what} | {result} |")
    print(f"\nbenchmarks/step.py:\n{benchmark}")
    return 0 if succeeded else 1


if __name__ == "__main__":
    sys.exit(main())
