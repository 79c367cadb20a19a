"""Post-training of open-weight chat models: data, SFT, preference, RL, export and report in one command."""

__version__ = "0.1.0"
