//! What only a peer process can do to an end that it shares memory with, or writes to: be killed, or stop and go on.

mod support;

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use fabric::{Channel, Fabric, LossReason, QuicOptions, RdmaOptions, RdmaUse};
use rustix::process::{Pid, Signal, kill_process};
use support::certificates::Credentials;
use support::{Net, PATIENCE, frame, lost, next, options, pattern, received, send, up};

const FRAMES: u64 = 40;

/// Starts this very test binary as another process, which dials `to` and sends frames.
fn start_peer(net: &Net, to: &Fabric, worker: &str) -> Child {
    let (authority, library) = match net {
        Net::Shared(authority) => (authority, None),
        Net::Rdma(authority, library) => (authority, Some(library)),
        Net::InProcess(_) | Net::Quic(_) => panic!("these tests are about memory that a peer reaches"),
    };
    let Credentials { cert_pem, key_pem } = authority.issue();
    Command::new(std::env::current_exe().expect("this binary"))
        .args(["--exact", "a_peer_process", "--ignored", "--nocapture"])
        .env("PEER_CA", authority.pem())
        .env("PEER_CERT", cert_pem)
        .env("PEER_KEY", key_pem)
        .env("PEER_TO", to.address())
        .env("PEER_NAME", worker)
        .env("PEER_NIXL", library.cloned().unwrap_or_default())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .expect("a process")
}

/// The other process' life; does nothing when it is run as a test.
#[test]
#[ignore = "started by the other tests as a process of its own"]
fn a_peer_process() {
    let Ok(to) = std::env::var("PEER_TO") else { return };
    let text = |name: &str| std::env::var(name).expect("set by the parent");
    let credentials = Credentials { cert_pem: text("PEER_CERT"), key_pem: text("PEER_KEY") };
    let options = options(&text("PEER_CA"), credentials, &text("PEER_NAME"), 7, fabric::Limits::default());
    let library = Some(PathBuf::from(text("PEER_NIXL"))).filter(|path| !path.as_os_str().is_empty());
    let share_memory = library.is_none();
    let rdma = RdmaOptions { when: if share_memory { RdmaUse::Off } else { RdmaUse::On }, library };
    let end = Fabric::quic(QuicOptions { share_memory, rdma, ..options }).expect("an end");
    let peer = end.connect(&to, PATIENCE).expect("a connection");
    for seed in 0..FRAMES {
        for channel in [Channel::Kv, Channel::Experts] {
            send(&end, peer, channel, frame(&seed.to_le_bytes(), &pattern(seed, 100_000)));
        }
    }
    // Until it is killed, or its parent is gone.
    let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
}

#[test]
fn a_killed_process_is_seen_at_once_and_what_it_sent_before_stays_whole() {
    killed(&Net::shared());
}

/// With nothing of ours under way to it, RDMA does not tell; the connection's silence does.
#[test]
#[ignore = "needs NIXL: TRIREME_NIXL_LIBRARY"]
fn a_killed_process_that_wrote_by_rdma_is_missed_and_what_it_sent_before_stays_whole() {
    killed(&Net::rdma());
}

fn killed(net: &Net) {
    let end = net.open("us");
    let (kv, experts) = (end.receiver(Channel::Kv), end.receiver(Channel::Experts));
    for round in 0..3 {
        let mut child = start_peer(net, &end, "peer");
        let (peer, info) = up(&kv);
        assert_eq!((info.incarnation, up(&experts).0), (7, peer));
        assert_eq!(end.stats().peers_shared + end.stats().peers_rdma, 1);
        let mut held = Vec::new();
        for seed in 0..FRAMES {
            for events in [&kv, &experts] {
                let fabric::Event::Frame { head, body, .. } = next(events) else { panic!("no frame") };
                assert_eq!(*head, seed.to_le_bytes());
                held.push((seed, body));
            }
        }
        child.kill().expect("a living process");
        child.wait().expect("its end");
        for events in [&kv, &experts] {
            let (gone, reason) = lost(events);
            let expected = match net {
                Net::Rdma(..) => matches!(reason, LossReason::Died | LossReason::Silent),
                _ => reason == LossReason::Died,
            };
            assert!(gone == peer && expected, "round {round}: {reason}");
        }
        // The memory stays as long as a body refers to it.
        for (seed, body) in held {
            assert!(*body.into_bytes() == *pattern(seed, 100_000), "frame {seed} changed");
        }
    }
}

#[test]
fn a_stopped_process_is_given_up_and_cannot_come_back() {
    stopped(&Net::shared());
}

#[test]
#[ignore = "needs NIXL: TRIREME_NIXL_LIBRARY"]
fn a_stopped_process_that_wrote_by_rdma_is_given_up_and_cannot_come_back() {
    stopped(&Net::rdma());
}

fn stopped(net: &Net) {
    let end = net.open("us");
    let events = end.receiver(Channel::Kv);
    let mut child = start_peer(net, &end, "peer");
    let (peer, _) = up(&events);
    for _ in 0..FRAMES {
        received(&events);
    }
    let pid = Pid::from_child(&child);
    kill_process(pid, Signal::STOP).expect("a living process");
    assert_eq!(lost(&events), (peer, LossReason::Silent));
    kill_process(pid, Signal::CONT).expect("a stopped process");
    // Whatever it does now, it is no peer any more.
    assert!(events.recv_timeout(Duration::from_millis(300)).is_err());
    assert_eq!(end.stats().peers, 0);
    child.kill().expect("a living process");
    child.wait().expect("its end");
}
