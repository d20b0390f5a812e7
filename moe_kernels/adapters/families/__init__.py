"""The families that `replace_moe` knows, a file for each; the one registered last is asked first."""

from ..family import register_family
from .diffmoe import DiffMoE
from .dit_moe import DiTMoE
from .dsmoe import DSMoE
from .ec_dit import ECDiT
from .hidream import HiDream
from .hunyuan_image import HunyuanImage
from .jitmoe import JiTMoE
from .lingbot import LingBot
from .magi2 import MAGI2
from .nucleus import Nucleus
from .promoe import ProMoE, ProMoEByExpert
from .transformers import FAMILY as TRANSFORMERS
from .transformers import experts_forward

for _family in (
    DiTMoE,
    ECDiT,
    DiffMoE,
    DSMoE,
    JiTMoE,
    HunyuanImage,
    LingBot,
    Nucleus,
    HiDream,
    ProMoE,
    ProMoEByExpert,
    MAGI2,
):
    register_family(_family())
register_family(TRANSFORMERS)

__all__ = ["experts_forward"]
