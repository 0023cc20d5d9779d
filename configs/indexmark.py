"""S074 IndexMark: codes replaced by their like, a watermark without training (Tong et al. 2025, arXiv 2505.14673).

    python scripts/train.py --config configs/indexmark.py --variant small --workdir runs/indexmark
    python scripts/sample.py --workdir runs/indexmark --labels 0,1,2 --num 8 --out grid.png

Codes are paired with their nearest; sampled red codes become their green partners. `config.find(params, images)` reads the codes
back with an index encoder, which is the last stage, and tries all places of a crop. Variants: `smoke` (seconds on a CPU), `small`
(scikit-learn's digits as 64 tokens, minutes on a CPU), and `paper`: ImageNet at 256 pixels with LlamaGen-L's sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from configs import lbw
from jaxgen import config as config_lib
from jaxgen.optim import OptimConfig
from jaxgen.recipe import Recipe
from jaxgen.recipes import watermarked_claims as claims
from jaxgen.recipes.claims import Claim, claim_config
from jaxgen.recipes.next_scale import ModelConfig, TokenizerConfig
from jaxgen.recipes.watermarked import IndexConfig, IndexEncoderConfig, IndexMarkConfig

VARIANTS = ("smoke", "small", "paper")

# LlamaGen's tokenizer, VQ-16 (Sun et al. 2024, section 4.1).
TOKENIZER = TokenizerConfig(ch=128, vocab=16384, width=8, patch_nums=(16,), phis=1, phi_ratio=0.0, cosine=True, dtype="bfloat16")


def get_config(variant: str) -> Recipe:
    """The recipe of a variant.

    Raises:
      ValueError: an unknown variant.
    """
    return _config(variant).recipe()


def _config(variant: str) -> IndexConfig:
    if variant == "paper":
        base = lbw.imagenet(TOKENIZER, ModelConfig(depth=24, width=1024, heads=16))
        # 100 epochs of ImageNet's 50,000 validation images, as the authors' script.
        optim = OptimConfig(lr=1e-5, schedule="constant", b2=0.95, weight_decay=0.0, clip=1.0)
        train = IndexEncoderConfig(steps=100 * 50_000 // 8, batch_size=8, optim=optim)
    else:
        base, smoke = lbw.digits(variant), variant == "smoke"
        optim = OptimConfig(lr=1e-3, warmup_steps=2 if smoke else 20, schedule="cosine", lr_end=0.05, weight_decay=0.0, clip=1.0)
        train = IndexEncoderConfig(steps=10 if smoke else 400, batch_size=16, code_weight=1.0, swap=0.5, optim=optim)
    fields = config_lib.fields_of(base)
    return IndexConfig(**fields, mark=IndexMarkConfig(), index_train=train)


def claim(budget: str = "small", *, seeds: int = 3, edits: Sequence[str] = (), log: Callable[[str], None] = print) -> list[Claim]:
    """S074's claims, measured again: detection, after a crop too, with hardly a change of the picture.

    Args:
      budget: "smoke" (nothing is learnt), or "small" (the digits).
      seeds: trainings of the generator.
      edits: of the configuration, such as `index_train.swap=0`.
      log: takes progress lines.
    """
    config, smoke = claim_config(_config, budget, edits)
    # A crop of 4 x 4 cells has no inside.
    if smoke:
        config = config_lib.override(config, ["mark.margin=0"])
    shares = (0.0, 1.0) if smoke else (0.0, 0.5, 0.8, 1.0)
    samples = 20 if smoke else 300
    return [claims.compare_shares(config, shares=shares, seeds=seeds, samples=samples, decoys=999, log=log)]
