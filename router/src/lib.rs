//! HTTP and gRPC in, tokens out.
