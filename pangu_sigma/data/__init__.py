"""From corpus files to batches: sources, tokenizer, token store, packing, mixture sampler, read-ahead."""
