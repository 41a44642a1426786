//! The control frames and slots of the verbs fabric, written a second time from the tables at the top of transport/src/verbs/wire.rs.
//!
//! `frame(&mut socket)` gives the bytes of the next frame without its length; `slot(1, b"hello", 7)` is the 13 bytes of a message whose sender has
//! taken seven slots.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

pub const SLOT: usize = 64;
pub const HEADER: usize = 8;
pub const SLOTS: u32 = 256;

/// Frame 1: a queue pair.
#[derive(Clone, Copy, Debug)]
pub struct Attributes {
    pub queue_pair: u32,
    pub first_psn: u32,
    pub gid: [u8; 16],
    pub lid: u16,
    pub mtu: u8,
    pub reads_served: u8,
    pub slots: u32,
}

impl Attributes {
    pub fn bytes(&self) -> [u8; 33] {
        let mut bytes = [0; 33];
        bytes[0] = 1;
        bytes[1..5].copy_from_slice(&self.queue_pair.to_le_bytes());
        bytes[5..9].copy_from_slice(&self.first_psn.to_le_bytes());
        bytes[9..25].copy_from_slice(&self.gid);
        bytes[25..27].copy_from_slice(&self.lid.to_le_bytes());
        bytes[27] = self.mtu;
        bytes[28] = self.reads_served;
        bytes[29..33].copy_from_slice(&self.slots.to_le_bytes());
        bytes
    }

    pub fn of(frame: &[u8]) -> Self {
        let frame: &[u8; 33] = frame.try_into().expect("a frame of attributes has 33 bytes");
        assert_eq!(frame[0], 1, "the first frame is one of attributes");
        Self {
            queue_pair: u32::from_le_bytes(at(frame, 1)),
            first_psn: u32::from_le_bytes(at(frame, 5)),
            gid: at(frame, 9),
            lid: u16::from_le_bytes(at(frame, 25)),
            mtu: frame[27],
            reads_served: frame[28],
            slots: u32::from_le_bytes(at(frame, 29)),
        }
    }
}

/// Frame 2: memory that is granted.
#[derive(Clone, Copy, Debug)]
pub struct Granted {
    pub number: u64,
    pub address: u64,
    pub len: u64,
    pub key: u32,
    /// Bit 0 to read, bit 1 to write.
    pub access: u8,
}

impl Granted {
    pub fn bytes(&self) -> [u8; 30] {
        let mut bytes = [0; 30];
        bytes[0] = 2;
        bytes[1..9].copy_from_slice(&self.number.to_le_bytes());
        bytes[9..17].copy_from_slice(&self.address.to_le_bytes());
        bytes[17..25].copy_from_slice(&self.len.to_le_bytes());
        bytes[25..29].copy_from_slice(&self.key.to_le_bytes());
        bytes[29] = self.access;
        bytes
    }

    pub fn of(frame: &[u8]) -> Self {
        let frame: &[u8; 30] = frame.try_into().expect("a frame of a grant has 30 bytes");
        assert_eq!(frame[0], 2, "a grant was expected");
        Self {
            number: u64::from_le_bytes(at(frame, 1)),
            address: u64::from_le_bytes(at(frame, 9)),
            len: u64::from_le_bytes(at(frame, 17)),
            key: u32::from_le_bytes(at(frame, 25)),
            access: frame[29],
        }
    }
}

/// Frame 3: the sender's queue pair takes packets.
pub const READY: [u8; 1] = [3];

/// The next frame of the control connection.
pub fn frame(socket: &mut UnixStream) -> std::io::Result<Vec<u8>> {
    let mut len = [0; 4];
    socket.read_exact(&mut len)?;
    let mut frame = vec![0; u32::from_le_bytes(len) as usize];
    socket.read_exact(&mut frame)?;
    Ok(frame)
}

pub fn send_frame(socket: &mut UnixStream, frame: &[u8]) -> std::io::Result<()> {
    socket.write_all(&(frame.len() as u32).to_le_bytes())?;
    socket.write_all(frame)
}

/// A slot as it is sent.
pub fn slot(kind: u8, body: &[u8], taken: u32) -> Vec<u8> {
    let mut bytes = vec![kind, body.len() as u8, 0, 0];
    bytes.extend_from_slice(&taken.to_le_bytes());
    bytes.extend_from_slice(body);
    bytes
}

/// What came in a slot: kind, body, and how many slots its sender had taken.
pub fn parse(bytes: &[u8]) -> (u8, &[u8], u32) {
    assert!(bytes.len() >= HEADER, "a slot of {} bytes", bytes.len());
    assert_eq!(bytes[2..4], [0, 0], "reserved bytes");
    assert_eq!(usize::from(bytes[1]), bytes.len() - HEADER, "the length in a slot, and that of the message");
    (bytes[0], &bytes[HEADER..], u32::from_le_bytes(at(bytes, 4)))
}

fn at<const N: usize>(bytes: &[u8], from: usize) -> [u8; N] {
    bytes[from..from + N].try_into().expect("as many bytes as asked for")
}
