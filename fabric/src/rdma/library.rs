//! NIXL's C library, `libnixl_capi.so`, opened at run time: nothing of it is needed to build.
//!
//! The C interface has no version function. One struct is passed by layout, [`AgentConfig`], which is that of 1.5; every
//! function that we call is looked up when the library is opened, and one that is missing refuses the whole of it.

#![expect(unsafe_code, reason = "a foreign library; every block argues what it calls")]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::error::LibraryError;

/// An opaque object of the library.
pub(crate) type Handle = *mut c_void;
/// 0: done; 1: in progress; negative: an error.
pub(crate) type Status = c_int;

/// `nixl_capi_agent_config_t` of NIXL 1.5.
#[repr(C)]
pub(crate) struct AgentConfig {
    pub prog_thread: bool,
    pub listen_thread: bool,
    pub listen_port: c_int,
    pub thread_sync: c_int,
    pub workers: u32,
    pub prog_thread_delay_us: u64,
    pub listen_thread_delay_us: u64,
    pub telemetry: bool,
}

/// Declares the functions, and how all of them are looked up.
macro_rules! functions {
    ($($name:ident($($argument:ty),* $(,)?);)*) => {
        /// The functions that we call, as `nixl_capi_` and their name.
        pub(crate) struct Library {
            $(pub $name: unsafe extern "C" fn($($argument),*) -> Status,)*
        }

        impl Library {
            /// Opens the library and looks every function up. It stays open for as long as the process lives: threads
            /// and handlers of its own may run until then.
            pub fn open(path: &Path) -> Result<Self, LibraryError> {
                let opened = open(path)?;
                exit_without_destructors();
                Ok(Self {
                    $($name: {
                        let found = symbol(opened, concat!("nixl_capi_", stringify!($name), "\0"))?;
                        // SAFETY: the function of that name has this type in NIXL 1.5's C header; a pointer to a
                        // function is as large as one to data on every platform that has `dlsym`.
                        unsafe {
                            std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($argument),*) -> Status>(found)
                        }
                    },)*
                })
            }
        }
    };
}

functions! {
    create_configured_agent(*const c_char, *const AgentConfig, *mut Handle);
    destroy_agent(Handle);
    get_plugin_params(Handle, *const c_char, *mut Handle, *mut Handle);
    destroy_mem_list(Handle);
    destroy_params(Handle);
    create_backend(Handle, *const c_char, Handle, *mut Handle);
    destroy_backend(Handle);
    create_opt_args(*mut Handle);
    destroy_opt_args(Handle);
    opt_args_add_backend(Handle, Handle);
    opt_args_set_notif_msg(Handle, *const c_void, usize);
    opt_args_set_has_notif(Handle, bool);
    create_reg_dlist(c_int, *mut Handle);
    destroy_reg_dlist(Handle);
    reg_dlist_add_desc(Handle, usize, usize, u64, *const c_void, usize);
    register_mem(Handle, Handle, Handle);
    deregister_mem(Handle, Handle, Handle);
    get_local_md(Handle, *mut *mut c_void, *mut usize);
    load_remote_md(Handle, *const c_void, usize, *mut *mut c_char);
    invalidate_remote_md(Handle, *const c_char);
    create_xfer_dlist(c_int, *mut Handle);
    destroy_xfer_dlist(Handle);
    xfer_dlist_add_desc(Handle, usize, usize, u64);
    create_xfer_req(Handle, c_int, Handle, Handle, *const c_char, *mut Handle, Handle);
    post_xfer_req(Handle, Handle, Handle);
    get_xfer_status(Handle, Handle);
    release_xfer_req(Handle, Handle);
    destroy_xfer_req(Handle);
    create_notif_map(*mut Handle);
    destroy_notif_map(Handle);
    get_notifs(Handle, Handle, Handle);
    notif_map_size(Handle, *mut usize);
    notif_map_get_agent_at(Handle, usize, *mut *const c_char);
    notif_map_get_notifs_size(Handle, *const c_char, *mut usize);
    notif_map_get_notif(Handle, *const c_char, usize, *mut *const c_void, *mut usize);
    notif_map_clear(Handle);
    gen_notif(Handle, *const c_char, *const c_void, usize, Handle);
}

fn open(path: &Path) -> Result<Handle, LibraryError> {
    let absent = |detail: String| LibraryError::Absent { path: path.to_owned(), detail };
    let name = CString::new(path.as_os_str().as_bytes()).map_err(|error| absent(error.to_string()))?;
    // SAFETY: a terminated string. The library's initialisers run; they are NIXL's, or whatever the configuration names.
    let opened = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    if opened.is_null() {
        // SAFETY: after a failure `dlerror` gives a terminated string, valid until this thread's next call of its kind.
        let detail = unsafe { CStr::from_ptr(libc::dlerror()) };
        return Err(absent(detail.to_string_lossy().into_owned()));
    }
    Ok(opened)
}

/// Ends the process before the destructors of what the library has brought along: where a system's libnl meets the one of
/// NIXL's wheel they fail, and a worker that has done its work would be reported as crashed.
fn exit_without_destructors() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        unsafe extern "C" {
            /// glibc's: as `atexit`, and tells the handler with which status.
            fn on_exit(handler: extern "C" fn(c_int, *mut c_void), argument: *mut c_void) -> c_int;
        }
        extern "C" fn exit_now(status: c_int, _: *mut c_void) {
            // SAFETY: flushes C's streams, then leaves without returning. Rust's are flushed before handlers run.
            unsafe {
                libc::fflush(std::ptr::null_mut());
                libc::_exit(status)
            }
        }
        static ONCE: std::sync::Once = std::sync::Once::new();
        ONCE.call_once(|| {
            // SAFETY: the handler takes no argument and lives as long as the process. Registered behind all of the
            // library's own, it runs before them.
            let registered = unsafe { on_exit(exit_now, std::ptr::null_mut()) };
            if registered != 0 {
                tracing::debug!("no handler for the process' exit");
            }
        });
    }
}

fn symbol(library: Handle, name: &'static str) -> Result<*mut c_void, LibraryError> {
    // SAFETY: an open library and a string that ends in a zero byte.
    let found = unsafe { libc::dlsym(library, name.as_ptr().cast()) };
    if found.is_null() {
        return Err(LibraryError::Function { name: name.trim_end_matches('\0') });
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_there_or_is_something_else_is_refused_with_its_name() {
        let error = Library::open(Path::new("/nowhere/libnixl_capi.so")).err().expect("nothing is there");
        assert!(error.to_string().contains("/nowhere/libnixl_capi.so"), "{error}");
        // Another library that every process has: it opens, and lacks the first function.
        let error = Library::open(Path::new("libc.so.6")).err().expect("no NIXL");
        assert!(error.to_string().contains("nixl_capi_create_configured_agent"), "{error}");
    }
}
