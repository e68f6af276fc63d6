//! API keys: the configuration holds only their SHA-256, and comparing takes the same time whatever matches.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::header;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

use super::errors::ApiError;
use crate::error::RequestError;

/// The accepted keys, hashed.
pub(crate) struct ApiKeys {
    hashes: Vec<[u8; 32]>,
}

impl ApiKeys {
    /// Takes 64 hexadecimal digits each; the configuration has been checked.
    pub fn new(hashes_hex: &[String]) -> Self {
        Self { hashes: hashes_hex.iter().filter_map(|hex| decode_hex(hex)).collect() }
    }

    /// Whether `authorization` (the header's value) holds an accepted key, or none is asked for.
    pub fn accept(&self, authorization: Option<&[u8]>) -> bool {
        if self.hashes.is_empty() {
            return true;
        }
        let key = authorization
            .and_then(|value| value.split_at_checked(7))
            .and_then(|(scheme, key)| scheme.eq_ignore_ascii_case(b"bearer ").then_some(key));
        let hash = Sha256::digest(key.unwrap_or_default());
        // Every hash is compared, so that the time says nothing about which one matched.
        let any = self.hashes.iter().fold(Choice::from(0), |any, known| any | known.ct_eq(hash.as_slice()));
        key.is_some() && bool::from(any)
    }
}

pub(super) async fn require_key(State(keys): State<Arc<ApiKeys>>, request: Request, next: Next) -> Response {
    let authorization = request.headers().get(header::AUTHORIZATION).map(|value| value.as_bytes());
    match keys.accept(authorization) {
        true => next.run(request).await,
        false => ApiError(RequestError::Unauthorized).into_response(),
    }
}

fn decode_hex(hex: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    let pairs = hex.as_bytes().chunks_exact(2);
    if hex.len() != 2 * bytes.len() {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(pairs) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests;
