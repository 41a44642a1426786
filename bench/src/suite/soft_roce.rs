//! `farbus bench soft-roce`: what the RDMA fabric costs, each figure held against perftest over the same device, in turns with it.
//!
//! A read of 4 KiB is held against `ib_read_lat -s 4096`, a remote register read against twice `ib_write_lat -s 8`. What is measured is behind
//! [`RoceSubjects`]; the pairs and the verdicts are here.
//!
//! Each row is at least five pairs, the order inside a pair reversed from pair to pair. A target is met or missed where both ends of the interval in
//! which the median of the pairs' ratios lies with 90 % probability say so (of eleven pairs, all but the two least and the two greatest ratios); otherwise
//! the row is too noisy to say, and prints the interval. Counts are exact and have no pairs.

use std::cell::RefCell;
use std::time::Duration;

use anyhow::Result;

use super::perftest::{Figures, Test};
use super::shm::Direction;
use super::soft_roce_subjects::Traffic;
use super::{Heard, Step};
use crate::measure::{Latencies, Pairs, interleave};
use crate::report::{Row, SuiteReport, Target};

/// Posted register writes of a burst.
pub const BURST: u64 = 64;
/// Bytes of a streamed operation.
pub const STREAM_BYTES: u64 = 64 << 10;

/// What the caller of posted register writes waits for one.
#[derive(Clone, Debug, Default)]
pub struct PostedWrites {
    /// A vCPU, at its port: another thread owns the function.
    pub at_a_port: Latencies,
    /// The thread that owns the function, with the doorbell of this write.
    pub with_doorbell: Latencies,
    /// The same thread, of a burst of [`BURST`] with its doorbell, for each write.
    pub in_bursts: Latencies,
}

/// What is measured, over a new link each time; an error makes the row "not measured", with the reason.
pub trait RoceSubjects {
    /// The reference.
    ///
    /// # Errors
    /// Why it could not be measured.
    fn perftest(&mut self, test: Test, bytes: u64, iterations: u64) -> Result<Figures>;

    /// Writes of 8 bytes that notify, one way: half of a round trip.
    ///
    /// # Errors
    /// Why it could not be measured.
    fn notify(&mut self, samples: u64) -> Result<Latencies>;

    /// Reads of the peer's memory, one at a time.
    ///
    /// # Errors
    /// Why it could not be measured.
    fn read(&mut self, bytes: u64, samples: u64) -> Result<Latencies>;

    /// Operations of [`STREAM_BYTES`], as many in flight as perftest has: bytes per second.
    ///
    /// # Errors
    /// Why it could not be measured.
    fn stream(&mut self, direction: Direction, operations: u64) -> Result<f64>;

    /// 4-byte reads of a lent device's register: from the call until the value is there.
    ///
    /// # Errors
    /// Why it could not be measured.
    fn mmio_read(&mut self, samples: u64) -> Result<Latencies>;

    /// 4-byte writes of a lent device's register: what the caller waits.
    ///
    /// # Errors
    /// Why it could not be measured.
    fn mmio_write(&mut self, samples: u64) -> Result<PostedWrites>;

    /// TCP, TLS and hellos between a borrower and a lender on this host.
    ///
    /// # Errors
    /// Why it could not be measured.
    fn handshake(&mut self, samples: u64) -> Result<Latencies>;

    /// The same, and on to queue pairs, sessions, and the first answer of the lent device's register.
    ///
    /// # Errors
    /// Why it could not be measured.
    fn connect(&mut self, samples: u64) -> Result<Latencies>;

    /// What register reads cost.
    ///
    /// # Errors
    /// Why it could not be counted.
    fn count_mmio_reads(&mut self, operations: u64) -> Result<Traffic>;

    /// What bursts of [`BURST`] posted register writes cost.
    ///
    /// # Errors
    /// Why it could not be counted.
    fn count_bursts(&mut self, bursts: u64) -> Result<Traffic>;

    /// What NVMe reads of 4 KiB cost, one in flight at a time.
    ///
    /// # Errors
    /// Why it could not be counted.
    fn count_nvme_reads(&mut self, operations: u64) -> Result<Traffic>;

    /// Bytes that a link has pinned beyond the guest's memory, both sides together.
    ///
    /// # Errors
    /// Why it is not known.
    fn pinned(&mut self) -> Result<u64>;
}

/// How much to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Effort {
    /// Pairs of each row, at least 5.
    pub pairs: usize,
    /// How long one side of one pair is to take, without its start.
    pub side: Duration,
    /// Operations in which work requests, doorbells and notifications are counted.
    pub operations: u64,
}

impl Default for Effort {
    fn default() -> Self {
        Self { pairs: 11, side: Duration::from_millis(150), operations: 500 }
    }
}

/// A reference: one of perftest's programs with its arguments.
#[derive(Clone, Copy)]
struct Reference {
    test: Test,
    bytes: u64,
    /// What the target counts: "twice ib_write_lat".
    times: f64,
    text: &'static str,
}

const WRITE: Reference = Reference { test: Test::WriteLatency, bytes: 8, times: 1.0, text: "ib_write_lat 8 B" };

/// The fewest iterations whose median means something, and the most that a row needs.
const LATENCY_SAMPLES: (u64, u64) = (300, 20_000);
/// Connections of a side of a pair.
const CONNECTIONS: u64 = 5;
/// Streams fill their window of 128 a few times.
const STREAM_OPERATIONS: (u64, u64) = (512, 20_000);

struct Suite<'a> {
    subjects: RefCell<&'a mut dyn RoceSubjects>,
    effort: Effort,
}

/// Measures all rows.
pub fn run(subjects: &mut dyn RoceSubjects, effort: &Effort, mut hear: impl FnMut(Heard<'_>)) -> SuiteReport {
    type Group<'a> = fn(&Suite<'a>) -> Vec<Row>;
    let groups: [(&'static str, Group<'_>); 9] = [
        ("counts per operation", Suite::counts),
        ("notifications", Suite::notifications),
        ("reads of 8 bytes", |suite| suite.read("read-8", "ib_read_lat 8 B", 8)),
        ("reads of 4 KiB", |suite| suite.read("read-4k", "ib_read_lat 4 KiB", 4096)),
        ("register reads", Suite::register_reads),
        ("register writes", Suite::register_writes),
        ("streaming", Suite::streams),
        ("connecting", Suite::connecting),
        ("pinned memory", Suite::pinned),
    ];
    let suite = Suite { subjects: RefCell::new(subjects), effort: *effort };
    let mut rows = Vec::new();
    for (done, (what, group)) in groups.iter().enumerate() {
        hear(Heard::Begins(Step { what, done, total: groups.len() }));
        let measured = group(&suite);
        hear(Heard::Measured(&measured));
        rows.extend(measured);
    }
    SuiteReport { suite: "soft-roce".to_owned(), rows }
}

impl Suite<'_> {
    /// As many iterations as take a side's time, by a short run that also warms up.
    fn iterations(&self, reference: Reference, (least, most): (u64, u64)) -> Result<u64> {
        let figure = self.subjects.borrow_mut().perftest(reference.test, reference.bytes, least)?.typical;
        let one = match reference.test {
            Test::WriteLatency => 2.0 * figure,
            Test::ReadLatency => figure,
            Test::WriteBandwidth | Test::ReadBandwidth => reference.bytes as f64 * 1e9 / figure,
        };
        Ok(((self.effort.side.as_nanos() as f64 / one) as u64).clamp(least, most))
    }

    /// Pairs: perftest, then ours, then ours, then perftest, …
    fn pairs<T>(
        &self,
        reference: Reference,
        limits: (u64, u64),
        subject: impl Fn(&mut dyn RoceSubjects, u64) -> Result<T>,
    ) -> Result<Pairs<Figures, T>> {
        let iterations = self.iterations(reference, limits)?;
        let theirs = |_| self.subjects.borrow_mut().perftest(reference.test, reference.bytes, iterations);
        let ours = |_| subject(&mut **self.subjects.borrow_mut(), iterations);
        interleave(self.effort.pairs, theirs, ours)
    }

    /// Two rows: the medians, which are judged, and the least, which say what is left where nobody else takes a core meanwhile.
    fn latency(
        &self,
        case: &str,
        reference: Reference,
        target: Target,
        subject: impl Fn(&mut dyn RoceSubjects, u64) -> Result<Latencies>,
    ) -> Vec<Row> {
        let pairs = self.pairs(reference, LATENCY_SAMPLES, subject);
        let times = reference.times;
        vec![
            row(
                (&format!("{case} p50"), "ns", target),
                (reference.text, &pairs),
                |theirs| theirs.typical * times,
                |ours| ours.p50_ns() as f64,
            ),
            row(
                (&format!("{case} least"), "ns", Target::None),
                (&format!("{}, least", reference.text), &pairs),
                |theirs| theirs.best * times,
                |ours| ours.least_ns() as f64,
            ),
        ]
    }

    fn notifications(&self) -> Vec<Row> {
        self.latency("write-notify-8 one way", WRITE, Target::AtMost(1.2), |subjects, samples| subjects.notify(samples))
    }

    fn read(&self, case: &str, text: &'static str, bytes: u64) -> Vec<Row> {
        let reference = Reference { test: Test::ReadLatency, bytes, times: 1.0, text };
        self.latency(case, reference, Target::AtMost(1.15), |subjects, samples| subjects.read(bytes, samples))
    }

    fn register_reads(&self) -> Vec<Row> {
        let twice = Reference { times: 2.0, text: "twice ib_write_lat 8 B", ..WRITE };
        self.latency("mmio-read-4", twice, Target::AtMost(1.25), |subjects, samples| subjects.mmio_read(samples / 2))
    }

    /// Soft-RoCE carries a whole operation out inside the system call that is its doorbell, and perftest's figure ends when the peer sees the bytes,
    /// before that call returns. So a vCPU leaves the doorbell to the function's thread; what it costs there is beside it, for information.
    fn register_writes(&self) -> Vec<Row> {
        let pairs = self.pairs(WRITE, LATENCY_SAMPLES, |subjects, samples| subjects.mmio_write(samples));
        let mut rows = Vec::new();
        for (case, target, of) in [
            (
                "mmio-write-4 at the caller, a vCPU's port",
                Target::AtMost(0.5),
                (|ours| &ours.at_a_port) as fn(&PostedWrites) -> &Latencies,
            ),
            ("mmio-write-4 with its doorbell", Target::None, |ours| &ours.with_doorbell),
            ("mmio-write-4 with its doorbell, of 64 together", Target::None, |ours| &ours.in_bursts),
        ] {
            let p50 = |ours: &PostedWrites| of(ours).p50_ns() as f64;
            rows.push(row((&format!("{case} p50"), "ns", target), (WRITE.text, &pairs), |theirs| theirs.typical, p50));
        }
        rows
    }

    fn streams(&self) -> Vec<Row> {
        let stream = |case, test, text, direction| {
            let reference = Reference { test, bytes: STREAM_BYTES, times: 1.0, text };
            let subject = |subjects: &mut dyn RoceSubjects, operations| subjects.stream(direction, operations);
            let pairs = self.pairs(reference, STREAM_OPERATIONS, subject);
            row((case, "bytes/s", Target::AtLeast(0.95)), (text, &pairs), |theirs| theirs.typical, |ours| *ours)
        };
        vec![
            stream("write-stream-64k", Test::WriteBandwidth, "ib_write_bw 64 KiB", Direction::Write),
            stream("read-stream-64k", Test::ReadBandwidth, "ib_read_bw 64 KiB", Direction::Read),
        ]
    }

    fn counts(&self) -> Vec<Row> {
        let mut subjects = self.subjects.borrow_mut();
        let operations = self.effort.operations;
        let reads = subjects.count_mmio_reads(operations);
        let bursts = subjects.count_bursts((operations / BURST).max(2));
        let nvme = subjects.count_nvme_reads(operations);
        let (exactly, most) = (Target::Exactly, Target::ValueAtMost);
        let quietly =
            |traffic: &Traffic| traffic.of_both(|counters| counters.signalled) / traffic.of_both(|counters| counters.work_requests);
        vec![
            count("mmio read: work requests", exactly(2.0), &reads, |traffic| traffic.of_both(|side| side.work_requests)),
            count("mmio read: doorbells of the borrower", exactly(1.0), &reads, |traffic| {
                traffic.of_borrower(|side| side.doorbells)
            }),
            count("mmio read: doorbells of the lender", exactly(1.0), &reads, |traffic| traffic.of_lender(|side| side.doorbells)),
            count("burst of 64 posted writes: doorbells", most(2.0), &bursts, |traffic| traffic.of_borrower(|side| side.doorbells)),
            count("burst of 64 posted writes: work requests", Target::None, &bursts, |traffic| {
                traffic.of_borrower(|side| side.work_requests)
            }),
            count("nvme read 4 KiB: work requests", most(4.0), &nvme, |traffic| traffic.of_both(|side| side.work_requests)),
            count("nvme read 4 KiB: notifications", most(3.0), &nvme, |traffic| traffic.of_both(|side| side.received)),
            count("nvme read 4 KiB: doorbells", Target::None, &nvme, |traffic| traffic.of_both(|side| side.doorbells)),
            count("signalled of the requests of register reads", most(1.0 / 16.0), &reads, quietly),
            count("signalled of the requests of posted writes", most(1.0 / 16.0), &bursts, quietly),
            count("signalled of the requests of nvme reads", Target::None, &nvme, quietly),
        ]
    }

    fn connecting(&self) -> Vec<Row> {
        let (case, target, reference) = ("connect to first mmio answer p50", Target::AtMost(2.0), "TCP, TLS and hellos p50");
        let handshake = |_| self.subjects.borrow_mut().handshake(CONNECTIONS);
        let pairs = interleave(self.effort.pairs, handshake, |_| self.subjects.borrow_mut().connect(CONNECTIONS));
        let p50 = |latencies: &Latencies| latencies.p50_ns() as f64;
        vec![row((case, "ns", target), (reference, &pairs), p50, p50)]
    }

    fn pinned(&self) -> Vec<Row> {
        let (case, unit, target) = ("memory pinned by a link beyond the guest's", "bytes", Target::ValueAtMost(f64::from(8 << 20)));
        vec![match self.subjects.borrow_mut().pinned() {
            Ok(bytes) => Row::exact(case, unit, bytes as f64, "none", target),
            Err(error) => Row::missing(case, unit, "none", target, format!("{error:#}")),
        }]
    }
}

/// A row of pairs, or of the reason why there are none.
fn row<A, B>(
    (case, unit, target): (&str, &str, Target),
    (reference, pairs): (&str, &Result<Pairs<A, B>>),
    of_theirs: impl Fn(&A) -> f64,
    of_ours: impl Fn(&B) -> f64,
) -> Row {
    match pairs {
        Ok(pairs) => {
            let (references, subjects) = pairs.series(&of_theirs, &of_ours);
            Row::judged(case, unit, (&subjects, reference, &references), &pairs.ratios(&of_theirs, &of_ours), target)
        }
        Err(error) => Row::missing(case, unit, reference, target, format!("{error:#}")),
    }
}

/// A row of what was counted.
fn count(case: &str, target: Target, traffic: &Result<Traffic>, figure: impl Fn(&Traffic) -> f64) -> Row {
    let (unit, reference) = ("per operation", "none");
    match traffic {
        Ok(traffic) if traffic.operations > 0 => Row::exact(case, unit, figure(traffic), reference, target),
        Ok(_) => Row::missing(case, unit, reference, target, "no operation was carried out".to_owned()),
        Err(error) => Row::missing(case, unit, reference, target, format!("{error:#}")),
    }
}

#[cfg(test)]
mod tests {
    use farbus_transport::verbs::Counters;

    use super::*;

    /// Answers as a fabric would whose figures are these; only the arithmetic is under test.
    struct Scripted {
        round: u64,
        work_requests: u64,
    }

    fn constant(ns: u64) -> Latencies {
        let mut latencies = Latencies::new();
        (0..100).for_each(|_| latencies.record_ns(ns));
        latencies
    }

    impl RoceSubjects for Scripted {
        fn perftest(&mut self, test: Test, _: u64, iterations: u64) -> Result<Figures> {
            anyhow::ensure!(test != Test::ReadBandwidth, "it is broken");
            assert!(iterations >= 300, "{iterations}");
            Ok(Figures { typical: 20_000.0, best: 10_000.0 })
        }
        fn notify(&mut self, _: u64) -> Result<Latencies> {
            Ok(constant(23_000))
        }
        fn read(&mut self, bytes: u64, _: u64) -> Result<Latencies> {
            // Rounds of reads of 4 KiB scatter around the target.
            self.round += 1;
            Ok(constant(if bytes == 8 || self.round.is_multiple_of(2) { 20_000 } else { 30_000 }))
        }
        fn stream(&mut self, _: Direction, _: u64) -> Result<f64> {
            Ok(20_000.0)
        }
        fn mmio_read(&mut self, _: u64) -> Result<Latencies> {
            Ok(constant(44_000))
        }
        fn mmio_write(&mut self, _: u64) -> Result<PostedWrites> {
            Ok(PostedWrites { at_a_port: constant(30_000), with_doorbell: constant(100), in_bursts: constant(8_000) })
        }
        fn handshake(&mut self, _: u64) -> Result<Latencies> {
            Ok(constant(1_000_000))
        }
        fn connect(&mut self, _: u64) -> Result<Latencies> {
            Ok(constant(1_900_000))
        }
        fn count_mmio_reads(&mut self, operations: u64) -> Result<Traffic> {
            let side =
                Counters { work_requests: operations, doorbells: operations, signalled: operations / 32, received: operations };
            Ok(Traffic { operations, borrower: side, lender: Counters { work_requests: self.work_requests, ..side } })
        }
        fn count_bursts(&mut self, _: u64) -> Result<Traffic> {
            Ok(Traffic::default())
        }
        fn count_nvme_reads(&mut self, _: u64) -> Result<Traffic> {
            anyhow::bail!("no NVMe yet")
        }
        fn pinned(&mut self) -> Result<u64> {
            Ok(9 << 20)
        }
    }

    #[test]
    fn every_target_of_the_fabric_has_its_row_and_is_judged_by_its_figures() {
        let effort = Effort { pairs: 5, side: Duration::from_millis(1), operations: 100 };
        let (mut steps, mut seen) = (0, Vec::new());
        let report = run(&mut Scripted { round: 0, work_requests: 101 }, &effort, |heard| match heard {
            Heard::Begins(step) => steps += usize::from(step.done == steps),
            Heard::Measured(rows) => seen.extend(rows.iter().map(|row| row.case.clone())),
        });
        // Each row was heard of when it was there.
        assert_eq!(seen, report.rows.iter().map(|row| row.case.clone()).collect::<Vec<_>>());
        assert_eq!((steps, report.rows.len()), (9, 26), "{report:#?}");
        let row = |case: &str| report.rows.iter().find(|row| row.case == case).unwrap_or_else(|| panic!("{case}"));
        // Three digits are kept of a latency.
        let near = |case, ratio: f64| row(case).ratio.is_some_and(|found| (found / ratio - 1.0).abs() < 0.002);
        assert!(near("write-notify-8 one way p50", 1.15) && row("write-notify-8 one way p50").meets == Some(true));
        assert!(
            row("write-notify-8 one way least").ratio.is_some_and(|ratio| (2.29..2.31).contains(&ratio)),
            "beside perftest's least"
        );
        assert_eq!(row("read-8 p50").meets, Some(true));
        assert_eq!(row("read-4k p50").meets, None, "too noisy to say");
        assert!(near("mmio-read-4 p50", 1.1), "beside twice the reference");
        assert_eq!(row("mmio-write-4 at the caller, a vCPU's port p50").meets, Some(false));
        assert_eq!(row("mmio-write-4 with its doorbell, of 64 together p50").meets, Some(true));
        assert_eq!(row("write-stream-64k").meets, Some(true));
        assert!(row("read-stream-64k").note.as_ref().is_some_and(|note| note.contains("it is broken")));
        assert_eq!((row("mmio read: work requests").value, row("mmio read: work requests").meets), (Some(2.01), Some(false)));
        assert_eq!(row("mmio read: doorbells of the lender").meets, Some(true));
        assert_eq!(row("burst of 64 posted writes: doorbells").value, None, "nothing was carried out");
        assert_eq!(row("nvme read 4 KiB: work requests").note.as_deref(), Some("no NVMe yet"));
        assert_eq!(row("memory pinned by a link beyond the guest's").meets, Some(false));
        assert!(near("connect to first mmio answer p50", 1.9) && row("connect to first mmio answer p50").meets == Some(true));
    }
}
