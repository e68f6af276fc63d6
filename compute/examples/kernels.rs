//! Compiles every CUDA kernel into a folder, without a device: `cargo run -p compute --example kernels -- sm_90a FOLDER`.
//!
//! Prints each entry's registers and shared memory as the compiler reports them; fails on a register spill, which costs
//! more than any kernel here can spare. Called `kernels` and put beside `trireme`, the folder is found there: such a machine needs
//! no compiler.

use std::path::PathBuf;
use std::process::ExitCode;

use compute::cuda::{KernelStore, nvrtc};

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let (Some(architecture), Some(folder)) = (arguments.next(), arguments.next()) else {
        eprintln!("usage: kernels ARCHITECTURE FOLDER");
        return ExitCode::FAILURE;
    };
    match nvrtc::version() {
        Some((major, minor)) => println!("NVRTC {major}.{minor}, {architecture}"),
        None => eprintln!("no NVRTC library: put its folder on LD_LIBRARY_PATH"),
    }
    let (mut entries, mut spilling) = (0, Vec::new());
    let built = KernelStore::build(&PathBuf::from(folder), &architecture, |file, log| {
        for entry in Entry::all(log) {
            println!("{file:<14} {:<22} {}", entry.name, entry.usage);
            entries += 1;
            if entry.spills {
                spilling.push(entry.name);
            }
        }
        for line in log.lines().filter(|line| line.contains("warning") || line.contains("error")) {
            println!("{file:<14} {line}");
        }
    });
    if let Err(error) = built {
        eprintln!("{error}");
        return ExitCode::FAILURE;
    }
    println!("{entries} entries, {} spill {spilling:?}", spilling.len());
    // A log that can no longer be read must not pass for one without spills.
    if entries > 0 && spilling.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// One entry point in the compiler's log.
struct Entry {
    name: String,
    spills: bool,
    usage: String,
}

impl Entry {
    fn all(log: &str) -> Vec<Self> {
        let mut entries: Vec<Self> = Vec::new();
        for line in log.lines() {
            if let Some((_, rest)) = line.split_once("Compiling entry function '") {
                let name = rest.split('\'').next().unwrap_or_default().to_owned();
                // Until the log says otherwise, the worst is assumed.
                entries.push(Self { name, spills: true, usage: String::new() });
            }
            let Some(entry) = entries.last_mut() else { continue };
            if line.contains("bytes spill stores") {
                // A stack frame is an array that could not stay in registers: the same cost by another name.
                entry.spills =
                    !line.contains(" 0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads");
            }
            if let Some((_, usage)) = line.split_once("Used ") {
                entry.usage = usage.to_owned();
            }
        }
        entries
    }
}
