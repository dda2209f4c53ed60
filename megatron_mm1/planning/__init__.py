"""What a configuration costs, from the configuration alone: parameters, FLOPs, memory, pipeline. Imports no torch."""
