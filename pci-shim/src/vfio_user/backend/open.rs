//! From a path to a device that can be lent: connect, agree on a version, ask what the device is, reset it.
//!
//! `open("/run/dev.sock", …)` sends `VERSION`, `DEVICE_GET_INFO`, a `DEVICE_GET_REGION_INFO` for each BAR and the configuration space, a
//! `DEVICE_GET_IRQ_INFO` for each kind of interrupt, reads 256 bytes of configuration space, and ends with `DEVICE_RESET`. Each answer is checked.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use farbus_remote_dma::DeviceDescription;
use farbus_remote_dma::device::BAR_COUNT;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use thiserror::Error;
use zerocopy::IntoBytes;

use super::areas::Areas;
use super::describe::{Controls, DescribeError, HEADER_BYTES, IrqCounts, describe};
use super::dma::SLOT_BYTES;
use super::reply::{MAX_REGION_INFO, Region, ServerLimits, more_region_info, region, server_limits};
use super::{BackendOptions, RESET_LIMIT};
use crate::vfio_user::client::{Client, ClientError};
use crate::vfio_user::socket::Input;
use crate::vfio_user::wire::{
    CONFIG_REGION, Command, DEVICE_PCI, DEVICE_RESETS, INTX, IRQ_EVENTFD, IRQ_INDEXES, MAJOR, MAX_MESSAGE_FDS, MINOR, MSI, MSIX,
    REGION_READ, REGION_WRITE, RegionInfo,
};

/// Why a server's device cannot be lent.
#[derive(Debug, Error)]
pub enum OpenError {
    /// Nobody listens, or nobody lets us in.
    #[error("cannot connect: {0}")]
    Connect(io::Error),
    /// It did not answer, or refused, or closed the connection.
    #[error("{what}: {source}")]
    Asked {
        /// What was asked.
        what: &'static str,
        /// What came.
        source: ClientError,
    },
    /// What it said makes no sense.
    #[error("the server says nonsense: {0}")]
    Server(&'static str),
    /// It lacks what lending needs.
    #[error("the device cannot be lent: {0}")]
    Unfit(&'static str),
    /// Its configuration space describes no device.
    #[error("the device cannot be lent: {0}")]
    Describe(#[from] DescribeError),
    /// It came back as another device than was lent.
    #[error("the server came back with another device")]
    Changed,
    /// This host refused.
    #[error("cannot {what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// What the kernel answered.
        source: io::Error,
    },
}

/// A device that answered every question.
pub(super) struct Opened {
    pub(super) socket: UnixStream,
    pub(super) input: Input,
    pub(super) description: DeviceDescription,
    pub(super) controls: Controls,
    pub(super) limits: ServerLimits,
    /// BARs by number.
    pub(super) regions: [Region; BAR_COUNT],
    pub(super) areas: Areas,
}

fn asked(what: &'static str) -> impl FnOnce(ClientError) -> OpenError {
    move |source| OpenError::Asked { what, source }
}

/// Connects and asks.
///
/// # Errors
/// [`OpenError`].
pub(super) fn open(path: &Path, options: &BackendOptions) -> Result<Opened, OpenError> {
    let socket = connect(path, options.answer_within).map_err(OpenError::Connect)?;
    // What carries descriptors is sent by calls that wait; for this long.
    socket.set_write_timeout(Some(options.answer_within)).map_err(OpenError::Connect)?;
    let mut client = Client::over(socket, options.answer_within);
    let offer = format!(
        "{{\"capabilities\":{{\"max_msg_fds\":{MAX_MESSAGE_FDS},\"max_data_xfer_size\":{SLOT_BYTES},\"pgsizes\":4096,\
         \"write_multiple\":true}}}}\0"
    );
    let (minor, data) = client.version(MAJOR, MINOR, offer.as_bytes()).map_err(asked("agreeing on a version"))?;
    if minor > MINOR {
        return Err(OpenError::Server("it answers with a later version than was offered"));
    }
    let limits = server_limits(&data).map_err(OpenError::Server)?;
    let info = client.device_info().map_err(asked("asking what the device is"))?;
    if info.flags & DEVICE_PCI == 0 {
        return Err(OpenError::Unfit("it is no PCI device"));
    }
    if info.flags & DEVICE_RESETS == 0 {
        return Err(OpenError::Unfit("it cannot be reset, so what one borrower left in it would reach the next"));
    }
    if info.num_regions <= CONFIG_REGION {
        return Err(OpenError::Server("it has no configuration space"));
    }
    let mut areas = Areas::default();
    let mut regions: [Region; BAR_COUNT] = Default::default();
    for (index, slot) in (0..).zip(&mut regions) {
        let (found, fds) = ask_region(&mut client, index)?;
        areas.add(index, &found, fds, options.map_unsealed);
        *slot = found;
    }
    let (config_region, _) = ask_region(&mut client, CONFIG_REGION)?;
    if config_region.size < HEADER_BYTES as u64 || config_region.flags & (REGION_READ | REGION_WRITE) != REGION_READ | REGION_WRITE
    {
        return Err(OpenError::Server("its configuration space cannot be read and written"));
    }
    let irqs = IrqCounts {
        pin: ask_irqs(&mut client, INTX, info.num_irqs)?.min(1),
        msi: ask_irqs(&mut client, MSI, info.num_irqs)?,
        msix: ask_irqs(&mut client, MSIX, info.num_irqs)?,
    };
    client.set_deadline(RESET_LIMIT);
    client.reset().map_err(asked("resetting the device"))?;
    client.set_deadline(options.answer_within);
    let mut config = [0; HEADER_BYTES];
    // Servers may move no more than this at a time.
    for (at, piece) in (0..).step_by(64).zip(config.chunks_mut(64)) {
        for (at, piece) in (at..).step_by(8).zip(piece.chunks_mut(8)) {
            client.region_read(CONFIG_REGION, at, piece).map_err(asked("reading configuration space"))?;
        }
    }
    let sizes = std::array::from_fn(|bar| regions.get(bar).map_or(0, |region: &Region| region.size));
    let (description, controls) = describe(&format!("vfio-user {}", path.display()), &config, &sizes, irqs)?;
    let (socket, input) = client.into_parts();
    Ok(Opened { socket, input, description, controls, limits, regions, areas })
}

/// Connects without waiting for a listener that lets nobody in.
fn connect(path: &Path, within: Duration) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let started = Instant::now();
    loop {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        match rustix::net::connect(&socket, &address) {
            Ok(()) => {
                let socket = UnixStream::from(socket);
                socket.set_nonblocking(false)?;
                return Ok(socket);
            }
            // Its queue is full: connect(2) would wait without end.
            Err(Errno::AGAIN) if started.elapsed() < within => std::thread::sleep(Duration::from_millis(5)),
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn ask_region(client: &mut Client, index: u32) -> Result<(Region, Vec<OwnedFd>), OpenError> {
    const ASKED: u32 = size_of::<RegionInfo>() as u32;
    let what = "asking what a region is";
    let mut argsz = ASKED;
    loop {
        let ask = RegionInfo { argsz, flags: 0, index, cap_offset: 0, size: 0, offset: 0 };
        let body = client.request(Command::RegionInfo, ask.as_bytes(), &[]).map_err(asked(what))?;
        match more_region_info(body, argsz) {
            Some(more) if argsz == ASKED && more <= MAX_REGION_INFO => argsz = more,
            Some(_) => return Err(OpenError::Server("its answer about a region is too long")),
            None => {
                let found = region(body, index).map_err(OpenError::Server)?;
                return Ok((found, client.take_reply_fds()));
            }
        }
    }
}

fn ask_irqs(client: &mut Client, index: u32, indexes: u32) -> Result<u32, OpenError> {
    if index >= indexes.min(IRQ_INDEXES) {
        return Ok(0);
    }
    let info = client.irq_info(index).map_err(asked("asking what an interrupt is"))?;
    if info.index != index {
        return Err(OpenError::Server("it answered about another interrupt"));
    }
    Ok(if info.flags & IRQ_EVENTFD == 0 { 0 } else { info.count })
}
