//! One forward step of a DeepSeek model: layers, paged KV cache, batch, sampler.
