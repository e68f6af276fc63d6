//! A cluster's certificate authority for one test.

use proto::security::{Identity, SERVER_NAME};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

pub struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    pub fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("key");
        let pem = params.self_signed(&key).expect("authority").pem();
        Self { pem, issuer: Issuer::new(params, key) }
    }

    /// A process's identity, signed by this authority.
    pub fn identity(&self) -> Identity {
        let key = KeyPair::generate().expect("key");
        let params = CertificateParams::new(vec![SERVER_NAME.to_owned()]).expect("name");
        let certificate = params.signed_by(&key, &self.issuer).expect("certificate");
        Identity { ca_pem: self.pem.clone(), cert_pem: certificate.pem(), key_pem: key.serialize_pem() }
    }
}
