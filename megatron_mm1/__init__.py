"""megatron_mm1: train MM1-style multimodal LLMs with megatron-core.

Importing the package alone pulls in neither torch nor megatron-core, so that `config` and `planning` run on a login
node.
"""

__version__ = "0.1.0"
