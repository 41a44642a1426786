//! The messages of Cloud Hypervisor's migration, and the descriptors beside them; everything that comes in is bounds-checked.
//!
//! `01 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00` is `Start` without a payload; `01 00 …` with length 0 is also the answer that all is right.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::Deserialize;
use thiserror::Error;

use crate::manifest::head::MOST_BYTES;
use crate::page::PAGE;

/// Bytes of a request and of an answer.
pub(super) const HEADER: usize = 16;
/// Slots at most.
pub(super) const MOST_SLOTS: usize = 128;
/// Bytes of the longest JSON that is taken.
pub(super) const MOST_JSON: u64 = 64 << 20;
/// The version of the protocol.
const VERSION: [u8; 2] = [0, 0];

pub(super) const START: u16 = 1;
pub(super) const CONFIG: u16 = 2;
pub(super) const STATE: u16 = 3;
pub(super) const COMPLETE: u16 = 5;
pub(super) const ABANDON: u16 = 6;
pub(super) const MEMORY_FD: u16 = 7;
pub(super) const COMPLETE_PAUSED: u16 = 8;
pub(super) const PAGE_FAULT: u16 = 9;

/// What an additional connection is for: faults.
pub(super) const FAULTS: [u8; 2] = [2, 0];

const OK: u16 = 1;
const ERROR: u16 = 2;

/// Why the other end is refused.
#[derive(Debug, Error)]
pub enum Refused {
    /// The connection.
    #[error("the connection: {0}")]
    Connection(#[from] io::Error),
    /// It went away.
    #[error("the other end closed the connection")]
    Closed,
    /// It says something that does not come now.
    #[error("command {0} came where {1} should")]
    Command(u16, &'static str),
    /// Another version of the protocol.
    #[error("its protocol has version {0}, and version 0 is spoken")]
    Version(u16),
    /// A length that makes no sense.
    #[error("{0} of {1} bytes")]
    Length(&'static str, u64),
    /// It answers with something else.
    #[error("it answers {1} with status {0}")]
    Answer(u16, &'static str),
    /// It passed no descriptor.
    #[error("the memory of slot {0} came with {1} descriptors, and one is needed")]
    Descriptors(u32, usize),
    /// Its configuration is none.
    #[error("its configuration: {0}")]
    Json(#[from] serde_json::Error),
    /// A slot that makes no sense.
    #[error("slot {slot} of {size} bytes from {gpa:#x}: {why}")]
    Slot {
        /// Its number.
        slot: u32,
        /// Where it is in the guest.
        gpa: u64,
        /// Its bytes.
        size: u64,
        /// What is wrong.
        why: &'static str,
    },
    /// There are none, or too many.
    #[error("{0} slots of memory: from 1 to {MOST_SLOTS} are taken")]
    Slots(usize),
    /// It gave up.
    #[error("Cloud Hypervisor abandoned it")]
    Abandoned,
}

/// A slot of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub struct Slot {
    /// Its number.
    pub slot: u32,
    /// Its first byte's address in the guest.
    pub gpa: u64,
    /// Its bytes.
    pub size: u64,
    /// Where it begins in its memfd.
    pub file_offset: u64,
    #[serde(default)]
    virtio_mem: bool,
}

#[derive(Deserialize)]
struct Config {
    memory_manager_data: Memory,
}

#[derive(Deserialize)]
struct Memory {
    guest_ram_mappings: Vec<Slot>,
}

/// The slots of a configuration.
///
/// # Errors
/// It is none, or they make no sense.
pub fn slots(config: &[u8]) -> Result<Vec<Slot>, Refused> {
    let slots = serde_json::from_slice::<Config>(config)?.memory_manager_data.guest_ram_mappings;
    if slots.is_empty() || slots.len() > MOST_SLOTS {
        return Err(Refused::Slots(slots.len()));
    }
    for (at, one) in slots.iter().enumerate() {
        let Slot { slot, gpa, size, file_offset, virtio_mem } = *one;
        let refuse = |why| Err(Refused::Slot { slot, gpa, size, why });
        let page = PAGE as u64;
        if size == 0 || [gpa, size, file_offset].iter().any(|value| value % page != 0) {
            return refuse("it is not of whole pages of 4 KiB");
        }
        if size > MOST_BYTES || file_offset > MOST_BYTES || gpa.checked_add(size).is_none() {
            return refuse("it is too large");
        }
        if virtio_mem {
            return refuse("it is virtio-mem's, of which only a part is plugged in");
        }
        for other in &slots[..at] {
            if other.slot == slot {
                return refuse("there are two of that number");
            }
            if gpa < other.gpa + other.size && other.gpa < gpa + size {
                return refuse("it overlaps another one");
            }
        }
    }
    Ok(slots)
}

/// A request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub command: u16,
    pub length: u64,
}

/// One end of a connection.
#[derive(Debug)]
pub(super) struct Link(pub UnixStream);

impl Link {
    /// The next request; `None`: the other end closed the connection before it.
    pub fn request(&mut self) -> Result<Option<Request>, Refused> {
        let mut header = [0; HEADER];
        let first = loop {
            match self.0.read(&mut header) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => break other?,
            }
        };
        if first == 0 {
            return Ok(None);
        }
        self.fill(&mut header[first..])?;
        let (command, rest) = split(&header);
        let [version_low, version_high, _, _, _, _, length @ ..] = rest;
        if command == START && [version_low, version_high] != VERSION {
            return Err(Refused::Version(u16::from_le_bytes([version_low, version_high])));
        }
        Ok(Some(Request { command, length: u64::from_le_bytes(length) }))
    }

    /// Waits for so long; whether the other end has closed the connection.
    pub fn closes_within(&self, time: Duration) -> Result<bool, Refused> {
        let until = Instant::now() + time;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let left = Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() };
            let mut fds = [PollFd::new(&self.0, PollFlags::RDHUP)];
            match poll(&mut fds, Some(&left)) {
                Ok(ready) => return Ok(ready > 0),
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(io::Error::from(errno).into()),
            }
        }
    }

    pub fn fill(&mut self, bytes: &mut [u8]) -> Result<(), Refused> {
        self.0.read_exact(bytes).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => Refused::Closed,
            _ => error.into(),
        })
    }

    /// JSON of `length` bytes; room is made as it comes.
    pub fn json(&mut self, what: &'static str, length: u64) -> Result<Vec<u8>, Refused> {
        if length == 0 || length > MOST_JSON {
            return Err(Refused::Length(what, length));
        }
        let mut json = Vec::new();
        (&self.0).take(length).read_to_end(&mut json)?;
        if json.len() as u64 == length { Ok(json) } else { Err(Refused::Closed) }
    }

    /// A slot's number with its memfd.
    pub fn memory(&mut self, length: u64) -> Result<(u32, OwnedFd), Refused> {
        if length != 4 {
            return Err(Refused::Length("the number of a slot", length));
        }
        let (mut number, mut fds) = ([0; 4], Vec::new());
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let got = loop {
            match recvmsg(&self.0, &mut [IoSliceMut::new(&mut number)], &mut control, RecvFlags::CMSG_CLOEXEC) {
                Err(rustix::io::Errno::INTR) => {}
                other => break other.map_err(io::Error::from)?.bytes,
            }
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        if got == 0 {
            return Err(Refused::Closed);
        }
        self.fill(&mut number[got..])?;
        let slot = u32::from_le_bytes(number);
        match (fds.pop(), fds.len()) {
            (Some(fd), 0) => Ok((slot, fd)),
            (one, others) => Err(Refused::Descriptors(slot, others + usize::from(one.is_some()))),
        }
    }

    /// Says that a request was done, or that it could not be.
    pub fn answer(&mut self, done: bool) -> Result<(), Refused> {
        Ok(self.0.write_all(&header(if done { OK } else { ERROR }, 0))?)
    }

    /// Asks, and waits until it was done.
    pub fn ask(&mut self, command: u16, what: &'static str, payload: &[u8]) -> Result<(), Refused> {
        self.0.write_all(&header(command, payload.len() as u64))?;
        self.0.write_all(payload)?;
        self.answered(what)
    }

    /// Hands the memfd of a slot over.
    pub fn pass(&mut self, slot: u32, memfd: &impl AsFd) -> Result<(), Refused> {
        self.0.write_all(&header(MEMORY_FD, 4))?;
        let (fds, mut space) = ([memfd.as_fd()], [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))]);
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&fds));
        let number = slot.to_le_bytes();
        let sent = sendmsg(&self.0, &[IoSlice::new(&number)], &mut control, SendFlags::NOSIGNAL).map_err(io::Error::from)?;
        self.0.write_all(&number[sent..])?;
        self.answered("memory")
    }

    fn answered(&mut self, what: &'static str) -> Result<(), Refused> {
        let mut answer = [0; HEADER];
        self.fill(&mut answer)?;
        match split(&answer) {
            (OK, [_, _, _, _, _, _, 0, 0, 0, 0, 0, 0, 0, 0]) => Ok(()),
            (status, _) => Err(Refused::Answer(status, what)),
        }
    }
}

fn header(word: u16, length: u64) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..2].copy_from_slice(&word.to_le_bytes());
    header[8..].copy_from_slice(&length.to_le_bytes());
    header
}

fn split(header: &[u8; HEADER]) -> (u16, [u8; HEADER - 2]) {
    let [low, high, rest @ ..] = *header;
    (u16::from_le_bytes([low, high]), rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_that_make_no_sense_are_refused() {
        let config = |slots: &str| format!(r#"{{"vm_config":{{}},"memory_manager_data":{{"guest_ram_mappings":[{slots}]}}}}"#);
        let one = r#"{"slot":0,"gpa":0,"size":8192,"zone_id":"mem0","virtio_mem":false,"file_offset":0}"#;
        let other = r#"{"slot":2,"gpa":4294967296,"size":4096,"zone_id":"mem0","file_offset":8192}"#;
        let both = slots(config(&format!("{one},{other}")).as_bytes()).unwrap();
        assert_eq!((both[0].slot, both[1].gpa, both[1].file_offset), (0, 1 << 32, 8192));
        for (change, to) in [
            ("\"slot\":2", "\"slot\":0"),
            ("4294967296", "4096"),
            ("4294967296", "18446744073709547520"),
            ("\"size\":4096", "\"size\":0"),
            ("\"size\":4096", "\"size\":100"),
            ("\"size\":4096", "\"size\":9223372036854771712"),
            ("\"file_offset\":8192", "\"file_offset\":1"),
            ("\"file_offset\":8192", "\"file_offset\":\"x\""),
            ("\"zone_id\":\"mem0\",\"file", "\"virtio_mem\":true,\"file"),
        ] {
            let wrong = config(&format!("{one},{}", other.replace(change, to)));
            assert!(slots(wrong.as_bytes()).is_err(), "{to}");
        }
        for wrong in ["", "{}", "[]", &config(""), &config(&vec![one; 200].join(","))] {
            assert!(slots(wrong.as_bytes()).is_err());
        }
    }
}
