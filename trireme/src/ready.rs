//! Waiting for a cluster to be able to answer, by asking its own health page.

use std::time::{Duration, Instant};

use bench::client::Client;

const POLL: Duration = Duration::from_millis(15);

/// Returns once `GET /health` says 200. `watch` is called between two looks and may give up with a reason.
pub async fn wait(
    client: &Client,
    timeout: Duration,
    mut watch: impl FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let begin = Instant::now();
    loop {
        let last = client.get("/health").await;
        if matches!(last, Ok((200, _))) {
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
