//! A function on a thread of its own, for a VMM with several vCPUs: they reach it through ports, without a lock, and none waits for a doorbell.
//!
//! With four vCPUs `FunctionThread::start(embedded, 4, FunctionThreadOptions::default())` gives four ports; a burst of 64 stores through one of them is one
//! doorbell of the fabric, rung by this thread, which polls the link anyway and signals the interrupts that come over it. The device sees the accesses of
//! all vCPUs in an order in which they can have been made.
//!
//! ```
//! use farbus_pci_shim::{Embedded, FunctionThread, FunctionThreadOptions, IrqSink, VcpuPort};
//! use farbus_remote_dma::{BarAddress, GuestMemory, Width};
//!
//! fn boot<S, M>(function: Embedded<S, M>, vcpus: usize) -> std::io::Result<FunctionThread<S, M>>
//! where
//!     S: IrqSink + Send + 'static,
//!     M: GuestMemory + 'static,
//! {
//!     let (thread, ports) = FunctionThread::start(function, vcpus, FunctionThreadOptions::default())?;
//!     for mut port in ports {
//!         // What a vCPU's thread does when the guest exits with a store:
//!         std::thread::spawn(move || port.bar_write(BarAddress { bar: 0, offset: 0x1018 }, Width::B4, 17));
//!     }
//!     Ok(thread)
//! }
//! ```

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use farbus_remote_dma::wait::{Patience, SpinThenSleep, Waker, relax, sleep_until_readable};
use farbus_remote_dma::wire::{SLOTS, barrier};
use farbus_remote_dma::{Activity, GuestMemory};

use super::Embedded;
use super::vcpu::{Access, Served, Shared, Ticket, VcpuPort, port};
use crate::irq::IrqSink;

/// Accesses for each port that are carried out before the link has its turn.
const TURN: usize = 64;

/// How a function's thread passes its time.
#[derive(Clone, Copy, Debug)]
pub struct FunctionThreadOptions {
    /// How long it polls without finding anything before it sleeps.
    pub spin: Duration,
}

impl Default for FunctionThreadOptions {
    fn default() -> Self {
        Self { spin: Duration::from_micros(200) }
    }
}

/// The thread. Dropped, it ends, and its ports read all ones. The sink and the guest memory must not wait for anything that a vCPU holds while it waits at
/// its port. What else a function can do (map, reset from outside, decode, the dirty log) is done before it has a thread, or after [`FunctionThread::stop`].
pub struct FunctionThread<S: IrqSink, M: GuestMemory> {
    stop: Waker,
    thread: Option<JoinHandle<Embedded<S, M>>>,
}

impl<S: IrqSink + Send + 'static, M: GuestMemory + 'static> FunctionThread<S, M> {
    /// Gives `function` a thread, and each of `vcpus` vCPUs a port to it.
    ///
    /// # Errors
    /// What eventfd(2) or starting a thread answers.
    pub fn start(function: Embedded<S, M>, vcpus: usize, options: FunctionThreadOptions) -> io::Result<(Self, Vec<VcpuPort>)> {
        let stop = Waker::new()?;
        let shared = Arc::new(Shared {
            routes: function.function.routes().clone(),
            over: AtomicBool::new(false),
            next_ticket: AtomicU64::new(0),
        });
        let (ports, served): (Vec<_>, Vec<_>) =
            (0..vcpus).map(|_| port(&shared)).collect::<io::Result<Vec<_>>>()?.into_iter().unzip();
        let owner = Owner { function, served, stop: stop.clone(), over: Over(shared) };
        let thread = std::thread::Builder::new().name("farbus-function".into()).spawn(move || owner.run(options))?;
        Ok((Self { stop, thread: Some(thread) }, ports))
    }

    /// The thread, to pin it to a core.
    pub fn thread(&self) -> Option<&JoinHandle<Embedded<S, M>>> {
        self.thread.as_ref()
    }

    /// Ends the thread and gives the function back, with all that the ports had posted before; `None` where the thread panicked.
    pub fn stop(mut self) -> Option<Embedded<S, M>> {
        self.stop.set();
        self.thread.take()?.join().ok()
    }
}

impl<S: IrqSink, M: GuestMemory> Drop for FunctionThread<S, M> {
    fn drop(&mut self) {
        self.stop.set();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread of a function ended badly");
        }
    }
}

/// Tells the ports when the thread ends, however it ends.
struct Over(Arc<Shared>);

impl Drop for Over {
    fn drop(&mut self) {
        self.0.over.store(true, Ordering::Release);
    }
}

/// Everything the thread owns.
struct Owner<S: IrqSink, M: GuestMemory> {
    function: Embedded<S, M>,
    served: Vec<Served>,
    stop: Waker,
    over: Over,
}

impl<S: IrqSink, M: GuestMemory> Owner<S, M> {
    fn run(mut self, options: FunctionThreadOptions) -> Embedded<S, M> {
        let mut patience = SpinThenSleep::new(options.spin);
        let (mut now, mut empty_polls) = (patience.begin(), 0_u32);
        while !self.stop.is_set() {
            let served = self.serve();
            match (served, self.function.poll(now)) {
                (false, Activity::Idle(limit)) => {
                    now = patience.idle();
                    empty_polls = empty_polls.saturating_add(1);
                    relax(empty_polls);
                    if patience.wants_sleep() {
                        self.sleep(limit);
                        (now, empty_polls) = (patience.begin(), 0);
                    }
                }
                _ => (now, empty_polls) = (patience.begin(), 0),
            }
        }
        // What was posted before the end is carried out; a vCPU that never stops posting is not waited for.
        for _ in 0..=SLOTS as usize / TURN {
            self.serve();
        }
        self.function.function.send_all();
        drop(self.over);
        self.function
    }

    /// Carries out what the vCPUs ask; whether they asked anything. What is posted together is sent together.
    fn serve(&mut self) -> bool {
        let (mut any, mut first) = (false, self.first());
        for _ in 0..TURN * self.served.len() {
            let Some(before) = first else { break };
            // What some vCPU knows to have come before it was pushed before it was: a look at all ports that begins now finds that.
            let again = self.first();
            if again == first
                && let Some(port) = self.served.get_mut(before.1)
                && let Some(access) = port.take()
            {
                any = true;
                carry_out(&mut self.function, port, access);
                first = self.first();
            } else {
                first = again;
            }
        }
        if any {
            self.function.flush();
        }
        any
    }

    /// The least ticket that is seen, and at which port.
    fn first(&mut self) -> Option<(Ticket, usize)> {
        self.served.iter_mut().enumerate().filter_map(|(number, port)| Some((port.look()?, number))).min()
    }

    fn sleep(&mut self, limit: Option<Duration>) {
        let announced = self.function.arm() && self.served.iter_mut().all(Served::announce);
        if !announced || !barrier() || !self.served.iter().all(Served::is_quiet) {
            return;
        }
        let mut fds: Vec<Option<BorrowedFd<'_>>> = self.served.iter().map(|port| Some(port.fd())).collect();
        fds.extend([self.function.wake_fd(), Some(self.stop.fd())]);
        sleep_until_readable(&fds, limit);
    }
}

/// An access was checked by its port, so it cannot be refused; if it were, the guest reads what an empty slot answers.
fn carry_out<S: IrqSink, M: GuestMemory>(function: &mut Embedded<S, M>, port: &mut Served, access: Access) {
    let refused = |error| tracing::error!(%error, "an access that was checked is refused");
    match access {
        Access::BarWrite { at, width, value } => function.post_write(at, width, value).unwrap_or_else(refused),
        Access::BarRead { at, width } => {
            let value = function.bar_read(at, width).unwrap_or_else(|error| {
                refused(error);
                width.all_ones()
            });
            port.answer(value.to_le_bytes());
        }
        Access::ConfigWrite { offset, len, bytes } => {
            function.config_write(offset, bytes.get(..len).unwrap_or_default()).unwrap_or_else(refused);
            port.answer([0; 8]);
        }
        Access::ConfigRead { offset, len } => {
            let mut bytes = [0xff; 8];
            function.config_read(offset, bytes.get_mut(..len).unwrap_or_default()).unwrap_or_else(refused);
            port.answer(bytes);
        }
    }
}

#[cfg(test)]
mod tests;
