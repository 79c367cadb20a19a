"""`python -m posttrain.host.detached PIPE`: become the command that comes through the pipe, with its environment."""

import json
import os
import sys
from pathlib import Path

OF_THE_SESSION = ("TERM", "STY", "WINDOW", "TMUX", "TMUX_PANE", "TERMCAP")


def main() -> None:
    handed = json.loads(Path(sys.argv[1]).read_bytes())
    own = {name: os.environ[name] for name in OF_THE_SESSION if name in os.environ}
    os.chdir(handed["folder"])
    os.execve(sys.executable, [sys.executable, "-m", "posttrain", *handed["words"]], handed["environment"] | own)


if __name__ == "__main__":
    main()
