//! Stop strings, matched on streamed text.
//!
//! The match that ends first wins; of several that end together, the one that starts first. That is what
//! matching character by character would find, so the answer does not depend on how tokens cut the text.
//! Text is held back only while it may turn out to be the beginning of a stop string: it ends the text
//! and is a proper prefix of one.

/// Longest stop string, bytes.
pub(crate) const STOP_BYTES_MAX: usize = 512;
/// Stop strings of one request.
pub(crate) const STOPS_MAX: usize = 16;

/// What has become certain.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Certain {
    /// Text that belongs to the answer.
    pub text: String,
    /// Index of the stop string that ended it.
    pub stopped: Option<usize>,
}

/// Watches one choice's text. After a match it must not be fed again.
#[derive(Debug)]
pub(crate) struct StopMatcher {
    stops: Vec<String>,
    held: String,
}

impl StopMatcher {
    /// None of `stops` may be empty.
    pub fn new(stops: Vec<String>) -> Self {
        Self { stops, held: String::new() }
    }

    /// Takes the next piece of text.
    pub fn push(&mut self, piece: &str) -> Certain {
        if self.stops.is_empty() {
            return Certain { text: piece.to_owned(), stopped: None };
        }
        self.held.push_str(piece);
        let matches = self.stops.iter().enumerate().filter_map(|(index, stop)| {
            let start = self.held.find(stop.as_str())?;
            Some((start + stop.len(), start, index))
        });
        if let Some((_, start, index)) = matches.min() {
            self.held.truncate(start);
            return Certain { text: std::mem::take(&mut self.held), stopped: Some(index) };
        }
        let rest = self.held.split_off(self.held.len() - self.undecided());
        Certain { text: std::mem::replace(&mut self.held, rest), stopped: None }
    }

    /// Takes text in which nothing may match (before `min_tokens`), and forgets what was held back: a stop
    /// string does not begin in such text either.
    pub fn pass(&mut self, piece: &str) -> String {
        let mut text = std::mem::take(&mut self.held);
        text.push_str(piece);
        text
    }

    /// The text has ended: what was held back is no stop string.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// The stop string of a match.
    pub fn stop(&self, index: usize) -> &str {
        &self.stops[index]
    }

    /// Bytes at the end of the held text that may be the beginning of a stop string.
    fn undecided(&self) -> usize {
        let longest = |stop: &String| longest_overlap(&self.held, stop);
        self.stops.iter().map(longest).max().unwrap_or(0)
    }
}

/// Length of the longest proper prefix of `mark` that ends `text`, bytes.
pub(crate) fn longest_overlap(text: &str, mark: &str) -> usize {
    let prefixes = mark.char_indices().map(|(end, _)| end).rev();
    prefixes.take_while(|&end| end > 0).find(|&end| text.ends_with(&mark[..end])).unwrap_or(0)
}

#[cfg(test)]
mod tests;
