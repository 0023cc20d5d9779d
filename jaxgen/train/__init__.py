"""Training: meshes, the jitted update, checkpoints, logging, and the loop over a recipe's stages."""

from jaxgen.hosts import to_host
from jaxgen.train.checkpoint import Checkpoints, load_params, save_params
from jaxgen.train.distributed import World, find_world, start_world
from jaxgen.train.evaluation import evaluate
from jaxgen.train.gradients import check_batch
from jaxgen.train.interrupt import Interrupted
from jaxgen.train.log import MetricsLog, Progress
from jaxgen.train.loop import NonFiniteError, RunConfig, StageResult, train
from jaxgen.train.mesh import (
    batch_sharding,
    batch_share,
    make_mesh,
    parse_mesh,
    replicated,
    shard_batch,
    shardings,
    spread,
)
from jaxgen.train.profile import CompileCache, Profile
from jaxgen.train.rules import check_rules, parse_rules
from jaxgen.train.step import TrainState, abstract_state, init_state, make_step
from jaxgen.train.waiting import saying
from jaxgen.train.workdir import load_config, save_config

__all__ = [
    "Checkpoints",
    "CompileCache",
    "Interrupted",
    "MetricsLog",
    "NonFiniteError",
    "Profile",
    "Progress",
    "RunConfig",
    "StageResult",
    "TrainState",
    "World",
    "abstract_state",
    "batch_sharding",
    "batch_share",
    "check_batch",
    "check_rules",
    "evaluate",
    "find_world",
    "init_state",
    "load_config",
    "load_params",
    "make_mesh",
    "make_step",
    "parse_mesh",
    "parse_rules",
    "replicated",
    "save_config",
    "save_params",
    "saying",
    "shard_batch",
    "shardings",
    "spread",
    "start_world",
    "to_host",
    "train",
]
