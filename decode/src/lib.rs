//! KV to the remaining tokens.
