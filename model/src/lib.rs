//! What follows from a checkpoint and token ids alone.
