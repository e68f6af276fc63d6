//! The I/O thread: accepts and dials connections, and starts their lives.

use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::Sender;
use quinn::{
    ClientConfig, Connection, ConnectionId, ConnectionIdGenerator, EndpointConfig, Incoming, ServerConfig,
    TokioRuntime,
};
use tokio::sync::{Notify, Semaphore, mpsc};

use super::attachment;
use super::connection::{self, CloseCode, Live, close};
use super::hello::{self, Hello};
use super::outbox::{Outbox, outbox};
use super::path::Path;
use super::peers::{Peer, Peers};
use super::{one_sided, socket, tls};
use crate::arrivals::{Ring, Rings};
use crate::error::DialError;
use crate::event::{Event, LossReason, PeerId};
use crate::inbox::Inbox;
use crate::limits::Limits;
use crate::rdma::Rdma;
use crate::shared::Door;
use crate::sync::lock;

/// From the first packet to the hello. A peer that is silent for 1.5 s fails earlier.
const HANDSHAKE_MAX: Duration = Duration::from_secs(3);
/// Strangers in the handshake at once; more are refused before they cost any cryptography.
const HANDSHAKES_MAX: usize = 64;
const CONNECTION_ID_BYTES: usize = 8;
/// For the goodbyes to leave the socket.
const CLOSE_MAX: Duration = Duration::from_millis(100);

/// A caller that waits for a connection.
pub(crate) struct Dial {
    pub remote: SocketAddr,
    pub answer: Sender<Result<PeerId, DialError>>,
}

/// What the I/O thread starts from.
pub(crate) struct Setup {
    pub socket: UdpSocket,
    pub path: Path,
    pub in_flight_bytes: u64,
    pub configs: tls::Configs,
    pub hello: Hello,
    pub limits: Limits,
    pub peers: Arc<Peers>,
    pub inboxes: [Inbox; 2],
    /// Where memory is shared with peers of this host.
    pub rings: Option<Arc<Rings>>,
    pub rdma: Option<Arc<Rdma>>,
    pub dials: mpsc::Receiver<Dial>,
    pub closing: Arc<Notify>,
}

/// What its tasks share. Dropped with the last of them, which ends the receivers.
pub(crate) struct Io {
    pub limits: Limits,
    pub path: Path,
    pub peers: Arc<Peers>,
    pub inboxes: Arc<[Inbox; 2]>,
    pub rings: Option<Arc<Rings>>,
    pub rdma: Option<Arc<Rdma>>,
    /// And the host that it is on.
    pub door: Option<(Arc<Door>, String)>,
    pub hello: Hello,
    endpoint: quinn::Endpoint,
    client: ClientConfig,
    next_peer: AtomicU64,
    handshakes: Arc<Semaphore>,
    /// Callers by the address that is being dialled for them.
    dialling: Mutex<HashMap<SocketAddr, Vec<Dial>>>,
}

/// Starts the I/O thread and waits until its endpoint stands.
pub(crate) fn spawn(setup: Setup) -> io::Result<JoinHandle<()>> {
    let (started, starting) = crossbeam_channel::bounded(1);
    let thread = std::thread::Builder::new().name("fabric-io".to_owned()).spawn(move || {
        // Built here, so that a caller inside another runtime never drops this one.
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => return drop(started.send(Err(error))),
        };
        runtime.block_on(async move {
            let Setup {
                socket,
                path,
                in_flight_bytes,
                configs,
                hello,
                limits,
                peers,
                inboxes,
                rings,
                rdma,
                dials,
                closing,
            } = setup;
            let (endpoint, client) = match open(socket, path, &configs, in_flight_bytes) {
                Ok(opened) => opened,
                Err(error) => return drop(started.send(Err(error))),
            };
            let door = rings.as_ref().and_then(|_| attachment::open_door());
            let io = Arc::new(Io {
                limits,
                path,
                peers,
                inboxes: Arc::new(inboxes),
                rings,
                rdma,
                door,
                endpoint,
                client,
                hello,
                next_peer: AtomicU64::new(1),
                handshakes: Arc::new(Semaphore::new(HANDSHAKES_MAX)),
                dialling: Mutex::default(),
            });
            drop(started.send(Ok(())));
            serve(io, dials, closing).await;
        });
        // Dropping the runtime drops every task that is left, and with them the inboxes.
    })?;
    match starting.recv() {
        Ok(Ok(())) => Ok(thread),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(io::Error::other("it ended while starting")),
    }
}

fn open(
    udp: UdpSocket,
    path: Path,
    configs: &tls::Configs,
    in_flight_bytes: u64,
) -> io::Result<(quinn::Endpoint, ClientConfig)> {
    let transport = path.transport(in_flight_bytes);
    let mut client = ClientConfig::new(Arc::clone(&configs.client) as _);
    client.transport_config(Arc::clone(&transport));
    let mut server = ServerConfig::with_crypto(Arc::clone(&configs.server) as _);
    server.transport_config(transport).migration(false).max_incoming(HANDSHAKES_MAX);

    let mut config = EndpointConfig::new(Arc::new(configs.reset_key.clone()));
    config.cid_generator(|| Box::new(ConnectionIds));
    // A transport parameter: at quinn's default of 1,472 the peer would not send larger datagrams.
    config.max_udp_payload_size(path.mtu_bytes).map_err(io::Error::other)?;
    let socket = socket::register(udp, path)?;
    let endpoint =
        quinn::Endpoint::new_with_abstract_socket(config, Some(server), socket, Arc::new(TokioRuntime))?;
    Ok((endpoint, client))
}

/// Random connection ids. quinn's own carry a mark of the process that made them, and it ignores packets without
/// its mark: a restarted end would not disown its predecessor's connections.
struct ConnectionIds;

impl ConnectionIdGenerator for ConnectionIds {
    fn generate_cid(&mut self) -> ConnectionId {
        ConnectionId::new(&rand::random::<[u8; CONNECTION_ID_BYTES]>())
    }

    fn cid_len(&self) -> usize {
        CONNECTION_ID_BYTES
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

async fn serve(io: Arc<Io>, mut dials: mpsc::Receiver<Dial>, closing: Arc<Notify>) {
    loop {
        tokio::select! {
            Some(incoming) = io.endpoint.accept() => accept(&io, incoming),
            Some(dial) = dials.recv() => begin_dial(&io, dial),
            () = closing.notified() => break,
        }
    }
    io.endpoint.close(quinn::VarInt::from_u32(CloseCode::Goodbye as u32), b"closing");
    // The goodbyes are sent by the connections' own tasks; a peer that does not answer is not waited for.
    drop(tokio::time::timeout(CLOSE_MAX, io.endpoint.wait_idle()).await);
    io.peers.clear();
}

fn accept(io: &Arc<Io>, incoming: Incoming) {
    let Ok(permit) = Arc::clone(&io.handshakes).try_acquire_owned() else {
        io.peers.counters.handshakes_failed.fetch_add(1, Relaxed);
        return incoming.refuse();
    };
    let io = Arc::clone(io);
    tokio::spawn(async move {
        let _permit = permit;
        let remote = incoming.remote_address();
        let handshake = async {
            let connection = incoming.await.map_err(hello::HandshakeError::from)?;
            greet(&io, connection, None).await
        };
        let failed = match tokio::time::timeout(HANDSHAKE_MAX, handshake).await {
            Ok(Ok(_)) => return,
            Ok(Err(error)) => error,
            Err(_) => DialError::TimedOut(HANDSHAKE_MAX),
        };
        io.peers.counters.handshakes_failed.fetch_add(1, Relaxed);
        tracing::warn!(peer = %remote, error = %failed, "refused a connection");
    });
}

/// Joins the dial that already runs to this address, or starts one.
fn begin_dial(io: &Arc<Io>, dial: Dial) {
    let remote = dial.remote;
    // The caller looked before it queued; since then an earlier dial may have succeeded.
    if let Some(peer) = io.peers.dialled(remote) {
        return drop(dial.answer.send(Ok(peer)));
    }
    let mut dialling = lock(&io.dialling);
    let waiting = dialling.entry(remote).or_default();
    waiting.push(dial);
    if waiting.len() > 1 {
        return;
    }
    drop(dialling);
    let io = Arc::clone(io);
    tokio::spawn(async move {
        let connected = match tokio::time::timeout(HANDSHAKE_MAX, dial_once(&io, remote)).await {
            Ok(connected) => connected,
            Err(_) => Err(DialError::TimedOut(HANDSHAKE_MAX)),
        };
        for waiting in lock(&io.dialling).remove(&remote).unwrap_or_default() {
            // A caller that gave up at its deadline is no error.
            drop(waiting.answer.send(connected.clone()));
        }
    });
}

async fn dial_once(io: &Arc<Io>, remote: SocketAddr) -> Result<PeerId, DialError> {
    let connecting = io
        .endpoint
        .connect_with(io.client.clone(), remote, tls::SERVER_NAME)
        .map_err(|error| DialError::Handshake { detail: error.to_string() })?;
    let connection = connecting.await.map_err(hello::HandshakeError::from)?;
    greet(io, connection, Some(remote)).await
}

/// Exchanges hellos, enters the peer into the table and starts its life.
async fn greet(
    io: &Arc<Io>,
    connection: Connection,
    dialled: Option<SocketAddr>,
) -> Result<PeerId, DialError> {
    let (ours, expected) = attachment::offer(io);
    let (Hello { mut info, local, rdma }, mut streams) = match hello::exchange(&connection, &ours).await {
        Ok(greeted) => greeted,
        Err(error) => {
            if let hello::HandshakeError::Protocol(error) = &error {
                io.peers.counters.protocol_errors.fetch_add(1, Relaxed);
                close(&connection, CloseCode::Protocol, &error.to_string());
            }
            return Err(error.into());
        }
    };
    if let Some(remote) = dialled {
        info.address = format!("{}{remote}", super::SCHEME);
    }
    let shared = attachment::attach(io, local, dialled.is_some(), expected).await;
    let rdma = match shared {
        // Where ours is off nothing is said about it, so nothing is waited for.
        None if ours.rdma && rdma => one_sided::attach(io, &mut streams).await?,
        _ => None,
    };
    let superseded = Arc::new(Notify::new());
    let peer = PeerId(io.next_peer.fetch_add(1, Relaxed));
    let mut queues = None;
    let (outboxes, ring, attachment, rdma) = match (shared, rdma) {
        (Some(shared), _) => {
            let (outboxes, ring, attachment) = shared.split();
            (outboxes, Some(ring), Some(attachment), None)
        }
        (None, Some((producers, attached))) => {
            (producers.map(|producer| Outbox::Rdma(Mutex::new(producer))), None, None, Some(attached))
        }
        (None, None) => {
            let (kv, kv_queue) = outbox(&io.limits);
            let (experts, experts_queue) = outbox(&io.limits);
            queues = Some([kv_queue, experts_queue]);
            ([Outbox::Queue(kv), Outbox::Queue(experts)], None, None, None)
        }
    };
    let entry =
        Peer { info, dialled, outboxes, connection: connection.clone(), superseded: Arc::clone(&superseded) };
    if !enter(io, peer, entry, ring) {
        close(&connection, CloseCode::Overloaded, "too many peers or unread events");
        attachment.iter().for_each(attachment::Attachment::say_goodbye);
        return Err(DialError::Overloaded);
    }
    // Behind `PeerUp`.
    rdma.iter().for_each(|rdma| rdma.deliver_as(peer));
    let live = Live { peer, connection, streams, queues, attachment, rdma, superseded };
    let io = Arc::clone(io);
    tokio::spawn(async move {
        let reason = connection::run(Arc::clone(&io), live).await;
        leave(&io, peer, reason);
    });
    Ok(peer)
}

/// Makes the peer known and announces it. `false`: there is no room.
fn enter(io: &Io, id: PeerId, peer: Peer, ring: Option<Ring>) -> bool {
    let info = peer.info.clone();
    let room =
        |live| live < io.limits.peers_max && io.inboxes.iter().all(|inbox| inbox.has_room_for_peers(live, 1));
    // Known first: whoever reads the event may answer at once.
    if !io.peers.enter(id, peer, room) {
        return false;
    }
    let shared_memory = ring.is_some();
    tracing::debug!(
        peer = %id, worker = info.worker, incarnation = info.incarnation, shared_memory, "peer up"
    );
    if let Some((rings, ring)) = io.rings.as_ref().zip(ring) {
        rings.enter(id, ring);
    }
    for inbox in io.inboxes.iter() {
        inbox.announce(Event::PeerUp { peer: id, info: info.clone() });
    }
    true
}

/// Forgets the peer and announces its loss, after its last frame.
fn leave(io: &Io, id: PeerId, reason: LossReason) {
    let Some(info) = io.peers.leave(id) else { return };
    tracing::info!(peer = %id, worker = info.worker, %reason, "peer lost");
    for inbox in io.inboxes.iter() {
        inbox.announce(Event::PeerLost { peer: id, reason: reason.clone() });
    }
}
