//! API keys: the configuration holds only their SHA-256, and comparing takes the same time whatever matches.
//!
//! A key is a tenant, and tenants share no cached prefix: how fast an answer begins would tell one of them what
//! another one has asked. The salt that keeps them apart follows from the key here, never from what a request says.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::header;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use proto::share::{Priority, Share};
use sha2::{Digest, Sha256};
use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};

use super::errors::ApiError;
use crate::config::Config;
use crate::error::RequestError;
use crate::generate::RequestContext;

/// Keeps salts apart from everything else that is ever made of a key's hash.
const SALT_DOMAIN: &[u8] = b"trireme prefix cache salt v1";
/// The same for the names by which workers know tenants: they go into queues, and nobody can learn a salt from one.
const TENANT_DOMAIN: &[u8] = b"trireme tenant v1";

/// Who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Tenant {
    /// Whose cached prefixes its requests may share; 0 where no key is asked for.
    pub cache_salt: u64,
    /// Name among those that wait, and weight; its class of service is each request's.
    pub share: Share,
}

/// The accepted keys, hashed.
pub(crate) struct ApiKeys {
    keys: Vec<Key>,
}

struct Key {
    hash: [u8; 32],
    weight: u32,
}

impl ApiKeys {
    /// Takes 64 hexadecimal digits each, and the weights of those that have one; the configuration has been checked.
    pub fn new(config: &Config) -> Self {
        let weight = |hex: &String| config.tenant_weights.get(hex).copied().unwrap_or(1);
        let key = |hex: &String| decode_hex(hex).map(|hash| Key { hash, weight: weight(hex) });
        Self { keys: config.api_keys_sha256.iter().filter_map(key).collect() }
    }

    /// Who sends `authorization` (the header's value). `None` where it holds no accepted key and one is asked for.
    pub fn accept(&self, authorization: Option<&[u8]>) -> Option<Tenant> {
        if self.keys.is_empty() {
            return Some(Tenant::default());
        }
        let key = authorization
            .and_then(|value| value.split_at_checked(7))
            .and_then(|(scheme, key)| scheme.eq_ignore_ascii_case(b"bearer ").then_some(key));
        let hash = Sha256::digest(key.unwrap_or_default());
        // Every hash is compared, so that the time says nothing about which one matched.
        let (any, weight) = self.keys.iter().fold((Choice::from(0), 0), |(any, weight), known| {
            let same = known.hash.ct_eq(hash.as_slice());
            (any | same, u32::conditional_select(&weight, &known.weight, same))
        });
        (key.is_some() && bool::from(any)).then(|| Tenant {
            cache_salt: name(SALT_DOMAIN, &hash),
            share: Share { tenant: name(TENANT_DOMAIN, &hash), weight, priority: Priority::default() },
        })
    }
}

/// A tenant's number in a domain: the same at every router, and nothing to be learnt from it about the key.
fn name(domain: &[u8], key_hash: &[u8]) -> u64 {
    let digest = Sha256::new().chain_update(domain).chain_update(key_hash).finalize();
    digest.iter().take(8).fold(0, |name, &byte| name << 8 | u64::from(byte))
}

pub(super) async fn require_key(
    State(keys): State<Arc<ApiKeys>>,
    mut request: Request,
    next: Next,
) -> Response {
    let authorization = request.headers().get(header::AUTHORIZATION).map(|value| value.as_bytes());
    let Some(tenant) = keys.accept(authorization) else {
        return ApiError(RequestError::Unauthorized).into_response();
    };
    if let Some(context) = request.extensions_mut().get_mut::<RequestContext>() {
        context.tenant = tenant;
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
