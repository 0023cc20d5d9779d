"""One file a system: `get_config(variant) -> Recipe`, and the system's claim."""
