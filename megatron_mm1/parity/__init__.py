"""Whether every parallel layout computes the same model as one process: `mm1 parity`."""
