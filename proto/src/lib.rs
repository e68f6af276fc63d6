//! What two processes must agree on: protobuf files, generated code, domain types and their conversions.
