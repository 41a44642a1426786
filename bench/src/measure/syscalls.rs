//! Counts the system calls of the calling thread, with Linux's Syscall User Dispatch: each one is trapped, counted and then carried out.
//!
//! `count_syscalls(|| { for _ in 0..7 { getpid(); } })` answers a total of 7. A lock that somebody else holds shows as a futex call; one
//! that nobody holds is no system call, so the absence of locks on the data path is checked in its source as well.
//!
//! ```text
//!   syscall ─► kernel: selector says BLOCK ─► SIGSYS ─► handler: ALLOW, count, the same syscall, result into RAX, BLOCK ─► sigreturn
//! ```
//!
//! The kernel lets calls from one range of code through whatever the selector says: the handler returns through a restorer of its own,
//! three instructions long, and only those are in the range (Documentation/admin-guide/syscall-user-dispatch.rst).

use std::cell::Cell;
use std::sync::Once;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering, compiler_fence};

use thiserror::Error;

/// What a thread asked of the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SyscallCounts {
    /// All system calls.
    pub total: u64,
    /// Those that wait for or wake a lock (`futex`).
    pub futex: u64,
    /// The number of the last one, which is where the search for its origin begins.
    pub last: Option<u64>,
}

/// Why system calls cannot be counted here.
#[derive(Debug, Error)]
pub enum SyscallError {
    /// The kernel lacks Syscall User Dispatch (Linux 5.11, x86-64) or refused it.
    #[error("system calls cannot be counted on this kernel: {0}")]
    Unsupported(#[source] std::io::Error),
    /// Counting inside of counting.
    #[error("the system calls of this thread are being counted already")]
    Nested,
}

const ALLOW: u8 = 0;
const BLOCK: u8 = 1;

thread_local! {
    // Const and without destructors, so that the signal handler may touch them.
    static SELECTOR: AtomicU8 = const { AtomicU8::new(ALLOW) };
    static TOTAL: AtomicU64 = const { AtomicU64::new(0) };
    static FUTEX: AtomicU64 = const { AtomicU64::new(0) };
    static LAST: AtomicU64 = const { AtomicU64::new(0) };
    static COUNTING: Cell<bool> = const { Cell::new(false) };
}

/// Runs `work` on this thread and counts its system calls. `work` must not start threads or processes: their creation cannot be carried
/// out from a signal handler and is answered with ENOSYS.
///
/// # Errors
/// [`SyscallError`]; `work` was not run.
pub fn count_syscalls<T>(work: impl FnOnce() -> T) -> Result<(T, SyscallCounts), SyscallError> {
    if COUNTING.with(Cell::get) {
        return Err(SyscallError::Nested);
    }
    install_handler()?;
    TOTAL.with(|total| total.store(0, Ordering::Relaxed));
    FUTEX.with(|futex| futex.store(0, Ordering::Relaxed));
    dispatch(true)?;
    let counting = Counting::begin();
    let result = work();
    drop(counting);
    let total = TOTAL.with(|total| total.load(Ordering::Relaxed));
    let futex = FUTEX.with(|futex| futex.load(Ordering::Relaxed));
    let last = LAST.with(|last| last.load(Ordering::Relaxed));
    let last = (total > 0).then_some(last);
    Ok((result, SyscallCounts { total, futex, last }))
}

/// Ends the counting also where the work panics.
struct Counting;

impl Counting {
    fn begin() -> Self {
        COUNTING.with(|counting| counting.set(true));
        compiler_fence(Ordering::SeqCst);
        SELECTOR.with(|selector| selector.store(BLOCK, Ordering::SeqCst));
        Self
    }
}

impl Drop for Counting {
    fn drop(&mut self) {
        SELECTOR.with(|selector| selector.store(ALLOW, Ordering::SeqCst));
        compiler_fence(Ordering::SeqCst);
        COUNTING.with(|counting| counting.set(false));
        // With the selector at ALLOW a dispatch that stays on changes nothing, so a refusal is harmless.
        let ended = dispatch(false);
        debug_assert!(ended.is_ok(), "{ended:?}");
    }
}

#[cfg(target_arch = "x86_64")]
mod trap {
    //! What is specific to the machine: the restorer, the handler and the raw call.

    use std::arch::{asm, global_asm};

    use super::*;

    global_asm!(
        ".pushsection .text",
        ".balign 16",
        ".hidden farbus_bench_sigreturn",
        ".globl farbus_bench_sigreturn",
        "farbus_bench_sigreturn:",
        "mov $15, %eax",
        "syscall",
        "ud2",
        ".hidden farbus_bench_sigreturn_end",
        ".globl farbus_bench_sigreturn_end",
        "farbus_bench_sigreturn_end:",
        ".popsection",
        options(att_syntax)
    );

    unsafe extern "C" {
        safe fn farbus_bench_sigreturn();
        safe fn farbus_bench_sigreturn_end();
    }

    /// The kernel's own layout of `struct sigaction`; libc's wrapper would put its own restorer in.
    #[repr(C)]
    struct KernelSigaction {
        handler: usize,
        flags: u64,
        restorer: usize,
        mask: u64,
    }

    const SA_RESTORER: u64 = 0x0400_0000;
    const PR_SET_SYSCALL_USER_DISPATCH: i32 = 59;

    pub(super) fn install() -> Result<(), std::io::Error> {
        let action = KernelSigaction {
            handler: on_sigsys as *const () as usize,
            flags: libc::SA_SIGINFO as u64 | SA_RESTORER,
            restorer: farbus_bench_sigreturn as *const () as usize,
            mask: u64::MAX,
        };
        // SAFETY: `action` has the kernel's layout and outlives the call; the handler touches const thread-locals and its own frame only.
        let answer = unsafe { libc::syscall(libc::SYS_rt_sigaction, libc::SIGSYS, &raw const action, 0, 8) };
        if answer == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    }

    pub(super) fn dispatch(on: bool) -> Result<(), std::io::Error> {
        let start = farbus_bench_sigreturn as *const () as usize;
        let len = farbus_bench_sigreturn_end as *const () as usize - start;
        let (mode, start, len) = if on { (1_usize, start, len) } else { (0, 0, 0) };
        let selector = SELECTOR.with(AtomicU8::as_ptr);
        let selector = if on { selector } else { std::ptr::null_mut() };
        // SAFETY: the selector lives as long as the thread, and dispatch belongs to the thread.
        let answer = unsafe { libc::prctl(PR_SET_SYSCALL_USER_DISPATCH, mode, start, len, selector) };
        if answer == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    }

    extern "C" fn on_sigsys(_signal: i32, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
        SELECTOR.with(|selector| selector.store(ALLOW, Ordering::SeqCst));
        let context = context.cast::<libc::ucontext_t>();
        // SAFETY: with SA_SIGINFO the kernel passes the context that sigreturn will restore; it is ours until the handler returns.
        let registers = unsafe { &mut (*context).uc_mcontext.gregs };
        let number = registers[libc::REG_RAX as usize];
        TOTAL.with(|total| total.fetch_add(1, Ordering::Relaxed));
        LAST.with(|last| last.store(number as u64, Ordering::Relaxed));
        if number == libc::SYS_futex {
            FUTEX.with(|futex| futex.fetch_add(1, Ordering::Relaxed));
        }
        registers[libc::REG_RAX as usize] = match number {
            libc::SYS_clone | libc::SYS_clone3 | libc::SYS_fork | libc::SYS_vfork | libc::SYS_rt_sigreturn => {
                -i64::from(libc::ENOSYS)
            }
            _ => {
                let arguments = [libc::REG_RDI, libc::REG_RSI, libc::REG_RDX, libc::REG_R10, libc::REG_R8, libc::REG_R9];
                raw(number, arguments.map(|register| registers[register as usize]))
            }
        };
        SELECTOR.with(|selector| selector.store(BLOCK, Ordering::SeqCst));
    }

    fn raw(number: i64, [a, b, c, d, e, f]: [i64; 6]) -> i64 {
        let result;
        // SAFETY: the thread asked for exactly this call with these arguments; it is made once, in its place.
        unsafe {
            asm!(
                "syscall",
                inlateout("rax") number => result,
                in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d, in("r8") e, in("r9") f,
                lateout("rcx") _, lateout("r11") _,
            );
        }
        result
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod trap {
    //! No restorer has been written for this machine.

    pub(super) fn install() -> Result<(), std::io::Error> {
        Err(std::io::ErrorKind::Unsupported.into())
    }

    pub(super) fn dispatch(_on: bool) -> Result<(), std::io::Error> {
        Err(std::io::ErrorKind::Unsupported.into())
    }
}

fn dispatch(on: bool) -> Result<(), SyscallError> {
    trap::dispatch(on).map_err(SyscallError::Unsupported)
}

fn install_handler() -> Result<(), SyscallError> {
    static INSTALLED: Once = Once::new();
    let mut outcome = Ok(());
    if !INSTALLED.is_completed() {
        outcome = trap::install().map_err(SyscallError::Unsupported);
        if outcome.is_ok() {
            INSTALLED.call_once(|| {});
        }
    }
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exactly_the_calls_made_are_counted_and_they_are_carried_out() {
        let pid = std::process::id();
        for calls in [0, 1, 7, 1000] {
            let (sum, counts) = count_syscalls(|| {
                (0..calls)
                    // SAFETY: getpid has no arguments and no effects.
                    .map(|_| unsafe { libc::syscall(libc::SYS_getpid) } as u64)
                    .sum::<u64>()
            })
            .unwrap();
            assert_eq!(sum, calls * u64::from(pid), "the calls must still answer");
            let last = (calls > 0).then_some(libc::SYS_getpid as u64);
            assert_eq!(counts, SyscallCounts { total: calls, futex: 0, last });
        }
    }

    #[test]
    fn a_lock_that_had_to_wait_is_seen() {
        let lock = std::sync::Mutex::new(());
        std::thread::scope(|scope| {
            let held = lock.lock().unwrap();
            let waiter = scope.spawn(|| count_syscalls(|| drop(lock.lock())).unwrap().1);
            std::thread::sleep(std::time::Duration::from_millis(50));
            drop(held);
            assert!(waiter.join().unwrap().futex >= 1);
        });
    }

    #[test]
    fn arithmetic_and_the_clock_are_no_system_calls_and_panics_end_the_counting() {
        let ((), counts) = count_syscalls(|| {
            for _ in 0..1000 {
                std::hint::black_box(std::time::Instant::now());
            }
        })
        .unwrap();
        assert_eq!(counts.total, 0, "the clock of this machine is read without the kernel");
        assert!(matches!(count_syscalls(|| count_syscalls(|| ())).unwrap().0, Err(SyscallError::Nested)));
        let panicked = std::panic::catch_unwind(|| count_syscalls(|| std::panic::resume_unwind(Box::new(()))));
        assert!(panicked.is_err());
        assert_eq!(count_syscalls(|| ()).unwrap().1.total, 0);
    }
}
