//! The `trireme` program.

use std::process::ExitCode;

use clap::Parser as _;
use trireme::{
    certificates, chat,
    cli::{Cli, Command},
    config::Role,
    generate, inspect, node, synth, up,
};

fn main() -> ExitCode {
    fabric::keep_freed_memory();
    let cli = Cli::parse();
    // Lives until everything else has ended: then the last spans leave.
    let _spans = trireme::tracing_setup::install(match cli.command {
        Command::Router(_) => Some("router"),
        Command::Prefill(_) => Some("prefill"),
        Command::Decode(_) => Some("decode"),
        Command::Expert(_) => Some("expert"),
        _ => None,
    });
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: no runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let outcome = runtime.block_on(async {
        match cli.command {
            Command::Up(args) => up::run(args).await,
            Command::Router(args) => node::run(Role::Router, args).await,
            Command::Prefill(args) => node::run(Role::Prefill, args).await,
            Command::Decode(args) => node::run(Role::Decode, args).await,
            Command::Expert(args) => node::run(Role::Expert, args).await,
            Command::Chat(args) => chat::run(args).await,
            Command::Generate(args) => generate::run(args).await,
            Command::Inspect(args) => inspect::run(args),
            Command::Synth(args) => synth::run(args),
            Command::Certificates(args) => certificates::run(args),
            Command::Bench(command) => bench::run(command).await,
        }
    });
    // A blocking read of a terminal cannot be interrupted; it must not hold the end of the program.
    runtime.shutdown_background();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", told_once(&error));
            ExitCode::FAILURE
        }
    }
}

/// The error and its causes, without those that an outer message has told already.
fn told_once(error: &anyhow::Error) -> String {
    let mut told = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if told.is_empty() {
            told = cause;
        } else if !told.contains(&cause) {
            told = format!("{told}: {cause}");
        }
    }
    told
}
