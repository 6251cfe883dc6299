"""A small GPT, written as functions of its parameters, so that all layers share a compiled block.

It has RMSNorm before each part, rotary positions, GELU, no biases, and a head that can be tied to
the embedding. Parameters are fp32. The matrix products, and the activations between blocks, have
the model's `dtype`.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# The kinds of tensors that results are reported for.
KINDS = ("matrices", "embedding", "head", "norms")
_BLOCK = ("attention_norm", "qkv", "attention_out", "mlp_norm", "mlp_in", "mlp_out")


@dataclass(frozen=True)
class Shape:
    """The sizes of a model. If `tied`, the embedding is the head, too."""

    num_layers: int
    width: int
    num_heads: int
    seq_length: int
    vocab_size: int
    tied: bool = False

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads


def kind_of(name: str) -> str:
    """Return the kind of a parameter, one of KINDS, from its name."""
    if name in ("embedding", "head"):
        return name
    return "norms" if name.endswith("norm") else "matrices"


def make_params(shape: Shape, device: torch.device) -> dict[str, Tensor]:
    """Allocate the fp32 parameters without values; `initialize_` sets these."""
    width = shape.width
    sizes = {"embedding": (shape.vocab_size, width)}
    for layer in range(shape.num_layers):
        sizes |= {
            f"{layer}.attention_norm": (width,),
            f"{layer}.qkv": (3 * width, width),
            f"{layer}.attention_out": (width, width),
            f"{layer}.mlp_norm": (width,),
            f"{layer}.mlp_in": (4 * width, width),
            f"{layer}.mlp_out": (width, 4 * width),
        }
    sizes["final_norm"] = (width,)
    if not shape.tied:
        sizes["head"] = (shape.vocab_size, width)
    return {
        name: torch.empty(size, dtype=torch.float32, device=device, requires_grad=True)
        for name, size in sizes.items()
    }


@torch.no_grad()
def initialize_(params: dict[str, Tensor], shape: Shape, seed: int) -> None:
    """Set the parameters to the start values of a seed, in place, and drop their gradients.

    The values are normal with a standard deviation of 0.02, and less for what is added to the
    residual stream. Norms are 1.
    """
    device = params["embedding"].device
    generator = torch.Generator(device=device).manual_seed(seed)
    for name, param in params.items():
        if kind_of(name) == "norms":
            param.fill_(1.0)
        else:
            is_residual = name.endswith(("attention_out", "mlp_out"))
            scale = 1 / math.sqrt(2 * shape.num_layers) if is_residual else 1.0
            param.normal_(0.0, 0.02 * scale, generator=generator)
        param.grad = None


def rotations(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the cosine and the sine of each position's angles: (seq_length, head_dim / 2) fp32."""
    half = shape.head_dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=device) / half
    positions = torch.arange(shape.seq_length, dtype=torch.float32, device=device)
    angles = torch.outer(positions, 10_000.0**-exponents)
    return angles.cos(), angles.sin()


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Divide each position by its root mean square, in fp32, and multiply it by `weight`."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    return (wide * scale * weight).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of each head, (batch, seq, heads, head_dim), by position."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def block(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    attention_norm: Tensor,
    qkv: Tensor,
    attention_out: Tensor,
    mlp_norm: Tensor,
    mlp_in: Tensor,
    mlp_out: Tensor,
) -> Tensor:
    """Apply one layer to (batch, seq, width): causal attention, then the MLP."""
    batch, seq, width = x.shape
    head_dim = 2 * cos.shape[-1]
    mixed = F.linear(rms_norm(x, attention_norm), qkv.to(x.dtype))
    q, k, v = mixed.view(batch, seq, 3, width // head_dim, head_dim).unbind(2)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    attended = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
    )
    attended = attended.transpose(1, 2).reshape(batch, seq, width)
    x = x + F.linear(attended, attention_out.to(x.dtype))
    hidden = F.gelu(F.linear(rms_norm(x, mlp_norm), mlp_in.to(x.dtype)), approximate="tanh")
    return x + F.linear(hidden, mlp_out.to(x.dtype))


def loss_of(x: Tensor, final_norm: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Return the mean loss for the last layer's (batch, seq, width), in nats per token, fp32."""
    logits = F.linear(rms_norm(x, final_norm), head.to(x.dtype))
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class Gpt:
    """The functions above with their parameters.

    Attributes:
        params: name -> parameter, in the order of the network.
    """

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        self.params = make_params(shape, device)
        self._rotations = rotations(shape, device)
        self._block, self._loss = block, loss_of

    def compile(self) -> None:
        """Make the next forward pass compile the loss, and the block once for all layers."""
        self._block = torch.compile(block, fullgraph=True, dynamic=False)
        self._loss = torch.compile(loss_of, fullgraph=True, dynamic=False)

    def forget_compiled(self) -> None:
        """Undo `compile`."""
        self._block, self._loss = block, loss_of

    def loss(self, tokens: Tensor) -> Tensor:
        """Return the mean loss of (batch, seq_length + 1) int64 tokens, in nats per token."""
        params = self.params
        x = F.embedding(tokens[:, :-1], params["embedding"]).to(self.dtype)
        for layer in range(self.shape.num_layers):
            weights = [params[f"{layer}.{name}"] for name in _BLOCK]
            x = self._block(x, *self._rotations, *weights)
        head = params["embedding" if self.shape.tied else "head"]
        return self._loss(x, params["final_norm"], head, tokens[:, 1:])
