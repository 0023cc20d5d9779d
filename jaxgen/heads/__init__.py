"""The law of one step: what a generator's features say of the token that comes there."""

from jaxgen.heads.diffusion import DiffusionHead

__all__ = ["DiffusionHead"]
