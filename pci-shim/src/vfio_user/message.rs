//! A client's command as a checked value, and what a reply is made of: pure functions of bytes, for the server and for fuzzing.
//!
//! `parse(9, body)` of 16 bytes that say offset 0x1c, region 0, count 4 is `Request::RegionRead` of the controller's status; the same 16
//! bytes with one cut off are `EINVAL`. Whether the region exists is the session's business; that the bytes are whole is decided here.

use rustix::io::Errno;
use zerocopy::{FromBytes, IntoBytes};

use super::wire::{
    Command, DeviceInfo, DmaAccess, DmaMap, DmaUnmap, FEATURE_GET, FEATURE_INDEX, FEATURE_PROBE, FEATURE_SET, Feature,
    HEADER_BYTES, Header, IRQ_INDEXES, IrqInfo, IrqSet, MAX_DATA_BYTES, MAX_MESSAGE_BYTES, MigrationData, RegionAccess, RegionInfo,
    RegionIoFds, SET_ACTION_MASK, SET_ACTION_TRIGGER, SET_ACTION_UNMASK, SET_DATA_BOOL, SET_DATA_EVENTFD, SET_DATA_NONE,
    ShortWrite,
};

/// What a header says is to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// A message of this many bytes, header included.
    Whole(usize),
    /// A message too long to be held: refuse it and skip this many bytes after the header.
    Skip(u64),
    /// A size below that of a header: where the next message begins is unknown.
    Broken,
}

/// How many bytes belong to the message that `header` begins.
pub fn framing(header: &Header) -> Framing {
    let size = header.message_size as usize;
    if size < HEADER_BYTES {
        Framing::Broken
    } else if size > MAX_MESSAGE_BYTES {
        Framing::Skip(u64::from(header.message_size) - HEADER_BYTES as u64)
    } else {
        Framing::Whole(size)
    }
}

/// What `DEVICE_SET_IRQS` does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IrqAction {
    /// Hold back.
    Mask,
    /// Let through again.
    Unmask,
    /// Raise, or say who is told.
    Trigger,
}

/// What `DEVICE_SET_IRQS` brings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IrqData<'a> {
    /// Nothing: all of the range.
    None,
    /// One byte per interrupt: those that are not 0.
    Bool(&'a [u8]),
    /// Descriptors beside the message.
    Eventfd,
}

/// A `DEVICE_SET_IRQS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SetIrqs<'a> {
    /// Which interrupt index, below 5.
    pub index: u32,
    /// First interrupt.
    pub start: u32,
    /// Interrupts; `start + count` does not overflow.
    pub count: u32,
    /// What to do.
    pub action: IrqAction,
    /// To which, or with what.
    pub data: IrqData<'a>,
}

/// A command of a client whose bytes are whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request<'a> {
    /// `VERSION`.
    Version {
        /// Major version proposed.
        major: u16,
        /// Minor version proposed.
        minor: u16,
        /// JSON with its terminating NUL, or nothing.
        data: &'a [u8],
    },
    /// `DMA_MAP`.
    DmaMap(DmaMap),
    /// `DMA_UNMAP`.
    DmaUnmap(DmaUnmap),
    /// `DEVICE_GET_INFO`.
    DeviceInfo,
    /// `DEVICE_GET_REGION_INFO` of a region.
    RegionInfo {
        /// Which.
        index: u32,
    },
    /// `DEVICE_GET_REGION_IO_FDS` of a region.
    RegionIoFds {
        /// Which.
        index: u32,
    },
    /// `DEVICE_GET_IRQ_INFO` of an interrupt index.
    IrqInfo {
        /// Which.
        index: u32,
    },
    /// `DEVICE_SET_IRQS`.
    SetIrqs(SetIrqs<'a>),
    /// `REGION_READ` of 1 byte to 1 MiB.
    RegionRead(RegionAccess),
    /// `REGION_WRITE` with as many bytes as it says.
    RegionWrite(RegionAccess, &'a [u8]),
    /// `DEVICE_RESET`.
    DeviceReset,
    /// `REGION_WRITE_MULTI`.
    RegionWriteMulti(ShortWrites<'a>),
    /// `DEVICE_FEATURE`: a valid question for a feature.
    DeviceFeature {
        /// Which feature.
        index: u16,
        /// Only whether it exists.
        probe: bool,
    },
    /// `MIG_DATA_READ` or `MIG_DATA_WRITE`.
    MigrationData,
}

/// The writes of a `REGION_WRITE_MULTI`, each of at most 8 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShortWrites<'a>(&'a [u8]);

impl<'a> ShortWrites<'a> {
    /// The writes in order, with their data.
    pub fn iter(self) -> impl Iterator<Item = (RegionAccess, [u8; 8])> + 'a {
        self.0
            .chunks_exact(size_of::<ShortWrite>())
            .filter_map(|entry| ShortWrite::read_from_bytes(entry).ok())
            .map(|write| (write.access, write.data))
    }
}

/// The command in a message with this number and body.
///
/// # Errors
/// `EINVAL` for a number that clients may not send, a body of the wrong length, and flags or counts that the specification forbids;
/// `E2BIG` for more data than "max_data_xfer_size".
pub fn parse(command: u16, body: &[u8]) -> Result<Request<'_>, Errno> {
    match Command::from_number(command).ok_or(Errno::INVAL)? {
        Command::Version => version(body),
        Command::DmaMap => {
            let map: DmaMap = exact(body)?;
            require(map.argsz as usize >= size_of::<DmaMap>())?;
            Ok(Request::DmaMap(map))
        }
        Command::DmaUnmap => {
            let (unmap, _): (DmaUnmap, _) = prefix(body)?;
            require(unmap.argsz as usize >= size_of::<DmaUnmap>())?;
            Ok(Request::DmaUnmap(unmap))
        }
        Command::DeviceInfo => {
            let (info, _): (DeviceInfo, _) = prefix(body)?;
            require(info.argsz as usize >= size_of::<DeviceInfo>())?;
            Ok(Request::DeviceInfo)
        }
        Command::RegionInfo => {
            let (info, _): (RegionInfo, _) = prefix(body)?;
            require(info.argsz as usize >= size_of::<RegionInfo>())?;
            Ok(Request::RegionInfo { index: info.index })
        }
        Command::RegionIoFds => {
            let (fds, _): (RegionIoFds, _) = prefix(body)?;
            require(fds.argsz as usize >= size_of::<RegionIoFds>() && fds.flags == 0 && fds.count == 0)?;
            Ok(Request::RegionIoFds { index: fds.index })
        }
        Command::IrqInfo => {
            let (info, _): (IrqInfo, _) = prefix(body)?;
            require(info.argsz as usize >= size_of::<IrqInfo>())?;
            Ok(Request::IrqInfo { index: info.index })
        }
        Command::SetIrqs => set_irqs(body).map(Request::SetIrqs),
        Command::RegionRead => {
            let access: RegionAccess = exact(body)?;
            transfer_size(access.count)?;
            Ok(Request::RegionRead(access))
        }
        Command::RegionWrite => {
            let (access, data): (RegionAccess, _) = prefix(body)?;
            transfer_size(access.count)?;
            require(data.len() == access.count as usize)?;
            Ok(Request::RegionWrite(access, data))
        }
        Command::DeviceReset => require(body.is_empty()).map(|()| Request::DeviceReset),
        Command::RegionWriteMulti => {
            let (count, writes): (u64, _) = prefix(body)?;
            let expected = count.checked_mul(size_of::<ShortWrite>() as u64).ok_or(Errno::INVAL)?;
            require(count > 0 && writes.len() as u64 == expected)?;
            Ok(Request::RegionWriteMulti(ShortWrites(writes)))
        }
        Command::DeviceFeature => feature(body),
        Command::MigrationRead => exact::<MigrationData>(body).map(|_| Request::MigrationData),
        Command::MigrationWrite => {
            let (data, bytes): (MigrationData, _) = prefix(body)?;
            require(bytes.len() == data.size as usize)?;
            Ok(Request::MigrationData)
        }
        // These two travel from server to client only.
        Command::DmaRead | Command::DmaWrite => Err(Errno::INVAL),
    }
}

/// The bytes that a client sent in its reply to a `DMA_READ` of `count` bytes at `address`; `None` where they do not fit the question.
pub fn dma_read_reply(body: &[u8], address: u64, count: usize) -> Option<&[u8]> {
    let (access, data) = DmaAccess::read_from_prefix(body).ok()?;
    (access.address == address && access.count == count as u64 && data.len() == count).then_some(data)
}

/// Whether a client's reply to a `DMA_WRITE` at `address` fits the question. The specification's table ends after 12 bytes, clients
/// send 16 or nothing; only what is there is compared.
pub fn dma_write_reply_fits(body: &[u8], address: u64) -> bool {
    u64::read_from_prefix(body).map_or(true, |(answered, _)| answered == address)
}

/// Appends a message to `out`.
pub fn encode(out: &mut Vec<u8>, header: &Header, parts: [&[u8]; 2]) {
    out.extend_from_slice(header.as_bytes());
    for part in parts {
        out.extend_from_slice(part);
    }
}

fn require(holds: bool) -> Result<(), Errno> {
    holds.then_some(()).ok_or(Errno::INVAL)
}

fn exact<T: FromBytes>(body: &[u8]) -> Result<T, Errno> {
    T::read_from_bytes(body).map_err(|_| Errno::INVAL)
}

fn prefix<T: FromBytes>(body: &[u8]) -> Result<(T, &[u8]), Errno> {
    T::read_from_prefix(body).map_err(|_| Errno::INVAL)
}

fn transfer_size(count: u32) -> Result<(), Errno> {
    if count > MAX_DATA_BYTES {
        return Err(Errno::TOOBIG);
    }
    require(count > 0)
}

fn version(body: &[u8]) -> Result<Request<'_>, Errno> {
    let ([major, minor], data): ([u16; 2], _) = prefix(body)?;
    Ok(Request::Version { major, minor, data })
}

fn set_irqs(body: &[u8]) -> Result<SetIrqs<'_>, Errno> {
    let (set, rest): (IrqSet, _) = prefix(body)?;
    require(set.argsz as usize >= size_of::<IrqSet>() && set.index < IRQ_INDEXES)?;
    set.start.checked_add(set.count).ok_or(Errno::INVAL)?;
    const DATA: u32 = SET_DATA_NONE | SET_DATA_BOOL | SET_DATA_EVENTFD;
    const ACTION: u32 = SET_ACTION_MASK | SET_ACTION_UNMASK | SET_ACTION_TRIGGER;
    require(set.flags & !(DATA | ACTION) == 0)?;
    let data = match set.flags & DATA {
        SET_DATA_NONE => IrqData::None,
        SET_DATA_BOOL => IrqData::Bool(rest.get(..set.count as usize).ok_or(Errno::INVAL)?),
        SET_DATA_EVENTFD => IrqData::Eventfd,
        _ => return Err(Errno::INVAL),
    };
    let action = match set.flags & ACTION {
        SET_ACTION_MASK => IrqAction::Mask,
        SET_ACTION_UNMASK => IrqAction::Unmask,
        SET_ACTION_TRIGGER => IrqAction::Trigger,
        _ => return Err(Errno::INVAL),
    };
    // A count of 0 only disables a whole index.
    let disables = set.start == 0 && action == IrqAction::Trigger && data == IrqData::None;
    require(set.count > 0 || disables)?;
    Ok(SetIrqs {
        index: set.index,
        start: set.start,
        count: set.count,
        action,
        data,
    })
}

fn feature(body: &[u8]) -> Result<Request<'_>, Errno> {
    let (feature, _): (Feature, _) = prefix(body)?;
    let methods = feature.flags & !FEATURE_INDEX;
    require(feature.argsz as usize >= size_of::<Feature>())?;
    require(methods != 0 && methods & !(FEATURE_GET | FEATURE_SET | FEATURE_PROBE) == 0)?;
    let probe = methods & FEATURE_PROBE != 0;
    // Getting and setting at once can only be probed for.
    require(probe || methods != FEATURE_GET | FEATURE_SET)?;
    Ok(Request::DeviceFeature {
        index: (feature.flags & FEATURE_INDEX) as u16,
        probe,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn irq_set(flags: u32, index: u32, start: u32, count: u32, data: &[u8]) -> Vec<u8> {
        let set = IrqSet {
            argsz: 20 + data.len() as u32,
            flags,
            index,
            start,
            count,
        };
        [set.as_bytes(), data].concat()
    }

    #[test]
    fn a_write_whose_count_differs_from_its_bytes_is_refused() {
        let access = RegionAccess {
            offset: 0x1018,
            region: 0,
            count: 4,
        };
        let whole = [access.as_bytes(), &[17, 0, 0, 0]].concat();
        assert_eq!(parse(10, &whole), Ok(Request::RegionWrite(access, &[17, 0, 0, 0])));
        for wrong in [&whole[..19], &[whole.as_slice(), &[0]].concat(), &whole[..15]] {
            assert_eq!(parse(10, wrong), Err(Errno::INVAL));
        }
    }

    #[test]
    fn a_transfer_of_more_than_was_negotiated_is_too_big() {
        let access = RegionAccess {
            offset: 0,
            region: 7,
            count: MAX_DATA_BYTES + 1,
        };
        assert_eq!(parse(9, access.as_bytes()), Err(Errno::TOOBIG));
    }

    #[test]
    fn exactly_one_data_and_one_action_flag_make_an_irq_set() {
        for flags in 0..128 {
            let one = |bits: u32| (flags & bits).count_ones() == 1;
            let valid = one(7) && one(0x38) && flags < 64;
            assert_eq!(parse(8, &irq_set(flags, 2, 0, 2, &[1, 0])).is_ok(), valid, "{flags:#x}");
        }
        assert!(parse(8, &irq_set(0x21, 2, 0, 0, &[])).is_ok());
        assert!(parse(8, &irq_set(0x22, 2, 0, 3, &[1, 1])).is_err());
        assert!(parse(8, &irq_set(0x21, 5, 0, 1, &[])).is_err());
        assert!(parse(8, &irq_set(0x21, 2, u32::MAX, 1, &[])).is_err());
    }

    #[test]
    fn sizes_decide_whether_a_stream_can_go_on() {
        let sized = |message_size| {
            framing(&Header {
                message_id: 1,
                command: 4,
                message_size,
                flags: 0,
                error: 0,
            })
        };
        assert_eq!(sized(15), Framing::Broken);
        assert_eq!(sized(16), Framing::Whole(16));
        assert_eq!(sized(u32::MAX), Framing::Skip(u64::from(u32::MAX) - 16));
    }

    proptest! {
        #[test]
        fn no_bytes_panic_the_parser(command in 0_u16..24, body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(command, &body);
            let _ = dma_read_reply(&body, 0, 4);
            let _ = dma_write_reply_fits(&body, 0);
        }
    }
}
