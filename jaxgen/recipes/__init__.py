"""Compositions: a configuration dataclass, the stages that it trains and the sampler, one file a construction."""
