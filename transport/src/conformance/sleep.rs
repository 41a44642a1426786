//! Cases of sleeping: whoever armed and sleeps is woken by the next event, and a link without events wakes nobody.
//!
//! Two threads play ball 10,000 times, each arming and sleeping whenever it has nothing: a wake-up lost between the last look and the
//! sleep shows as a message that lies there while its receiver sleeps.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};

use super::rig::{Outcome, Rig, Stop, ensure};
use super::{Pair, Provider};
use crate::fabric::{Event, Events, Fabric, Op, OpId, Signal};
use crate::sim::Seed;
use crate::span::Access;
use crate::time::Nanos;

/// Longer than any scheduler delays a thread that is awake.
const LOST: Duration = Duration::from_secs(3);
const ROUNDS: u32 = 10_000;

fn readable(fd: BorrowedFd<'_>, within: Duration) -> Outcome<bool> {
    let timeout = Timespec { tv_sec: within.as_secs() as i64, tv_nsec: i64::from(within.subsec_nanos()) };
    loop {
        let mut fds = [PollFd::new(&fd, PollFlags::IN)];
        match rustix::event::poll(&mut fds, Some(&timeout)) {
            Ok(ready) => return Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(Stop::Failed(format!("cannot sleep on the descriptor: {error}"))),
        }
    }
}

fn needs_descriptor(fabric: &dyn Fabric) -> Outcome {
    match fabric.wake_fd() {
        Some(_) => Ok(()),
        None => Err(Stop::NotRun("this fabric has no descriptor to sleep on".to_owned())),
    }
}

pub(super) fn arm_refuses_while_events_are_there(provider: &dyn Provider, seed: u64) -> Outcome {
    let mut rig = Rig::new(provider, seed)?;
    for round in 0..30_u32 {
        let sent = round.to_le_bytes();
        let id = OpId(u64::from(round));
        rig.post(0, Signal::Yes(id), Op::Send { message: &sent })?;
        rig.flush(0);
        // Only the sender polls, so the message is across when its completion is here, and nobody has taken it.
        while rig.seen[0].is_empty() {
            rig.poll(0);
            rig.be_patient("completion of a message")?;
        }
        let done = rig.outcome(0, id)?;
        ensure!(done.is_ok(), "a message ended as {done:?}");
        // A poll without room leaves it where it is.
        let mut no_room = Events::new();
        while no_room.push(Event::Notify(0)) {}
        let now = rig.now();
        rig.end(1).poll(now, &mut no_room);
        let armed = rig.end(1).arm();
        ensure!(!armed || woken(rig.end(1), LOST)?, "armed with a message waiting, which nothing will announce");
        let got = rig.message(1)?;
        ensure!(got == sent, "message {round} arrived as {got:02x?}");
    }
    rig.settle();
    rig.nothing_left()?;
    let sleeps = (0..10).any(|_| {
        rig.poll(1);
        rig.end(1).arm()
    });
    ensure!(sleeps, "an idle side may never sleep");
    Ok(())
}

pub(super) fn an_armed_side_is_woken_and_an_idle_one_is_not(provider: &dyn Provider, seed: u64) -> Outcome {
    let mut rig = Rig::new(provider, seed)?;
    needs_descriptor(rig.end(1))?;
    let (near, target) = (rig.filled(0, 4096)?, rig.filled(1, 4096)?);
    let remote = rig.grant(1, &target, Access::READ_WRITE)?;
    for round in 0..12_u32 {
        let message = round.to_le_bytes();
        fall_asleep(&mut rig, 1)?;
        let op = if round % 2 == 0 {
            Op::Send { message: &message }
        } else {
            Op::WriteNotify { from: near.region.span(0, 64, Access::READ)?, to: remote.span(0, 64, Access::WRITE)?, notify: round }
        };
        post_alone(&mut rig, Signal::No, op, 20)?;
        ensure!(woken(rig.end(1), LOST)?, "round {round}: {op:?} did not wake its receiver");
        // It stays so until somebody polls.
        ensure!(woken(rig.end(1), Duration::ZERO)?, "round {round}: the wake-up vanished before a poll");
        let event = rig.next(1)?;
        let fits = match event {
            Event::Message(got) => got.bytes() == message,
            Event::Notify(got) => got == round,
            _ => false,
        };
        ensure!(fits, "round {round}: woken by {event:?}");
    }

    // One's own completion is an event too.
    fall_asleep(&mut rig, 0)?;
    let op = Op::Write { from: near.region.span(0, 64, Access::READ)?, to: remote.span(0, 64, Access::WRITE)? };
    post_alone(&mut rig, Signal::Yes(OpId(1)), op, 0)?;
    let armed = rig.end(0).arm();
    ensure!(!armed || woken(rig.end(0), LOST)?, "a completion did not wake its poster");
    let done = rig.outcome(0, OpId(1))?;
    ensure!(done.is_ok(), "a write ended as {done:?}");

    fall_asleep(&mut rig, 1)?;
    rig.end(0).close();
    ensure!(woken(rig.end(1), LOST)?, "a close did not wake the peer");

    let mut rig = Rig::new(provider, seed)?;
    fall_asleep(&mut rig, 1)?;
    let Pair { ends: [left, right], .. } = rig.pair;
    drop(left);
    ensure!(woken(&*right, LOST)?, "a peer that vanished did not wake this side");
    Ok(())
}

/// Posts from side 0 and polls it `polls` times, as its owner would; the receiver is left to itself.
fn post_alone(rig: &mut Rig<'_>, signal: Signal, op: Op<'_>, polls: u32) -> Outcome {
    while rig.try_post(0, signal, op).is_err() {
        rig.poll(0);
        rig.be_patient("room in the queue")?;
    }
    rig.flush(0);
    for _ in 0..polls {
        rig.poll(0);
    }
    Ok(())
}

/// Polls all there is and arms; then nothing may be readable for as long as nothing happens.
fn fall_asleep(rig: &mut Rig<'_>, side: usize) -> Outcome {
    const QUIET: Duration = Duration::from_millis(10);
    for _ in 0..50 {
        rig.poll(1 - side);
        rig.poll(side);
        if rig.end(side).arm() && !woken(rig.end(side), QUIET)? {
            return rig.nothing_left();
        }
    }
    Err(Stop::Failed("an idle link keeps waking its side, or refusing to be armed".to_owned()))
}

fn woken(end: &dyn Fabric, within: Duration) -> Outcome<bool> {
    end.wake_fd().map_or(Ok(false), |fd| readable(fd, within))
}

pub(super) fn no_wake_up_is_lost(provider: &dyn Provider, seed: u64) -> Outcome {
    let mut rig = Rig::new(provider, seed)?;
    needs_descriptor(rig.end(0))?;
    let (mut first, mut second) = (rig.seed.split(), rig.seed.split());
    let Pair { ends: [left, right], .. } = rig.pair;
    let patience = provider.patience();
    let outcomes = std::thread::scope(|scope| {
        let other = scope.spawn(move || Player::new(right, patience).play(false, &mut second));
        let ours = Player::new(left, patience).play(true, &mut first);
        let others = other.join().unwrap_or_else(|_| Err(Stop::Failed("a player panicked".to_owned())));
        [ours, others]
    });
    // Where one side failed, the other only saw it leave.
    let mut sleeps = 0;
    for outcome in &outcomes {
        match outcome {
            Ok(Ended::Played { sleeps: slept }) => sleeps += slept,
            Ok(Ended::Left) => {}
            Err(stop) => return Err(stop.clone()),
        }
    }
    let left = outcomes.iter().any(|outcome| matches!(outcome, Ok(Ended::Left)));
    ensure!(!left, "the link ended in the middle of the game");
    ensure!(sleeps >= 100, "the two slept only {sleeps} times, so nothing was tested");
    Ok(())
}

enum Ended {
    Played { sleeps: u32 },
    Left,
}

struct Player {
    end: Box<dyn Fabric>,
    events: Events,
    patience: Duration,
    sleeps: u32,
}

impl Player {
    fn new(end: Box<dyn Fabric>, patience: Duration) -> Self {
        Self { end, events: Events::new(), patience, sleeps: 0 }
    }

    /// Plays all rounds, then waits for the other to have heard the last ball by closing in the server's turn.
    fn play(mut self, serves: bool, seed: &mut Seed) -> Outcome<Ended> {
        for round in 0..ROUNDS {
            if serves {
                self.throw(round, seed)?;
            }
            if !self.catch(round)? {
                return Ok(Ended::Left);
            }
            if !serves {
                self.throw(round, seed)?;
            }
        }
        // The last ball flies towards the server; whoever threw it must not vanish under it.
        if !serves {
            self.catch(ROUNDS)?;
        }
        Ok(Ended::Played { sleeps: self.sleeps })
    }

    fn throw(&mut self, round: u32, seed: &mut Seed) -> Outcome {
        // From none at all to long enough for the other to have gone to sleep, or to be just about to.
        let pause = Duration::from_nanos(seed.below(4) * seed.below(20_000));
        let started = Instant::now();
        while started.elapsed() < pause {
            std::hint::spin_loop();
        }
        while self.end.post(Signal::No, Op::Send { message: &round.to_le_bytes() }).is_err() {
            self.events.clear();
            self.end.poll(Nanos::now(), &mut self.events);
            ensure!(started.elapsed() < self.patience, "no room for one message");
        }
        self.end.flush();
        Ok(())
    }

    /// True with the ball of this round, false where the link ended.
    fn catch(&mut self, round: u32) -> Outcome<bool> {
        let started = Instant::now();
        let mut overslept = false;
        loop {
            self.events.clear();
            self.end.poll(Nanos::now(), &mut self.events);
            match self.events.as_slice() {
                [] => {}
                [..] if overslept => {
                    return Err(Stop::Failed(format!(
                        "round {round}: {:?} was there and nothing woke its receiver",
                        self.events.as_slice()
                    )));
                }
                [.., Event::Closed(_)] => return Ok(false),
                [Event::Message(ball)] if ball.bytes() == round.to_le_bytes() => return Ok(true),
                other => return Err(Stop::Failed(format!("round {round}: caught {other:?}"))),
            }
            ensure!(started.elapsed() < self.patience, "round {round}: nothing came");
            if self.end.arm() {
                self.sleeps += 1;
                overslept = !woken(&*self.end, LOST)?;
            }
        }
    }
}
