//! The messages of a Cloud Hypervisor's local migration, as its two ends say them.
//!
//! `ask(&mut stream, START, &[])` is `Some(1)` where the other end takes it, `Some(2)` where it does not, and `None` where it has gone.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use farbus_machine_bank::cloud_hypervisor::{RestoreError, RestoreOptions, RestoreReport, SaveError, restore, save};
use farbus_machine_bank::deposit::DepositReport;
use farbus_machine_bank::{Bank, DepositOptions, PAGE, SectionKind};
use rustix::fs::MemfdFlags;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use super::machine;

pub const START: u16 = 1;
pub const CONFIG: u16 = 2;
pub const STATE: u16 = 3;
pub const COMPLETE: u16 = 5;
pub const ABANDON: u16 = 6;
pub const MEMORY_FD: u16 = 7;
pub const COMPLETE_PAUSED: u16 = 8;
pub const PAGE_FAULT: u16 = 9;

/// Where the second slot is in the guest, and in the memfd.
pub const HIGH: u64 = 4 << 30;
pub const LOW_PAGES: usize = 100;
pub const HIGH_PAGES: usize = 50;

pub fn memory() -> Vec<u8> {
    machine(31, LOW_PAGES + HIGH_PAGES)
}

pub fn config() -> String {
    let slot = |slot: u32, gpa: u64, pages: usize, file_offset: usize| {
        format!(
            r#"{{"slot":{slot},"gpa":{gpa},"size":{},"zone_id":"mem0","virtio_mem":false,"file_offset":{file_offset}}}"#,
            pages * PAGE
        )
    };
    let slots = [slot(0, 0, LOW_PAGES, 0), slot(3, HIGH, HIGH_PAGES, LOW_PAGES * PAGE)].join(",");
    format!(r#"{{"vm_config":{{"cpus":{{"boot_vcpus":1}}}},"memory_manager_data":{{"guest_ram_mappings":[{slots}]}}}}"#)
}

pub fn memfd(bytes: &[u8]) -> File {
    let file = File::from(rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
    file.write_all_at(bytes, 0).unwrap();
    file
}

pub fn header(word: u16, length: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..2].copy_from_slice(&word.to_le_bytes());
    header[8..].copy_from_slice(&length.to_le_bytes());
    header
}

/// The status of the next answer; `None`: the connection is closed.
pub fn answer(stream: &mut UnixStream) -> Option<u16> {
    let mut answer = [0; 16];
    stream.read_exact(&mut answer).ok()?;
    assert_eq!(answer[2..], [0; 14]);
    Some(u16::from_le_bytes([answer[0], answer[1]]))
}

pub fn ask(stream: &mut UnixStream, command: u16, payload: &[u8]) -> Option<u16> {
    stream.write_all(&[&header(command, payload.len() as u64)[..], payload].concat()).ok()?;
    answer(stream)
}

pub fn pass(stream: &mut UnixStream, slot: u32, files: &[&File]) -> Option<u16> {
    stream.write_all(&header(MEMORY_FD, 4)).ok()?;
    let fds: Vec<_> = files.iter().map(|file| file.as_fd()).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(&fds)));
    sendmsg(&*stream, &[IoSlice::new(&slot.to_le_bytes())], &mut control, SendFlags::empty()).ok()?;
    answer(stream)
}

/// What a machine came to where it was handed.
pub struct Received {
    pub slots: Vec<(u32, File)>,
    pub config: Vec<u8>,
    pub state: Vec<u8>,
    pub last: u16,
}

pub fn request(stream: &mut UnixStream) -> (u16, u64) {
    let mut request = [0; 16];
    stream.read_exact(&mut request).unwrap();
    (u16::from_le_bytes([request[0], request[1]]), u64::from_le_bytes(*request[8..].first_chunk().unwrap()))
}

pub fn receive_fd(stream: &UnixStream) -> (u32, File) {
    let (mut number, mut space) = ([0; 4], [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))]);
    let mut control = RecvAncillaryBuffer::new(&mut space);
    assert_eq!(recvmsg(stream, &mut [IoSliceMut::new(&mut number)], &mut control, RecvFlags::CMSG_CLOEXEC).unwrap().bytes, 4);
    let fd = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut rights) => rights.next(),
        _ => None,
    });
    (u32::from_le_bytes(number), fd.unwrap().into())
}

/// What asks for pages.
pub type Faults<'a> = &'a mut (dyn FnMut(&mut UnixStream, &Received) + Send);

/// Waits at `path` as `ch-remote receive-migration` makes a VMM wait; `faults` is run over the connection for page faults, when the state is there.
pub fn receive(listener: &UnixListener, faults: Option<Faults<'_>>) -> Received {
    let (mut stream, _) = listener.accept().unwrap();
    let mut received = Received { slots: Vec::new(), config: Vec::new(), state: Vec::new(), last: 0 };
    let mut pages = None;
    loop {
        let (command, length) = request(&mut stream);
        let mut payload = vec![0; if command == MEMORY_FD { 0 } else { length as usize }];
        stream.read_exact(&mut payload).unwrap();
        match command {
            START => {}
            MEMORY_FD => received.slots.push(receive_fd(&stream)),
            CONFIG => {
                received.config = payload;
                if faults.is_some() {
                    stream.write_all(&header(1, 0)).unwrap();
                    let (mut second, _) = listener.accept().unwrap();
                    let mut role = [0; 2];
                    second.read_exact(&mut role).unwrap();
                    assert_eq!(role, [2, 0]);
                    pages = Some(second);
                    continue;
                }
            }
            STATE => received.state = payload,
            last => {
                received.last = last;
                stream.write_all(&header(1, 0)).unwrap();
                if let (Some(faults), Some(mut pages)) = (faults, pages) {
                    faults(&mut pages, &received);
                }
                return received;
            }
        }
        stream.write_all(&header(1, 0)).unwrap();
    }
}

pub fn fault(stream: &mut UnixStream, gpa: u64, len: u64) -> Option<u16> {
    ask(stream, PAGE_FAULT, &[gpa.to_le_bytes(), len.to_le_bytes()].concat())
}

/// Runs `vmm` as the other end of a deposit.
pub fn saved(bank: &Bank, vmm: impl FnOnce(&mut UnixStream) + Send) -> Result<DepositReport, SaveError> {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    std::thread::scope(|scope| {
        let vmm = scope.spawn(move || vmm(&mut theirs));
        let disk: &[u8] = b"a disk";
        let ended = save(bank, "vm7", &DepositOptions::default(), &[(SectionKind::Disk, "disk0", &disk)], ours, &|_, _| {});
        vmm.join().unwrap();
        ended
    })
}

pub fn hand_over(stream: &mut UnixStream, last: u16) -> Option<u16> {
    let memory = memfd(&memory());
    assert_eq!(ask(stream, START, &[]), Some(1));
    assert_eq!((pass(stream, 0, &[&memory]), pass(stream, 3, &[&memory])), (Some(1), Some(1)));
    assert_eq!(ask(stream, CONFIG, config().as_bytes()), Some(1));
    assert_eq!(ask(stream, STATE, b"{\"vcpus\":[]}"), Some(1));
    ask(stream, last, &[])
}

pub fn place(folder: &Path) -> (PathBuf, UnixListener) {
    let path = folder.join("restore");
    let listener = UnixListener::bind(&path).unwrap();
    (path, listener)
}

pub fn restored(
    bank: &Bank,
    options: RestoreOptions,
    faults: Option<Faults<'_>>,
) -> (Result<RestoreReport, RestoreError>, Received) {
    let folder = tempfile::tempdir().unwrap();
    let (path, listener) = place(folder.path());
    std::thread::scope(|scope| {
        let vmm = scope.spawn(|| receive(&listener, faults));
        let ended = restore(bank, &bank.find("vm7").unwrap(), &path, &options, &|_| {});
        // Who waits for somebody who never came fails, and does not wait for ever.
        drop(UnixStream::connect(&path));
        (ended, vmm.join().unwrap())
    })
}

pub fn page_of(file: &File, at: u64) -> Vec<u8> {
    let mut page = vec![0; PAGE];
    file.read_exact_at(&mut page, at * PAGE as u64).unwrap();
    page
}
