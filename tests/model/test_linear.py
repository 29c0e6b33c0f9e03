"""Linear layers through oneDNN: nn.Linear's results and gradients, and where they are not taken."""

from __future__ import annotations

import platform
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from reelmae.model.linear import ONEDNN, Linear, QVLinear


def test_float32_products_on_an_x86_processor_go_through_onednn() -> None:
    if platform.machine() != "x86_64":
        pytest.skip("another processor")
    assert ONEDNN  # else torch has lost the operator: see what has taken its place
    calls: list[str] = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(str(func))
            return func(*args, **(kwargs or {}))

    with Names():
        Linear(6, 4)(torch.zeros(3, 6))
    assert "reelmae.linear.default" in calls


def gradients(layer: nn.Module, x: Tensor, weight: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_(), *layer.parameters()]
    return list(torch.autograd.grad((layer(leaves[0]) * weight).sum(), leaves))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (5, 7), (3, 5, 7), (2, 3, 5, 7)])
def test_results_and_gradients_are_those_of_a_plain_linear(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    ours, plain = Linear(7, 4, bias=bias), nn.Linear(7, 4, bias=bias)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(shape)
    weight = torch.randn(*shape[:-1], 4)
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=1e-6)
    for one, other in zip(gradients(ours, x, weight), gradients(plain, x, weight), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_strides_of_input_and_gradient_do_not_matter() -> None:
    torch.manual_seed(0)
    ours, plain = Linear(6, 4), nn.Linear(6, 4)
    plain.load_state_dict(ours.state_dict())
    for x in (torch.randn(6, 5).t(), torch.randn(1, 6).expand(5, 6), torch.randn(5, 12)[:, ::2]):
        for weight in (torch.ones(()), torch.randn(4, 5).t(), torch.randn(1, 4)):
            for one, other in zip(gradients(ours, x, weight), gradients(plain, x, weight), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_gradient_that_was_only_expanded_counts_in_full() -> None:
    layer, x = Linear(6, 4), torch.randn(5, 6)
    layer(x).sum().backward()  # the gradient of a sum: one number, expanded
    assert layer.weight.grad is not None and layer.bias.grad is not None
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(4, 6))
    torch.testing.assert_close(layer.bias.grad, torch.full((4,), 5.0))


def test_second_derivatives_are_those_of_a_plain_linear() -> None:
    torch.manual_seed(0)
    ours, plain = Linear(3, 2), nn.Linear(3, 2)
    plain.load_state_dict(ours.state_dict())
    found = []
    for layer in (ours, plain):
        x = torch.linspace(-1, 1, 12).view(4, 3).requires_grad_()
        (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), [x, layer.weight]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_told_as_torch_does() -> None:
    with pytest.raises(RuntimeError, match="3x5 and 6x4"):
        Linear(6, 4)(torch.zeros(3, 5))


def test_no_rows_are_no_error() -> None:
    layer = Linear(6, 4)
    layer(torch.zeros(0, 6)).sum().backward()
    assert layer.weight.grad is not None and not layer.weight.grad.any()


def test_flops_are_counted_as_those_of_a_plain_linear() -> None:
    counts = []
    for layer in (Linear(6, 4), nn.Linear(6, 4)):
        x = torch.randn(3, 5, 6, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            layer(x).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 3 * 2 * 15 * 6 * 4


def test_under_autocast_the_product_is_in_bfloat16() -> None:
    layer = Linear(6, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(3, 6)).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_multiplied_as_ever(dtype: torch.dtype) -> None:
    layer = Linear(6, 4).to(dtype)
    assert layer(torch.randn(3, 6, dtype=dtype)).dtype == dtype


def test_it_compiles_whole() -> None:
    torch.manual_seed(0)
    layer = Linear(6, 4)
    x = torch.randn(3, 6)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    compiled(x).sum().backward()
    assert layer.weight.grad is not None


def test_keys_have_no_bias_in_a_qv_projection() -> None:
    layer = QVLinear(4)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.q_bias)
    nn.init.normal_(layer.v_bias)
    out = layer(torch.zeros(1, 4))[0]
    assert torch.equal(out, torch.cat((layer.q_bias, torch.zeros(4), layer.v_bias)))
    assert sorted(name for name, _ in layer.named_parameters()) == ["q_bias", "v_bias", "weight"]
