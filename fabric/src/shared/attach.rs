//! How two ends of one host come to share memory: over a Unix socket that their authenticated hellos name.
//!
//! The side that dialled visits the other's [`Door`] with the token from its hello and passes its memory and bells; the other
//! answers with its own; the visitor confirms. Whatever goes wrong before that leaves both with the connection they have:
//! containers of one host cannot always reach each other's sockets, and that is no error.

use std::collections::HashMap;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg, sockopt::socket_peercred,
};
use tokio::sync::{Semaphore, oneshot};

use super::layout::{Layout, MAGIC};
use super::memory::{Ours, Theirs};
use crate::frame::Channel;
use crate::limits::Limits;
use crate::sync::lock;

/// Each step of an attachment. Both ends are up and on this host; what takes longer is not worth waiting for.
pub(crate) const STEP_MAX: Duration = Duration::from_millis(500);
/// Visitors at once whose token has not been read.
const VISITORS_MAX: usize = 64;
/// The memory, then a bell for each channel.
const DESCRIPTORS: usize = 3;
const ANSWER: &[u8] = b"attached";
const CONFIRMED: &[u8] = b"confirmed";
/// A peer may choose other limits than ours, within reason: this much address space is what one connection may take.
const SHARED_BYTES_MAX: usize = 16 << 30;

type Token = [u8; 16];

/// What a hello says about this host, and where and as whom the peer may knock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Offer {
    /// Equal on all processes of a host, see [`host_id`].
    pub host: String,
    /// The socket's name in the abstract namespace.
    pub door: String,
    /// Of this connection alone.
    pub token: Token,
}

/// Names this host and this start of it. `None`: there is no telling.
pub(crate) fn host_id() -> Option<String> {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(id.trim().to_owned())
}

/// Where peers of this host knock.
pub(crate) struct Door {
    pub name: String,
    expected: Mutex<HashMap<Token, oneshot::Sender<Visitor>>>,
}

/// Who has knocked with a token that was expected.
pub(crate) struct Visitor {
    socket: UnixStream,
    parts: [OwnedFd; DESCRIPTORS],
}

/// What a side brings into an attachment.
pub(crate) struct Side {
    memory: Arc<Ours>,
    bells: [OwnedFd; 2],
}

/// Two sides that see each other.
pub(crate) struct Attached {
    pub ours: Arc<Ours>,
    pub theirs: Arc<Theirs>,
    pub their_layout: Layout,
    /// What wakes the peer's consumers, by channel.
    pub their_bells: [OwnedFd; 2],
    /// Closed by the kernel when the peer's process ends.
    pub socket: UnixStream,
}

impl Door {
    /// Binds a name that nobody can guess.
    pub fn open() -> io::Result<(Arc<Self>, tokio::net::UnixListener)> {
        let name = format!("trireme-fabric-{:032x}", rand::random::<u128>());
        let listener = UnixListener::bind_addr(&SocketAddr::from_abstract_name(&name)?)?;
        listener.set_nonblocking(true)?;
        let listener = tokio::net::UnixListener::from_std(listener)?;
        Ok((Arc::new(Self { name, expected: Mutex::default() }), listener))
    }

    /// A fresh token, and who will have come with it.
    pub fn expect(self: &Arc<Self>) -> (Token, Expected) {
        let (token, (sender, visitor)) = (rand::random(), oneshot::channel());
        lock(&self.expected).insert(token, sender);
        (token, Expected { door: Arc::clone(self), token, visitor })
    }

    /// Lets visitors in for as long as the runtime lives.
    pub async fn serve(self: Arc<Self>, listener: tokio::net::UnixListener) {
        let room = Arc::new(Semaphore::new(VISITORS_MAX));
        loop {
            let Ok(permit) = Arc::clone(&room).acquire_owned().await else { return };
            let socket = match listener.accept().await.and_then(|(socket, _)| socket.into_std()) {
                Ok(socket) => socket,
                Err(error) => {
                    tracing::warn!(%error, "cannot take a visitor from this host in");
                    // Out of descriptors, most likely: not worth a busy loop.
                    tokio::time::sleep(STEP_MAX).await;
                    continue;
                }
            };
            let door = Arc::clone(&self);
            tokio::task::spawn_blocking(move || {
                let _permit = permit;
                if let Err(error) = door.admit(socket) {
                    tracing::debug!(%error, "a visitor from this host was turned away");
                }
            });
        }
    }

    fn admit(&self, socket: UnixStream) -> io::Result<()> {
        check_peer(&socket)?;
        let mut token = Token::default();
        let parts = receive_parts(&socket, &mut token)?;
        let expected = lock(&self.expected).remove(&token);
        let expected = expected.ok_or_else(|| io::Error::other("an unknown token"))?;
        drop(expected.send(Visitor { socket, parts }));
        Ok(())
    }
}

/// A token that is waited for. Forgotten with the drop.
pub(crate) struct Expected {
    door: Arc<Door>,
    token: Token,
    visitor: oneshot::Receiver<Visitor>,
}

impl Expected {
    /// Who has come. `None`: nobody in time.
    pub async fn arrival(mut self) -> Option<Visitor> {
        tokio::time::timeout(STEP_MAX, &mut self.visitor).await.ok()?.ok()
    }
}

impl Drop for Expected {
    fn drop(&mut self) {
        lock(&self.door.expected).remove(&self.token);
    }
}

impl Side {
    /// Memory for one connection, and the bells of our consumers.
    pub fn new(limits: &Limits, bells: [OwnedFd; 2]) -> io::Result<Self> {
        let layout = Layout::of(limits);
        let memory = Ours::new(layout.bytes())?;
        let header = [MAGIC, layout.entries as u64, layout.arena_bytes as u64];
        for (at, word) in Layout::HEADER.into_iter().zip(header) {
            memory.publish(at, word);
        }
        Ok(Self { memory: Arc::new(memory), bells })
    }

    /// Knocks at a peer's door. Blocks for at most three [`STEP_MAX`].
    pub fn visit(self, door: &str, token: &Token) -> io::Result<Attached> {
        let mut socket = UnixStream::connect_addr(&SocketAddr::from_abstract_name(door)?)?;
        check_peer(&socket)?;
        self.send_parts(&socket, token)?;
        let mut answer = [0; ANSWER.len()];
        let parts = receive_parts(&socket, &mut answer)?;
        let attached = self.attach(socket.try_clone()?, parts)?;
        socket.write_all(CONFIRMED)?;
        socket.set_nonblocking(true)?;
        Ok(attached)
    }

    /// Answers a visitor. Blocks for at most two [`STEP_MAX`].
    pub fn welcome(self, visitor: Visitor) -> io::Result<Attached> {
        let Visitor { mut socket, parts } = visitor;
        self.send_parts(&socket, ANSWER)?;
        let attached = self.attach(socket.try_clone()?, parts)?;
        let mut confirmed = [0; CONFIRMED.len()];
        socket.read_exact(&mut confirmed)?;
        socket.set_nonblocking(true)?;
        Ok(attached)
    }

    fn send_parts(&self, socket: &UnixStream, text: &[u8]) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let [kv, experts] = &self.bells;
        let descriptors = [self.memory.file(), kv.as_fd(), experts.as_fd()];
        if !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
            return Err(io::Error::other("no room for the descriptors"));
        }
        let sent = sendmsg(socket, &[IoSlice::new(text)], &mut control, SendFlags::NOSIGNAL)?;
        if sent == text.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    fn attach(self, socket: UnixStream, parts: [OwnedFd; DESCRIPTORS]) -> io::Result<Attached> {
        let [memory, kv, experts] = parts;
        let theirs = Theirs::map(&memory, SHARED_BYTES_MAX)?;
        let [magic, entries, arena_bytes] = Layout::HEADER.map(|at| theirs.load(at));
        if magic != MAGIC {
            return Err(io::Error::other("the shared memory has another layout"));
        }
        let their_layout = Layout::read(entries, arena_bytes, theirs.bytes())?;
        Ok(Attached {
            ours: self.memory,
            theirs: Arc::new(theirs),
            their_layout,
            their_bells: [kv, experts],
            socket,
        })
    }
}

/// Both ends run as one user; and nothing is waited for longer than a step.
fn check_peer(socket: &UnixStream) -> io::Result<()> {
    socket.set_nonblocking(false)?;
    socket.set_read_timeout(Some(STEP_MAX))?;
    socket.set_write_timeout(Some(STEP_MAX))?;
    if socket_peercred(socket)?.uid != rustix::process::geteuid() {
        return Err(io::Error::other("a process of another user"));
    }
    Ok(())
}

/// Reads exactly `text` and the descriptors that come with it.
fn receive_parts(socket: &UnixStream, text: &mut [u8]) -> io::Result<[OwnedFd; DESCRIPTORS]> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let wanted = text.len();
    let received = recvmsg(socket, &mut [IoSliceMut::new(text)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut descriptors = Vec::with_capacity(DESCRIPTORS);
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    let complete = received.bytes == wanted;
    let descriptors = descriptors.try_into().ok().filter(|_| complete);
    descriptors.ok_or_else(|| io::Error::other("not a visitor's message"))
}

/// Positions of the bells among [`Channel`]s: the order in which they are passed.
const _: () = assert!(Channel::ALL.len() + 1 == DESCRIPTORS);
