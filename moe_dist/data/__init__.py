"""Text in, batches out: sources, chat formatting, packing, the token cache, the resumable sampler."""
