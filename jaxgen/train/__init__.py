"""Training: meshes, the jitted update, checkpoints, logging, and the loop over a recipe's stages."""

from jaxgen.train.checkpoint import Checkpoints, load_params, save_params
from jaxgen.train.evaluation import evaluate
from jaxgen.train.interrupt import Interrupted
from jaxgen.train.log import MetricsLog, Progress
from jaxgen.train.loop import NonFiniteError, RunConfig, StageResult, train
from jaxgen.train.mesh import batch_sharding, make_mesh, parse_mesh, replicated, shard_batch, shardings
from jaxgen.train.step import TrainState, abstract_state, init_state, make_step
from jaxgen.train.workdir import load_config, save_config

__all__ = [
    "Checkpoints",
    "Interrupted",
    "MetricsLog",
    "NonFiniteError",
    "Progress",
    "RunConfig",
    "StageResult",
    "TrainState",
    "abstract_state",
    "batch_sharding",
    "evaluate",
    "init_state",
    "load_config",
    "load_params",
    "make_mesh",
    "make_step",
    "parse_mesh",
    "replicated",
    "save_config",
    "save_params",
    "shard_batch",
    "shardings",
    "train",
]
