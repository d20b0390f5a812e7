"""transformers divides the experts itself, and our function of its registry computes each rank's part."""

from __future__ import annotations

import os
from unittest import mock

import pytest
import torch
from torch import Tensor, distributed

from moe_kernels.adapters.families.transformers import experts_forward
from tests.error_rule import judge
from tests.product.distributed.problems import BACKEND

pytestmark = pytest.mark.unpoisoned
SIZES = dict(hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2, vocab_size=64)
SIZES |= dict(num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2)


def judge_model(folder: str, how_divided: str, seed: int) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
    from transformers.distributed import DistributedConfig
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register("moe_kernels", experts_forward)

    def computed(seed: int, how: str) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        model, path = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES)).eval(), f"{folder}/{seed}"
        tokens = torch.randint(SIZES["vocab_size"], (2, 9))
        if how in ("oracle", "eager"):
            model.set_experts_implementation("eager")  # its default has no float64
        else:
            if distributed.get_rank() == 0:
                model.save_pretrained(path)
            distributed.barrier()
            divided = DistributedConfig(tp_size=2, ep_size=2, ep_implementation=how_divided)
            model = Qwen3MoeForCausalLM.from_pretrained(path, distributed_config=divided).eval()
            experts = model.model.layers[0].mlp.experts
            assert experts.num_experts == 2, "the half of them"
            model.set_experts_implementation("moe_kernels")
        with torch.no_grad():
            return {"out": model.to(torch.float64 if how == "oracle" else torch.float32)(tokens).logits}

    with mock.patch.dict(os.environ, {"LOCAL_RANK": str(distributed.get_rank())}):
        judge(f"transformers_{how_divided}", computed, BACKEND, torch.float32, seed)


@pytest.mark.parametrize("how_divided", ["all_reduce", "all_to_all"])
def test_two_ranks_of_its_expert_parallelism(two, how_divided, seed, tmp_path):
    pytest.importorskip("transformers.distributed", reason="expert parallelism of its own came with transformers 5")
    two.run(judge_model, folder=str(tmp_path), how_divided=how_divided, seed=seed)
