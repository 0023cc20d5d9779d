"""S114 Falcon: semi-autoregressive drafts from the target's features, in a designed tree (Gao et al. 2024, arXiv 2412.12639).

    python scripts/train.py --config configs/falcon.py --variant small --workdir runs/falcon --set data.path=tinyshakespeare.txt
    python scripts/sample.py --workdir runs/falcon --prompt "To be, or" --num 3 --out text.txt

Variants: `smoke`, `small` (the byte model of `configs/language.py` and a drafter of one decoder block and two LSTM layers), and
`paper` (Vicuna-7B's sizes with the authors' tree of 75 drafts in four levels for k = 2).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from configs import language
from jaxgen import config as config_lib
from jaxgen.data.text import TextConfig
from jaxgen.decoding.topology import chain
from jaxgen.generators.feature_drafter import FeatureDraft
from jaxgen.generators.sequence_sampler import Draft, Plain, SequenceSampler
from jaxgen.optim import OptimConfig
from jaxgen.recipe import Recipe, modules
from jaxgen.recipes import claims
from jaxgen.recipes.claims import Claim, claim_config
from jaxgen.recipes.decoding_claims import compare_samplers, held_out_prompts
from jaxgen.recipes.falcon import FalconConfig
from jaxgen.recipes.language import LanguageConfig, LanguageModelConfig, LanguageTrainConfig, tiny

VARIANTS = ("smoke", "small", "paper")

# The authors' `kmask2_4layer_tree`.
PAPER_TREE = (
    "0 1 2 3 4 5 6 7 8 9 a b c d e f g h i j 00 01 02 03 04 05 06 07 08 09 0a 10 11 12 13 20 21 22 23 "
    "000 001 002 003 004 005 006 010 020 030 011 012 013 014 015 016 017 018 019 100 200 "
    "0000 0001 0002 0003 0004 0005 0006 0007 0008 0009 0100 0200 0300 1000 2000"
)


def get_config(variant: str) -> Recipe:
    """The recipe of a variant.

    Raises:
      ValueError: an unknown variant.
    """
    return _config(variant).recipe()


def _config(variant: str) -> FalconConfig:
    if variant == "smoke":
        config = tiny(_extended(language.base("small")))
        return dataclasses.replace(config, drafter_train=config.model_train)
    if variant == "small":
        return _extended(language.base("small"))
    if variant == "paper":
        model = LanguageModelConfig(vocab=32000, width=4096, heads=32, depth=32, hidden=11008, scan_layers=True, dtype="bfloat16")
        optim = OptimConfig(lr=3e-5, warmup_steps=2000, schedule="lin0", b1=0.9, b2=0.95, clip=0.5)
        return FalconConfig(
            data=TextConfig(length=2048),
            model=model,
            model_train=LanguageTrainConfig(steps=0),
            drafter_train=LanguageTrainConfig(steps=800_000, batch_size=2, optim=optim),
            tree=PAPER_TREE,
        )
    raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS)}")


def _extended(config: LanguageConfig, **fields) -> FalconConfig:
    return FalconConfig(**config_lib.fields_of(config), **fields)


def claim(budget: str = "small", *, seeds: int = 1, edits: Sequence[str] = (), log: Callable[[str], None] = print) -> list[Claim]:
    """S114's claims, measured again: two tokens a pass against one, with and without glancing, trees against chains.

    Args:
      budget: "smoke" (nothing is learnt) or "small".
      seeds: of the drafters' training; the target is trained once.
      edits: of the configuration.
      log: takes progress lines.
    """
    config, smoke = claim_config(_config, budget, edits)
    base = LanguageConfig(**config_lib.fields_of(config, LanguageConfig))
    _, target = claims.trained(base, 0, log)
    target = {"generator": target["generator"]}
    systems = {
        "k=2": config.drafter,
        "k=2, no glancing": dataclasses.replace(config.drafter, glance=0.0),
        "k=1": dataclasses.replace(config.drafter, block=1),
    }
    prompts = held_out_prompts(config.data, count=4 if smoke else 16, length=16)
    rows = []
    for seed in range(seeds):
        samplers, params = {"plain": SequenceSampler(model=config.build_model(), method=Plain())}, modules(target)
        for name, drafter in systems.items():
            log(f"seed {seed}: {name}")
            system = dataclasses.replace(config, drafter=drafter)
            _, trained, _ = claims.train_all(system, seed, target, log)
            label = f"drafter {name}"
            params[label] = modules(trained)["drafter"]
            shapes = {"chain of 4": chain(4)} | ({} if "no" in name else {"tree": config.topology})
            for shape, topology in shapes.items():
                passes = -(-len(topology.levels) // drafter.block)
                method = FeatureDraft(config.build_model(), system.build_drafter(), topology, name=label)
                samplers[f"{name}, {shape}, {passes} passes"] = SequenceSampler(model=config.build_model(), method=method)
        model = dataclasses.replace(config.model, depth=2)
        log(f"seed {seed}: a model of half the depth")
        draft = dataclasses.replace(base, model=model, model_train=config.drafter_train)
        _, trained, _ = claims.train_all(draft, seed, {}, log)
        params["draft"] = modules(trained)["generator"]
        method = Draft(model.build(), chain(4))
        samplers["draft model of 2 blocks, chain of 4, 4 passes"] = SequenceSampler(model=config.build_model(), method=method)
        rows += [
            {"seed": seed} | row
            for row in compare_samplers(samplers, params, prompts, new_tokens=16 if smoke else 64, repeats=1 if smoke else 3)
        ]
    notes = (
        f"Temperature 1. The target has {config.model.depth} blocks, the drafter one and {config.drafter.recurrent} LSTM layers: "
        "a pass of it costs a good part of a target call, where the published drafters cost a thirtieth. "
        f"All drafts are trained alike, {config.drafter_train.steps} updates of {config.drafter_train.batch_size} windows."
    )
    return [Claim("Semi-autoregressive drafting: tokens a target call and time", rows, notes)]
