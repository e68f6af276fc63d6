//! Prompts to KV and a first token, chunk by chunk.
