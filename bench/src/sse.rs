//! Server-sent events as OpenAI-compatible servers send them: `data: …` lines, blank lines between events.
//!
//! Push-driven, so that it works the same on a socket and in a test; bytes may be cut anywhere, inside a UTF-8
//! sequence too. Comments and other fields are skipped, as the specification asks.

/// An event longer than this is refused: no server of this kind sends one.
const EVENT_BYTES_MAX: usize = 4 << 20;

/// Turns a stream of bytes into the `data` of its events.
#[derive(Debug, Default)]
pub struct Decoder {
    line: Vec<u8>,
    data: String,
    has_data: bool,
}

/// The stream is not server-sent events.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SseError {
    /// A line or an event grew past the bound.
    #[error("an event is longer than {EVENT_BYTES_MAX} bytes")]
    TooLong,
    /// An event's text is not UTF-8.
    #[error("an event is not UTF-8")]
    NotUtf8,
}

impl Decoder {
    /// Takes the next bytes and calls `event` with the data of every event that they complete.
    pub fn push(&mut self, bytes: &[u8], mut event: impl FnMut(&str)) -> Result<(), SseError> {
        for &byte in bytes {
            if byte != b'\n' {
                if self.line.len() + self.data.len() >= EVENT_BYTES_MAX {
                    return Err(SseError::TooLong);
                }
                self.line.push(byte);
                continue;
            }
            if self.line.last() == Some(&b'\r') {
                self.line.pop();
            }
            if self.line.is_empty() {
                if std::mem::take(&mut self.has_data) {
                    event(&self.data);
                }
                self.data.clear();
            } else if let Some(value) = self.line.strip_prefix(b"data:") {
                let value = value.strip_prefix(b" ").unwrap_or(value);
                let value = std::str::from_utf8(value).map_err(|_| SseError::NotUtf8)?;
                if self.has_data {
                    self.data.push('\n');
                }
                self.data.push_str(value);
                self.has_data = true;
            }
            self.line.clear();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(pieces: &[&[u8]]) -> Result<Vec<String>, SseError> {
        let mut decoder = Decoder::default();
        let mut events = Vec::new();
        for piece in pieces {
            decoder.push(piece, |data| events.push(data.to_owned()))?;
        }
        Ok(events)
    }

    #[test]
    fn events_are_the_same_wherever_the_bytes_are_cut() {
        let text =
            "data: {\"a\":\"é\"}\r\n\r\n: comment\nevent: x\ndata: 1\ndata:2\n\ndata: [DONE]\n\n".as_bytes();
        let expected = vec!["{\"a\":\"é\"}".to_owned(), "1\n2".to_owned(), "[DONE]".to_owned()];
        for cut in 0..text.len() {
            let (a, b) = text.split_at(cut);
            assert_eq!(decode(&[a, b]), Ok(expected.clone()), "cut at {cut}");
        }
    }

    #[test]
    fn an_endless_line_and_broken_text_are_refused() {
        let long = vec![b'x'; EVENT_BYTES_MAX + 1];
        assert_eq!(decode(&[&long]), Err(SseError::TooLong));
        assert_eq!(decode(&[b"data: \xff\n\n"]), Err(SseError::NotUtf8));
    }
}
