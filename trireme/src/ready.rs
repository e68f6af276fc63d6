//! Waiting for a cluster to be able to answer, by asking its own health page.

use std::time::{Duration, Instant};

use bench::client::Client;
use serde_json::Value;

const POLL: Duration = Duration::from_millis(15);

/// Returns once `GET /health` says 200 and `ours` holds of its body. `watch` is called between two looks and may give
/// up with a reason.
pub async fn wait(
    client: &Client,
    timeout: Duration,
    ours: impl Fn(&Value) -> bool,
    mut watch: impl FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let begin = Instant::now();
    loop {
        let last = client.get("/health").await;
        if matches!(&last, Ok((200, body)) if ours(body)) {
            return Ok(());
        }
        watch()?;
        if begin.elapsed() >= timeout {
            let seen = match last {
                Ok((status, body)) => format!("HTTP {status}: {body}"),
                Err(error) => error.to_string(),
            };
            anyhow::bail!("the cluster was not ready within {} s; its health says {seen}", timeout.as_secs());
        }
        tokio::time::sleep(POLL).await;
    }
}
