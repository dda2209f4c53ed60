"""`mm1 report`: a run's logs and evaluations as one HTML page."""
