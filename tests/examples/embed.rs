//! A VMM that embeds a borrowed device: README's "Embed it" as a whole program, which a test holds to README's lines.
//!
//! Beside `farbus lend --device nvme:disk.img --listen shm:/tmp/farbus.link`, `cargo run -p farbus-tests --example embed` prints "NVMe 1.4" after one
//! register read by a vCPU's port, leaves the device at rest and goes on with it; with the argument `nas.example.org:7000` it meets a lender on another host, and shows the certificate in vm7.

use std::time::Duration;

use anyhow::{Context, Result};
use farbus_control::{BorrowerSecurity, CredentialFiles, Credentials};
use farbus_pci_shim::{Embedded, FunctionState, FunctionThread, FunctionThreadOptions, IrqfdSink};
use farbus_remote_dma::borrower::{BorrowerOptions, BorrowerSession};
use farbus_remote_dma::guest_memory::VmMemory;
use farbus_remote_dma::{Attachment, BarAddress, DeviceDescription, Width};
use farbus_transport::link::hello::{Hello, Role, SPOKEN};
use farbus_transport::shm::{self, Connection, ShmOptions};
use farbus_transport::verbs::{DeviceChoice, VerbsFabric};
use vm_memory::{GuestAddress, GuestMemoryMmap};

fn main() -> Result<()> {
    let hello = Hello { versions: SPOKEN, role: Role::Borrower, features: 0, epoch: 0, description: Vec::new() };
    match std::env::args().nth(1) {
        None => over_shared_memory(&hello),
        Some(lender) => over_rdma(&hello, &lender),
    }
}

fn over_shared_memory(hello: &Hello) -> Result<()> {
    let Connection { fabric, agreed } = shm::connect("/tmp/farbus.link", hello, ShmOptions::default())?;
    let device = DeviceDescription::decode(&agreed.peer.description)?;
    let session: Box<dyn Attachment> = Box::new(BorrowerSession::new(fabric, device, BorrowerOptions::default())?);
    boot(session)
}

fn over_rdma(hello: &Hello, lender: &str) -> Result<()> {
    let security =
        BorrowerSecurity::Tls { credentials: Credentials::load(&CredentialFiles::in_folder("vm7".as_ref()))?, peer: None };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let met = runtime.block_on(farbus_control::connect(&lender.parse()?, &security))?.greet(hello)?;
    let fabric = VerbsFabric::establish(&DeviceChoice::default(), met.control)?;
    let device = DeviceDescription::decode(&met.agreed.peer.description)?;
    boot(Box::new(BorrowerSession::new(fabric, device, BorrowerOptions::default())?))
}

/// What a VMM does with a device before its guest starts, and then what a vCPU of the guest does with it.
fn boot(session: Box<dyn Attachment>) -> Result<()> {
    // Memory of a shared file (a memfd) would be granted to the lender; this is reached by messages.
    let guest_memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 64 << 20)])?;
    let vectors = session.description().msix.map_or(0, |msix| msix.vectors);
    // A VMM with KVM routes the message to an irqfd.
    let irqfds = IrqfdSink::new(vectors, |_| {})?;
    let mut function = Embedded::new(session, irqfds, VmMemory::new(guest_memory))?;
    // What firmware does: memory space and bus master.
    function.config_write(0x04, &[0x06, 0x00])?;
    function.bar_write(BarAddress { bar: 0, offset: 0x1018 }, Width::B4, 17)?; // what the vCPU's exit says

    let vcpus = 4;
    let (thread, mut ports) = FunctionThread::start(function, vcpus, FunctionThreadOptions::default())?;
    let port = ports.get_mut(2).context("a port for each vCPU")?;
    port.bar_write(BarAddress { bar: 0, offset: 0x1018 }, Width::B4, 17)?;
    let version = port.bar_read(BarAddress { bar: 0, offset: 0x08 }, Width::B4)?;
    println!("NVMe {}.{}", version >> 16, version >> 8 & 0xff);
    // The vCPUs are stopped, and the machine goes elsewhere: here, by a second link.
    let mut function = thread.stop().context("the function's thread")?;
    let state = leave(&mut function)?;
    drop(function);
    go_on(&state)
}

/// What a VMM does with a function whose machine moves.
fn leave(function: &mut Embedded<IrqfdSink, VmMemory<()>>) -> Result<Vec<u8>> {
    function.quiesce(Duration::from_secs(1))?;
    let state = function.save()?;
    function.leave(Duration::from_secs(30))?;
    Ok(state)
}

/// And what the VMM of the other host does, which has the state, and memory with the same contents.
fn go_on(state: &[u8]) -> Result<()> {
    let token = FunctionState::parse(state)?.rest().token;
    let hello = Hello { versions: SPOKEN, role: Role::Borrower, features: 0, epoch: 0, description: token.claim() };
    let Connection { fabric, agreed } = shm::connect("/tmp/farbus.link", &hello, ShmOptions::default())?;
    let device = DeviceDescription::decode(&agreed.peer.description)?;
    let session = BorrowerSession::new(fabric, device, BorrowerOptions::default())?.continuing(token);
    let memory = VmMemory::new(GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 64 << 20)])?);
    let irqfds = IrqfdSink::new(session.description().msix.map_or(0, |msix| msix.vectors), |_| {})?;
    let (mut function, restored) = Embedded::restore(Box::new(session), irqfds, memory, state)?;
    function.resume();
    println!("goes on, after a reset: {}", restored.revived);
    Ok(())
}
