"""Other ways to load the same shards of images and captions, set up as their users set them up."""
