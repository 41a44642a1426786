//! Who uses an object store, as objects that have to be written anew to count: leases.
//!
//! Process 4711 deposits: it creates `locks/use/deposit-30000-4711-…-0` and then lists `locks/use`. No sweep is there, so it may; each 7 s it writes the object
//! anew, until the guard is dropped and the object removed. If it dies, the object is 30 s old at some time, by the store's clock, and counts no more.
//!
//! Of two that exclude each other both write before they look, and a listing has what was written before it: so one of them sees the other, or both do
//! and both step back for a time of chance. Nobody compares clocks: ages are differences between the store's own times of two objects, one of
//! which the asking process has just written.
//!
//! Whoever was silent for 20 s, asleep or cut off, may be taken for dead 10 s later. It says so itself first: from then on it commits, removes and
//! reserves nothing, and a request that is under way has at most what is left until then ([`Leases::left`]). Its own clock counts sleep too.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use object_store::path::Path;
use object_store::{ObjectStoreExt, PutMode};
use rustix::time::{ClockId, clock_gettime};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::{Bucket, Failure};
use crate::page::Root;
use crate::store::{Guard, Hold, Pin, StoreError};

const USE: &str = "locks/use";
const COMMIT: &str = "locks/commit";
const PINS: &str = "locks/pins";
/// What the store's times may be rounded to.
const ROUNDED: Duration = Duration::from_secs(2);

/// The longest that letting go waits for a store that does not answer.
const FAREWELL: Duration = Duration::from_secs(10);

/// How a process says that it is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseTimes {
    /// How old a lease may be that counts.
    pub life: Duration,
    /// After how long without a new one its owner itself takes it for lapsed; shorter.
    pub lapse: Duration,
    /// How often it is written anew; much shorter.
    pub renew: Duration,
}

impl Default for LeaseTimes {
    fn default() -> Self {
        Self { life: Duration::from_secs(30), lapse: Duration::from_secs(20), renew: Duration::from_secs(7) }
    }
}

/// The holds of this process.
#[derive(Debug)]
pub struct Leases {
    times: LeaseTimes,
    held: Mutex<Vec<Weak<Lease>>>,
}

/// When it was last written, in nanoseconds of the clock that counts sleep, and whether that was too long ago once.
#[derive(Debug)]
struct Lease {
    written: AtomicU64,
    lapsed: AtomicBool,
}

/// Nanoseconds since this host started, those included that it slept.
fn now() -> u64 {
    let time = clock_gettime(ClockId::Boottime);
    (time.tv_sec as u64).saturating_mul(1_000_000_000).saturating_add(time.tv_nsec as u64)
}

impl Lease {
    /// How long nothing was heard of it.
    ///
    /// # Errors
    /// Too long, now or once before.
    fn silent(&self, times: &LeaseTimes) -> Result<Duration, StoreError> {
        let silent = Duration::from_nanos(now().saturating_sub(self.written.load(Ordering::Acquire)));
        if silent >= times.lapse {
            self.lapsed.store(true, Ordering::Release);
        }
        if self.lapsed.load(Ordering::Acquire) { Err(StoreError::Lapsed { silent }) } else { Ok(silent) }
    }
}

impl Leases {
    pub fn new(times: LeaseTimes) -> Self {
        Self { times, held: Mutex::default() }
    }

    /// How long a request may take that rests on what this process holds.
    ///
    /// # Errors
    /// It may not any more.
    pub fn left(&self) -> Result<Duration, StoreError> {
        let mut left = Duration::MAX;
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.retain(|lease| lease.strong_count() > 0);
        for lease in held.iter().filter_map(Weak::upgrade) {
            left = left.min(self.times.life.saturating_sub(lease.silent(&self.times)?));
        }
        Ok(left)
    }
}

/// A lease that another process, or this one, has written.
struct Found {
    name: String,
    key: Path,
    word: String,
    life: Duration,
    pid: u32,
    written: SystemTime,
}

/// `deposit-30000-4711-9f…-0`: the word, milliseconds that it counts, and whose it is.
fn parse(name: String, key: Path, written: SystemTime) -> Option<Found> {
    let mut parts = name.splitn(4, '-');
    let (word, life, pid) = (parts.next()?.to_owned(), parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    parts.next()?;
    Some(Found { name, key, word, life: Duration::from_millis(life), pid, written })
}

fn found(bucket: &Bucket, folder: &str) -> Result<Vec<Found>, StoreError> {
    let listed = bucket.listed(folder)?;
    Ok(listed.into_iter().filter_map(|(name, about)| parse(name, about.location, about.last_modified.into())).collect())
}

/// Whether it counts, at a time of the store.
fn alive(lease: &Found, at: SystemTime) -> bool {
    at.duration_since(lease.written).unwrap_or_default() <= lease.life + ROUNDED
}

/// A name in `folder` of `bucket`, and its key.
fn named(bucket: &Bucket, folder: &str, word: &str, times: &LeaseTimes) -> (String, Path) {
    let name = format!("{word}-{}-{}", times.life.as_millis(), bucket.unique());
    let key = folder.split('/').fold(bucket.prefix.clone(), |key, part| key.join(part)).join(name.as_str());
    (name, key)
}

fn place(bucket: &Bucket, key: &Path) -> Result<(), StoreError> {
    if bucket.mine(bucket.limit, key)? {
        return Ok(());
    }
    let source = std::io::Error::new(std::io::ErrorKind::AlreadyExists, "it is there, and its name is new");
    Err(StoreError::io(format!("cannot write {key}"), source))
}

/// Waits until the store may be used so.
pub fn hold(bucket: &Arc<Bucket>, leases: &Arc<Leases>, hold: Hold, wait: Duration) -> Result<Box<dyn Guard>, StoreError> {
    let (folder, word) = match hold {
        Hold::Deposit => (USE, "deposit"),
        Hold::Sweep => (USE, "sweep"),
        Hold::Commit => (COMMIT, "commit"),
    };
    let until = Instant::now() + wait;
    loop {
        let (name, key) = named(bucket, folder, word, &leases.times);
        let asked = now();
        place(bucket, &key)?;
        let mut guard = LeaseGuard::new(bucket, key);
        let others = found(bucket, folder)?;
        // Where the listing lacks what was written before it, nothing of it can be relied on.
        let mine = others.iter().find(|lease| lease.name == name).ok_or_else(|| StoreError::Unreachable {
            what: format!("{} does not list what was just written to it", bucket.address),
            source: std::io::ErrorKind::InvalidData.into(),
        })?;
        let against = |lease: &&Found| lease.name != name && (hold != Hold::Deposit || lease.word != "deposit");
        match others.iter().filter(against).find(|lease| alive(lease, mine.written)) {
            None => {
                guard.keep(leases, asked);
                return Ok(Box::new(guard));
            }
            Some(_) if Instant::now() >= until => {
                let by = match hold {
                    Hold::Deposit => "another process removes from this bank, or collects its garbage",
                    Hold::Commit => "another process does not end naming what it deposited",
                    Hold::Sweep => "another process deposits into this bank, or removes from it",
                };
                return Err(StoreError::Busy { by: by.to_owned() });
            }
            Some(_) => drop(guard),
        }
        let mut chance = [0; 1];
        // Without chance two that met would meet again.
        getrandom::fill(&mut chance).map_err(|error| StoreError::io("cannot draw a number", error.into()))?;
        let pause = Duration::from_millis(20 + u64::from(chance[0]));
        std::thread::sleep(pause.min(until.saturating_duration_since(Instant::now())));
    }
}

/// Says that a machine is withdrawn.
pub fn pin(bucket: &Arc<Bucket>, leases: &Arc<Leases>, root: Root) -> Result<Box<dyn Guard>, StoreError> {
    let (_, key) = named(bucket, PINS, &root.to_string(), &leases.times);
    place(bucket, &key)?;
    let mut guard = LeaseGuard::new(bucket, key);
    // A withdrawal changes nothing, so it need not end where its pin does.
    guard.keep(&Arc::new(Leases::new(leases.times)), now());
    Ok(Box::new(guard))
}

/// The machines that living processes withdraw.
pub fn pins(bucket: &Bucket) -> Result<Vec<Pin>, StoreError> {
    let at = clock(bucket)?;
    let pins = found(bucket, PINS)?;
    let living = pins.iter().filter(|lease| alive(lease, at));
    Ok(living.filter_map(|lease| Some(Pin { root: Root::from_hex(&lease.word)?, pid: lease.pid })).collect())
}

/// Removes leases that count no more.
pub fn tidy(bucket: &Bucket) -> Result<(), StoreError> {
    let at = clock(bucket)?;
    for folder in [USE, COMMIT, PINS] {
        for lease in found(bucket, folder)?.iter().filter(|lease| !alive(lease, at)) {
            bucket.delete(bucket.limit, &lease.key)?;
        }
    }
    Ok(())
}

/// What time it is for the store.
fn clock(bucket: &Bucket) -> Result<SystemTime, StoreError> {
    let key = bucket.prefix.clone().join("locks").join("clock");
    bucket.small(bucket.limit, &key, Bytes::from(bucket.unique()), PutMode::Overwrite)?;
    let client = bucket.client.clone();
    let what = || format!("cannot tell what time it is for {}", bucket.address);
    let about = bucket.wait(async move { client.head(&key).await });
    Ok(about.map_err(|failure: Failure| super::sorted(&what(), false, failure))?.last_modified.into())
}

/// A lease of this process; dropped, it is removed.
struct LeaseGuard {
    bucket: Arc<Bucket>,
    key: Path,
    /// Ends the writing, which says when it has ended: nothing may write after the removal.
    renewal: Option<(oneshot::Sender<()>, JoinHandle<()>, Arc<Lease>)>,
}

impl std::fmt::Debug for LeaseGuard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "LeaseGuard({})", self.key)
    }
}

impl LeaseGuard {
    fn new(bucket: &Arc<Bucket>, key: Path) -> Self {
        Self { bucket: bucket.clone(), key, renewal: None }
    }

    /// Writes it anew from now on; the last time was `written`.
    fn keep(&mut self, leases: &Arc<Leases>, written: u64) {
        let Some(runtime) = &self.bucket.runtime else { return };
        let lease = Arc::new(Lease { written: AtomicU64::new(written), lapsed: AtomicBool::new(false) });
        leases.held.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::downgrade(&lease));
        let (end, mut ends) = oneshot::channel();
        let (client, key, times, state) = (self.bucket.client.clone(), self.key.clone(), leases.times, lease.clone());
        let task = runtime.spawn(async move {
            loop {
                tokio::select! {
                    _ = &mut ends => break,
                    () = tokio::time::sleep(times.renew) => {}
                }
                if state.silent(&times).is_err() {
                    tracing::warn!(%key, "the store could not be told that this process is there");
                    break;
                }
                let asked = now();
                match tokio::time::timeout(times.renew, client.put(&key, Bytes::new().into())).await {
                    Ok(Ok(_)) => state.written.store(asked, Ordering::Release),
                    other => tracing::debug!(?other, %key, "a lease was not written anew"),
                }
            }
        });
        self.renewal = Some((end, task, lease));
    }
}

impl Guard for LeaseGuard {}

impl Drop for LeaseGuard {
    fn drop(&mut self) {
        let limit = self.bucket.limit.min(FAREWELL);
        if let Some((end, task, _lease)) = self.renewal.take() {
            drop(end);
            // A task that panicked writes nothing more either.
            let ended = self.bucket.within(limit, async move {
                drop(task.await);
                Ok(())
            });
            if let Err(error) = ended {
                tracing::debug!(?error, key = %self.key, "a lease is still being written");
            }
        }
        if let Err(error) = self.bucket.delete(limit, &self.key) {
            tracing::debug!(%error, key = %self.key, "a lease stays until it is too old");
        }
    }
}
