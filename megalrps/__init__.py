"""megalrps: Megatron-style distributed pretraining of LLMs built around the version update."""

__version__ = "0.1.0"
