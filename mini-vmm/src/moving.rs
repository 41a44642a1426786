//! A machine moves between two processes while its guest works: its memory goes ahead, then it stops, and what changed last goes with the states.
//!
//! Two rounds carry 1,024 and 40 pages while the guest runs; then it stands still for some milliseconds: the device comes to rest, the last 12 pages and the states
//! are sent, the function leaves; on the other side it is restored with the device that was kept, and the guest runs.
//!
//! On the stream: pages as their number (8 bytes) and 4,096 bytes; the number `u64::MAX` ends them, and behind it are two lengths of 8 bytes, the CPUs' state, the
//! function's, and when the machine stopped, in nanoseconds since 1970 (8 bytes; it is as good as the two hosts' clocks are).

use std::io::{Read, Write};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use farbus_machine_bank::PAGE;
use farbus_machine_bank::lazy::Area;
use farbus_pci_shim::{Embedded, IrqSink};
use farbus_remote_dma::GuestMemory;

use crate::deposit::{Depositor, Frozen, Pause};

/// The longest state that is taken.
const MOST_STATE: u64 = farbus_pci_shim::state::MOST_BYTES as u64;
/// The longest memory that is taken: 1 TiB.
const MOST_MEMORY: u64 = 1 << 40;
const END: u64 = u64::MAX;

/// How a machine left.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Left {
    /// Pages that were sent while it ran.
    pub ahead: u64,
    /// Pages that were sent while it stood still.
    pub last: u64,
    /// What it stood still for, up to its leaving.
    pub pause: Pause,
    /// For its function to leave, with all of its memory taken back.
    pub leave: Duration,
    /// For the last pages and the states to be sent.
    pub send: Duration,
}

/// A machine that came.
pub struct Arrived {
    /// Its memory.
    pub area: Area,
    /// Its CPUs' state.
    pub cpu: Vec<u8>,
    /// Its function's state.
    pub function: Vec<u8>,
    /// When it stopped, by the clock of the host that it left.
    pub stopped: SystemTime,
}

/// Says how much memory there is; first.
///
/// # Errors
/// The stream's.
pub fn begin(stream: &mut impl Write, area: &Area) -> Result<()> {
    Ok(stream.write_all(&area.len().to_le_bytes())?)
}

/// Sends pages while the guest runs.
///
/// # Errors
/// The stream's.
pub fn send_ahead(stream: &mut impl Write, frozen: &Frozen) -> Result<()> {
    frozen.each_page(|page, bytes| {
        stream.write_all(&page.to_le_bytes())?;
        Ok(stream.write_all(bytes)?)
    })
}

/// Stops the machine at last, and sends what is left; `cpu` says what its CPUs, which stand still already since `stopped`, are like. The device is kept for `lease`.
///
/// # Errors
/// The device does not come to rest: the machine can go on. The stream's: it has left, and its state is in `frozen` of nobody.
pub fn send_last<S: IrqSink, M: GuestMemory>(
    stream: &mut impl Write,
    depositor: &mut Depositor<'_>,
    device: &mut Embedded<S, M>,
    lease: Duration,
    stopped: SystemTime,
    cpu: impl FnOnce() -> Result<Vec<u8>>,
) -> Result<Left> {
    let began = Instant::now();
    let frozen = depositor.freeze_and_leave(device, lease, cpu)?;
    let left_at = Instant::now();
    send_ahead(stream, &frozen)?;
    let (cpu, function) = frozen.states();
    let mut tail = END.to_le_bytes().to_vec();
    tail.extend((cpu.len() as u64).to_le_bytes());
    tail.extend((function.len() as u64).to_le_bytes());
    tail.extend_from_slice(cpu);
    tail.extend_from_slice(function);
    let stopped = stopped.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos());
    tail.extend(u64::try_from(stopped).unwrap_or(u64::MAX).to_le_bytes());
    stream.write_all(&tail)?;
    stream.flush()?;
    let leave = (left_at - began).saturating_sub(frozen.pause.total());
    Ok(Left { ahead: 0, last: frozen.pages(), pause: frozen.pause, leave, send: left_at.elapsed() })
}

/// Takes a machine that comes.
///
/// # Errors
/// The stream ends early, or says what cannot be.
pub fn receive(stream: &mut impl Read) -> Result<Arrived> {
    let mut number = || -> Result<u64> {
        let mut bytes = [0; 8];
        stream.read_exact(&mut bytes).context("the machine did not come")?;
        Ok(u64::from_le_bytes(bytes))
    };
    let len = number()?;
    ensure!(len > 0 && len <= MOST_MEMORY, "a machine with {len} bytes of memory");
    let area = Area::shared(len)?;
    let mut bytes = [0; PAGE];
    loop {
        let mut page = [0; 8];
        stream.read_exact(&mut page).context("the machine did not come whole")?;
        let page = u64::from_le_bytes(page);
        if page == END {
            break;
        }
        stream.read_exact(&mut bytes).context("the machine did not come whole")?;
        let at = page.checked_mul(PAGE as u64).context("a page outside the machine's memory")?;
        area.memory().write(at, &bytes).context("a page outside the machine's memory")?;
    }
    let mut lens = [0; 16];
    stream.read_exact(&mut lens).context("the machine did not come whole")?;
    let (cpu, function) = lens.split_at(8);
    let mut state = |len: &[u8]| -> Result<Vec<u8>> {
        let len = u64::from_le_bytes(len.try_into()?);
        ensure!(len <= MOST_STATE, "a state of {len} bytes");
        let mut bytes = vec![0; usize::try_from(len)?];
        stream.read_exact(&mut bytes).context("the machine did not come whole")?;
        Ok(bytes)
    };
    let (cpu, function) = (state(cpu)?, state(function)?);
    let mut stopped = [0; 8];
    stream.read_exact(&mut stopped).context("the machine did not come whole")?;
    let stopped = UNIX_EPOCH.checked_add(Duration::from_nanos(u64::from_le_bytes(stopped))).context("a time that there is not")?;
    Ok(Arrived { area, cpu, function, stopped })
}
