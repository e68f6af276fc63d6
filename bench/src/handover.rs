//! `trireme bench handover`: what handing a prompt over adds to its time.
//!
//! Two device threads of this process, joined by the real fabric: prefill's runs the serving scheduler and hand-off over a pool of
//! V3-shaped KV whose rows are computed by the clock (`prefill`), decode's receives as a decode worker does (`decode`). A layer
//! takes as long as its tokens are said to take; its blocks are pushed while the next one runs. What is told is the time from the
//! last layer's end, when the first token could be sampled, to decode's commit, when its first step could begin, and how many of the
//! bytes were in decode's pool already when it began.

mod decode;
mod prefill;

use std::time::Duration;

use anyhow::ensure;
use fabric::{Fabric, Limits, QuicOptions};
use model::{ExecutionFingerprint, KvFormat, KvLayout, Numerics};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

use crate::table;

/// What to hand over, how often.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Prompts, tokens.
    #[arg(long, value_delimiter = ',', default_values_t = [4096, 32_768])]
    tokens: Vec<usize>,
    /// Hand-overs of each prompt.
    #[arg(long, default_value_t = 50)]
    runs: usize,
    /// Layers of the model. V3 has 61.
    #[arg(long, default_value_t = 61)]
    layers: usize,
    /// Synthetic compute, microseconds a token over all layers: 40 is 25,000 tokens/s.
    #[arg(long, default_value_t = 40.0)]
    token_us: f64,
    /// Tokens of a chunk.
    #[arg(long, default_value_t = 4096)]
    chunk: usize,
    /// QUIC on loopback instead of shared memory.
    #[arg(long)]
    quic: bool,
}

/// What one hand-over showed.
#[derive(Debug, Clone, Copy)]
struct Sample {
    /// From the last layer's end to the commit.
    after: Duration,
    /// Share of the bytes that had landed when the last layer ended.
    landed: f64,
    /// From the first layer's end to the commit.
    whole: Duration,
}

/// V3's KV: 512 latent values in FP8 with four scales, 64 rope values in BF16, 656 bytes a token and layer.
fn layout(layers: usize) -> KvLayout {
    KvLayout { format: KvFormat::Fp8, layers, latent: 512, rope: 64, block_tokens: 64 }
}

fn fingerprint(layout: &KvLayout) -> ExecutionFingerprint {
    ExecutionFingerprint {
        weights: [1; 16],
        numerics: Numerics::Fp8,
        kv_layout_digest: layout.digest(),
        backend: "synthetic".to_owned(),
        arithmetic_revision: 1,
    }
}

/// Runs it and prints the table.
///
/// # Errors
/// No port, no memory, or a hand-over that fails.
pub fn run(args: &Args) -> anyhow::Result<()> {
    ensure!(args.runs > 0 && args.layers > 0 && args.chunk > 0, "nothing to hand over");
    let [ours, theirs] = ends(!args.quic)?;
    let layout = layout(args.layers);
    let tokens_max = args.tokens.iter().copied().max().unwrap_or(0);
    ensure!(tokens_max > 0, "nothing to hand over");
    let blocks = layout.blocks_for(tokens_max);
    let decode = decode::Decode::start(theirs, &layout, blocks)?;
    let mut prefill = prefill::Prefill::new(ours, &layout, blocks, args)?;
    let path = if args.quic { "QUIC" } else { "shared memory" };
    println!(
        "{path}, {} layers of {} bytes a token, {} us a token, chunks of {}, {} runs each",
        args.layers,
        layout.row_bytes(),
        args.token_us,
        args.chunk,
        args.runs
    );
    let header =
        ["tokens", "MB", "p50 ms", "p99 ms", "max ms", "landed p50 %", "landed min %", "whole p50 ms"];
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    for &tokens in &args.tokens {
        // Twice for nothing: pages are touched, connections stand.
        for _ in 0..2 {
            prefill.hand_over(tokens, &decode)?;
        }
        let samples: Vec<Sample> =
            (0..args.runs).map(|_| prefill.hand_over(tokens, &decode)).collect::<anyhow::Result<_>>()?;
        let megabytes = tokens * layout.row_bytes() * args.layers / 1_000_000;
        rows.push(row(tokens, megabytes, &samples));
    }
    print!("{}", table::aligned(&rows));
    decode.stop()
}

fn row(tokens: usize, megabytes: usize, samples: &[Sample]) -> Vec<String> {
    let sorted = |of: fn(&Sample) -> f64| {
        let mut values: Vec<f64> = samples.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        values
    };
    let at = |values: &[f64], share: f64| values[((values.len() - 1) as f64 * share).round() as usize];
    let (after, landed) = (sorted(|s| s.after.as_secs_f64() * 1e3), sorted(|s| s.landed * 100.0));
    let whole = sorted(|s| s.whole.as_secs_f64() * 1e3);
    vec![
        tokens.to_string(),
        megabytes.to_string(),
        format!("{:.2}", at(&after, 0.5)),
        format!("{:.2}", at(&after, 0.99)),
        format!("{:.2}", at(&after, 1.0)),
        format!("{:.2}", at(&landed, 0.5)),
        format!("{:.2}", at(&landed, 0.0)),
        format!("{:.1}", at(&whole, 0.5)),
    ]
}

/// Two ends on loopback that trust each other: prefill's and decode's.
fn ends(share_memory: bool) -> anyhow::Result<[Fabric; 2]> {
    let authority_key = KeyPair::generate()?;
    let mut params = CertificateParams::new(Vec::new())?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca_pem = params.self_signed(&authority_key)?.pem();
    let authority = Issuer::new(params, authority_key);
    let end = |worker: &str, incarnation| -> anyhow::Result<Fabric> {
        let key = KeyPair::generate()?;
        let certificate = CertificateParams::new(vec!["trireme".to_owned()])?.signed_by(&key, &authority)?;
        Ok(Fabric::quic(QuicOptions {
            bind: ([127, 0, 0, 1], 0).into(),
            ca_pem: ca_pem.clone(),
            cert_pem: certificate.pem(),
            key_pem: key.serialize_pem(),
            worker: worker.to_owned(),
            incarnation,
            limits: Limits::default(),
            share_memory,
            datagram_bytes: None,
            rdma: Default::default(),
        })?)
    };
    Ok([end("prefill", 1)?, end("decode", 2)?])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_hand_over_is_measured() {
        let args = Args { tokens: vec![130], runs: 2, layers: 3, token_us: 1.0, chunk: 64, quic: false };
        run(&args).expect("two ends of one process");
    }
}
