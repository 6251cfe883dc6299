"""Record what Nsight Compute counts in one launch of the kernel, for three modes.

It watches this same program with --steps.
"""

import csv
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.gpu.stages.stage import Stage

METRICS = (
    "gpu__time_duration.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "lts__t_sectors_op_read.sum",
    "lts__t_sectors_op_write.sum",
    "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_ld.ratio",
    "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_st.ratio",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "smsp__inst_executed.sum",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
)
# If a metric has another name, the profiler's own groups are used.
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats")
MODES = {
    "fp32": ("fp32", "fp32", "fp32", "none"),
    "mixed": ("fp32", "bf16", "fp32", "fp32"),
    "bf16": ("bf16", "bf16", "bf16", "none"),
}
NUMEL = 50_000_000


def take_steps(device: str, numel: int) -> None:
    """Take one step of each mode, in the order of MODES."""
    import torch

    from megatron_adams.kernels import Mode, multi_tensor_adams
    from tests.kernels.checks import DTYPES

    if device == "cuda":
        # The GPU's clock settings are not changed. This work raises the clocks.
        warm = torch.randn(4096, 4096, device=device)
        for _ in range(50):
            warm = (warm @ warm).clamp_(-1, 1)
    for names in MODES.values():
        mode = Mode(*names)

        def tensor(name: str) -> list[torch.Tensor]:
            return [torch.randn(numel, device=device).mul_(1e-2).to(DTYPES[name])]

        with torch.no_grad():
            multi_tensor_adams(
                tensor(mode.param),
                tensor(mode.grad),
                tensor(mode.exp_avg),
                None if mode.main == "none" else tensor(mode.main),
                lr=1e-5,
                beta1=0.9,
                beta2=0.95,
                eps=1e-8,
                weight_decay=0.1,
                step=1,
                backend="cuda" if device == "cuda" else "host",
            )
        if device == "cuda":
            torch.cuda.synchronize()


def main() -> int:
    stage = Stage("ncu")
    if stage.is_rehearsal:
        take_steps("cpu", 10_000)
        stage.record("steps", ok=True, words="the steps that would be watched were taken")
        return 0
    if shutil.which("ncu") is None:
        stage.record("ncu", ok=False, words="not measured: there is no ncu")
        return 1
    sections = [part for name in SECTIONS for part in ("--section", name)]
    path = stage.folder / "ncu.csv"
    for asked_for in (["--metrics", ",".join(METRICS)], sections):
        kernels = _profile(asked_for, path, stage.seconds_left)
        if kernels:
            for name, counters in zip(MODES, kernels, strict=False):
                stage.record(name, counters=counters)
            return 0
    words = " ".join(path.read_text(errors="replace").split())[-300:] if path.exists() else ""
    stage.record("ncu", ok=False, words=f"not measured: ncu shows no kernel. {words}")
    return 1


def _profile(asked_for: list[str], path: Path, timeout_s: float) -> list[dict[str, Any]]:
    """Return the counters of each launch; an empty list if the profiler fails."""
    command = ["ncu", "--clock-control", "none", "--kernel-name", "regex:adams_update"]
    command += [*asked_for, "--csv", "--log-file", str(path)]
    watched = [sys.executable, __file__, "--steps"]
    try:
        subprocess.run([*command, *watched], timeout=max(timeout_s, 1), check=False)
    except subprocess.TimeoutExpired:
        print(f"ncu does not end within {timeout_s:.0f} s", flush=True)
    return read_counters(path.read_text(errors="replace")) if path.exists() else []


def read_counters(text: str) -> list[dict[str, str]]:
    """Return the counters by launch. Each line of ncu's table has one metric of one launch."""
    lines = text.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if first is None:
        return []
    launches: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(lines[first:]):
        if row.get("Metric Name") and row.get("Metric Value"):
            unit = row.get("Metric Unit") or ""
            value = f"{row['Metric Value']} {unit}".strip()
            launches.setdefault(row["ID"], {})[row["Metric Name"]] = value
    return list(launches.values())


if __name__ == "__main__":
    if sys.argv[1:] == ["--steps"]:
        take_steps("cuda", NUMEL)
        sys.exit(0)
    sys.exit(main())
