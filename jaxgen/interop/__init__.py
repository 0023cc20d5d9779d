"""Published PyTorch checkpoints in, safetensors out: file formats, name mappings, one module a layout."""
