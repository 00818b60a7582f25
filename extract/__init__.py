"""What a domain's sub-model consists of inside a checkpoint."""
