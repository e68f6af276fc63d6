//! W3C trace context: the request's identity across processes (<https://www.w3.org/TR/trace-context/>).

use std::fmt;

/// A parsed `traceparent`. Ids are never all zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceContext {
    trace_id: [u8; 16],
    span_id: [u8; 8],
    flags: u8,
}

impl TraceContext {
    /// A fresh trace with a fresh span, sampled.
    pub fn root() -> Self {
        Self { trace_id: random_id(), span_id: random_id(), flags: 1 }
    }

    /// Reads version 00 strictly, and of a later version the fields that 00 has, as the standard asks.
    /// `None` for anything else: the receiver then starts a trace of its own.
    pub fn parse(traceparent: &str) -> Option<Self> {
        let mut parts = traceparent.split('-');
        let [version] = hex(parts.next()?)?;
        let trace_id = hex(parts.next()?)?;
        let span_id = hex(parts.next()?)?;
        let [flags] = hex(parts.next()?)?;
        let complete = version != 0 || parts.next().is_none();
        let valid = version != 0xff && trace_id != [0; 16] && span_id != [0; 8];
        (complete && valid).then_some(Self { trace_id, span_id, flags })
    }

    /// What the wire carried, or a new trace when that was absent or malformed.
    pub fn parse_or_root(traceparent: &str) -> Self {
        Self::parse(traceparent).unwrap_or_else(Self::root)
    }

    /// The same trace, a new span in it.
    #[must_use]
    pub fn child(&self) -> Self {
        Self { span_id: random_id(), ..*self }
    }

    /// The trace's id, 32 hexadecimal digits: what every span of a request has in common.
    pub fn trace_id(&self) -> String {
        self.trace_id.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The span's id, 16 hexadecimal digits: the parent of what is done on its behalf elsewhere.
    pub fn span_id(&self) -> String {
        self.span_id.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// The `traceparent` header, version 00.
impl fmt::Display for TraceContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("00-")?;
        self.trace_id.iter().try_for_each(|byte| write!(f, "{byte:02x}"))?;
        f.write_str("-")?;
        self.span_id.iter().try_for_each(|byte| write!(f, "{byte:02x}"))?;
        write!(f, "-{:02x}", self.flags)
    }
}

fn random_id<const N: usize>() -> [u8; N] {
    loop {
        let mut id = [0; N];
        rand::fill(&mut id);
        if id != [0; N] {
            return id;
        }
    }
}

/// Exactly `2 * N` lower-case hexadecimal digits; upper case is not W3C.
fn hex<const N: usize>(digits: &str) -> Option<[u8; N]> {
    let digits = digits.as_bytes();
    if digits.len() != 2 * N {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = nibble(pair[0])? << 4 | nibble(pair[1])?;
    }
    Some(bytes)
}

fn nibble(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
