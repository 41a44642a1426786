//! A vfio-user server that says anything to a lender's backend: no panic, a device that is described is a valid one, and a lent device comes to rest.
//!
//! A piece `05 …` in the handshake replaces the body of the sixth answer; after it, `01 0b 10 …` is a `DMA_READ` with the piece as its body, and with bit
//! 7 set the piece goes onto the socket as it is.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use farbus_pci_shim::vfio_user::backend::{describe, dma_request, read_value, region, server_limits};
use farbus_pci_shim::vfio_user::wire::{Command, DeviceInfo, HEADER_BYTES, Header, IrqInfo, RegionAccess, RegionInfo};
use farbus_pci_shim::vfio_user::{BackendOptions, VfioUserBackend};
use farbus_remote_dma::{
    Backend, BarAddress, Bus, DmaBuffer, DmaFault, DmaTag, InterruptMode, Iova, Progress, ReadTicket, ResetKind, Width,
};
use farbus_transport::local::LocalRegions;
use farbus_transport::{Access, LocalRegion, LocalSpan, Memory, Nanos, RegisterError};

use super::input::Input;

const BASE: u64 = 0x1_0000;
const BYTES: u64 = 64 << 10;

/// A server's answers and messages.
pub fn vfio_user_server(bytes: &[u8]) {
    let mut input = Input(bytes);
    let Some(changed) = input.u8() else { return };
    let Some(piece) = input.piece() else { return };
    parsers(piece);
    let folder = folder();
    let path = folder.join(format!("{:?}.sock", std::thread::current().id()));
    // Left by the input before.
    drop(std::fs::remove_file(&path));
    let listener = UnixListener::bind(&path).expect("a socket");
    let options = BackendOptions { answer_within: Duration::from_millis(20), map_unsealed: true, share_memory: true };
    let (opened, socket) = std::thread::scope(|scope| {
        let server = scope.spawn(|| shake_hands(listener.accept().expect("a client").0, changed, piece));
        let opened = VfioUserBackend::open(&path, options);
        (opened, server.join().expect("the server's thread does not panic"))
    });
    let (Ok(mut backend), Some(socket)) = (opened, socket) else { return };
    assert_eq!(backend.description().validate(), Ok(()), "a device that is none was described");
    let mut bus = GuestBus { guest: Memory::memfd("fuzz-guest", BYTES).expect("memory"), locals: LocalRegions::default() };
    if backend.attach(&mut bus).is_err() {
        return;
    }
    socket.set_nonblocking(true).expect("a socket");
    backend.window_mapped(Iova(BASE), BYTES, Access::READ_WRITE, None, &mut bus);
    for number in 0..64 {
        let (Some(control), Some(piece)) = (input.u8(), input.piece()) else { break };
        play(&socket, control, piece);
        act(&mut backend, &mut bus, control, number);
        backend.poll(&mut bus);
        while backend.next_read().is_some() {}
    }
    backend.fence();
    drop(socket);
    // Its server is gone, so nothing is left to wait for.
    for _ in 0..100_000 {
        backend.poll(&mut bus);
        if backend.in_flight() == 0 && backend.gone().is_some() {
            break;
        }
    }
    assert_eq!((backend.in_flight(), backend.is_unmapping()), (0, false), "a device without a server does not come to rest");
    backend.reset(ResetKind::Conventional, &mut bus);
    backend.detach();
}

fn parsers(piece: &[u8]) {
    if let Ok(region) = region(piece, 0) {
        assert!(region.areas.iter().all(|area| area.offset + area.len <= region.size), "an area outside of its region");
    }
    if let Some(request) = dma_request(piece, true, 4096) {
        assert_eq!(request.data.map(<[u8]>::len), Some(request.len as usize));
    }
    let _ = (server_limits(piece), read_value(piece, &RegionAccess { offset: 0, region: 0, count: 4 }));
    let mut config = config();
    for (to, from) in config.iter_mut().zip(piece) {
        *to = *from;
    }
    let irqs = farbus_pci_shim::vfio_user::backend::IrqCounts { pin: 1, msi: 32, msix: 64 };
    if let Ok((device, _)) = describe("x", &config, &[1 << 14, 0, 4096, 0, 0, 0], irqs) {
        assert_eq!(device.validate(), Ok(()));
    }
}

/// One message of the server.
fn play(mut socket: &UnixStream, control: u8, piece: &[u8]) {
    let bytes = if control & 0x80 != 0 {
        piece.to_vec()
    } else {
        let header = Header {
            message_id: u16::from(control >> 4 & 7) | u16::from(control & 1) << 12,
            command: u16::from(control & 0xf) + 2,
            message_size: (HEADER_BYTES + piece.len()) as u32,
            flags: u32::from(control >> 5 & 1),
            error: 0,
        };
        [zerocopy_bytes(&header).as_slice(), piece].concat()
    };
    // A backend that has hung up, or has not read for long, is one of its right answers.
    let _ = socket.write(&bytes);
    let mut sink = [0; 4096];
    while matches!(socket.read(&mut sink), Ok(1..)) {}
}

/// What the session does meanwhile.
fn act(backend: &mut VfioUserBackend, bus: &mut GuestBus, control: u8, number: u64) {
    let at = BarAddress { bar: 0, offset: number * 8 };
    match control >> 4 & 7 {
        0 => drop(backend.bar_read_later(ReadTicket(number as u32), at, Width::B4, bus)),
        1 => backend.bar_write(at, Width::B8, number, bus),
        2 => backend.set_interrupt_mode(if control & 1 == 0 { InterruptMode::Msix } else { InterruptMode::Msi(2) }, bus),
        3 if number.is_multiple_of(5) => backend.window_unmapped(Iova(BASE), BYTES, bus),
        4 => backend.set_bus_master(control & 1 == 0),
        5 if number.is_multiple_of(7) => {
            backend.fence();
            backend.poll(bus);
            if backend.in_flight() == 0 {
                backend.reset(ResetKind::Function, bus);
            }
        }
        _ => {}
    }
}

fn config() -> [u8; 256] {
    let mut config = [0; 256];
    for (at, bytes) in [
        (0, &[0x36, 0x1b, 0x10, 0, 0, 0, 0x10, 0, 2, 2, 8, 1][..]),
        (0x10, &[4]),
        (0x34, &[0x40]),
        (0x3d, &[1]),
        (0x40, &[0x11, 0x50, 19, 0, 0, 0x20, 0, 0, 0, 0x30, 0, 0]),
        (0x50, &[0x05, 0, 4, 0]),
    ] {
        for (to, from) in config.iter_mut().skip(at).zip(bytes) {
            *to = *from;
        }
    }
    config
}

/// Answers as a controller's server would, but for answer number `changed`, whose body is `piece`.
fn shake_hands(mut socket: UnixStream, changed: u8, piece: &[u8]) -> Option<UnixStream> {
    socket.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
    let config = config();
    for number in 0_u8.. {
        let mut header = [0; HEADER_BYTES];
        socket.read_exact(&mut header).ok()?;
        let [a, b, c, d, e, f, g, h, ..] = header;
        let (id, command, size) = (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]), u32::from_le_bytes([e, f, g, h]));
        let mut body = vec![0; size as usize - HEADER_BYTES];
        socket.read_exact(&mut body).ok()?;
        let word = |at: usize| body.get(at..at + 4).and_then(|word| word.try_into().ok()).map_or(0, u32::from_le_bytes);
        let mut last = false;
        let mut answer = match Command::from_number(command) {
            Some(Command::Version) => b"\0\0\x01\0{\"capabilities\":{\"max_msg_fds\":8}}\0".to_vec(),
            Some(Command::DeviceInfo) => zerocopy_bytes(&DeviceInfo { argsz: 16, flags: 3, num_regions: 9, num_irqs: 5 }),
            Some(Command::RegionInfo) => {
                let index = word(8);
                let size = if index == 0 { 1 << 14 } else { u64::from(index == 7) * 4096 };
                zerocopy_bytes(&RegionInfo { argsz: 32, flags: 3, index, cap_offset: 0, size, offset: 0 })
            }
            Some(Command::IrqInfo) => zerocopy_bytes(&IrqInfo { argsz: 16, flags: 1, index: word(8), count: 4 }),
            Some(Command::RegionRead) => {
                let at = word(0) as usize;
                last = at == 248;
                let data = config.get(at..at + word(12) as usize).unwrap_or_default();
                [body.as_slice(), data].concat()
            }
            _ => Vec::new(),
        };
        if number == changed {
            answer = piece.to_vec();
        }
        let flags = 1;
        let reply = Header { message_id: id, command, message_size: (HEADER_BYTES + answer.len()) as u32, flags, error: 0 };
        socket.write_all(&[zerocopy_bytes(&reply).as_slice(), &answer].concat()).ok()?;
        if last {
            break;
        }
    }
    Some(socket)
}

fn zerocopy_bytes<T: zerocopy::IntoBytes + zerocopy::Immutable>(value: &T) -> Vec<u8> {
    value.as_bytes().to_vec()
}

fn folder() -> &'static std::path::Path {
    static FOLDER: OnceLock<tempfile::TempDir> = OnceLock::new();
    FOLDER.get_or_init(|| tempfile::tempdir().expect("a folder")).path()
}

struct GuestBus {
    guest: Arc<Memory>,
    locals: LocalRegions,
}

impl GuestBus {
    fn copy(&self, iova: Iova, span: LocalSpan, read: bool) -> Result<Progress, DmaFault> {
        let len = u64::from(span.len());
        let fault = DmaFault::Unmapped { iova, len };
        let at = iova.0.checked_sub(BASE).ok_or(fault)?;
        let (memory, offset) = self.locals.resolve(span).expect("the backend's own memory");
        let copied =
            if read { memory.copy_from(offset, &self.guest, at, len) } else { self.guest.copy_from(at, memory, offset, len) };
        copied.map_err(|_| fault).map(|()| Progress::Done)
    }
}

impl Bus for GuestBus {
    fn now(&self) -> Nanos {
        Nanos::now()
    }

    fn register(&mut self, memory: Arc<Memory>, access: Access) -> Result<LocalRegion, RegisterError> {
        self.locals.register(memory, access)
    }

    fn dma_read(&mut self, _: DmaTag, iova: Iova, into: LocalSpan) -> Result<Progress, DmaFault> {
        self.copy(iova, into, true)
    }

    fn dma_write(&mut self, _: DmaTag, iova: Iova, from: LocalSpan) -> Result<Progress, DmaFault> {
        self.copy(iova, from, false)
    }

    fn dma_write_polled(&mut self, _: DmaTag, iova: Iova, bytes: &[u8]) -> Result<Progress, DmaFault> {
        let whole = bytes.len() <= 32 && bytes.len().is_multiple_of(4) && iova.0.is_multiple_of(4);
        assert!(whole && iova.0 % 4096 + bytes.len() as u64 <= 4096, "a polled write that no bus takes");
        let fault = DmaFault::Unmapped { iova, len: bytes.len() as u64 };
        let at = iova.0.checked_sub(BASE).ok_or(fault)?;
        self.guest.write(at, bytes).map_err(|_| fault).map(|()| Progress::Done)
    }

    fn map(&mut self, _: Iova, _: u64, _: Access) -> Result<Option<DmaBuffer>, DmaFault> {
        Ok(None)
    }

    fn interrupt(&mut self, _: u16) {}

    fn set_pin(&mut self, _: bool) {}
}
