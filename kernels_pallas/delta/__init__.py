"""Gated delta rule."""

from kernels_pallas.delta.api import gated_delta, gated_delta_step

__all__ = ["gated_delta", "gated_delta_step"]
