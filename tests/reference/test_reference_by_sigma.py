"""reference.samplers by sigma on data whose flow is known exactly: mixtures on a line, and Gaussians."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from reference import samplers
from reference.diffusion import sample_generators
from reference.mixture import GaussianMixture
from reference.samplers import by_sigma

HIGH, LOW = 8.0, 0.1
MIXTURE = GaussianMixture(
    torch.tensor([[-1.5], [0.5], [2.0]], dtype=torch.float64), 0.35, torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
)
GAUSSIAN = GaussianMixture(torch.tensor([[1.5]], dtype=torch.float64), 0.4)
START = HIGH * torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
ORDERS = {"euler": 1, "probability_flow": 1, "heun": 2, "dpmpp_2m": 2, "unipc": 3}
RANDOM = {"euler": 1, "heun": 2, "reverse_diffusion": 1, "euler_maruyama": 1}  # weak orders; the first two with churn


def quantile(x, sigma):
    """Return P(Y <= x) of y = x0 + sigma noise: what probability flow keeps, in one dimension."""
    spread = (MIXTURE.std**2 + sigma**2) ** 0.5
    return (MIXTURE.weights * torch.special.ndtr((x - MIXTURE.means.T) / spread)).sum(-1, keepdim=True)


def exact_flow(start, high, low):
    """Solve quantile(x, low) = quantile(start, high) by bisection."""
    wanted = quantile(start, high)
    below, above = torch.full_like(start, -60.0), torch.full_like(start, 60.0)
    for _ in range(80):
        middle = (below + above) / 2
        less = quantile(middle, low) < wanted
        below, above = torch.where(less, middle, below), torch.where(less, above, middle)
    return below


def evaluations(name, nodes):
    seen = []

    def denoise(y, sigma):
        seen.append(sigma.tolist())
        return MIXTURE.denoise(y, sigma)

    result = getattr(samplers, name)(denoise, START, nodes)
    return result, seen


def falling(count):
    return samplers.karras_sigmas(count + 1, HIGH, LOW)[:-1]


@pytest.mark.parametrize("name", ORDERS)
def test_flows_converge_at_their_order_on_a_mixture(name):
    exact = exact_flow(START, HIGH, LOW)
    errors = [
        (getattr(samplers, name)(MIXTURE.denoise, START, falling(n)) - exact).norm().item() for n in (80, 160, 320)
    ]
    assert errors[2] < {1: 0.2, 2: 4e-3, 3: 5e-4}[ORDERS[name]]
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2 ** ORDERS[name], rel=0.15)


@pytest.mark.parametrize("name", RANDOM)
def test_random_samplers_converge_at_their_weak_order(name, monkeypatch):
    """On a Gaussian the result is linear in every draw, so unit draws give mean and variance without chance."""
    exact = (GAUSSIAN.std**2 + LOW**2) ** 0.5

    def error(steps):
        calls = iter(range(steps))
        monkeypatch.setattr(
            by_sigma, "draw_noise", lambda y, _: (torch.arange(len(y)) - 2 == next(calls)).to(y)[:, None]
        )
        options = {"churn": samplers.Churn(10.0, 0.0, 100.0, 1.0)} if name in ("euler", "heun") else {}
        y = torch.zeros(steps + 2, 1, dtype=torch.float64) + GAUSSIAN.means
        y[1] += (GAUSSIAN.std**2 + HIGH**2) ** 0.5  # the spread that the first sigma has
        end = getattr(samplers, name)(
            GAUSSIAN.denoise, y, samplers.geometric_sigmas(steps + 1, HIGH, LOW)[:-1], **options
        )
        assert next(calls, None) is None
        assert end[0].item() == pytest.approx(1.5), "a mean stays where it is"
        return abs((end[1:] - end[0]).norm().item() - exact)

    errors = [error(steps) for steps in (100, 200, 400)]
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2 ** RANDOM[name], rel=0.15)


@pytest.mark.parametrize("name", sorted({*ORDERS, *RANDOM}))
def test_evaluations_and_the_step_to_zero(name):
    """N evaluations at the N nodes (Heun twice between them), and D of the last one is the result."""
    nodes = samplers.geometric_sigmas(4, HIGH, LOW)
    _, seen = evaluations(name, nodes)
    told = [s[0] for s in seen]
    expected = nodes[:-1].tolist()
    assert told == ([told[0], *(s for s in expected[1:] for _ in "ab")] if name == "heun" else expected)
    point = GaussianMixture(torch.tensor([[1.5]], dtype=torch.float64), 0.0)
    end = getattr(samplers, name)(point.denoise, START, nodes)
    assert torch.equal(end, torch.full_like(START, 1.5)), "whatever came before, D is the point, exactly"


@pytest.mark.parametrize("name", sorted({*ORDERS, *RANDOM}))
def test_samples_of_one_batch_may_start_at_levels_of_their_own(name):
    levels, generators = torch.tensor([8.0, 1.0, 0.2], dtype=torch.float64), lambda b: sample_generators([5, 6, 7][b])
    y = torch.tensor([[3.0], [-1.0], [0.7]], dtype=torch.float64)
    sampler = getattr(samplers, name)

    def run(b, sigmas):
        options = {"churn": samplers.Churn()} if name in ("euler", "heun") else {}
        options |= {"generators": generators(b)} if name in RANDOM else {}
        return sampler(MIXTURE.denoise, y[b], sigmas, **options)

    together = run(slice(None), samplers.karras_sigmas(5, levels, 0.05))
    for i in range(3):
        alone = run(slice(i, i + 1), samplers.karras_sigmas(5, levels[i].item(), 0.05))
        assert torch.allclose(together[i : i + 1], alone, rtol=1e-12)


def test_churn_adds_noise_only_where_it_should():
    levels = []
    samplers.euler(lambda y, s: levels.append(s[0].item()) or y, START, falling(6), samplers.Churn(80, 0.2, 2.0), None)
    for told, node in zip(levels, falling(6)[:-1].tolist(), strict=True):
        assert told == pytest.approx(node * (2**0.5 if 0.2 <= node <= 2.0 else 1))


def test_schedules():
    karras, geometric = samplers.karras_sigmas(5, 10.0, 0.1), samplers.geometric_sigmas(5, 10.0, 0.1)
    assert karras[[0, 4, 5]].tolist() == pytest.approx([10, 0.1, 0]) and geometric[[0, 4, 5]].tolist() == pytest.approx(
        [10, 0.1, 0]
    )
    assert (karras[:-1] ** (1 / 7)).diff().std() < 1e-12 and geometric[:-1].log().diff().std() < 1e-12
    assert samplers.karras_sigmas(1, 10.0, 0.1).tolist() == pytest.approx([10, 0])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: samplers.karras_sigmas(0, 10.0, 0.1), "count: got 0"),
        (lambda: samplers.karras_sigmas(3, 10.0, 0.1, rho=0), "rho: got 0"),
        (lambda: samplers.euler(MIXTURE.denoise, START, torch.tensor([1.0, 2.0, 0.0])), "sigmas: got 1 to 0"),
        (lambda: samplers.heun(MIXTURE.denoise, START, torch.tensor([1.0, -1.0])), "sigmas: got 1 to -1"),
        (lambda: samplers.dpmpp_2m(MIXTURE.denoise, START, torch.ones(3, 2)), r"expected \(N \+ 1,\) or \(N \+ 1, 9\)"),
        (lambda: samplers.unipc(MIXTURE.denoise, START, torch.ones(1)), r"sigmas: got \(1,\)"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
