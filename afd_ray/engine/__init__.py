"""The engine core: KV cache, scheduler, sampling, pipeline and the two step loops."""
