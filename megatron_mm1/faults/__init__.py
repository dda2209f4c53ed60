"""Faults of a running job: a rank that dies, fails or stops takes the others down, and is named."""
