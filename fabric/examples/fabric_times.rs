//! What the fabric costs on this machine: round trips of small frames, and throughput of large ones.
//!
//! `cargo run --release -p fabric --example fabric_times`

use std::time::{Duration, Instant};

use bytes::Bytes;
use fabric::{Channel, Event, Fabric, Frame, Hub, Limits, PeerId, QuicOptions, SendError};

const ROUND_TRIPS: usize = 5_000;
const WARM_UP: usize = 500;
/// What a measurement of throughput moves.
const MOVED_BYTES: usize = 2 << 30;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let hub = Hub::new();
    let in_process = |worker: &str| Fabric::in_process(&hub, worker, 1, Limits::default());
    let authority = Authority::new()?;
    let quic = |worker: &str, share_memory| -> Result<Fabric, Box<dyn std::error::Error>> {
        Ok(Fabric::quic(QuicOptions { share_memory, ..authority.options(worker)? })?)
    };
    for (name, a, b) in [
        ("in process", in_process("a")?, in_process("b")?),
        ("shared memory", quic("a", true)?, quic("b", true)?),
        ("quic, loopback", quic("c", false)?, quic("d", false)?),
    ] {
        println!("{name}");
        let (b_at_a, a_at_b) = connect(&a, &b)?;
        for body_bytes in [64, 7 << 10, 56 << 10, 512 << 10] {
            let mut times = ping_pong(&a, b_at_a, &b, a_at_b, body_bytes);
            times.sort_unstable();
            let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize];
            println!(
                "  round trip, {body_bytes:>7} B each way: p50 {:>8.1?}  p99 {:>8.1?}",
                at(0.5),
                at(0.99)
            );
        }
        for body_bytes in [64 << 10, 1 << 20, 8 << 20] {
            let cpu_before = cpu_time();
            let taken = one_way(&a, b_at_a, &b, body_bytes);
            let cpu = (cpu_time() - cpu_before).as_secs_f64();
            let moved_gb = MOVED_BYTES as f64 / 1e9;
            println!(
                "  one way, frames of {body_bytes:>8} B: {:.2} GB/s, {:.2} CPU s/GB for both ends",
                moved_gb / taken.as_secs_f64(),
                cpu / moved_gb
            );
        }
        let stats = a.stats();
        println!("  packets lost {}, datagram payload {} B", stats.packets_lost, stats.mtu_bytes_min);
    }
    Ok(())
}

fn connect(a: &Fabric, b: &Fabric) -> Result<(PeerId, PeerId), Box<dyn std::error::Error>> {
    let b_at_a = a.connect(&b.address(), Duration::from_secs(5))?;
    for channel in [Channel::Kv, Channel::Experts] {
        a.receiver(channel).recv()?;
    }
    b.receiver(Channel::Kv).recv()?;
    match b.receiver(Channel::Experts).recv()? {
        Event::PeerUp { peer, .. } => Ok((b_at_a, peer)),
        other => Err(format!("unexpected {other:?}").into()),
    }
}

/// Times of round trips on the experts' channel, the way a decode step waits for its experts.
fn ping_pong(a: &Fabric, b_at_a: PeerId, b: &Fabric, a_at_b: PeerId, body_bytes: usize) -> Vec<Duration> {
    let rounds = WARM_UP + ROUND_TRIPS * 64 / (64 + body_bytes / 1024);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let events = b.receiver(Channel::Experts);
            for _ in 0..rounds {
                let Ok(Event::Frame { head, body, .. }) = events.recv() else { return };
                send(b, a_at_b, Channel::Experts, Frame { head, body: vec![body.into_bytes()] });
            }
        });
        let events = a.receiver(Channel::Experts);
        let body = Bytes::from(vec![1; body_bytes]);
        let mut times = Vec::with_capacity(rounds);
        for _ in 0..rounds {
            let start = Instant::now();
            let frame = Frame { head: Bytes::from_static(b"ping"), body: vec![body.clone()] };
            send(a, b_at_a, Channel::Experts, frame);
            drop(events.recv());
            times.push(start.elapsed());
        }
        times.split_off(WARM_UP)
    })
}

/// Time to send frames of `MOVED_BYTES` together, all received and dropped.
fn one_way(a: &Fabric, b_at_a: PeerId, b: &Fabric, body_bytes: usize) -> Duration {
    let frames = MOVED_BYTES / body_bytes;
    let body = Bytes::from(vec![1; body_bytes]);
    let events = b.receiver(Channel::Kv);
    let start = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..frames {
                let frame = Frame { head: Bytes::from_static(b"kv"), body: vec![body.clone()] };
                send(a, b_at_a, Channel::Kv, frame);
            }
        });
        for _ in 0..frames {
            drop(events.recv());
        }
    });
    start.elapsed()
}

/// Processor time of this process so far. On a busy machine it says more than the clock does.
fn cpu_time() -> Duration {
    // Fields 14 and 15, counted after the name in parentheses: user and system time in ticks of 10 ms.
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    let ticks: u64 =
        after_name.split_whitespace().skip(11).take(2).filter_map(|t| t.parse::<u64>().ok()).sum();
    Duration::from_millis(10 * ticks)
}

fn send(from: &Fabric, peer: PeerId, channel: Channel, mut frame: Frame) {
    loop {
        match from.try_send(peer, channel, frame) {
            Ok(()) => return,
            // A real sender does something else meanwhile; here there is nothing else to do.
            Err(SendError::Full(back)) => frame = back,
            Err(error) => panic!("{error}"),
        }
        std::thread::sleep(Duration::from_micros(50));
    }
}

/// Certificates for this run.
struct Authority(rcgen::CertifiedIssuer<'static, rcgen::KeyPair>);

impl Authority {
    fn new() -> Result<Self, rcgen::Error> {
        let mut params = rcgen::CertificateParams::new(Vec::new())?;
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = rcgen::KeyPair::generate()?;
        Ok(Self(rcgen::CertifiedIssuer::self_signed(params, key)?))
    }

    fn options(&self, worker: &str) -> Result<QuicOptions, rcgen::Error> {
        let key = rcgen::KeyPair::generate()?;
        let cert = rcgen::CertificateParams::new(vec!["trireme".to_owned()])?.signed_by(&key, &self.0)?;
        Ok(QuicOptions {
            bind: ([127, 0, 0, 1], 0).into(),
            ca_pem: self.0.pem(),
            cert_pem: cert.pem(),
            key_pem: key.serialize_pem(),
            worker: worker.to_owned(),
            incarnation: 1,
            limits: Limits::default(),
            datagram_bytes: None,
            share_memory: false,
            rdma: Default::default(),
        })
    }
}
