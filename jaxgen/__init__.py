"""jaxgen: generative models that build their output in steps, in JAX.

Import the room you need: `jaxgen.tokenizers`, `jaxgen.generators`, `jaxgen.decoding`, `jaxgen.interop`, `jaxgen.train`, ...
Importing starts no accelerator, reads no data and changes no global setting.
"""

__version__ = "0.1.0"
