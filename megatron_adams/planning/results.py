"""A plan: what worker.py answers, and what follows from it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_adams.planning.gpus import Gpu
from megatron_adams.planning.traffic import bytes_per_param

# The share of the data sheet's bandwidth that a step reaches. On an H100 a copy reached 3.04 of
# 3.35 TB/s, and AdamS's step 97% of a copy (docs/measurements.md).
STEP_EFFICIENCY = 0.97 * 3.04 / 3.35

_WORDS = {
    "adamw": "AdamW",
    "adams": "AdamS",
    "adamw_precision_aware": "AdamW, precision-aware",
    "adams_precision_aware": "AdamS, precision-aware",
    "adamw_precision_aware_bf16": "AdamW, precision-aware, bf16",
    "adams_precision_aware_bf16": "AdamS, precision-aware, bf16",
    "adamw_precision_aware_fp8": "AdamW, precision-aware, fp8",
    "adams_precision_aware_fp8": "AdamS, precision-aware, fp8",
    "as_given": "as given",
}


@dataclasses.dataclass(frozen=True)
class Mode:
    """One way to keep the optimizer's state.

    Attributes:
        name: in JSON.
        optimizer: "adam" or "adams".
        flags: of Megatron, that ask for it.
        bytes_per_param: of the optimizer, for most params, without scales.
        dtypes: of "grad", "param", "exp_avg" and "main_param" ("remainder", "none").
        step_bytes_per_param: what a step reads and writes; None: not known.
    """

    name: str
    optimizer: str
    flags: str
    bytes_per_param: int
    dtypes: Mapping[str, str]
    step_bytes_per_param: int | None

    @property
    def title(self) -> str:
        return _WORDS[self.name]


@dataclasses.dataclass(frozen=True)
class Kind:
    """Ranks that hold the same bytes.

    Attributes:
        pipeline_stage: from 0.
        ranks: (start, stop) of runs of global ranks.
        num_ranks: how many they are.
        numel: elements of model params that each updates.
        weights: bytes of model params, with the padding of Megatron's buckets.
        gradients: bytes of main_grad by mode, with that padding.
        optimizer: bytes by mode and kind of state.
    """

    pipeline_stage: int
    ranks: tuple[tuple[int, int], ...]
    num_ranks: int
    numel: int
    weights: int
    gradients: Mapping[str, int]
    optimizer: Mapping[str, Mapping[str, int]]

    def optimizer_bytes(self, mode: str) -> int:
        return sum(self.optimizer[mode].values())

    def static_bytes(self, mode: str) -> int:
        """Weights, gradients and optimizer state."""
        return self.weights + self.gradients[mode] + self.optimizer_bytes(mode)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The bytes of every rank of a job.

    Attributes:
        data: as it came, for JSON.
        modes: in the order of the tables.
        kinds: of ranks, by pipeline stage.
    """

    data: Mapping[str, Any]
    modes: Sequence[Mode]
    kinds: Sequence[Kind]

    @classmethod
    def from_json(cls, data: Any) -> "Plan":
        """A plan of worker.py's answer."""
        modes = [
            Mode(
                name=mode["name"],
                optimizer=mode["optimizer"],
                flags=mode["flags"],
                bytes_per_param=mode["bytes_per_param"],
                dtypes=mode["dtypes"],
                step_bytes_per_param=bytes_per_param(
                    mode["optimizer"],
                    mode["dtypes"],
                    is_precision_aware=mode["is_precision_aware"],
                    clips=data["clips_gradients"],
                    is_guarded=mode["is_guarded"],
                ),
            )
            for mode in data["modes"]
        ]
        kinds = [
            Kind(**{**kind, "ranks": tuple((start, stop) for start, stop in kind["ranks"])})
            for kind in data["kinds"]
        ]
        return cls(data, modes, kinds)

    def mode(self, name: str) -> Mode:
        return next(mode for mode in self.modes if mode.name == name)

    @property
    def activations(self) -> int:
        """Megatron's estimate of the first stage's bytes of activations."""
        return int(self.data["activations"]["bytes"])

    def fullest(self, mode: str) -> Kind:
        """The ranks with the most weights, gradients and optimizer state."""
        return max(self.kinds, key=lambda kind: kind.static_bytes(mode))

    def total_bytes(self, mode: str) -> int:
        """The fullest rank's bytes, with the first stage's activations, which no stage exceeds."""
        return self.fullest(mode).static_bytes(mode) + self.activations

    def step_s(self, mode: Mode, bandwidth_gb_s: float) -> float | None:
        """Seconds in which the optimizer's step of the fullest rank moves its bytes."""
        if mode.step_bytes_per_param is None:
            return None
        numel = max(kind.numel for kind in self.kinds)
        return numel * mode.step_bytes_per_param / (STEP_EFFICIENCY * bandwidth_gb_s * 1e9)

    def to_json(self, gpu: Gpu | None) -> dict[str, Any]:
        """What `--json` prints."""
        modes = []
        for mode, given in zip(self.modes, self.data["modes"], strict=True):
            step_s = self.step_s(mode, gpu.bandwidth_gb_s) if gpu and gpu.bandwidth_gb_s else None
            modes.append(
                {
                    **given,
                    "title": mode.title,
                    "fullest_rank_bytes": self.fullest(mode.name).static_bytes(mode.name),
                    "fullest_rank_optimizer_bytes": self.fullest(mode.name).optimizer_bytes(
                        mode.name
                    ),
                    "with_activations_bytes": self.total_bytes(mode.name),
                    "step_bytes_per_param": mode.step_bytes_per_param,
                    "step_ms": None if step_s is None else 1e3 * step_s,
                    "fits": gpu.fits(self.total_bytes(mode.name)) if gpu else None,
                }
            )
        found = None
        if gpu:
            found = {
                "name": gpu.name,
                "memory_bytes": gpu.memory_bytes,
                "bandwidth_gb_s": gpu.bandwidth_gb_s,
            }
        return {**self.data, "modes": modes, "gpu": found}
