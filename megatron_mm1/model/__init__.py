"""The model: vision tower, connectors, decoder, and MM1Model that joins them. Process groups are passed in, never
looked up.
"""

import megatron_mm1.parallel  # noqa: F401  # readies the process for megatron-core
