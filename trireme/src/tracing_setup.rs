//! Where log lines go: standard error, as text; levels by `TRIREME_LOG` in `tracing`'s filter syntax.

use tracing_subscriber::EnvFilter;

/// Installs the process' subscriber. Roles log from `info`, commands that a person reads from `warn`.
pub fn install(is_role: bool) {
    // A cluster inside a command is taken down worker by worker, which its router rightly warns of and nobody needs to read.
    let default = if is_role { "info" } else { "warn,router=error,proto=error" };
    let filter = EnvFilter::try_from_env("TRIREME_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    // A second installation (a test's own subscriber is there already) is no error.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .try_init();
}
