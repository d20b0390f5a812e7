"""What counting costs in a step of sampling."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

import moe_kernels
from bench.images.analysis.counts import Counter
from bench.images.analysis.watch import watch
from bench.instrument import measure, stats, store
from reference.dit import DiTMoE, DiTMoEConfig

STEPS = 50
CONFIGS = {  # name -> model, images of a step; guidance doubles them
    "digits": (DiTMoEConfig(4, 96, 4, 2, 8, 2, input_size=8, in_channels=1, num_classes=10, learn_sigma=False), 64),
    "S/2-8E2A": (DiTMoEConfig.from_name("DiT-MoE-S/2-8E2A"), 1),
}


def counting(name: str, depth: int, seconds: float, backend: str = "native") -> dict:
    """Return a row: a guided evaluation of a replaced model with all tables of `analyze` filled, against without.

    The counted model has first given, bit for bit, what the other gives, and all its picks have been counted.
    """
    config, images = CONFIGS[name]
    config = replace(config, depth=depth)
    torch.manual_seed(0)
    plain = DiTMoE(config).eval()
    moe_kernels.replace_moe(plain, backend=backend)
    counted, counter = copy.deepcopy(plain), Counter(depth, STEPS, images)
    x = torch.randn(images, config.in_channels, config.input_size, config.input_size)
    t, y = torch.full((images,), 0.5), torch.arange(images) % config.num_classes

    def counting_step() -> Tensor:
        if counter.step in (0, STEPS):
            counter.begin(0, y, guided=True)
        return step(counted)

    def step(model: DiTMoE = plain) -> Tensor:
        with torch.no_grad():
            return model.forward_with_guidance(x, t, y, 1.5)

    with watch(counted, counter):
        wrong = _wrong(step, counting_step, counter, 2 * images * config.top_k * (config.input_size // 2) ** 2)
        samples = {} if wrong else measure.interleave({"counted": counting_step, "plain": step}, 9, seconds)
    figures = {}
    if samples:
        ratio = stats.by_round(samples["counted"].times(), samples["plain"].times())
        figures = {f"{key}_us": s.summary().median * 1e6 for key, s in samples.items()}
        figures |= {"cost": ratio.value, "cost_low": ratio.low, "cost_high": ratio.high}
    tokens = 2 * images * (config.input_size // 2) ** 2
    case = f"{name}-{depth}-blocks-T{tokens}-{backend}-fp32-t{torch.get_num_threads()}"
    return store.row("counting", case=case, figures=figures, wrong=wrong, tables_bytes=counter.result().nbytes)


def _wrong(step: Callable[[], Tensor], counted: Callable[[], Tensor], counter: Counter, picks: int) -> str | None:
    if not torch.equal(step(), counted()):
        return "output: counting changed it"
    found = counter.result().load.sum((1, 2, 3, 4)).tolist()
    return None if found == [picks] * counter.L else f"load: got {found} picks by layer, expected {picks}"
