"""Powers of two in place of those of e: the hardware has exp2 and log2, and a scale takes the factor in."""

import math

__all__ = ["LN2", "LOG2E"]

LOG2E = math.log2(math.e)
LN2 = math.log(2)
