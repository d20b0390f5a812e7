"""torchtitan's joint: its grouped experts, imitated from their published interface, and ours in their place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import Shard, distribute_tensor

from moe_kernels.distributed import experts_on_rows
from tests.error_rule import judge
from tests.product.distributed.problems import BACKEND, mesh_of

D, F, COUNTS = 32, 24, (5, 0, 1, 7)  # and two rows that are nobody's
R = sum(COUNTS) + 2
pytestmark = pytest.mark.unpoisoned


class GroupedExperts(nn.Module):
    """Weights (E, F, D), (E, D, F), (E, F, D); forward(rows in the order of their experts, rows per expert)."""

    def __init__(self, dim: int, hidden_dim: int, num_experts: int):
        super().__init__()
        self.w1_EFD = nn.Parameter(torch.randn(num_experts, hidden_dim, dim) / dim**0.5)
        self.w2_EDF = nn.Parameter(torch.randn(num_experts, dim, hidden_dim) / hidden_dim**0.5)
        self.w3_EFD = nn.Parameter(torch.randn(num_experts, hidden_dim, dim) / dim**0.5)

    def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        counts = num_tokens_per_expert_E.tolist()
        *parts, rest = x_RD.split([*counts, len(x_RD) - sum(counts)])
        experts = zip(parts, self.w1_EFD, self.w2_EDF, self.w3_EFD, strict=True)
        done = [(nn.functional.silu(x @ w1.T) * (x @ w3.T)) @ w2.T for x, w1, w2, w3 in experts]
        return torch.cat([*done, torch.zeros_like(rest)])


class Override(GroupedExperts):
    backend = BACKEND

    def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        weights = self.w1_EFD, self.w3_EFD, self.w2_EDF
        return experts_on_rows(x_RD, num_tokens_per_expert_E, *weights, backend=self.backend)


def results(module: GroupedExperts, x: Tensor, dout: Tensor, counts: Tensor) -> dict[str, Tensor]:
    x = x.to(module.w1_EFD.dtype).requires_grad_()
    y = module(x, counts)
    y.backward(dout.to(y.dtype))
    return {"out": y.detach(), "dx": x.grad} | {f"d{name}": p.grad for name, p in module.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_override_computes_what_grouped_experts_compute(dtype, seed):
    def computed(seed: int, how: str) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        module = (GroupedExperts if how in ("oracle", "eager", "loop") else Override)(D, F, len(COUNTS)).to(dtype)
        x, dout = torch.randn(2, R, D).to(dtype)
        return results(module.double() if how == "oracle" else module, x, dout, torch.tensor(COUNTS, dtype=torch.int32))

    judge("grouped_experts", computed, BACKEND, dtype, seed)


def own_part(seed: int) -> None:
    """As its dispatcher leaves it under expert parallelism: weights divided, rows of the own experts alone."""
    torch.manual_seed(seed)
    whole, (x, dout), rank = Override(D, F, len(COUNTS)), torch.randn(2, R, D), distributed.get_rank()
    counts = torch.tensor(COUNTS).chunk(2)[rank]
    own = Override(D, F, 2)
    for name, p in whole.named_parameters():
        setattr(own, name, nn.Parameter(p.detach().chunk(2)[rank].clone()))
    expected = results(own, x, dout, counts)
    for name, p in whole.named_parameters():
        setattr(whole, name, nn.Parameter(distribute_tensor(p.detach(), mesh_of(ep=2), [Shard(0)])))
    for name, got in results(whole, x, dout, counts).items():
        assert torch.equal(got.to_local() if hasattr(got, "to_local") else got, expected[name]), name


def test_of_divided_weights_a_rank_takes_its_own(two, seed):
    two.run(own_part, seed=seed)


def test_weights_that_do_not_fit_are_refused():
    module = Override(D, F, 4)
    with pytest.raises(ValueError, match=r"gate_proj: got .*4.*, expected .*3"):
        module(torch.randn(R, D), torch.tensor([1, 2, 3]))
