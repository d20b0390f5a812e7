"""The families that `replace_moe` knows, a file for each; the one registered last is asked first."""

from ..family import register_family
from .dit_moe import DiTMoE
from .dsmoe import DSMoE
from .ec_dit import ECDiT
from .hidream import HiDream
from .hunyuan_image import HunyuanImage
from .lingbot import LingBot
from .nucleus import Nucleus
from .refused import MAGI2, DiffMoE, ProMoE
from .transformers import FAMILY as TRANSFORMERS
from .transformers import experts_forward

for _family in (DiTMoE, ECDiT, DSMoE, HunyuanImage, LingBot, Nucleus, HiDream, DiffMoE, ProMoE, MAGI2):
    register_family(_family())
register_family(TRANSFORMERS)

__all__ = ["experts_forward"]
