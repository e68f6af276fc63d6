//! A NIXL agent of one connection: the memory it has registered, the one peer it knows, writes under way.
//!
//! An agent belongs to one connection and is used by one thread, which created it. NIXL has no other proof that a peer's
//! writes have ended than that there is nobody left to take them: so the agent's end is the end of the connection's memory as
//! a target, and no other connection's.

#![expect(unsafe_code, reason = "calls of a foreign library; every block argues its arguments")]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::ptr::{null, null_mut};
use std::sync::Arc;

use super::library::{AgentConfig, Handle, Library, Status};
use super::staging::Staging;

/// UCX: what NIXL drives RDMA devices with, and TCP and CMA where there are none.
const BACKEND: &CStr = c"UCX";
/// `NIXL_CAPI_MEM_DRAM`.
const DRAM: c_int = 0;
/// `NIXL_CAPI_XFER_OP_WRITE`.
const WRITE: c_int = 1;

/// A call that failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("NIXL's {call} answered {status}")]
pub(crate) struct CallError {
    call: &'static str,
    status: Status,
}

/// An agent, its backend and its memory.
pub(crate) struct Agent {
    library: Arc<Library>,
    agent: Handle,
    backend: Handle,
    options: Handle,
    notifications: Handle,
    registered: Handle,
    /// Longer than the registration.
    staging: Arc<Staging>,
    peer: Option<CString>,
}

/// A write that may still be under way.
pub(crate) struct Write(Handle);

impl Agent {
    /// An agent that has registered `staging`. `name` must be unique among all that may meet.
    pub fn new(library: &Arc<Library>, name: &str, staging: Arc<Staging>) -> Result<Self, CallError> {
        let mut this = Self {
            library: Arc::clone(library),
            agent: null_mut(),
            backend: null_mut(),
            options: null_mut(),
            notifications: null_mut(),
            registered: null_mut(),
            staging,
            peer: None,
        };
        // NIXL's own progress thread spins; ours polls when there is something to poll for.
        let config = AgentConfig {
            prog_thread: false,
            listen_thread: false,
            listen_port: 0,
            thread_sync: 0,
            workers: 1,
            prog_thread_delay_us: 0,
            listen_thread_delay_us: 100_000,
            telemetry: false,
        };
        let name = CString::new(name.replace('\0', "")).unwrap_or_default();
        let (mut memories, mut parameters) = (null_mut(), null_mut());
        // SAFETY: handles come from the library's own calls and are used once each has succeeded, strings are terminated,
        // results are places of our own. What was made before a failure is given back by the drop.
        unsafe {
            let nixl = &*this.library;
            ok(
                "create_configured_agent",
                (nixl.create_configured_agent)(name.as_ptr(), &config, &mut this.agent),
            )?;
            let found =
                (nixl.get_plugin_params)(this.agent, BACKEND.as_ptr(), &mut memories, &mut parameters);
            ok("get_plugin_params", found)?;
            let made = (nixl.create_backend)(this.agent, BACKEND.as_ptr(), parameters, &mut this.backend);
            (nixl.destroy_params)(parameters);
            (nixl.destroy_mem_list)(memories);
            ok("create_backend", made)?;
            ok("create_opt_args", (nixl.create_opt_args)(&mut this.options))?;
            ok("opt_args_add_backend", (nixl.opt_args_add_backend)(this.options, this.backend))?;
            ok("create_notif_map", (nixl.create_notif_map)(&mut this.notifications))?;
            let mut list = null_mut();
            ok("create_reg_dlist", (nixl.create_reg_dlist)(DRAM, &mut list))?;
            let (start, bytes) = (this.staging.address(), this.staging.bytes());
            let added = (nixl.reg_dlist_add_desc)(list, start, bytes, 0, null(), 0);
            let registered = ok("reg_dlist_add_desc", added)
                .and_then(|()| ok("register_mem", (nixl.register_mem)(this.agent, list, this.options)));
            match registered {
                Ok(()) => this.registered = list,
                Err(error) => {
                    (nixl.destroy_reg_dlist)(list);
                    return Err(error);
                }
            }
        }
        Ok(this)
    }

    /// What the peer needs to write here: how to connect, and the keys of this connection's memory alone.
    pub fn metadata(&self) -> Result<Vec<u8>, CallError> {
        let (mut data, mut bytes) = (null_mut(), 0);
        // SAFETY: on success the library gives a block of that many bytes, made with `malloc`, which is ours to free.
        unsafe {
            ok("get_local_md", (self.library.get_local_md)(self.agent, &mut data, &mut bytes))?;
            let metadata = std::slice::from_raw_parts(data.cast::<u8>(), bytes).to_vec();
            libc::free(data);
            Ok(metadata)
        }
    }

    /// Learns of the peer. Once.
    pub fn meet(&mut self, metadata: &[u8]) -> Result<(), CallError> {
        let mut name: *mut c_char = null_mut();
        // SAFETY: the bytes are read during the call; on success the name is a terminated string made with `malloc`.
        unsafe {
            let loaded = (self.library.load_remote_md)(
                self.agent,
                metadata.as_ptr().cast(),
                metadata.len(),
                &mut name,
            );
            ok("load_remote_md", loaded)?;
            self.peer = Some(CStr::from_ptr(name).to_owned());
            libc::free(name.cast());
        }
        Ok(())
    }

    /// Starts to write `bytes` bytes from `offset` of our staging memory to `remote`, and to notify the peer with `notice` when
    /// they are there. The bytes must stay as they are until [`Self::is_done`].
    pub fn write(&self, offset: usize, bytes: usize, remote: u64, notice: &[u8]) -> Result<Write, CallError> {
        let peer = self.peer.as_ref().ok_or(CallError { call: "write", status: -1 })?;
        let local = self.staging.address_of(offset, bytes);
        let nixl = &*self.library;
        let (mut from, mut to, mut request) = (null_mut(), null_mut(), null_mut());
        // SAFETY: lists and request come from the library; the local range lies within registered memory, as
        // `address_of` has checked; the remote one is the peer's to check, and NIXL's, which knows what it registered.
        unsafe {
            let made = ok("create_xfer_dlist", (nixl.create_xfer_dlist)(DRAM, &mut from))
                .and_then(|()| ok("create_xfer_dlist", (nixl.create_xfer_dlist)(DRAM, &mut to)))
                .and_then(|()| ok("xfer_dlist_add_desc", (nixl.xfer_dlist_add_desc)(from, local, bytes, 0)))
                .and_then(|()| {
                    ok("xfer_dlist_add_desc", (nixl.xfer_dlist_add_desc)(to, remote as usize, bytes, 0))
                })
                .and_then(|()| self.notify_with(notice))
                .and_then(|()| {
                    let options = self.options;
                    let made = (nixl.create_xfer_req)(
                        self.agent,
                        WRITE,
                        from,
                        to,
                        peer.as_ptr(),
                        &mut request,
                        options,
                    );
                    ok("create_xfer_req", made)
                })
                .and_then(|()| ok("post_xfer_req", (nixl.post_xfer_req)(self.agent, request, self.options)));
            for list in [from, to].into_iter().filter(|list| !list.is_null()) {
                (nixl.destroy_xfer_dlist)(list);
            }
            (nixl.opt_args_set_has_notif)(self.options, false);
            let write = Write(request);
            if let Err(error) = made {
                if !request.is_null() {
                    self.release(write);
                }
                return Err(error);
            }
            Ok(write)
        }
    }

    /// Whether a write has arrived. To be asked until it has: the notification is sent by the asking.
    pub fn is_done(&self, write: &Write) -> Result<bool, CallError> {
        // SAFETY: a request of this agent that was not released.
        let status = unsafe { (self.library.get_xfer_status)(self.agent, write.0) };
        if status < 0 { Err(CallError { call: "get_xfer_status", status }) } else { Ok(status == 0) }
    }

    /// Forgets a write.
    pub fn release(&self, write: Write) {
        // SAFETY: a request of this agent, released once. One that the library does not let go of is leaked.
        unsafe {
            if (self.library.release_xfer_req)(self.agent, write.0) >= 0 {
                (self.library.destroy_xfer_req)(write.0);
            }
        }
    }

    /// Sends a notification on its own.
    pub fn notify(&self, notice: &[u8]) -> Result<(), CallError> {
        let peer = self.peer.as_ref().ok_or(CallError { call: "gen_notif", status: -1 })?;
        // SAFETY: the bytes are copied during the call; the peer's name is terminated.
        let sent = unsafe {
            (self.library.gen_notif)(
                self.agent,
                peer.as_ptr(),
                notice.as_ptr().cast::<c_void>(),
                notice.len(),
                self.options,
            )
        };
        ok("gen_notif", sent)
    }

    /// Makes progress, and hands over what the peer has notified of. Others than the peer are not listened to.
    pub fn notifications(&self, mut take: impl FnMut(&[u8])) -> Result<(), CallError> {
        let nixl = &*self.library;
        // SAFETY: the map is the library's and changes only in `get_notifs` and `clear`; names and notices are read
        // before that, within the lengths that it gives.
        unsafe {
            ok("get_notifs", (nixl.get_notifs)(self.agent, self.notifications, self.options))?;
            let mut agents = 0;
            ok("notif_map_size", (nixl.notif_map_size)(self.notifications, &mut agents))?;
            if agents == 0 {
                return Ok(());
            }
            for index in 0..agents {
                let (mut agent, mut count) = (null(), 0);
                ok(
                    "notif_map_get_agent_at",
                    (nixl.notif_map_get_agent_at)(self.notifications, index, &mut agent),
                )?;
                if self.peer.as_deref() != Some(CStr::from_ptr(agent)) {
                    continue;
                }
                let counted = (nixl.notif_map_get_notifs_size)(self.notifications, agent, &mut count);
                ok("notif_map_get_notifs_size", counted)?;
                for number in 0..count {
                    let (mut data, mut bytes) = (null(), 0);
                    let got =
                        (nixl.notif_map_get_notif)(self.notifications, agent, number, &mut data, &mut bytes);
                    ok("notif_map_get_notif", got)?;
                    // An empty one may have no place.
                    if bytes > 0 {
                        take(std::slice::from_raw_parts(data.cast::<u8>(), bytes));
                    }
                }
            }
            ok("notif_map_clear", (nixl.notif_map_clear)(self.notifications))
        }
    }

    fn notify_with(&self, notice: &[u8]) -> Result<(), CallError> {
        // SAFETY: the bytes are copied during the call.
        unsafe {
            let set = (self.library.opt_args_set_notif_msg)(
                self.options,
                notice.as_ptr().cast::<c_void>(),
                notice.len(),
            );
            ok("opt_args_set_notif_msg", set)?;
            ok("opt_args_set_has_notif", (self.library.opt_args_set_has_notif)(self.options, true))
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let nixl = &*self.library;
        // SAFETY: each object is given back once, and only if it was made; the agent goes last but for its memory, which
        // lives on in `staging`. Failures leave nothing to do.
        unsafe {
            if let Some(peer) = &self.peer {
                (nixl.invalidate_remote_md)(self.agent, peer.as_ptr());
            }
            if !self.registered.is_null() {
                (nixl.deregister_mem)(self.agent, self.registered, self.options);
                (nixl.destroy_reg_dlist)(self.registered);
            }
            if !self.notifications.is_null() {
                (nixl.destroy_notif_map)(self.notifications);
            }
            if !self.options.is_null() {
                (nixl.destroy_opt_args)(self.options);
            }
            if !self.agent.is_null() {
                (nixl.destroy_agent)(self.agent);
            }
            if !self.backend.is_null() {
                (nixl.destroy_backend)(self.backend);
            }
        }
    }
}

fn ok(call: &'static str, status: Status) -> Result<(), CallError> {
    if status < 0 { Err(CallError { call, status }) } else { Ok(()) }
}
