//! Everything that measures or predicts, as trireme bench.
