//! A lender in a thread of this process, pinned to its core, and the borrower's session with it.
//!
//! `Lender::start(ends, Box::new(nvme), 1, ALWAYS)` has the device polled on core 1 until the lender is dropped; the session is the caller's.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use farbus_remote_dma::Backend;
use farbus_remote_dma::borrower::{BorrowerOptions, BorrowerSession};
use farbus_remote_dma::lender::{LenderSession, PollOptions};
use farbus_remote_dma::wait::Waker;
use farbus_transport::{Fabric, Memory};

use crate::measure::pin_to;

/// A lender's thread; it ends when this is dropped.
#[derive(Debug)]
pub(super) struct Lender {
    stop: Waker,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Lender {
    /// Lends `backend` over `ends`, the lender's first, on core `there`; polls for `spin` before it sleeps.
    pub(super) fn start<F: Fabric + 'static>(
        ends: (F, F),
        backend: Box<dyn Backend>,
        there: usize,
        spin: Duration,
    ) -> Result<(Self, BorrowerSession<F>)> {
        Self::serve(ends, backend, there, move |session, stop| {
            session.run(PollOptions { spin }, stop);
            Ok(())
        })
    }

    /// As [`Lender::start`], in turns: the device is polled without a pause during a [`Turn`], and rests otherwise. Who sleeps and is woken in
    /// between is measured as well where waking takes longer than `spin`, and then never stops sleeping.
    pub(super) fn in_turns<F: Fabric + 'static>(
        ends: (F, F),
        backend: Box<dyn Backend>,
        there: usize,
    ) -> Result<(Self, Turns, BorrowerSession<F>)> {
        let (turns, taken) = channel::<(Waker, Sender<()>)>();
        let (lender, session) = Self::serve(ends, backend, there, move |session, _| {
            // Who waits for the end of a turn hears of it when `rests` is dropped.
            while let Ok((over, rests)) = taken.recv() {
                session.run(PollOptions { spin: Duration::MAX }, &over);
                drop(rests);
            }
            Ok(())
        })?;
        Ok((lender, Turns(turns), session))
    }

    /// As [`Lender::start`], with a way to serve of the caller's.
    pub(super) fn serve<F: Fabric + 'static>(
        (theirs, ours): (F, F),
        backend: Box<dyn Backend>,
        there: usize,
        serve: impl FnOnce(&mut LenderSession<F>, &Waker) -> Result<()> + Send + 'static,
    ) -> Result<(Self, BorrowerSession<F>)> {
        let description = backend.description().clone();
        let stop = Waker::new()?;
        let stopped = stop.clone();
        let thread = std::thread::Builder::new().name("bench-lender".into()).spawn(move || -> Result<()> {
            let _pinned = pin_to(there)?;
            let mut session = LenderSession::new(theirs, backend).map_err(|(error, _)| error)?;
            let served = serve(&mut session, &stopped);
            session.end().map_err(|wedged| anyhow!("the device does not end its work: {wedged:?}"))?;
            served
        })?;
        let options = BorrowerOptions {
            read_deadline: Duration::from_secs(60),
            // It waits inside a call only, and what is measured there must not be a sleep.
            spin: Duration::from_secs(1),
            ..BorrowerOptions::default()
        };
        Ok((Self { stop, thread: Some(thread) }, BorrowerSession::new(ours, description, options)?))
    }

    /// Ends it, and says whether it served well.
    pub(super) fn end(mut self) -> Result<()> {
        self.stop.set();
        let thread = self.thread.take();
        thread.map_or(Ok(()), |thread| thread.join().unwrap_or_else(|_| Err(anyhow!("the lender's thread failed"))))
    }
}

/// Tells a lender when it is its turn; the lender ends when this is dropped.
#[derive(Debug)]
pub(super) struct Turns(Sender<(Waker, Sender<()>)>);

impl Turns {
    /// The device is polled from now on, until the result is dropped.
    pub(super) fn begin(&self) -> Result<Turn> {
        let (over, (rests, at_rest)) = (Waker::new()?, channel());
        self.0.send((over.clone(), rests)).context("the lender has ended")?;
        Ok(Turn { over, at_rest })
    }
}

/// While this lives, a device is polled.
#[derive(Debug)]
pub(super) struct Turn {
    over: Waker,
    at_rest: Receiver<()>,
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.over.set();
        let rests = self.at_rest.recv();
        debug_assert!(rests.is_err(), "nothing is ever sent: the other end is dropped when the lender rests, or has ended");
    }
}

impl Drop for Lender {
    fn drop(&mut self) {
        self.stop.set();
        if let Some(thread) = self.thread.take() {
            // What it served was measured or not; there is nobody left to tell.
            drop(thread.join());
        }
    }
}

/// Memory whose pages are all there, so that nothing measured pays for a page fault.
pub(super) fn filled(name: &str, len: u64) -> Result<Arc<Memory>> {
    let memory = Memory::memfd(name, len)?;
    let pattern = [0x5a; 4096];
    for at in (0..len).step_by(pattern.len()) {
        let piece = pattern.len().min((len - at) as usize);
        memory.write(at, pattern.get(..piece).unwrap_or_default())?;
    }
    Ok(memory)
}
