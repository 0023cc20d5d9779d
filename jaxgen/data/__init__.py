"""Images for training: sources, transforms and batches.

`batches(make_source(config, "train"), config, batch_size=..., train=True)` is all that most callers need.
"""

from jaxgen.data.folder import FileSource, folder
from jaxgen.data.loader import DataConfig, Pictures, batches, image_batches, info, make_source, read_image
from jaxgen.data.shard_set import ShardSource, shard_source
from jaxgen.data.sources import ArraySource, EncodedSource, Source, digits, npz
from jaxgen.data.tar_shards import write_tar
from jaxgen.data.throughput import Throughput
from jaxgen.data.token_cache import TokenSource, digest, token_batches, write_tokens
from jaxgen.data.transforms import Preprocess, pixels, to_uint8
from jaxgen.data.world import World
from jaxgen.data.world_scene import WorldConfig

__all__ = [
    "ArraySource",
    "DataConfig",
    "EncodedSource",
    "FileSource",
    "Pictures",
    "Preprocess",
    "ShardSource",
    "Source",
    "Throughput",
    "TokenSource",
    "World",
    "WorldConfig",
    "batches",
    "digest",
    "digits",
    "folder",
    "image_batches",
    "info",
    "make_source",
    "npz",
    "pixels",
    "read_image",
    "shard_source",
    "to_uint8",
    "token_batches",
    "write_tar",
    "write_tokens",
]
