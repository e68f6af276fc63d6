//! Ends of the fabric for two processes that trust each other for one run.

use anyhow::Context;
use fabric::{Fabric, Limits, QuicOptions, RdmaOptions, RdmaUse};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use serde::{Deserialize, Serialize};

use super::{Mode, Shape};

/// One end's certificate, key and authority.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Credentials {
    pub ca_pem: String,
    pub cert_pem: String,
    pub key_pem: String,
}

impl Credentials {
    /// Those of both ends, of an authority that is forgotten at once.
    pub fn pair() -> anyhow::Result<[Self; 2]> {
        let authority_key = KeyPair::generate()?;
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca_pem = params.self_signed(&authority_key)?.pem();
        let authority = Issuer::new(params, authority_key);
        let end = || -> anyhow::Result<Self> {
            let key = KeyPair::generate()?;
            let certificate =
                CertificateParams::new(vec!["trireme".to_owned()])?.signed_by(&key, &authority)?;
            Ok(Self { ca_pem: ca_pem.clone(), cert_pem: certificate.pem(), key_pem: key.serialize_pem() })
        };
        Ok([end()?, end()?])
    }
}

/// Opens an end on loopback.
pub(crate) fn open(
    worker: &str,
    mode: Mode,
    shape: &Shape,
    credentials: &Option<Credentials>,
) -> anyhow::Result<Fabric> {
    let Credentials { ca_pem, cert_pem, key_pem } = credentials.clone().context("no credentials")?;
    let options = QuicOptions {
        bind: ([127, 0, 0, 1], 0).into(),
        datagram_bytes: shape.mtu,
        ca_pem,
        cert_pem,
        key_pem,
        worker: worker.to_owned(),
        incarnation: 1,
        limits: Limits::default(),
        share_memory: matches!(mode, Mode::Shm | Mode::ShmBare),
        rdma: RdmaOptions {
            when: if mode == Mode::Rdma { RdmaUse::On } else { RdmaUse::Off },
            library: shape.nixl_library.clone(),
        },
    };
    Ok(Fabric::quic(options)?)
}
