"""Process groups, pipeline stages and the device.

Importing this package readies the process for megatron-core (see `device`), so every module of ours that imports
megatron-core imports this package first.
"""

from megatron_mm1.parallel.device import prepare

prepare()
