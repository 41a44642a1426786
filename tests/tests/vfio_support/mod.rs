//! Real PCI devices for the tests of the vfio backend: bound to vfio-pci, lent by a thread or by `farbus lend`, borrowed over shared memory.
//!
//! `Lent::here(&edu())` is the guest's edu behind a session in this process, with the counters of its backend; `link.borrow()` is what a VMM
//! would have of a device that the program lends.

#![allow(dead_code, clippy::unwrap_used, reason = "each test program uses a part of it, and a panic is how a test fails")]

pub mod careless;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use farbus_bench::function::FunctionRegisters;
use farbus_pci_shim::irq::RecorderSink;
use farbus_remote_dma::borrower::{BorrowerOptions, BorrowerSession};
use farbus_remote_dma::lender::{LenderSession, PollOptions};
use farbus_remote_dma::vfio::{Host, Vfio, VfioCounters};
use farbus_remote_dma::wait::Waker;
use farbus_remote_dma::{Attachment, Backend, DeviceDescription, Iova};
use farbus_transport::Memory;
use farbus_transport::link::hello::{Hello, Role, SPOKEN};
use farbus_transport::shm::{ShmFabric, ShmOptions, connect};

pub type Registers = FunctionRegisters<RecorderSink>;

/// The address of a device of the lab; ci/softroce --pci says it.
pub fn lab(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: ci/softroce --pci sets it"))
}

pub fn folder(address: &str) -> PathBuf {
    Path::new("/sys/bus/pci/devices").join(address)
}

/// Gives a device to vfio-pci, as the hint of `farbus lend` says.
pub fn bind(address: &str) {
    if driver(address).as_deref() == Some("vfio-pci") {
        return;
    }
    fs::write(folder(address).join("driver_override"), "vfio-pci").unwrap();
    if driver(address).is_some() {
        fs::write(folder(address).join("driver/unbind"), address).unwrap();
    }
    fs::write("/sys/bus/pci/drivers_probe", address).unwrap();
    assert_eq!(driver(address).as_deref(), Some("vfio-pci"));
}

/// Takes it from vfio-pci again.
pub fn unbind(address: &str) {
    fs::write(folder(address).join("driver_override"), "\n").unwrap();
    if driver(address).is_some() {
        fs::write(folder(address).join("driver/unbind"), address).unwrap();
    }
    assert_eq!(driver(address), None);
}

pub fn driver(address: &str) -> Option<String> {
    let link = fs::read_link(folder(address).join("driver")).ok()?;
    Some(link.file_name().unwrap().to_string_lossy().into_owned())
}

/// Whether the device itself may begin DMA (command register bit 2).
pub fn is_bus_master(address: &str) -> bool {
    fs::read(folder(address).join("config")).unwrap()[4] & 4 != 0
}

/// A device that a thread of this process lends, and its borrower's attachment.
pub struct Lent {
    stop: Waker,
    thread: Option<JoinHandle<()>>,
    pub counters: Arc<VfioCounters>,
    pub attachment: Option<Box<dyn Attachment>>,
}

impl Lent {
    pub fn here(address: &str) -> Self {
        Self::through(address, |vfio| Box::new(vfio))
    }

    /// Through a backend that changes what the device is told.
    pub fn through(address: &str, change: impl FnOnce(Vfio) -> Box<dyn Backend>) -> Self {
        bind(address);
        let vfio = Vfio::open(&Host::default(), address.parse().unwrap()).unwrap();
        let (counters, description) = (vfio.counters(), vfio.description().clone());
        let backend = change(vfio);
        let (theirs, ours) = ShmFabric::pair(ShmOptions::default()).unwrap();
        let stop = Waker::new().unwrap();
        let waker = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut session = LenderSession::new(theirs, backend).map_err(|(error, _)| error).unwrap();
            session.run(PollOptions::default(), &waker);
            session.end().unwrap();
        });
        let session = BorrowerSession::new(ours, description, BorrowerOptions::default()).unwrap();
        Self { stop, thread: Some(thread), counters, attachment: Some(Box::new(session)) }
    }

    /// Registers over the device, which may use all of `memory` from `base` on.
    pub fn open(&mut self, memory: &Arc<Memory>, base: Iova) -> Registers {
        FunctionRegisters::open(self.attachment.take().unwrap(), RecorderSink::default(), memory, base).unwrap()
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.stop.set();
        let ended = self.thread.take().unwrap().join();
        if !std::thread::panicking() {
            ended.unwrap();
        }
    }
}

/// Borrows what a program lends at the link `path`.
pub fn borrow(path: &Path) -> Box<dyn Attachment> {
    let hello = Hello { versions: SPOKEN, role: Role::Borrower, features: 0, epoch: 0, description: Vec::new() };
    let connection = connect(path, &hello, ShmOptions::default()).unwrap();
    let description = DeviceDescription::decode(&connection.agreed.peer.description).unwrap();
    Box::new(BorrowerSession::new(connection.fabric, description, BorrowerOptions::default()).unwrap())
}

/// Calls `done` until it is true.
#[track_caller]
pub fn wait_until(what: &str, limit: Duration, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < limit, "{what}: not within {limit:?}");
        std::thread::sleep(Duration::from_micros(200));
    }
}
