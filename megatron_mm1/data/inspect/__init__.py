"""`mm1 data inspect`: what prepared data holds, and what a run makes of it."""
