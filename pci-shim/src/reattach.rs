//! How a function gets its device again when the link, the lender's process or its host is gone: somebody looks for it until it is found or the time is up.
//!
//! The lender is killed at 12:00:00.000: the function says `begin`, a thread asks the lender's address after 1, 2, 4 ms and so on, the lender is back at
//! 12:00:00.300, and the next `poll` hands over a new attachment. After the time that was chosen (10 s, say) it says [`Found::Nobody`], and the guest sees an
//! empty slot.

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use farbus_remote_dma::Attachment;
use farbus_remote_dma::wait::Waker;
use farbus_transport::CloseReason;

/// Between two attempts.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
/// While whoever was lost may be on its way back, and later. The guest waits for the rest of a pause when the link is there again, so it is short for as long as a
/// link is usually down; a lender that does not listen refuses within some microseconds.
const LONGEST_PAUSE: Duration = Duration::from_millis(8);
const LATER_PAUSE: Duration = Duration::from_millis(100);
const SOON: Duration = Duration::from_secs(20);

/// What became of the search.
pub enum Found {
    /// It goes on.
    NotYet,
    /// The device, as after a reset.
    Device(Box<dyn Attachment>),
    /// The time is up, or there is no use in looking: why.
    Nobody(String),
}

/// Looks for a device that was lost. Nothing here blocks.
pub trait Reattach: Send {
    /// The device is lost, since `since`: look for it. Said again where what was found was lost before it could be used.
    fn begin(&mut self, why: CloseReason, since: Instant);

    /// What was found so far.
    fn poll(&mut self) -> Found;

    /// Readable when [`Reattach::poll`] has something to say.
    fn wake_fd(&self) -> Option<BorrowedFd<'_>>;

    /// The function has its device again, after so long.
    fn back(&mut self, _away: Duration) {}

    /// The function goes without it from now on, and why.
    fn gave_up(&mut self, _why: &str) {}
}

/// What a search tells whoever wants to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Search {
    /// It begins.
    Lost(CloseReason),
    /// The device is back, after so long.
    Back(Duration),
    /// There is no device any more: why.
    GaveUp(String),
}

/// Why an attempt found nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NotFound {
    /// It may be there later.
    Yet(String),
    /// There is no use in looking: somebody else had it meanwhile, say.
    Ever(String),
}

type Connect = dyn FnMut() -> Result<Box<dyn Attachment>, NotFound> + Send;
type Hear = dyn FnMut(Search) + Send;

/// Asks for the device again and again, on a thread of its own while it is lost.
pub struct Reconnector {
    connect: Arc<Mutex<Box<Connect>>>,
    hear: Box<Hear>,
    give_up: Duration,
    running: Option<Running>,
    stop: SearchStop,
}

/// Ends a search, and any that would begin later: whoever waits for the device is told that there is none.
#[derive(Clone, Debug, Default)]
pub struct SearchStop(Arc<AtomicBool>);

impl SearchStop {
    /// Says so.
    pub fn stop(&self) {
        self.0.store(true, Ordering::Release);
    }
}

struct Running {
    found: Receiver<Result<Box<dyn Attachment>, String>>,
    /// Set when there is something in it.
    ready: Waker,
    /// Whoever looks stops when this is gone.
    _wanted: Arc<()>,
}

impl Reconnector {
    /// Looks by `connect` for up to `give_up` since the loss. An attempt that takes long makes the next one late; it should give up by itself.
    pub fn new(give_up: Duration, connect: impl FnMut() -> Result<Box<dyn Attachment>, NotFound> + Send + 'static) -> Self {
        Self {
            connect: Arc::new(Mutex::new(Box::new(connect))),
            hear: Box::new(|_| {}),
            give_up,
            running: None,
            stop: SearchStop::default(),
        }
    }

    /// What ends a search from elsewhere: before the function's thread is waited for, say.
    pub fn stop_handle(&self) -> SearchStop {
        self.stop.clone()
    }

    /// Tells `hear` of every loss and how it ended, on the function's thread.
    #[must_use]
    pub fn telling(mut self, hear: impl FnMut(Search) + Send + 'static) -> Self {
        self.hear = Box::new(hear);
        self
    }

    fn start(&self, until: Instant) -> io::Result<Running> {
        let (tell, found) = mpsc::channel();
        let (ready, wanted) = (Waker::new()?, Arc::new(()));
        let (connect, wake, still) = (Arc::clone(&self.connect), ready.clone(), Arc::downgrade(&wanted));
        std::thread::Builder::new().name("farbus-reconnect".into()).spawn(move || {
            let mut connect = connect.lock().unwrap_or_else(PoisonError::into_inner);
            // Who is not there any more wants nothing.
            drop(tell.send(look(&mut **connect, until, &still)));
            wake.set();
        })?;
        Ok(Running { found, ready, _wanted: wanted })
    }
}

/// Until it is found, nobody wants it any more, or the time is up.
fn look(connect: &mut Connect, until: Instant, wanted: &Weak<()>) -> Result<Box<dyn Attachment>, String> {
    let began = Instant::now();
    let mut pause = FIRST_PAUSE;
    loop {
        let error = match connect() {
            Ok(device) => return Ok(device),
            Err(NotFound::Ever(error)) => return Err(error),
            Err(NotFound::Yet(error)) => error,
        };
        tracing::debug!(error, ?pause, "the lender is not back");
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() || wanted.strong_count() == 0 {
            return Err(format!("it did not come back in time: {error}"));
        }
        std::thread::sleep(pause.min(left));
        pause = (pause * 2).min(if began.elapsed() < SOON { LONGEST_PAUSE } else { LATER_PAUSE });
    }
}

impl Reattach for Reconnector {
    fn begin(&mut self, why: CloseReason, since: Instant) {
        if self.running.is_none() {
            (self.hear)(Search::Lost(why));
        }
        let running = self.start(since + self.give_up);
        self.running = running.inspect_err(|error| tracing::error!(%error, "nobody can look for the lender")).ok();
    }

    fn poll(&mut self) -> Found {
        if self.stop.0.load(Ordering::Acquire) {
            return Found::Nobody("it was told to stop".into());
        }
        match self.running.as_ref().map(|running| running.found.try_recv()) {
            Some(Ok(Ok(device))) => Found::Device(device),
            Some(Err(TryRecvError::Empty)) => Found::NotYet,
            Some(Ok(Err(why))) => Found::Nobody(why),
            Some(Err(TryRecvError::Disconnected)) | None => Found::Nobody("nobody looks for it".into()),
        }
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        self.running.as_ref().map(|running| running.ready.fd())
    }

    fn back(&mut self, away: Duration) {
        self.running = None;
        (self.hear)(Search::Back(away));
    }

    fn gave_up(&mut self, why: &str) {
        self.running = None;
        (self.hear)(Search::GaveUp(why.to_owned()));
    }
}

impl fmt::Debug for Reconnector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reconnector")
            .field("give_up", &self.give_up)
            .field("looks", &self.running.is_some())
            .finish_non_exhaustive()
    }
}
