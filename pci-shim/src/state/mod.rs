//! The state of a function as bytes: all that a guest can tell of its device, but for what the device itself keeps.
//!
//! A function of 65 MSI-X vectors and a driver with two queue pairs is 6 KiB: its device's name, the rest it was saved in, configuration space, the MSI-X
//! table, masks, the map of DMA addresses, and what the NVMe profile knows of the queues. Restored elsewhere it refuses another device, and says why.
//!
//! # The format, version 1
//!
//! `FBFUNC\r\n`, the version (2 bytes), the number of sections (2), the sections, and BLAKE3 of all before it (32). A section is a tag (2), a length (4) and
//! bytes; numbers are little-endian, a text is its length (2) and UTF-8. Each tag is there once, in ascending order.
//!
//! | tag | what | bytes |
//! |---|---|---|
//! | 1 | device | name, serial (texts), vendor, device, subsystem vendor, subsystem (2 each), revision (1), class (4), 6 BARs (kind 1, size 8, prefetchable 1; kind 0: none, 1: 32-bit, 2: 64-bit, 3: I/O), pin (1), MSI vectors (1), MSI-X vectors (2), table BAR and offset (1, 4), pending-bit BAR and offset (1, 4) |
//! | 2 | rest | token (16), milliseconds since 1970 (8), journal (1: 0 none, 1 there), its life, writes begun, writes acknowledged (8 each) |
//! | 3 | configuration space | 4,096 |
//! | 4 | interrupts | who owns them (1: 0 function, 1 client), the client's mode (1: 0 pin, 1 MSI, 2 MSI-X; 1: MSI vectors), pin asserted (1), MSI pending (4), MSI-X vectors (2), for each: address (8), data (4), masked (1), pending (1) |
//! | 5 | map | number of windows (4), for each: address, bytes (8 each), access bits (1), whether it is a mapping (1) |
//! | 6 | profile | which (2: 0 none, 1 NVMe), its own bytes (`profile/nvme/saved.rs`) |

pub(crate) mod codec;
mod device;
#[cfg(test)]
mod tests;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use farbus_remote_dma::{InterruptMode, Mark, Rest, RestToken};
use farbus_transport::Access;
use thiserror::Error;

use crate::config::CONFIG_BYTES;
use crate::function::InterruptOwner;
use codec::{Input, Output};
pub use device::DeviceIdentity;

const MAGIC: [u8; 8] = *b"FBFUNC\r\n";
/// The version that this code writes; it reads this one and all before it.
pub const VERSION: u16 = 1;
/// The most that a state can be: every window there may be, and room for the rest.
pub const MOST_BYTES: usize = 4 << 20;
const HASH_BYTES: usize = 32;

const DEVICE: u16 = 1;
const REST: u16 = 2;
const CONFIG: u16 = 3;
const INTERRUPTS: u16 = 4;
const MAP: u16 = 5;
const PROFILE: u16 = 6;

/// Why bytes are no state that can be restored here.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum StateError {
    /// Something else begins this way.
    #[error("this is no saved function: it begins with {found:02x?}")]
    Magic {
        /// Its first bytes.
        found: [u8; 8],
    },
    /// A later farbus saved it.
    #[error("the function was saved in version {found} of the format, and this farbus reads up to {VERSION}")]
    Version {
        /// Its version.
        found: u16,
    },
    /// It ends too early.
    #[error("the saved function is cut off")]
    Truncated,
    /// A byte of it is not what was saved.
    #[error("the saved function was altered: its checksum is another")]
    Altered,
    /// It is longer than any function's.
    #[error("{0} bytes are more than any saved function has")]
    TooLong(usize),
    /// It says what cannot be.
    #[error("the saved function cannot be: {0}")]
    Malformed(&'static str),
}

/// One MSI-X vector.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct VectorState {
    pub(crate) address: u64,
    pub(crate) data: u32,
    pub(crate) masked: bool,
    pub(crate) pending: bool,
}

/// What the function says to the guest, and what it holds back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct InterruptState {
    pub(crate) owner: InterruptOwner,
    pub(crate) client_mode: InterruptMode,
    pub(crate) pin: bool,
    pub(crate) msi_pending: u32,
    pub(crate) msix: Vec<VectorState>,
}

/// One window of the map of DMA addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowState {
    /// First address.
    pub iova: u64,
    /// Bytes.
    pub len: u64,
    /// What the device may do.
    pub access: Access,
    /// Whether memory that can be shared lies behind it; otherwise each access goes through the guest's side.
    pub mapped: bool,
}

/// What a profile knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProfileState {
    /// Which profile: 0 for none, 1 for NVMe.
    pub kind: u16,
    /// Its own format.
    pub bytes: Vec<u8>,
}

/// A saved function, parsed and checked: every part is possible by itself. Whether it fits a device is for [`crate::Function::restore`] to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FunctionState {
    pub(crate) device: DeviceIdentity,
    pub(crate) rest: Rest,
    pub(crate) saved_ms: u64,
    pub(crate) config: Box<[u8; CONFIG_BYTES]>,
    pub(crate) interrupts: InterruptState,
    pub(crate) windows: Vec<WindowState>,
    pub(crate) profile: ProfileState,
}

impl FunctionState {
    /// The device that it was a function of.
    pub fn device(&self) -> &DeviceIdentity {
        &self.device
    }

    /// The rest in which it was saved: what a lender that keeps the device must be shown, and where the device's journal was.
    pub fn rest(&self) -> Rest {
        self.rest
    }

    /// When it was saved, by the clock of the host that saved it.
    pub fn saved_at(&self) -> SystemTime {
        UNIX_EPOCH.checked_add(Duration::from_millis(self.saved_ms)).unwrap_or(UNIX_EPOCH)
    }

    /// Its map of DMA addresses, in address order.
    pub fn windows(&self) -> &[WindowState] {
        &self.windows
    }

    /// Its bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Output::default();
        out.bytes(&MAGIC);
        out.u16(VERSION);
        out.u16(6);
        out.section(DEVICE, |out| self.device.encode(out));
        out.section(REST, |out| {
            out.bytes(&self.rest.token.0);
            out.u64(self.saved_ms);
            out.u8(u8::from(self.rest.mark.is_some()));
            let mark = self.rest.mark.unwrap_or(Mark { life: 0, begun: 0, acknowledged: 0 });
            [mark.life, mark.begun, mark.acknowledged].into_iter().for_each(|number| out.u64(number));
        });
        out.section(CONFIG, |out| out.bytes(&self.config[..]));
        out.section(INTERRUPTS, |out| self.interrupts.encode(out));
        out.section(MAP, |out| {
            out.u32(self.windows.len() as u32);
            for window in &self.windows {
                out.u64(window.iova);
                out.u64(window.len);
                out.u8(window.access.bits());
                out.u8(u8::from(window.mapped));
            }
        });
        out.section(PROFILE, |out| {
            out.u16(self.profile.kind);
            out.bytes(&self.profile.bytes);
        });
        let hash = *blake3::hash(&out.0).as_bytes();
        out.bytes(&hash);
        out.0
    }

    /// Parses what was saved by this version or an earlier one.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn parse(bytes: &[u8]) -> Result<Self, StateError> {
        if bytes.len() > MOST_BYTES {
            return Err(StateError::TooLong(bytes.len()));
        }
        let mut head = Input(bytes);
        let found = head.array()?;
        if found != MAGIC {
            return Err(StateError::Magic { found });
        }
        // Before anything whose meaning a later version could change.
        let version = head.u16()?;
        if version == 0 || version > VERSION {
            return Err(StateError::Version { found: version });
        }
        let (body, hash) = bytes.split_last_chunk::<HASH_BYTES>().ok_or(StateError::Truncated)?;
        let sections = sections_of(body)?;
        if blake3::hash(body).as_bytes() != hash {
            return Err(StateError::Altered);
        }
        let section = |tag| {
            let found = sections.iter().find(|(known, _)| *known == tag);
            found.map(|(_, bytes)| Input(bytes)).ok_or(StateError::Malformed("a section is missing"))
        };
        if sections.len() != 6 {
            return Err(StateError::Malformed("sections that this version does not have"));
        }
        let (rest, saved_ms) = rest(section(REST)?)?;
        let mut config = section(CONFIG)?;
        let mut profile = section(PROFILE)?;
        let state = Self {
            device: DeviceIdentity::parse(section(DEVICE)?)?,
            rest,
            saved_ms,
            config: Box::new(config.array()?),
            interrupts: InterruptState::parse(section(INTERRUPTS)?)?,
            windows: windows(section(MAP)?)?,
            profile: ProfileState { kind: profile.u16()?, bytes: profile.0.to_vec() },
        };
        config.end()?;
        Ok(state)
    }
}

/// Splits what follows the head into its sections: a length that leaves the bytes is a state that is cut off.
fn sections_of(body: &[u8]) -> Result<Vec<(u16, &[u8])>, StateError> {
    let mut input = Input(body);
    input.slice(MAGIC.len() + 2)?;
    let count = usize::from(input.u16()?);
    let mut before = 0;
    let sections = input.list(count, |input| {
        let (tag, len) = (input.u16()?, input.u32()?);
        if tag <= before {
            return Err(StateError::Malformed("sections out of order"));
        }
        before = tag;
        Ok((tag, input.slice(len as usize)?))
    })?;
    input.end()?;
    Ok(sections)
}

fn rest(mut input: Input<'_>) -> Result<(Rest, u64), StateError> {
    let (token, saved_ms, kept) = (RestToken(input.array()?), input.u64()?, input.bool()?);
    let mark = Mark { life: input.u64()?, begun: input.u64()?, acknowledged: input.u64()? };
    input.end()?;
    Ok((Rest { token, mark: kept.then_some(mark) }, saved_ms))
}

fn windows(mut input: Input<'_>) -> Result<Vec<WindowState>, StateError> {
    let count = input.u32()? as usize;
    let windows = input.list(count, |input| {
        let (iova, len, access) = (input.u64()?, input.u64()?, input.u8()?);
        let access = Access::from_bits(access).ok_or(StateError::Malformed("a window of an unknown kind of access"))?;
        Ok(WindowState { iova, len, access, mapped: input.bool()? })
    })?;
    input.end()?;
    Ok(windows)
}

impl InterruptState {
    fn encode(&self, out: &mut Output) {
        out.u8(u8::from(self.owner == InterruptOwner::Client));
        let (mode, vectors) = match self.client_mode {
            InterruptMode::Pin => (0, 0),
            InterruptMode::Msi(vectors) => (1, vectors),
            InterruptMode::Msix => (2, 0),
        };
        out.u8(mode);
        out.u8(vectors);
        out.u8(u8::from(self.pin));
        out.u32(self.msi_pending);
        out.u16(self.msix.len() as u16);
        for vector in &self.msix {
            out.u64(vector.address);
            out.u32(vector.data);
            out.u8(u8::from(vector.masked));
            out.u8(u8::from(vector.pending));
        }
    }

    fn parse(mut input: Input<'_>) -> Result<Self, StateError> {
        let owner = if input.bool()? { InterruptOwner::Client } else { InterruptOwner::Function };
        let client_mode = match (input.u8()?, input.u8()?) {
            (0, 0) => InterruptMode::Pin,
            (1, vectors) if vectors.is_power_of_two() && vectors <= 32 => InterruptMode::Msi(vectors),
            (2, 0) => InterruptMode::Msix,
            _ => return Err(StateError::Malformed("an interrupt mode that there is not")),
        };
        let (pin, msi_pending) = (input.bool()?, input.u32()?);
        let count = usize::from(input.u16()?);
        let msix = input.list(count, |input| {
            Ok(VectorState { address: input.u64()?, data: input.u32()?, masked: input.bool()?, pending: input.bool()? })
        })?;
        input.end()?;
        Ok(Self { owner, client_mode, pin, msi_pending, msix })
    }
}
