"""Linear layers that run through oneDNN on a CPU in float32.

torch computes a float32 matrix product on x86 with MKL. On two cores of AMD's Zen 5 MKL reaches some 165 GFLOP/s;
oneDNN, which torch contains too, reaches 300 to 390 (train/RESULTS.md). The arithmetic is float32 in both.

Properties that hold:
- `Linear` has the parameters, the state dict and the gradients of `nn.Linear`; only rounding differs.
- Elsewhere (CUDA, bfloat16, autocast, float64, meta tensors, other processors) it computes as `nn.Linear` does.
- The product is one registered operator, `reelmae::linear`, so `torch.compile(fullgraph=True)` compiles it and torch's
  FLOP counter counts it.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library, nn
from torch.utils.flop_counter import register_flop_formula

# the operator that torch's compiler emits for inference; it is not public, so a later torch may not have it
ONEDNN = (
    platform.machine() in ("x86_64", "AMD64")
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


@library.custom_op("reelmae::linear", mutates_args=(), device_types="cpu")
def linear(x: Tensor, weight_ND: Tensor, bias_N: Tensor | None) -> Tensor:
    """x [..., D] times the transposed weight, plus bias: [..., N]; float32 on CPU, any strides."""
    return torch.ops.mkldnn._linear_pointwise(x, weight_ND, bias_N, "none", [], "")


@linear.register_fake
def _(x: Tensor, weight_ND: Tensor, bias_N: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight_ND.shape[0]))


@register_flop_formula(torch.ops.reelmae.linear)
def _flops(x_shape: Any, weight_shape: Any, *_: Any, **__: Any) -> int:
    rows = 1
    for side in x_shape[:-1]:
        rows *= side
    return 2 * rows * weight_shape[0] * weight_shape[1]


def _remember(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    x, weight_ND, _ = inputs
    ctx.save_for_backward(x, weight_ND)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, weight_ND = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad
    grad_MN = grad.reshape(-1, grad.shape[-1])
    x_MD = x.reshape(-1, x.shape[-1])
    grad_x = linear(grad_MN, weight_ND.t(), None).view(x.shape) if needs_x else None
    grad_weight = linear(grad_MN.t(), x_MD.t(), None) if needs_weight else None
    return grad_x, grad_weight, grad_MN.sum(dim=0) if needs_bias else None


linear.register_autograd(_backward, setup_context=_remember)


def fast_linear(x: Tensor, weight_ND: Tensor, bias_N: Tensor | None) -> Tensor:
    """As `F.linear`, computed by oneDNN where the arguments are float32 on a CPU."""
    if (
        ONEDNN
        and x.device.type == "cpu"
        and x.numel() > 0
        and x.shape[-1] == weight_ND.shape[1]  # otherwise torch raises the clearer error
        and x.dtype == weight_ND.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
    ):
        return linear(x, weight_ND, bias_N)
    return F.linear(x, weight_ND, bias_N)


class Linear(nn.Linear):
    """nn.Linear, computed by `fast_linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] → [..., out_features]."""
        return fast_linear(x, self.weight, self.bias)


class QVLinear(nn.Module):
    """Queries, keys and values in one product. Keys have no bias, as in VideoMAE.

    Parameters: `weight` [3D, D] with rows q, k, v; `q_bias` and `v_bias` [D].
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] → [..., 3D]."""
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        return fast_linear(x, self.weight, bias)
