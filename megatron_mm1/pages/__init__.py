"""What HTML pages that open without a server are made of: one style, plots and pictures inside the file."""
