//! A vfio-user client that sends anything to a real server over a real function: no panic, and the next client is served.
//!
//! A piece `02 02 20 …` is a well-framed DMA_MAP of 32 bytes with one descriptor beside it; with bit 7 set the piece goes onto the socket as
//! it is, so that sizes and cuts are wrong too.

use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;

use farbus_pci_shim::vfio_user::client::Client;
use farbus_pci_shim::vfio_user::message::{dma_read_reply, dma_write_reply_fits, parse};
use farbus_pci_shim::vfio_user::{ClientInterrupts, Options, Server};
use farbus_pci_shim::{Function, FunctionOptions, InterruptOwner};
use farbus_remote_dma::model::{Nvme, NvmeOptions};
use farbus_remote_dma::native::Native;
use farbus_transport::Memory;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{Mode, OFlags};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use super::input::Input;

const DEADLINE: Duration = Duration::from_secs(10);
const VERSION: &[u8] = b"\0\0\x01\0{\"capabilities\":{\"max_msg_fds\":16}}\0";

/// A client's messages.
pub fn vfio_user_messages(bytes: &[u8]) {
    let mut input = Input(bytes);
    let Some(first) = input.u8() else { return };
    let harness = harness();
    let mut socket = UnixStream::connect(&harness.path).expect("the server listens");
    if first & 1 != 0 {
        send(&socket, &framed(1, VERSION), &[]);
    }
    let mut number = 0;
    while let (Some(control), Some(command), Some(body)) = (input.u8(), input.u8(), input.piece()) {
        let request = parse(u16::from(command % 20), body);
        assert_eq!(request, parse(u16::from(command % 20), body), "one message has two meanings");
        let _ = (dma_read_reply(body, 0x1_0000, 8), dma_write_reply_fits(body, 0x1_0000));
        let fds: Vec<_> =
            (0..control & 3).filter_map(|at| harness.kinds.get(usize::from((control >> 2).wrapping_add(at) % 8))).collect();
        let fds: Vec<BorrowedFd<'_>> = fds.into_iter().map(AsFd::as_fd).collect();
        if control & 0x80 == 0 {
            send(&socket, &framed(u16::from(command % 20), body), &fds);
        } else if !body.is_empty() {
            send(&socket, body, &fds);
        }
        number += 1;
        if number > 64 {
            break;
        }
    }
    // Whatever was sent is dealt with once the server closes its end.
    drop(socket.shutdown(Shutdown::Write));
    drop(socket.set_read_timeout(Some(DEADLINE)));
    let mut answer = [0; 4096];
    loop {
        match socket.read(&mut answer) {
            Ok(0) => break,
            Ok(_) => {}
            // The fuzzer's own clock.
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => break,
            Err(error) => panic!("the server does not let go of a client that left: {error}"),
        }
    }
    let mut next = Client::open(&harness.path, DEADLINE).expect("the next client is welcome");
    assert_eq!(next.device_info().expect("the next client is served").num_regions, 9);
}

struct Harness {
    path: PathBuf,
    /// What the path leads to.
    _socket: OwnedFd,
    /// What can be passed as a descriptor, right or wrong.
    kinds: Vec<OwnedFd>,
}

/// One server for all inputs of the process: an NVMe controller behind a function.
fn harness() -> &'static Harness {
    static HARNESS: OnceLock<Harness> = OnceLock::new();
    HARNESS.get_or_init(|| {
        let folder = tempfile::tempdir().expect("a folder");
        let name = folder.path().join("vmm");
        let mut server = Server::bind(&name).expect("a socket");
        // A process that a fuzzer ends tidies nothing up, so the socket loses its name at once and is reached by its inode (proc(5)).
        let socket = rustix::fs::open(&name, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).expect("the socket is there");
        let path = PathBuf::from(format!("/proc/self/fd/{}", socket.as_raw_fd()));
        drop(folder);
        std::thread::spawn(move || {
            let image = Memory::memfd("fuzz-image", 64 << 10).expect("memory");
            let nvme = Nvme::in_memory(image, NvmeOptions::default()).expect("a controller");
            let device = Native::inline(Box::new(nvme)).expect("it attaches");
            let sink = ClientInterrupts::new(farbus_remote_dma::Attachment::description(&device));
            let options = FunctionOptions { interrupts: InterruptOwner::Client };
            let mut function = Function::new(Box::new(device), sink, options).expect("a function");
            let options = Options { dma_deadline: Duration::from_millis(2), ..Options::default() };
            let ended = server.serve(&mut function, &options);
            panic!("the server ended: {ended:?}");
        });
        let memory = Memory::memfd("fuzz-guest", 64 << 10).expect("memory");
        let shared = || memory.file().expect("a memfd").0.try_clone_to_owned().expect("a descriptor");
        let signal = || eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).expect("an eventfd");
        let mut kinds: Vec<OwnedFd> = vec![shared(), signal(), shared(), signal(), shared()];
        kinds.push(std::fs::File::open("/dev/null").expect("it is everywhere").into());
        kinds.push(UnixStream::pair().expect("a pair").0.into());
        kinds.push(std::fs::File::open("/proc/self/exe").expect("this program").into());
        Harness { path, _socket: socket, kinds }
    })
}

fn framed(command: u16, body: &[u8]) -> Vec<u8> {
    let mut message = Vec::with_capacity(16 + body.len());
    message.extend_from_slice(&7_u16.to_le_bytes());
    message.extend_from_slice(&command.to_le_bytes());
    message.extend_from_slice(&(16 + body.len() as u32).to_le_bytes());
    message.extend_from_slice(&[0; 8]);
    message.extend_from_slice(body);
    message
}

fn send(socket: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)), "four descriptors fit");
    }
    // A server that closed meanwhile is one of its right answers.
    let _ = rustix::io::retry_on_intr(|| rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL));
}
