//! Three settings make quinn fail without a word, each at full load only: these tests move enough to see it.

mod support;

use fabric::{Channel, Fabric, Limits, QuicOptions, Stats};
use support::{Net, PATIENCE, frame, pattern, received, send};

const BODY_BYTES: usize = 1 << 20;

/// Two ends on `host` with these settings; moves so many MiB and tells how the sender has fared.
fn moved(host: &str, datagram_bytes: Option<u16>, limits: &Limits, mib: u64) -> Stats {
    let Net::Quic(authority) = Net::quic() else { unreachable!("just made") };
    let open = |worker: &str| {
        let options = support::options(&authority.pem(), authority.issue(), worker, 1, limits.clone());
        let bind = host.parse().expect("a socket address");
        Fabric::quic(QuicOptions { bind, datagram_bytes, ..options }).expect("an end")
    };
    let (a, b) = (open("a"), open("b"));
    let address = b.address().replace("0.0.0.0", "127.0.0.1");
    let to = a.connect(&address, PATIENCE).expect("a connection");
    let events = b.receiver(Channel::Kv);
    support::up(&events);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for seed in 0..mib {
                send(&a, to, Channel::Kv, frame(&seed.to_le_bytes(), &pattern(seed % 4, BODY_BYTES)));
            }
        });
        for seed in 0..mib {
            let (_, head, body) = received(&events);
            assert_eq!(*head, seed.to_le_bytes());
            assert!(*body == *pattern(seed % 4, BODY_BYTES), "frame {seed} differs");
        }
    });
    a.stats()
}

/// quinn joins ten datagrams in a send; over 65,507 bytes together the kernel refuses them all, and quinn takes that for a
/// path that carries 1,200.
#[test]
fn joined_datagrams_stay_within_what_the_kernel_sends() {
    for datagram_bytes in [6_560, 8_972, 16_000, 32_000] {
        let stats = moved("127.0.0.1:0", Some(datagram_bytes), &Limits::default(), 8);
        assert_eq!(stats.mtu_bytes_min, u64::from(datagram_bytes), "the path has fallen: {stats:?}");
    }
    let stats = moved("127.0.0.1:0", None, &Limits::default(), 8);
    assert_eq!(stats.mtu_bytes_min, 65_507, "the path has fallen: {stats:?}");
}

/// A datagram that does not fit into the first congestion window is never sent, and no timer runs for it. Loopback has no
/// congestion control, so these are addresses of any network.
#[test]
fn the_first_window_holds_the_largest_datagram() {
    let limits = Limits { in_flight_bytes_max: 128 << 10, ..Limits::default() };
    for datagram_bytes in [16_000, 65_507] {
        let stats = moved("0.0.0.0:0", Some(datagram_bytes), &limits, 4);
        assert!(stats.bytes_sent >= 4 << 20, "{stats:?}");
    }
}

/// UDP drops what the receiver's buffer cannot hold, and what a configuration asks for may be more than that.
#[test]
fn what_is_in_flight_fits_into_the_receivers_buffer() {
    let limits = Limits { in_flight_bytes_max: 256 << 20, ..Limits::default() };
    let stats = moved("127.0.0.1:0", None, &limits, 32);
    assert_eq!(stats.packets_lost, 0, "{stats:?}");
}
