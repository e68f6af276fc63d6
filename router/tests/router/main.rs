//! The router as its clients and workers see it: real HTTP, real gRPC, real mutual TLS, scripted workers.

mod failures;
mod grpc;
mod malformed;
mod membership;
mod openai;
mod support;
