"""What a checkpoint folder is, and conversion to and from other projects' forms; without megatron-core."""
