"""The combinations of dtypes that kernels are compiled for. Imports only the standard library.

A kernel is compiled for one mode: the dtypes of the gradient, the param, exp_avg and the main
param. `multi_tensor_adams` finds the mode of the tensors that it is given.
"""

from typing import NamedTuple

_TOKENS = {"fp32": "32", "bf16": "b16", "fp16": "16", "e4m3": "e4m3", "e5m2": "e5m2"}
# The names of the codecs in source/element.h.
_CODECS = {
    "fp32": "F32",
    "bf16": "BF16",
    "fp16": "F16",
    "e4m3": "E4M3",
    "e5m2": "E5M2",
    "none": "NoMain",
    "remainder": "Remainder",
}


class Mode(NamedTuple):
    """The dtypes of one kernel.

    Attributes:
        grad: "fp32", "bf16" or "fp16".
        param: "fp32", "bf16", "fp16" or, only with main params, "e4m3" or "e5m2".
        exp_avg: "fp32", "bf16" or, with a scale per tensor, "fp16" or "e4m3".
        main: the main params: "none" (param is the main param), "fp32", "fp16" with a scale per
            tensor, or "remainder" (the low 16 bits of an fp32 main param; param is the high half).
        is_guarded: whether the kernel also counts the squares of updates and multiplies updates by
            a factor. Kernels without guards have no code for it.
        is_nesterov: whether the numerator of updates looks ahead by one step.
        is_cautious: whether elements stay that would move against their gradient.
    """

    grad: str
    param: str
    exp_avg: str
    main: str
    is_guarded: bool = False
    is_nesterov: bool = False
    is_cautious: bool = False

    @property
    def name(self) -> str:
        """The name that `megatron-adams precompile --mode` takes, such as g32-pb16-m32-w32."""
        main = {"none": "0", "remainder": "r"}.get(self.main) or _TOKENS[self.main]
        name = f"g{_TOKENS[self.grad]}-p{_TOKENS[self.param]}-m{_TOKENS[self.exp_avg]}-w{main}"
        for suffix, is_there in (
            ("nesterov", self.is_nesterov),
            ("cautious", self.is_cautious),
            ("rms", self.is_guarded),
        ):
            name += f"-{suffix}" if is_there else ""
        return name

    @property
    def entry_points(self) -> tuple[str, ...]:
        """The functions of a step, in order. Scaled state is measured before it is written."""
        if self.is_scaled:
            return ("adams_measure", "adams_update", "adams_finish")
        return ("adams_update",)

    @property
    def count_entry_points(self) -> tuple[str, ...]:
        """The functions that count the squares of a step's updates, and update nothing."""
        assert self.is_guarded
        return ("adams_rms",)

    @property
    def is_scaled(self) -> bool:
        """Whether exp_avg or the main params have a scale per tensor."""
        return self.exp_avg in ("fp16", "e4m3") or self.main == "fp16"

    def defines(self) -> dict[str, str]:
        """Return the macros that the sources in source/ are compiled with."""
        return {
            "ADAMS_GRAD": _CODECS[self.grad],
            "ADAMS_PARAM": _CODECS[self.param],
            "ADAMS_EXP_AVG": _CODECS[self.exp_avg],
            "ADAMS_MAIN": _CODECS[self.main],
            "ADAMS_SCALED": str(int(self.is_scaled)),
            "ADAMS_GUARDED": str(int(self.is_guarded)),
            "ADAMS_NESTEROV": str(int(self.is_nesterov)),
            "ADAMS_CAUTIOUS": str(int(self.is_cautious)),
        }


ALL_MODES = tuple(
    Mode(grad, param, exp_avg, main)
    for main, params in (
        ("none", ("fp32", "bf16", "fp16")),
        ("fp32", ("bf16", "fp16", "e4m3", "e5m2")),
        ("fp16", ("bf16", "fp16", "e4m3", "e5m2")),
        ("remainder", ("bf16",)),
    )
    for param in params
    for exp_avg in ("fp32", "bf16", "fp16", "e4m3")
    for grad in ("fp32", "bf16", "fp16")
)
# The same modes with guards.
GUARDED_MODES = tuple(mode._replace(is_guarded=True) for mode in ALL_MODES)
