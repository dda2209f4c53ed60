"""What a configuration costs, from the configuration alone: parameters, FLOPs, the pipeline split. Imports no torch."""
