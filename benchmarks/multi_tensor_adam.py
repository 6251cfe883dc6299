"""AdamW in Apex's launch shape: a peer on GPUs without Apex and TransformerEngine."""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from launcher import Kernel
from torch import Tensor

from megatron_adams.kernels import compile

SOURCE = Path(__file__).parent / "multi_tensor_adam.cu"
THREADS, CHUNK, MAX_TENSORS, MAX_BLOCKS = 512, 65536, 36, 320
_LISTS = ("grad", "param", "exp_avg", "exp_avg_sq")
# How much it may differ from torch's AdamW: relative to a number, or absolute if that is below 1.
TOLERANCE = 1e-6


class Arguments(ctypes.Structure):
    """The arguments of one launch; multi_tensor_adam.cu has the same structure."""

    _fields_ = (
        *((name, ctypes.c_void_p * MAX_TENSORS) for name in _LISTS),
        ("numel", ctypes.c_longlong * MAX_TENSORS),
        ("chunk_of_block", ctypes.c_int * MAX_BLOCKS),
        ("tensor_of_block", ctypes.c_ubyte * MAX_BLOCKS),
        *(
            (name, ctypes.c_float)
            for name in (
                *("lr", "beta1", "one_minus_beta1", "beta2", "one_minus_beta2", "eps"),
                *("weight_decay", "correction1", "correction2"),
            )
        ),
    )


type Launch = Callable[[int, Arguments], None]
"""Launches a number of blocks with these arguments."""


class MultiTensorAdam:
    """AdamW on fp32 tensors. It prepares the arguments once, so no tensor may move.

    Args:
        params, grads: dense tensors, one grad for each param.
        launch: by default, launches on the tensors' GPU.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        launch: Launch | None = None,
    ) -> None:
        self.exp_avgs, self.exp_avg_sqs = (
            [torch.zeros_like(param) for param in params] for _ in range(2)
        )
        self.params, self.grads = params, grads
        self._launch = launch or _launch_on_gpu(params[0].device)
        self._betas = betas
        self._num_steps = 0
        columns = (grads, params, self.exp_avgs, self.exp_avg_sqs)
        self._launches = [
            (num_blocks, arguments)
            for num_blocks, arguments in pack([*zip(*columns, strict=True)])
            if num_blocks
        ]
        for _, arguments in self._launches:
            arguments.lr, arguments.eps, arguments.weight_decay = lr, eps, weight_decay
            arguments.beta1, arguments.beta2 = betas
            arguments.one_minus_beta1, arguments.one_minus_beta2 = (1 - beta for beta in betas)

    def step(self) -> None:
        self._num_steps += 1
        corrections = [1 / (1 - beta**self._num_steps) for beta in self._betas]
        for num_blocks, arguments in self._launches:
            arguments.correction1, arguments.correction2 = corrections
            self._launch(num_blocks, arguments)


def pack(tensors: Sequence[tuple[Tensor, ...]]) -> list[tuple[int, Arguments]]:
    """Divide tensors into launches.

    Args:
        tensors: for each param, (grad, param, exp_avg, exp_avg_sq).
    Returns:
        The number of blocks, and the arguments, of each launch.
    """
    launches: list[tuple[int, Arguments]] = []
    arguments, num_tensors, num_blocks = Arguments(), 0, 0
    for members in tensors:
        numel = members[0].numel()
        slot = None
        for chunk in range(-(-numel // CHUNK)):
            if num_blocks == MAX_BLOCKS or (slot is None and num_tensors == MAX_TENSORS):
                launches.append((num_blocks, arguments))
                arguments, num_tensors, num_blocks, slot = Arguments(), 0, 0, None
            if slot is None:
                slot = num_tensors
                num_tensors += 1
                for name, member in zip(_LISTS, members, strict=True):
                    getattr(arguments, name)[slot] = member.data_ptr()
                arguments.numel[slot] = numel
            arguments.tensor_of_block[num_blocks] = slot
            arguments.chunk_of_block[num_blocks] = chunk
            num_blocks += 1
    return [*launches, (num_blocks, arguments)]


def _launch_on_gpu(device: torch.device) -> Launch:
    major, minor = torch.cuda.get_device_capability(device)
    kernel = _kernel(f"sm_{major}{minor}")

    def launch(num_blocks: int, arguments: Arguments) -> None:
        kernel.launch(num_blocks, THREADS, (arguments,))

    return launch


@cache
def _kernel(arch: str) -> Kernel:
    return Kernel(cubin(arch), "multi_tensor_adam")


def cubin(arch: str) -> bytes:
    return compile.compile_cuda(SOURCE.read_text("utf-8"), {}, arch)


def check(device: torch.device, launch: Launch | None = None) -> None:
    """Compare three steps with torch's AdamW.

    Raises:
        RuntimeError: the results differ by more than TOLERANCE.
    """
    generator = torch.Generator(device).manual_seed(0)
    numels = (1, 700, CHUNK, 2 * CHUNK + 333, *(33 * [17]))  # more tensors than a launch takes
    params = [torch.randn(n, generator=generator, device=device) for n in numels]
    grads = [torch.randn(n, generator=generator, device=device) for n in numels]
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    expected = [torch.nn.Parameter(param.clone()) for param in params]
    oracle = torch.optim.AdamW(expected, foreach=False, **settings)
    tried = MultiTensorAdam(params, grads, launch=launch, **settings)
    for _ in range(3):
        for param, grad in zip(expected, grads, strict=True):
            param.grad = grad
        oracle.step()
        tried.step()
        for grad in grads:
            grad.mul_(-0.7)
    for param, want in zip(params, expected, strict=True):
        wrong = ((param - want).abs() / want.abs().clamp(min=1)).max().item()
        if not wrong <= TOLERANCE:
            raise RuntimeError(f"differs from torch's AdamW by {wrong:.3g}: must be {TOLERANCE}")
