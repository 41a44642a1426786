//! membarrier(2): the sleeper makes every running thread of both processes fence, so that the one who pushes need not.
//!
//! A process registers once; then `global()` before a sleep orders "armed" before the last look at the ring for all registered processes.

use std::sync::OnceLock;

const GLOBAL_EXPEDITED: libc::c_int = 1 << 1;
const REGISTER_GLOBAL_EXPEDITED: libc::c_int = 1 << 2;

fn membarrier(command: libc::c_int) -> libc::c_long {
    // SAFETY: membarrier takes two integers and touches no memory of ours.
    unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) }
}

/// Registers this process; true where the kernel has the command (Linux 4.16 and later, unless a sandbox forbids it).
pub fn register() -> bool {
    static REGISTERED: OnceLock<bool> = OnceLock::new();
    *REGISTERED.get_or_init(|| membarrier(REGISTER_GLOBAL_EXPEDITED) == 0 && membarrier(GLOBAL_EXPEDITED) == 0)
}

/// A full fence on every running thread of every registered process. False where it suddenly fails: then nobody may sleep.
pub fn global() -> bool {
    membarrier(GLOBAL_EXPEDITED) == 0
}
