//! What the tests of the backend do again and again: wait for a value, turn interrupts on, share a window.
//!
//! `value(&mut backend, &mut bus)` polls until a register read has its answer: `(ReadTicket(7), 0x1c)`.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use farbus_pci_shim::vfio_user::VfioUserBackend;
use farbus_pci_shim::vfio_user::wire::{Command, IrqSet, MSIX, SET_ACTION_TRIGGER, SET_DATA_EVENTFD};
use farbus_remote_dma::dirty_log::DirtyLog;
use farbus_remote_dma::{Backend, BarAddress, InterruptMode, ReadTicket, SharedWindow};
use farbus_transport::{Mapped, Memory};
use zerocopy::FromBytes;

use super::{DEADLINE, Server, TestBus};

pub fn at(offset: u64) -> BarAddress {
    BarAddress { bar: 0, offset }
}

/// Polls until the backend has the value of a read.
pub fn value(backend: &mut VfioUserBackend, bus: &mut TestBus) -> (ReadTicket, u64) {
    let started = Instant::now();
    loop {
        backend.poll(bus);
        if let Some(answer) = backend.next_read() {
            return answer;
        }
        assert!(started.elapsed() < DEADLINE, "no value");
    }
}

/// Turns MSI-X on; the eventfds that the server got, by vector.
pub fn msix(backend: &mut VfioUserBackend, server: &mut Server, bus: &mut TestBus) -> Vec<OwnedFd> {
    backend.set_interrupt_mode(InterruptMode::Msix, bus);
    let mut fds = Vec::new();
    for got in server.answer_all(backend, bus) {
        let Ok((set, _)) = IrqSet::read_from_prefix(&got.body) else { continue };
        if got.is(Command::SetIrqs) && set.index == MSIX && set.count > 0 {
            assert_eq!((set.flags, set.start as usize), (SET_DATA_EVENTFD | SET_ACTION_TRIGGER, fds.len()));
            assert!(got.fds.len() == set.count as usize && got.fds.len() <= 8, "as many as the server takes");
            fds.extend(got.fds);
        }
    }
    fds
}

pub fn signal(fd: &OwnedFd) {
    rustix::io::write(fd, &1_u64.to_ne_bytes()).unwrap();
}

/// A window of two pages at 0x8000 whose memory may be mapped, its log, and what its owner waits for.
pub fn shared_window(guest: &Arc<Memory>) -> (SharedWindow, DirtyLog) {
    let log = DirtyLog::new(guest.len()).unwrap();
    let held = Mapped::new(Arc::clone(guest), 0, 0).unwrap();
    (SharedWindow::new(held, 0x3000, 0x2000, Some((log.clone(), 0x3000))), log)
}

pub fn pages(log: &DirtyLog) -> Vec<u64> {
    let mut pages = Vec::new();
    log.take(|page| pages.push(page));
    pages
}
