"""A device mesh emulated by CPU processes, one for each device: the same shards in and out, full tensors inside."""
