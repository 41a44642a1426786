//! The guest memory of a vfio-user client, and the accesses that a server asks it to make there.
//!
//! `DMA_READ` of 64 bytes at 0x1_0040 is answered with the 16 bytes that named them and the 64; where the memory refuses, with its errno.

use rustix::io::Errno;
use zerocopy::{FromBytes, IntoBytes};

use super::wire::{Command, DmaAccess, Header, MAX_DATA_BYTES};

/// The guest memory that a client answers `DMA_READ` and `DMA_WRITE` from.
pub trait ClientMemory {
    /// Fills `into` from `iova`.
    ///
    /// # Errors
    /// The errno for the server.
    fn read(&mut self, iova: u64, into: &mut [u8]) -> Result<(), Errno>;

    /// Stores `bytes` at `iova`.
    ///
    /// # Errors
    /// The errno for the server.
    fn write(&mut self, iova: u64, bytes: &[u8]) -> Result<(), Errno>;
}

/// The reply's body to a server's request.
///
/// # Errors
/// The errno for the server.
pub(super) fn answer_from(header: &Header, body: &[u8], memory: &mut dyn ClientMemory) -> Result<Vec<u8>, Errno> {
    let (asked, data) = DmaAccess::read_from_prefix(body).map_err(|_| Errno::INVAL)?;
    let mut reply = asked.as_bytes().to_vec();
    match Command::from_number(header.command) {
        Some(Command::DmaRead) if data.is_empty() && asked.count <= u64::from(MAX_DATA_BYTES) => {
            let begin = reply.len();
            reply.resize(begin + asked.count as usize, 0);
            memory.read(asked.address, reply.get_mut(begin..).unwrap_or_default())?;
        }
        Some(Command::DmaWrite) if data.len() as u64 == asked.count => memory.write(asked.address, data)?,
        _ => return Err(Errno::INVAL),
    }
    Ok(reply)
}
