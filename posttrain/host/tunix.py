"""Finds the Python that Tunix is installed for; it needs other versions of our own libraries, so rarely this one."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec

from posttrain.errors import MachineError
from posttrain.run.redaction import without_secrets

PYTHON = "POSTTRAIN_TUNIX_PYTHON"
LOOK = "import sys; from importlib.util import find_spec; sys.exit(find_spec('tunix') is None)"
PACKAGES = "google-tunix==0.1.7 qwix==0.1.8 jax==0.10.2 flax==0.12.8"
"""What was run; the Makefile's stamp `tunix` installs the same."""
INSTALL = f"""it goes into an environment of its own, since it wants an older safetensors than transformers does:
  python3 -m venv .tools/tunix && .tools/tunix/bin/pip install {PACKAGES}
  export {PYTHON}=$PWD/.tools/tunix/bin/python
For a GPU or TPU install jax[cuda13] or jax[tpu] there as well. --backend torch needs none of it"""


def interpreter() -> str:
    """The program to start the backend with. MachineError where there is none, with the commands that install it."""
    named = os.environ.get(PYTHON)
    if named is None and find_spec("tunix") is not None:
        return sys.executable
    if named is None:
        raise MachineError(f"--backend tunix needs Tunix: {INSTALL}")
    found = shutil.which(os.path.expanduser(named))
    if found is None:
        raise MachineError(f"{PYTHON}={named}: there is no such program. {INSTALL}")
    if subprocess.run([found, "-c", LOOK], env=without_secrets(), check=False).returncode:
        raise MachineError(f"{PYTHON}={named}: it has no Tunix. {INSTALL}")
    return found
