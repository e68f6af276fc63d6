//! A choice's two streams, read as one.
//!
//! Either worker may end the choice: by an error, by closing its stream too early, by breaking the protocol,
//! or by losing its lease. Once decode has the hand-off and the first token is out, prefill may fail without
//! harm.

use std::sync::Arc;
use std::time::Duration;

use proto::v1;
use proto::v1::decode_client::DecodeClient;
use tonic::{Status, Streaming};

use super::attempt::{Attempt, Failure};
use super::merge::Merge;
use crate::worker::Worker;

/// How long a finished choice waits for prefill to close its stream: a receipt crosses the network in less.
const PREFILL_END_MAX: Duration = Duration::from_millis(100);

/// How long a sequence that a stop string has ended may go on while its worker is told.
const FINISH_MAX: Duration = Duration::from_millis(500);

/// A choice's two streams.
pub(super) struct Streams<'a> {
    pub attempt: &'a Attempt<'a>,
    pub prefill: Arc<Worker>,
    pub decode: Arc<Worker>,
    /// `None` once it has ended.
    pub first_tokens: Option<Streaming<v1::PrefillEvent>>,
    pub tokens: Streaming<v1::DecodeEvent>,
    pub merge: Merge,
}

impl Streams<'_> {
    /// The next event of either: who sent it, and the tokens that are now in order.
    pub async fn next(&mut self) -> Result<(Arc<Worker>, Vec<v1::GeneratedToken>), Failure> {
        loop {
            tokio::select! {
                event = next_of(&mut self.first_tokens) => match event {
                    Ok(Some(event)) => return merged(&self.prefill, self.merge.prefill(event)),
                    Ok(None) if self.merge.needs_prefill() => {
                        return Err(Failure::protocol(&self.prefill, "its stream ended before the hand-off"));
                    }
                    Err(status) if self.merge.needs_prefill() => {
                        return Err(self.attempt.failure(&self.prefill, &status));
                    }
                    Ok(None) | Err(_) => self.first_tokens = None,
                },
                event = self.tokens.message(), if self.merge.needs_decode() => match event {
                    Ok(Some(event)) => return merged(&self.decode, self.merge.decode(event)),
                    Ok(None) => {
                        return Err(Failure::protocol(&self.decode, "its stream ended before the sequence did"));
                    }
                    Err(status) => return Err(self.attempt.failure(&self.decode, &status)),
                },
                () = self.prefill.gone(), if self.merge.needs_prefill() => {
                    return Err(Failure::gone(&self.prefill));
                }
                () = self.decode.gone(), if self.merge.needs_decode() => {
                    return Err(Failure::gone(&self.decode));
                }
            }
        }
    }

    /// A stop string has ended the choice, which decode cannot know: tells it why before hanging up, so that it counts a
    /// finished sequence. Nobody waits for that, and where it fails the sequence counts as cancelled.
    pub fn text_ended(self, end: v1::FinishRequest) {
        let Some(channel) = self.decode.channel.clone() else { return };
        let (tokens, first_tokens) = (self.tokens, self.first_tokens);
        tokio::spawn(async move {
            let mut decode = DecodeClient::new(channel);
            let _ = tokio::time::timeout(FINISH_MAX, decode.finish(end)).await;
            drop((tokens, first_tokens));
        });
    }

    /// A short answer is over while decode's receipt is still on its way to prefill: hanging up now would
    /// look like a cancel there. Whatever it says or does not say, the sequence is complete.
    pub async fn let_prefill_end(&mut self) {
        if self.first_tokens.is_none() {
            return;
        }
        let end = async {
            while let Ok(Some(event)) = next_of(&mut self.first_tokens).await {
                let _ = self.merge.prefill(event);
            }
        };
        let _ = tokio::time::timeout(PREFILL_END_MAX, end).await;
    }
}

/// The stream's next message; none ever from one that has ended.
async fn next_of<T>(stream: &mut Option<Streaming<T>>) -> Result<Option<T>, Status> {
    match stream {
        Some(stream) => stream.message().await,
        None => std::future::pending().await,
    }
}

fn merged(
    worker: &Arc<Worker>,
    ready: Result<Vec<v1::GeneratedToken>, &'static str>,
) -> Result<(Arc<Worker>, Vec<v1::GeneratedToken>), Failure> {
    match ready {
        Ok(tokens) => Ok((Arc::clone(worker), tokens)),
        Err(problem) => Err(Failure::protocol(worker, problem)),
    }
}
