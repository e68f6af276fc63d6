//! The composition root: any role, or a whole cluster, from one configuration.
//!
//! This crate decides nothing about serving; it puts the other crates together ([`node`]), in one process
//! ([`cluster`]) or in many ([`up`], [`supervisor`]), and has the commands that people type.

pub mod admin;
pub mod answer;
pub mod certificates;
pub mod chat;
pub mod cli;
pub mod cluster;
pub mod config;
pub mod generate;
pub mod identity;
pub mod inspect;
pub mod node;
pub mod otlp;
pub mod progress;
pub mod ready;
pub mod supervisor;
pub mod synth;
pub mod tracing_setup;
pub mod up;
