"""InceptionV3's published weights: `pt_inception-2015-12-05-6726825d.pth` of pytorch-fid, torch-fidelity's file of the same
network, and torchvision's `inception_v3`."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jaxgen.interop import files, mapping
from jaxgen.nn.inception import InceptionV3

__all__ = ["load", "save"]

# Class counts tell the two networks apart.
FID_CLASSES, TORCHVISION_CLASSES = 1008, 1000
_NAMES = {"kernel": "conv.weight", "scale": "bn.weight", "bias": "bn.bias", "mean": "bn.running_mean", "var": "bn.running_var"}
_LAST = (mapping.Rule("fc.weight", "fc_kernel", mapping.linear), mapping.Rule("fc.bias", "fc_bias"))


def load(path: str | os.PathLike, *, preprocess: str = "tensorflow") -> tuple[InceptionV3, dict[str, Any]]:
    """The network and its variables, from a file of its state dict.

    1008 classes make it the network that FID is defined with; 1000 make it torchvision's, whose features are other ones and
    give other distances.

    Args:
      path: a file of PyTorch or safetensors.
      preprocess: see `jaxgen.nn.inception.inception_input`.

    Returns:
      `(module, {"params": ...})`, float32 numpy arrays; `module.apply(variables, images, method="observe")` reads uint8 images.

    Raises:
      ValueError: a file that cannot be read, another number of classes, or names or shapes that are not InceptionV3's.

    Example:
      >>> inception, variables = load("pt_inception-2015-12-05-6726825d.pth")
    """
    state = files.read_state_dict(path)
    classes = state["fc.bias"].shape[0] if "fc.bias" in state else 0
    if classes not in (FID_CLASSES, TORCHVISION_CLASSES):
        found = f"{classes} classes" if classes else "no fc.bias"
        raise ValueError(f"{os.fspath(path)}: not the weights of InceptionV3 for FID or of torchvision ({found})")
    module = InceptionV3(num_classes=classes, tensorflow=classes == FID_CLASSES, preprocess=preprocess)
    expected = _shapes(classes)
    ignore = (r".*\.num_batches_tracked", r"AuxLogits\..*")
    try:
        params = mapping.to_jax(state, _rules(classes), ignore=ignore, expected=expected)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: not the weights of an InceptionV3 ({error})") from error
    return module, {"params": jax.tree.map(lambda x: np.array(x, np.float32, order="C"), params)}


def save(path: str | os.PathLike, variables: Mapping[str, Any]) -> None:
    """Writes variables under their published names, as safetensors; `load` reads them back.

    Raises:
      ValueError: parameters that are not InceptionV3's, or the file cannot be written.
    """
    params = variables["params"]
    classes = len(params["fc_bias"])
    mapping.check_shapes(params, _shapes(classes), _rules(classes))
    files.write_safetensors(path, mapping.to_torch(params, _rules(classes)), metadata={"format": "pt"})


@functools.cache
def _shapes(classes: int) -> dict[str, Any]:
    image = jax.ShapeDtypeStruct((1, 299, 299, 3), jnp.float32)
    return jax.eval_shape(InceptionV3(num_classes=classes).init, jax.random.key(0), image)["params"]


@functools.cache
def _rules(classes: int) -> tuple[mapping.Rule, ...]:
    rules = list(_LAST)
    for path in traverse_util.flatten_dict(_shapes(classes), sep="/"):
        module, _, name = path.rpartition("/")
        if module:
            layout = mapping.conv if name == "kernel" else mapping.same
            rules.append(mapping.Rule(f"{module.replace('/', '.')}.{_NAMES[name]}", path, layout))
    return tuple(rules)
