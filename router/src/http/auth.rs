//! API keys: the configuration holds only their SHA-256, and comparing takes the same time whatever matches.
//!
//! A key is a tenant, and tenants share no cached prefix: how fast an answer begins would tell one of them what
//! another one has asked. The salt that keeps them apart follows from the key here, never from what a request says.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::header;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

use super::errors::ApiError;
use crate::error::RequestError;
use crate::generate::RequestContext;

/// Keeps salts apart from everything else that is ever made of a key's hash.
const SALT_DOMAIN: &[u8] = b"trireme prefix cache salt v1";
/// Of everybody, where no key is asked for.
const SHARED_SALT: u64 = 0;

/// The accepted keys, hashed.
pub(crate) struct ApiKeys {
    hashes: Vec<[u8; 32]>,
}

impl ApiKeys {
    /// Takes 64 hexadecimal digits each; the configuration has been checked.
    pub fn new(hashes_hex: &[String]) -> Self {
        Self { hashes: hashes_hex.iter().filter_map(|hex| decode_hex(hex)).collect() }
    }

    /// The prefix cache's salt of who sends `authorization` (the header's value). `None` where it holds no accepted key
    /// and one is asked for.
    pub fn accept(&self, authorization: Option<&[u8]>) -> Option<u64> {
        if self.hashes.is_empty() {
            return Some(SHARED_SALT);
        }
        let key = authorization
            .and_then(|value| value.split_at_checked(7))
            .and_then(|(scheme, key)| scheme.eq_ignore_ascii_case(b"bearer ").then_some(key));
        let hash = Sha256::digest(key.unwrap_or_default());
        // Every hash is compared, so that the time says nothing about which one matched.
        let any = self.hashes.iter().fold(Choice::from(0), |any, known| any | known.ct_eq(hash.as_slice()));
        (key.is_some() && bool::from(any)).then(|| salt(&hash))
    }
}

/// A tenant's salt: the same at every router, and nothing to be learnt from it about the key.
fn salt(key_hash: &[u8]) -> u64 {
    let digest = Sha256::new().chain_update(SALT_DOMAIN).chain_update(key_hash).finalize();
    digest.iter().take(8).fold(0, |salt, &byte| salt << 8 | u64::from(byte))
}

pub(super) async fn require_key(
    State(keys): State<Arc<ApiKeys>>,
    mut request: Request,
    next: Next,
) -> Response {
    let authorization = request.headers().get(header::AUTHORIZATION).map(|value| value.as_bytes());
    let Some(cache_salt) = keys.accept(authorization) else {
        return ApiError(RequestError::Unauthorized).into_response();
    };
    if let Some(context) = request.extensions_mut().get_mut::<RequestContext>() {
        context.cache_salt = cache_salt;
    }
    next.run(request).await
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
