"""Where what can be made again is kept between runs."""

import os
from pathlib import Path

VARIABLE = "POSTTRAIN_CACHE_DIR"


def cache_folder() -> Path:
    """`POSTTRAIN_CACHE_DIR`, or `posttrain` where the user's caches are. Nothing in it is needed by a finished run."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return Path(chosen).expanduser().absolute()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "posttrain"
