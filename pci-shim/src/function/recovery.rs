//! A function whose device is lost, and has it again: the guest sees a pause, and every command that it had not been answered is carried out.
//!
//! The lender is killed in the middle of twenty commands. Doorbells go on being heard here; a register read waits; the guest's memory is taken back. 80 ms later
//! the device is there again, reset: the profile puts it where the lost one was, tells it the commands whose completions the guest has not got, and interrupts for
//! what the guest has perhaps not heard of are raised.
//!
//! A device of a class whose profile cannot do that ([`crate::profile::Profile::remember`]) is gone at once, as without [`Function::reattaching`].

use std::os::fd::BorrowedFd;
use std::sync::Weak;
use std::time::{Duration, Instant};

use farbus_remote_dma::dirty_log::PAGE_BYTES;
use farbus_remote_dma::wait::sleep_until_readable;
use farbus_remote_dma::{Activity, Attachment};
use farbus_transport::CloseReason;

use super::Function;
use super::restore::RestoreError;
use super::workbench::Workbench;
use crate::irq::IrqSink;
use crate::profile::{GoOn, RecoveryRule};
use crate::reattach::{Found, Reattach};
use crate::state::DeviceIdentity;

/// How long a waiting register read sleeps at most before it looks again.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// By then a link's end is known, over whatever fabric.
const KNOWN_BY_THEN: Duration = Duration::from_secs(4);

/// How a function gets its device again, and whether it has lost it.
pub(super) struct Recovery {
    reattach: Box<dyn Reattach>,
    lost: Option<Lost>,
    /// There is no hope any more.
    over: bool,
    /// How often it got its device again.
    times: u64,
    /// How long the last time took, once there was a device.
    took: RecoveryParts,
}

/// How long it took to put a device that was found in the lost one's place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RecoveryParts {
    /// The device's reset.
    pub reset: Duration,
    /// For the profile to put it where the lost one was, and for the guest's memory to be mapped.
    pub revive: Duration,
    /// For it to be told what the lost one had been told.
    pub tell: Duration,
}

#[derive(Clone, Copy)]
struct Lost {
    why: CloseReason,
    since: Instant,
}

impl Recovery {
    pub(super) const fn is_over(&self) -> bool {
        self.over
    }
}

impl<S: IrqSink> Function<S> {
    /// Looks for the device by `reattach` when it is lost, and goes on with it. To be said before the guest uses the function, or between a restore and
    /// [`Function::resume`]: what the guest is not answered is kept from then on, which costs a copy of 64 bytes for each command.
    #[must_use]
    pub fn reattaching(mut self, reattach: Box<dyn Reattach>) -> Self {
        self.reattach_by(reattach);
        self
    }

    /// As [`Function::reattaching`], in place.
    pub fn reattach_by(&mut self, reattach: Box<dyn Reattach>) {
        if self.profile.remember() {
            self.recovery = Some(Recovery { reattach, lost: None, over: false, times: 0, took: RecoveryParts::default() });
        } else {
            tracing::warn!(
                device = self.description.name,
                "a device of this class cannot be told again what it was told: it is not looked for when it is lost"
            );
        }
    }

    /// Breaks a rule, for a test that must then fail.
    #[doc(hidden)]
    pub fn break_recovery(&mut self, rule: RecoveryRule) {
        self.profile.break_rule(rule);
    }

    /// Since when the device is looked for; `None` where it is not.
    pub fn lost_since(&self) -> Option<Instant> {
        self.recovery.as_ref().filter(|recovery| !recovery.over)?.lost.map(|lost| lost.since)
    }

    /// How often the device was lost and found.
    pub fn recoveries(&self) -> u64 {
        self.recovery.as_ref().map_or(0, |recovery| recovery.times)
    }

    /// How long the last recovery took; nothing where there was none.
    pub fn recovery_took(&self) -> RecoveryParts {
        self.recovery.as_ref().map_or_else(RecoveryParts::default, |recovery| recovery.took)
    }

    /// Whether the device is lost, and may come back: what the guest does is noted, and told to it then.
    pub(super) fn is_lost(&mut self) -> bool {
        let Some(why) = self.attachment.gone() else { return false };
        let Some(recovery) = &mut self.recovery else { return false };
        if recovery.over {
            return false;
        }
        if recovery.lost.is_none() {
            if !may_come_back(why) || self.attachment.in_doubt() {
                tracing::error!(%why, "a device was lost that cannot be looked for");
                recovery.over = true;
                recovery.reattach.gave_up("its last lender broke the protocol, or may still be in the guest's memory");
                return false;
            }
            let since = Instant::now();
            recovery.lost = Some(Lost { why, since });
            recovery.reattach.begin(why, since);
            self.lazy.forget();
            self.quiesced = None;
            self.front.mediations.forget();
        }
        true
    }

    /// The device is not there: it is looked for, or the guest sees its line fall.
    #[cold]
    pub(super) fn mourn(&mut self, activity: Activity) -> Activity {
        let activity = if self.is_lost() { self.look_for_device() } else { activity };
        if !self.gone && self.gone().is_some() {
            self.gone = true;
            self.front.gone();
        }
        activity
    }

    /// For the device that is lost: whether it is found, and goes on.
    pub(super) fn look_for_device(&mut self) -> Activity {
        let Some(recovery) = &mut self.recovery else { return Activity::Idle(None) };
        match recovery.reattach.poll() {
            Found::NotYet => return Activity::Idle(None),
            Found::Nobody(why) => self.give_up(&why),
            Found::Device(device) => match self.recover(device) {
                Ok(took) => {
                    if let Some(recovery) = &mut self.recovery {
                        (recovery.times, recovery.took) = (recovery.times + 1, took);
                        let away = recovery.lost.take().map(|lost| lost.since.elapsed());
                        recovery.reattach.back(away.unwrap_or_default());
                    }
                }
                Err(Failed::LostAgain(error)) => {
                    self.front.hold(false);
                    self.front.mediations.forget();
                    tracing::info!(%error, "the device was found, and lost again");
                    if let Some(Recovery { reattach, lost: Some(lost), .. }) = &mut self.recovery {
                        reattach.begin(lost.why, lost.since);
                    }
                }
                Err(Failed::ForGood(error)) => self.give_up(&error.to_string()),
            },
        }
        Activity::Busy
    }

    /// A register read of a device that is lost waits for it; false where it does not come back.
    pub(super) fn wait_for_device(&mut self) -> bool {
        while self.is_lost() {
            if self.look_for_device() != Activity::Busy {
                sleep_until_readable(&[self.wake_fd()], Some(LOOK_AGAIN));
            }
        }
        self.attachment.gone().is_none()
    }

    /// Whether a register read was answered by its deadline alone, by a device whose loss would be known soon: then it is asked once more.
    pub(super) fn is_overdue(&self, began: Option<Instant>) -> bool {
        self.attachment.overdue()
            && self.recovery.as_ref().is_some_and(|recovery| !recovery.over)
            && began.is_some_and(|began| began.elapsed() < KNOWN_BY_THEN)
    }

    /// What to sleep on while the device is lost.
    pub(super) fn search_fd(&self) -> Option<BorrowedFd<'_>> {
        self.recovery.as_ref()?.reattach.wake_fd()
    }

    fn give_up(&mut self, why: &str) {
        if let Some(recovery) = &mut self.recovery {
            recovery.over = true;
            recovery.reattach.gave_up(why);
        }
        self.front.hold(false);
        tracing::error!(why, "the device is gone for good");
    }

    /// Puts the device that was found in the lost one's place.
    fn recover(&mut self, attachment: Box<dyn Attachment>) -> Result<RecoveryParts, Failed> {
        let mine = DeviceIdentity::of(&self.description);
        let here = DeviceIdentity::of(attachment.description());
        if let Some(what) = mine.differs_from(&here) {
            return Err(Failed::ForGood(RestoreError::Device { what, saved: mine.name, here: here.name }));
        }
        if attachment.continues().is_some() {
            return Err(Failed::ForGood(RestoreError::OtherRest));
        }
        let mut before = std::mem::replace(&mut self.attachment, attachment);
        self.carry_dirty_pages(&mut *before);
        drop(before);
        self.front.hold(true);
        let began = Instant::now();
        let recovered = self.reset_for_revival().map_err(RestoreError::from);
        let reset = began.elapsed();
        let recovered = recovered.and_then(|()| self.retell());
        let revive = began.elapsed() - reset;
        let go_on = match recovered {
            Ok(go_on) => go_on,
            Err(error) if self.attachment.gone().is_some_and(may_come_back) && !self.attachment.in_doubt() => {
                return Err(Failed::LostAgain(error));
            }
            Err(error) => {
                // It is in an unknown state: the end of its link resets it, and takes everything back.
                self.attachment.give_up();
                return Err(Failed::ForGood(error));
            }
        };
        self.front.hold(false);
        self.go_on(go_on);
        Ok(RecoveryParts { reset, revive, tell: began.elapsed() - reset - revive })
    }

    fn retell(&mut self) -> Result<GoOn, RestoreError> {
        let Self { attachment, front, profile, windows, .. } = self;
        let mut workbench = Workbench::new(&mut **attachment, front, windows);
        let go_on = profile.recover(&mut workbench)?;
        workbench.end()?;
        self.say_registers()?;
        Ok(go_on)
    }

    /// What the lost device wrote and nobody has copied is still to be copied, also of memory that is not mapped any more.
    fn carry_dirty_pages(&mut self, before: &mut dyn Attachment) {
        for memory in self.memories.iter().filter_map(Weak::upgrade) {
            let Some(log) = before.dirty_log(&memory, &mut self.front) else { continue };
            if log.is_clean() {
                continue;
            }
            match self.carried.of_or_new(&memory) {
                Ok(carried) => log.take(|page| carried.mark(page * PAGE_BYTES, PAGE_BYTES)),
                // Late, and by whom it is asked for: everything may have been written.
                Err(error) => tracing::error!(%error, "pages that a lost device wrote are not known any more"),
            }
        }
    }
}

/// Why a device that was found does not go on.
enum Failed {
    /// It is lost, too, and may be found again.
    LostAgain(RestoreError),
    /// There is no use in looking.
    ForGood(RestoreError),
}

/// Whether a device that was lost so may be found again.
fn may_come_back(why: CloseReason) -> bool {
    match why {
        CloseReason::PeerClosed | CloseReason::PeerGone | CloseReason::Device(_) | CloseReason::DeviceLost(_) => true,
        CloseReason::Protocol(_) | CloseReason::Local => false,
    }
}
