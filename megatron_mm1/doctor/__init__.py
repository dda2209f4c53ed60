"""`mm1 doctor`: what this machine can run. Imports no torch: what could crash or hang is asked of another process."""
