"""What these tests share: a small model around one block, inputs without near ties, ten steps, who is compared."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from moe_kernels import replace_moe
from reference.moe import SparseMoeBlock
from tests.contenders import BACKENDS
from tests.error_rule import judge
from tests.trap_cases import DEVICE, draw_router

B, L, H, I, E, K, Is = 2, 7, 32, 24, 5, 2, 16
LR = 2.0**-4  # a power of two: a product with it is exact, fused or not
STEPS = 10
on_the_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="says itself that it computes on the CPU")
native_and_eager = pytest.mark.parametrize("backend", [b for b in ("native", "eager") if b in BACKENDS])


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.moe = SparseMoeBlock(H, I, E, K, Is, alpha=0.1)
        self.head = nn.Linear(H, H)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.moe(x))


def make_model(seed: int) -> Model:
    torch.manual_seed(seed)
    model = Model().to(DEVICE)
    with torch.no_grad():
        model.moe.gate.weight.copy_(draw_router(B * L, H, E, K, torch.float32, 1.0, seed)[1])
    return model


def make_x(seed: int) -> Tensor:
    """Images of tokens that the router of make_model(seed) sends the same way in float32 and float64."""
    return draw_router(B * L, H, E, K, torch.float32, 1.0, seed)[0].view(B, L, H)


def make_replaced(seed: int, backend: str) -> Model:
    model = make_model(seed)
    assert replace_moe(model, backend=backend) == 1
    return model


def untouched(model: nn.Module, backend: str, dtype: torch.dtype = torch.float32) -> Model:
    """Return a replaced model to which nothing was done, with the weights that a model has now."""
    fresh = Model().to(DEVICE, dtype)
    fresh.load_state_dict(model.state_dict())
    replace_moe(fresh, backend=backend)
    return fresh.train(model.training)


def replace(model: nn.Module, how: str) -> nn.Module:
    """Replace where `how` (see judge) is a backend; oracle and loop are the plain model."""
    if how not in ("oracle", "loop"):
        replace_moe(model, backend=how)
    return model


def judge_as_plain(op: str, backend: str, seed: int, use: Callable[[Model, Tensor, str], dict[str, Tensor]]) -> None:
    """Judge what `use(model, x, how)` makes of a replaced model by the plain model in float64."""

    def compute(seed: int, how: str) -> dict[str, Tensor]:
        return by_matrix(use(make_model(seed), make_x(seed), how))

    judge(op, compute, backend, torch.float32, seed)


def by_matrix(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Make one slice (see error_rule) of each expert's matrix: a row of its gradient may be next to nothing."""
    whole = {name: t.detach() for name, t in results.items()}
    return {name: t[None] if "_proj" in name else t for name, t in whole.items()}


def as_asked(model: nn.Module, x: Tensor, how: str) -> tuple[nn.Module, Tensor]:
    return (model.double(), x.double()) if how == "oracle" else (model, x)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return y, and the gradient of its mean square for x and for every parameter that wants one."""
    x = x.detach().requires_grad_()
    y = model(x)
    named = {"x": x} | {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(y.square().mean(), list(named.values()))
    return {"y": y.detach()} | dict(zip(named, grads, strict=True))


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert not [name for name, t in expected.items() if not torch.equal(got[name], t)]


def assert_like_untouched(model: nn.Module, backend: str, seed: int) -> None:
    """Check output and gradients, bit for bit, against an untouched model with the weights that `model` has now."""
    assert_same(gradients(model, make_x(seed)), gradients(untouched(model, backend), make_x(seed)))


def sgd(model: nn.Module) -> Callable[[], None]:
    def step() -> None:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(p.grad, alpha=-LR)

    return step


def ten_losses(model: nn.Module, seed: int, step: Callable[[], None] | None = None) -> Tensor:
    """Train, and return the losses; `step` is what comes after backward, plain SGD by default."""
    step = step or sgd(model)
    losses = []
    for i in range(STEPS):
        loss = (model(make_x(seed + i)) - make_x(seed - i)).square().mean()
        loss.backward()
        step()
        model.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


@contextmanager
def one_warning(path: str) -> Iterator[None]:
    """Check that the block says once that the original computes, naming the module at `path` and a line of these tests,
    not one of torch or moe_kernels."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    said = [w for w in caught if "original forward computes" in str(w.message)]
    assert len(said) == 1 and path in str(said[0].message), said
    assert Path(said[0].filename).is_relative_to(Path(__file__).parent), said[0].filename
