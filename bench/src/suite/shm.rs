//! `farbus bench shm`: what the shared-memory fabric costs, each figure held against what this machine can do at best.
//!
//! A remote register read is held against one cache-line round trip between the same two cores, a DMA of 4 KiB against memcpy of 4 KiB.
//! What is measured is behind [`ShmSubjects`]; the references and the arithmetic are here.

use std::time::Duration;

use anyhow::Result;

use super::{Heard, Step};
use crate::measure::{
    Latencies, Pairs, cache_line_round_trip, eventfd_wake, interleave, memcpy_bandwidth, memcpy_hot, pin_to, socket_ping_pong,
    two_cores,
};
use crate::report::{Row, SuiteReport, Target};
use crate::workload::{Budget, Case, CaseRun};

/// Bytes of a vfio-user region read's request: header of 16, then offset, region and count.
pub const REGION_READ_REQUEST: usize = 32;
/// Bytes of its reply: the same, then 4 bytes of data.
pub const REGION_READ_REPLY: usize = 36;
/// Bytes of one piece of the streaming rows.
pub const STREAM_PIECE: u64 = 1 << 20;
/// Bytes that the streaming rows go through on each side, so that they do not live in a cache.
pub const STREAM_WORKING_SET: u64 = 64 << 20;

/// Which way a DMA goes, as the device sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From guest memory into the device.
    Read,
    /// From the device into guest memory.
    Write,
}

/// Where the device of a workload is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// In this process, on a thread of its own.
    Native,
    /// In this process, inside the doorbell write.
    Inline,
    /// Across the link.
    Remote,
}

/// What the polled data path did in a number of operations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OperationCounts {
    /// Operations.
    pub operations: u64,
    /// Allocations, from [`crate::measure::allocations_here`].
    pub allocations: u64,
    /// Locks that had to wait or wake: futex calls. Locks that were free are found in the source, by the tidy check.
    pub locks: u64,
    /// System calls, from [`crate::measure::count_syscalls`].
    pub syscalls: u64,
}

/// What is measured. Each method sets up its own threads on different cores, warms up, and answers for one round; an error makes the row
/// "not measured", with the reason.
pub trait ShmSubjects {
    /// 4-byte register reads that go to the device: from the call until the value is there.
    ///
    /// # Errors
    /// Why it could not be measured.
    fn mmio_read(&mut self, samples: u64) -> Result<Latencies>;

    /// 4-byte register writes: what the caller waits, with the queue neither full nor empty for its sake.
    ///
    /// # Errors
    /// Why it could not be measured.
    fn mmio_write(&mut self, samples: u64) -> Result<Latencies>;

    /// Device DMAs of `bytes`, the memory hot: nanoseconds of one.
    ///
    /// # Errors
    /// Why it could not be measured.
    fn dma(&mut self, direction: Direction, bytes: u64, samples: u64) -> Result<Latencies>;

    /// Device DMAs of `piece` bytes through `working_set` bytes, `total` in all: bytes per second.
    ///
    /// # Errors
    /// Why it could not be measured.
    fn dma_stream(&mut self, direction: Direction, piece: u64, working_set: u64, total: u64) -> Result<f64>;

    /// From the device's `interrupt` at the lender until the thread that sleeps on the borrower's eventfd runs.
    ///
    /// # Errors
    /// Why it could not be measured.
    fn interrupt(&mut self, samples: u64) -> Result<Latencies>;

    /// A case of the demo over a memory-backed image.
    ///
    /// # Errors
    /// Why it could not be measured.
    fn nvme(&mut self, side: Side, case: Case, budget: Budget) -> Result<CaseRun>;

    /// 4-byte region reads by a vfio-user client that is one blocking socket: round trips.
    ///
    /// # Errors
    /// Why it could not be measured.
    fn region_read(&mut self, samples: u64) -> Result<Latencies>;

    /// What `operations` remote reads of 4 KiB did on the polled data path, on both sides of the link.
    ///
    /// # Errors
    /// Why it could not be measured.
    fn data_path(&mut self, operations: u64) -> Result<OperationCounts>;
}

/// How much to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Effort {
    /// Rounds of each pair, at least 5.
    pub rounds: usize,
    /// Samples of a round where one takes a fraction of a microsecond; a tenth of it where threads sleep.
    pub samples: u64,
    /// Bytes of a round of the streaming rows.
    pub stream_bytes: u64,
    /// One round of an NVMe case.
    pub nvme: Duration,
    /// Operations in which allocations, locks and system calls are counted.
    pub operations: u64,
}

impl Default for Effort {
    fn default() -> Self {
        Self { rounds: 15, samples: 20_000, stream_bytes: 256 << 20, nvme: Duration::from_millis(67), operations: 100_000 }
    }
}

/// Measures all rows.
pub fn run(subjects: &mut dyn ShmSubjects, effort: &Effort, mut hear: impl FnMut(Heard<'_>)) -> SuiteReport {
    type Group = fn(&mut dyn ShmSubjects, &Effort) -> Vec<Row>;
    let groups: [(&'static str, Group); 7] = [
        ("register accesses", registers),
        ("dma of 4 KiB", dma),
        ("streaming dma", stream),
        ("interrupts", interrupts),
        ("nvme", nvme),
        ("vfio-user", vfio_user),
        ("operations of the data path", data_path),
    ];
    let mut rows = Vec::new();
    for (done, (what, group)) in groups.iter().enumerate() {
        let total = groups.len();
        hear(Heard::Begins(Step { what, done, total }));
        let measured = group(subjects, effort);
        hear(Heard::Measured(&measured));
        rows.extend(measured);
    }
    SuiteReport { suite: "shm".to_owned(), rows }
}

/// What a row is called and held against.
struct Spec {
    case: &'static str,
    unit: &'static str,
    reference: &'static str,
    target: Target,
}

impl Spec {
    fn missing(&self, error: &anyhow::Error) -> Row {
        Row::missing(self.case, self.unit, self.reference, self.target, format!("{error:#}"))
    }

    /// The row of rounds that were measured, or of the reason why they were not.
    fn row<A, B>(&self, pairs: &Result<Pairs<A, B>>, reference: impl Fn(&A) -> f64, subject: impl Fn(&B) -> f64) -> Row {
        match pairs {
            Ok(pairs) => {
                let (references, subjects) = pairs.series(&reference, &subject);
                let ratio = subjects.median() / references.median();
                let reference = (self.reference, references.median());
                Row::measured(self.case, self.unit, subjects.median(), reference, ratio, self.target)
            }
            Err(error) => self.missing(error),
        }
    }
}

fn p50(latencies: &Latencies) -> f64 {
    latencies.p50_ns() as f64
}

fn p99(latencies: &Latencies) -> f64 {
    latencies.p99_ns() as f64
}

const CACHE_LINE: &str = "cache-line round trip p50";

fn registers(subjects: &mut dyn ShmSubjects, effort: &Effort) -> Vec<Row> {
    let spec = |case, target| Spec { case, unit: "ns", reference: CACHE_LINE, target };
    let line = |_| Ok(cache_line_round_trip(effort.samples)?);
    let reads = interleave(effort.rounds, line, |_| subjects.mmio_read(effort.samples));
    let writes = interleave(effort.rounds, line, |_| subjects.mmio_write(effort.samples));
    vec![
        spec("mmio-read-4 p50", Target::AtMost(2.0)).row(&reads, p50, p50),
        spec("mmio-read-4 p99", Target::AtMost(4.0)).row(&reads, p50, p99),
        spec("mmio-write-4 at the caller p50", Target::AtMost(0.5)).row(&writes, p50, p50),
    ]
}

/// The subjects' devices have the second core, and whoever else is there disturbs both.
fn on_the_device_core<T>(measure: impl FnOnce() -> Result<T>) -> Result<T> {
    let [_, there] = two_cores()?;
    let _pinned = pin_to(there)?;
    measure()
}

fn dma(subjects: &mut dyn ShmSubjects, effort: &Effort) -> Vec<Row> {
    let bytes = 4096;
    let mut row = |case, direction| {
        let spec = Spec { case, unit: "ns", reference: "memcpy of 4 KiB p50", target: Target::AtMost(1.3) };
        let samples = effort.samples / 10;
        let reference = |_| on_the_device_core(|| Ok(memcpy_hot(bytes, samples)?));
        let pairs = interleave(effort.rounds, reference, |_| subjects.dma(direction, bytes, samples));
        spec.row(&pairs, p50, p50)
    };
    vec![row("dma-read-4k p50", Direction::Read), row("dma-write-4k p50", Direction::Write)]
}

fn stream(subjects: &mut dyn ShmSubjects, effort: &Effort) -> Vec<Row> {
    let mut row = |case, direction| {
        let spec = Spec { case, unit: "bytes/s", reference: "memcpy of 1 MiB pieces", target: Target::AtLeast(0.9) };
        let (piece, set, total) = (STREAM_PIECE, STREAM_WORKING_SET, effort.stream_bytes);
        let reference = |_| on_the_device_core(|| Ok(memcpy_bandwidth(piece, set, total)?));
        let pairs = interleave(effort.rounds, reference, |_| subjects.dma_stream(direction, piece, set, total));
        spec.row(&pairs, |figure| *figure, |figure| *figure)
    };
    vec![row("dma-read-stream-1m", Direction::Read), row("dma-write-stream-1m", Direction::Write)]
}

fn interrupts(subjects: &mut dyn ShmSubjects, effort: &Effort) -> Vec<Row> {
    let spec = Spec { case: "interrupt p50", unit: "ns", reference: "eventfd wake p50", target: Target::AtMost(1.3) };
    let samples = effort.samples / 10;
    let reference = |_| Ok(eventfd_wake(samples)?);
    let pairs = interleave(effort.rounds, reference, |_| subjects.interrupt(samples));
    vec![spec.row(&pairs, p50, p50)]
}

fn nvme(subjects: &mut dyn ShmSubjects, effort: &Effort) -> Vec<Row> {
    let iops = |run: &CaseRun| run.iops();
    let latency = |run: &CaseRun| p50(&run.latencies);
    let mut rows = Vec::new();
    // What a device with a thread of its own costs beside one without is worth knowing, and nothing that a link could meet or miss.
    for (name, row, unit, reference, target) in [
        ("randread-4k-qd1", "randread-4k-qd1 p50", "ns", Side::Native, Target::AtMost(1.3)),
        ("randread-4k-qd32", "randread-4k-qd32", "iops", Side::Native, Target::AtLeast(0.95)),
        ("read-128k", "read-128k", "iops", Side::Native, Target::AtLeast(0.95)),
        ("randread-4k-qd1", "randread-4k-qd1 p50, beside inline", "ns", Side::Inline, Target::None),
    ] {
        let reference_text = match reference {
            Side::Inline => "native, device inside the doorbell write",
            _ => "native, device on its own thread",
        };
        let spec = Spec { case: row, unit, reference: reference_text, target };
        let case = Case::named(name).ok_or_else(|| anyhow::anyhow!("there is no case {name}"));
        let pairs = case.and_then(|case| {
            let subjects = std::cell::RefCell::new(&mut *subjects);
            let side = |side| {
                let subjects = &subjects;
                move |_| subjects.borrow_mut().nvme(side, case, Budget::Time(effort.nvme))
            };
            interleave(effort.rounds, side(reference), side(Side::Remote))
        });
        rows.push(if unit == "ns" { spec.row(&pairs, latency, latency) } else { spec.row(&pairs, iops, iops) });
    }
    rows
}

fn vfio_user(subjects: &mut dyn ShmSubjects, effort: &Effort) -> Vec<Row> {
    let spec = Spec {
        case: "vfio-user region read p50",
        unit: "ns",
        reference: "unix socket ping-pong of 32 and 36 bytes p50",
        target: Target::AtMost(1.15),
    };
    let samples = effort.samples / 10;
    let reference = |_| Ok(socket_ping_pong(REGION_READ_REQUEST, REGION_READ_REPLY, samples)?);
    let pairs = interleave(effort.rounds, reference, |_| subjects.region_read(samples));
    vec![spec.row(&pairs, p50, p50)]
}

fn data_path(subjects: &mut dyn ShmSubjects, effort: &Effort) -> Vec<Row> {
    let counts = subjects.data_path(effort.operations);
    let row = |case, count: fn(&OperationCounts) -> u64| {
        let spec = Spec { case, unit: "per operation", reference: "none", target: Target::Zero };
        match &counts {
            Ok(counts) if counts.operations > 0 => {
                let value = count(counts) as f64 / counts.operations as f64;
                Row::exact(spec.case, spec.unit, value, spec.reference, spec.target)
            }
            Ok(_) => spec.missing(&anyhow::anyhow!("no operation was carried out")),
            Err(error) => spec.missing(error),
        }
    };
    vec![
        row("allocations", |counts| counts.allocations),
        row("locks", |counts| counts.locks),
        row("system calls", |counts| counts.syscalls),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers as a fabric would whose figures are these; only the arithmetic is under test.
    struct Scripted {
        allocations: u64,
    }

    fn constant(ns: u64) -> Latencies {
        let mut latencies = Latencies::new();
        (0..100).for_each(|_| latencies.record_ns(ns));
        latencies
    }

    impl ShmSubjects for Scripted {
        fn mmio_read(&mut self, _: u64) -> Result<Latencies> {
            Ok(constant(10_000_000))
        }
        fn mmio_write(&mut self, _: u64) -> Result<Latencies> {
            Ok(constant(1))
        }
        fn dma(&mut self, direction: Direction, _: u64, _: u64) -> Result<Latencies> {
            anyhow::ensure!(direction == Direction::Write, "reads are not there yet");
            Ok(constant(1))
        }
        fn dma_stream(&mut self, _: Direction, _: u64, _: u64, _: u64) -> Result<f64> {
            Ok(1.0)
        }
        fn interrupt(&mut self, samples: u64) -> Result<Latencies> {
            Ok(eventfd_wake(samples)?)
        }
        fn nvme(&mut self, side: Side, _: Case, _: Budget) -> Result<CaseRun> {
            let ns = if side == Side::Remote { 1200 } else { 1000 };
            Ok(CaseRun { commands: 1_000_000 / ns, elapsed: Duration::from_secs(1), latencies: constant(ns) })
        }
        fn region_read(&mut self, _: u64) -> Result<Latencies> {
            Ok(constant(1))
        }
        fn data_path(&mut self, operations: u64) -> Result<OperationCounts> {
            let allocations = self.allocations;
            Ok(OperationCounts { operations, allocations, ..OperationCounts::default() })
        }
    }

    #[test]
    fn every_target_of_the_fabric_has_its_row_and_a_bad_figure_fails_it() {
        let effort = Effort { rounds: 5, samples: 500, stream_bytes: 4 << 20, nvme: Duration::ZERO, operations: 1000 };
        let (mut steps, mut seen) = (0, Vec::new());
        let report = run(&mut Scripted { allocations: 1 }, &effort, |heard| match heard {
            Heard::Begins(step) => steps += usize::from(step.done == steps),
            Heard::Measured(rows) => seen.extend(rows.iter().map(|row| row.case.clone())),
        });
        // Each row was heard of when it was there.
        assert_eq!(seen, report.rows.iter().map(|row| row.case.clone()).collect::<Vec<_>>());
        assert_eq!((steps, report.rows.len()), (7, 16));
        let row = |case: &str| report.rows.iter().find(|row| row.case == case).unwrap();
        assert_eq!(row("mmio-read-4 p50").meets, Some(false));
        assert_eq!(row("mmio-write-4 at the caller p50").meets, Some(true));
        assert_eq!(row("dma-read-4k p50").note.as_deref(), Some("reads are not there yet"));
        assert_eq!(row("dma-read-4k p50").meets, None);
        assert_eq!(row("dma-write-stream-1m").meets, Some(false));
        assert_eq!((row("randread-4k-qd1 p50").ratio, row("randread-4k-qd1 p50").meets), (Some(1.2), Some(true)));
        assert_eq!(row("randread-4k-qd32").meets, Some(false));
        assert_eq!((row("allocations").value, row("allocations").meets), (Some(0.001), Some(false)));
        assert_eq!(row("system calls").meets, Some(true));
    }
}
