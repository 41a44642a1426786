//! libibverbs, loaded when it is first asked for, so that a program with this crate starts where no RDMA library is installed.
//!
//! `Library::load()` on a bare machine is `Err(NoRdma::Library("libibverbs.so.1: cannot open shared object file: …"))`, and farbus goes on with
//! shared memory. Calls on the data path (post, poll, arm) are function pointers of the device's provider and are not looked up here.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

use super::error::NoRdma;
use super::sys::{
    ibv_async_event, ibv_comp_channel, ibv_context, ibv_cq, ibv_device, ibv_device_attr, ibv_gid_entry, ibv_mr, ibv_pd,
    ibv_port_attr, ibv_qp, ibv_qp_attr, ibv_qp_init_attr,
};

/// The name under which every distribution installs it (rdma-core, stable since 2005).
const SONAME: &CStr = c"libibverbs.so.1";

macro_rules! library {
    ($($name:ident: $symbol:literal = fn($($arg:ty),*) $(-> $result:ty)?;)*) => {
        /// The entry points of libibverbs; each has the type that its manual page gives.
        pub(super) struct Library {
            $(pub(super) $name: unsafe extern "C" fn($($arg),*) $(-> $result)?,)*
        }

        impl Library {
            fn open() -> Result<Self, NoRdma> {
                // SAFETY: loading runs the library's constructors, which rdma-core keeps free of side effects on the process.
                let handle = unsafe { libc::dlopen(SONAME.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
                if handle.is_null() {
                    return Err(NoRdma::Library(last_error()));
                }
                // The handle is never closed: the entry points stay valid for the life of the process.
                Ok(Self { $($name: {
                    let found = symbol(handle, $symbol)?;
                    // SAFETY: the symbol exists in the library whose header (infiniband/verbs.h; tests/oracle compares) declares it with this
                    // signature; a function pointer and a data pointer have one size on every platform with dlsym(3).
                    unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($arg),*) $(-> $result)?>(found) }
                },)* })
            }
        }
    };
}

library! {
    get_device_list: c"ibv_get_device_list" = fn(*mut c_int) -> *mut *mut ibv_device;
    free_device_list: c"ibv_free_device_list" = fn(*mut *mut ibv_device);
    get_device_name: c"ibv_get_device_name" = fn(*mut ibv_device) -> *const c_char;
    open_device: c"ibv_open_device" = fn(*mut ibv_device) -> *mut ibv_context;
    close_device: c"ibv_close_device" = fn(*mut ibv_context) -> c_int;
    query_device: c"ibv_query_device" = fn(*mut ibv_context, *mut ibv_device_attr) -> c_int;
    query_port: c"ibv_query_port" = fn(*mut ibv_context, u8, *mut ibv_port_attr) -> c_int;
    query_gid_table: c"_ibv_query_gid_table" = fn(*mut ibv_context, *mut ibv_gid_entry, usize, u32, usize) -> isize;
    alloc_pd: c"ibv_alloc_pd" = fn(*mut ibv_context) -> *mut ibv_pd;
    dealloc_pd: c"ibv_dealloc_pd" = fn(*mut ibv_pd) -> c_int;
    reg_mr: c"ibv_reg_mr" = fn(*mut ibv_pd, *mut c_void, usize, c_int) -> *mut ibv_mr;
    dereg_mr: c"ibv_dereg_mr" = fn(*mut ibv_mr) -> c_int;
    create_comp_channel: c"ibv_create_comp_channel" = fn(*mut ibv_context) -> *mut ibv_comp_channel;
    destroy_comp_channel: c"ibv_destroy_comp_channel" = fn(*mut ibv_comp_channel) -> c_int;
    create_cq: c"ibv_create_cq" = fn(*mut ibv_context, c_int, *mut c_void, *mut ibv_comp_channel, c_int) -> *mut ibv_cq;
    destroy_cq: c"ibv_destroy_cq" = fn(*mut ibv_cq) -> c_int;
    get_cq_event: c"ibv_get_cq_event" = fn(*mut ibv_comp_channel, *mut *mut ibv_cq, *mut *mut c_void) -> c_int;
    ack_cq_events: c"ibv_ack_cq_events" = fn(*mut ibv_cq, c_uint);
    create_qp: c"ibv_create_qp" = fn(*mut ibv_pd, *mut ibv_qp_init_attr) -> *mut ibv_qp;
    modify_qp: c"ibv_modify_qp" = fn(*mut ibv_qp, *mut ibv_qp_attr, c_int) -> c_int;
    destroy_qp: c"ibv_destroy_qp" = fn(*mut ibv_qp) -> c_int;
    get_async_event: c"ibv_get_async_event" = fn(*mut ibv_context, *mut ibv_async_event) -> c_int;
    ack_async_event: c"ibv_ack_async_event" = fn(*mut ibv_async_event);
}

impl Library {
    /// The library of this process, loaded by the first call.
    ///
    /// # Errors
    /// [`NoRdma::Library`] where it, or a function in it, is missing.
    pub(super) fn load() -> Result<&'static Self, NoRdma> {
        static LOADED: OnceLock<Result<Library, NoRdma>> = OnceLock::new();
        LOADED.get_or_init(Self::open).as_ref().map_err(Clone::clone)
    }
}

fn symbol(handle: *mut c_void, name: &CStr) -> Result<*mut c_void, NoRdma> {
    // SAFETY: `handle` is what dlopen returned, and `name` ends with NUL.
    let found = unsafe { libc::dlsym(handle, name.as_ptr()) };
    if found.is_null() { Err(NoRdma::Library(last_error())) } else { Ok(found) }
}

fn last_error() -> String {
    // SAFETY: dlerror(3) returns NULL or a string that is valid until this thread's next call of the dl family.
    let text = unsafe { libc::dlerror() };
    if text.is_null() {
        return "the dynamic loader gives no reason".to_owned();
    }
    // SAFETY: not NULL, and NUL-terminated as dlerror(3) promises.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}
