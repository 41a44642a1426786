//! The rows of the fabric itself: two ends over one device, ours on one core and the peer's in a thread on another.
//!
//! For a notification both poll, as the two processes of `ib_write_lat` do; for reads and streams the peer sleeps, as the servers of `ib_read_lat` and
//! `ib_write_bw` do, because its device serves them alone.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use farbus_transport::verbs::{DeviceChoice, VerbsFabric};
use farbus_transport::{
    Access, Event, Events, Fabric, LocalRegion, LocalSpan, Memory, Nanos, Op, OpId, Regions, RemoteRegion, RemoteSpan, Signal,
};

use crate::measure::{Latencies, Stopwatch, pin_to};
use crate::suite::link::filled;
use crate::suite::shm::Direction;

/// Bytes of a streamed operation, and of the part of each side's memory that they and reads use.
const BYTES: u32 = 64 << 10;
/// Where in its memory a side has the word that it sends, and where the one that it receives: on cache lines and pages of their own.
const SENT: u64 = 64 << 10;
const RECEIVED: u64 = SENT + 4096;
/// Bytes of each side's memory.
const MEMORY: u64 = RECEIVED + 4096;
/// Streamed operations in flight: as perftest's TX depth.
const IN_FLIGHT: u64 = 128;
/// Whatever takes longer is no figure but a failure.
const LOST: Duration = Duration::from_secs(60);
/// Looking at the clock costs more than a poll, so it is done now and then, as in sessions.
const POLLS_PER_LOOK: u32 = 64;

/// One end with memory that both sides may use.
struct End {
    fabric: VerbsFabric,
    events: Events,
    memory: Arc<Memory>,
    ours: LocalRegion,
    theirs: RemoteRegion,
}

impl End {
    /// Both ends of a link over `choice`.
    fn pair(choice: &DeviceChoice) -> Result<(Self, Self)> {
        let (mut left, mut right) = VerbsFabric::pair(choice)?;
        let ready = |fabric: &mut VerbsFabric| -> Result<_> {
            let memory = filled("bench-end", MEMORY)?;
            let region = fabric.register(Arc::clone(&memory), Access::READ_WRITE)?;
            Ok((memory, region, fabric.export(&region, Access::READ_WRITE)?))
        };
        let (memories, regions, grants): (Vec<_>, Vec<_>, Vec<_>) = {
            let (left, right) = (ready(&mut left)?, ready(&mut right)?);
            (vec![left.0, right.0], vec![left.1, right.1], vec![right.2, left.2])
        };
        let mut ends = Vec::new();
        for (((mut fabric, memory), ours), grant) in [left, right].into_iter().zip(memories).zip(regions).zip(grants) {
            let theirs = fabric.import(&grant)?;
            ends.push(Self { fabric, events: Events::new(), memory, ours, theirs });
        }
        let right = ends.pop().context("two ends")?;
        Ok((ends.pop().context("two ends")?, right))
    }

    fn local(&self, offset: u64, bytes: u32, access: Access) -> Result<LocalSpan> {
        Ok(self.ours.span(offset, bytes, access)?)
    }

    fn remote(&self, offset: u64, bytes: u32, access: Access) -> Result<RemoteSpan> {
        Ok(self.theirs.span(offset, bytes, access)?)
    }

    #[inline]
    fn post(&mut self, signal: Signal, op: Op<'_>) -> Result<()> {
        Ok(self.fabric.post(signal, op)?)
    }

    /// Polls until something has come; all of it goes to `each`.
    #[inline]
    fn wait(&mut self, mut each: impl FnMut(Event) -> Result<()>) -> Result<()> {
        let mut now = Nanos::now();
        let deadline = now + LOST;
        let mut polls = 0_u32;
        loop {
            self.events.clear();
            self.fabric.poll(now, &mut self.events);
            if !self.events.as_slice().is_empty() {
                return self.events.as_slice().iter().try_for_each(|event| each(*event));
            }
            polls = polls.wrapping_add(1);
            if polls.is_multiple_of(POLLS_PER_LOOK) {
                now = Nanos::now();
                ensure!(now < deadline, "the peer does not answer");
            }
        }
    }

    #[inline]
    fn notify(&mut self, round: u64) -> Result<()> {
        self.memory.write(SENT, &round.to_le_bytes())?;
        let (from, to) = (self.local(SENT, 8, Access::READ)?, self.remote(RECEIVED, 8, Access::WRITE)?);
        self.post(Signal::No, Op::WriteNotify { from, to, notify: round as u32 })?;
        self.fabric.flush();
        Ok(())
    }

    #[inline]
    fn wait_for_notification(&mut self, round: u64) -> Result<()> {
        self.wait(|event| match event {
            Event::Notify(told) if told == round as u32 => Ok(()),
            other => bail!("{other:?} where notification {round} was due"),
        })
    }

    /// The word that the peer wrote last.
    fn received(&self) -> Result<u64> {
        let mut word = [0; 8];
        self.memory.read(RECEIVED, &mut word)?;
        Ok(u64::from_le_bytes(word))
    }
}

type Job = Box<dyn FnOnce(&mut End) -> Result<()> + Send>;

/// Both ends; the peer's thread ends when this is dropped.
pub(super) struct Ends {
    here: End,
    jobs: Option<Sender<Job>>,
    done: Receiver<Result<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Ends {
    /// Linked over `choice`, the peer's thread on core `there`.
    pub(super) fn new(choice: &DeviceChoice, there: usize) -> Result<Self> {
        let (here, mut peer) = End::pair(choice)?;
        let (jobs, taken) = channel::<Job>();
        let (report, done) = channel();
        let thread = std::thread::Builder::new().name("bench-peer".into()).spawn(move || {
            let pinned = pin_to(there);
            while let Ok(job) = taken.recv() {
                let outcome = match &pinned {
                    Ok(_) => job(&mut peer),
                    Err(error) => Err(anyhow!("{error}")),
                };
                if report.send(outcome).is_err() {
                    break;
                }
            }
        })?;
        Ok(Self { here, jobs: Some(jobs), done, thread: Some(thread) })
    }

    /// Half of the round trip of writes of 8 bytes that notify, each side answering the other's.
    pub(super) fn notify(&mut self, samples: u64) -> Result<Latencies> {
        let warm_up = samples / 10 + 1;
        let rounds = warm_up + samples;
        let jobs = self.jobs.as_ref().context("the peer has ended")?;
        let job: Job = Box::new(move |end: &mut End| {
            for round in 0..rounds {
                end.wait_for_notification(round)?;
                end.notify(round)?;
            }
            ensure!(end.received()? == rounds - 1, "the last write was lost");
            Ok(())
        });
        jobs.send(job).map_err(|_| anyhow!("the peer has ended"))?;
        let watch = Stopwatch::calibrate();
        let mut latencies = Latencies::new();
        for round in 0..rounds {
            let start = Instant::now();
            self.here.notify(round)?;
            self.here.wait_for_notification(round)?;
            let ns = watch.since(start) / 2;
            if round >= warm_up {
                latencies.record_ns(ns);
            }
        }
        self.done.recv().context("the peer has ended")??;
        Ok(latencies)
    }

    /// Reads of `bytes`, one at a time: from the post until it is done.
    pub(super) fn read(&mut self, bytes: u32, samples: u64) -> Result<Latencies> {
        let end = &mut self.here;
        let (from, into) = (end.remote(0, bytes, Access::READ)?, end.local(0, bytes, Access::WRITE)?);
        let watch = Stopwatch::calibrate();
        let mut latencies = Latencies::new();
        let warm_up = samples / 10 + 1;
        for round in 0..warm_up + samples {
            let start = Instant::now();
            end.post(Signal::Yes(OpId(round)), Op::Read { from, into })?;
            end.fabric.flush();
            end.wait(|event| match event {
                Event::Done(OpId(id)) if id == round => Ok(()),
                other => bail!("{other:?} where read {round} was due"),
            })?;
            let ns = watch.since(start);
            if round >= warm_up {
                latencies.record_ns(ns);
            }
        }
        Ok(latencies)
    }

    /// `count` operations of 64 KiB, 128 in flight, each reported: bytes per second from the first post to the last report.
    pub(super) fn stream(&mut self, direction: Direction, count: u64) -> Result<f64> {
        let end = &mut self.here;
        let op = match direction {
            Direction::Write => Op::Write { from: end.local(0, BYTES, Access::READ)?, to: end.remote(0, BYTES, Access::WRITE)? },
            Direction::Read => Op::Read { from: end.remote(0, BYTES, Access::READ)?, into: end.local(0, BYTES, Access::WRITE)? },
        };
        let (mut posted, mut done) = (0, 0);
        let start = Instant::now();
        while done < count {
            while posted < count && posted - done < IN_FLIGHT {
                end.post(Signal::Yes(OpId(posted)), op)?;
                posted += 1;
            }
            end.fabric.flush();
            end.wait(|event| match event {
                Event::Done(OpId(id)) if id == done => {
                    done += 1;
                    Ok(())
                }
                other => bail!("{other:?} where operation {done} was due"),
            })?;
        }
        Ok((count * u64::from(BYTES)) as f64 / start.elapsed().as_secs_f64().max(1e-9))
    }
}

impl Drop for Ends {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // What it did was told by `done`, or nobody asked.
            drop(thread.join());
        }
    }
}
