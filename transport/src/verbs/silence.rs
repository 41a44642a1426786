//! When a silent peer's device is asked whether it is there, and when the end is believed that nobody reports.
//!
//! Nothing is heard for 0.8 s: a question. Our own device reports the answer, or a second later that its retries are used up; if it reports neither,
//! the link is given up 2 s after the question.

use std::time::Duration;

use crate::time::Nanos;

/// How long a peer may be silent before its device is asked whether it is there, by a write of no bytes. A black hole raises no event, so only a question
/// that is not acknowledged tells: together with all retries (see `establish::RETRIES`) and the time until a look, a peer that is gone is known within 2 s.
pub(super) const SILENCE: Duration = Duration::from_millis(800);

/// How long our own device may report nothing of such a question, neither an answer nor that its retries are used up. Soft-RoCE (Linux 6.1) sometimes stops
/// sending again where its port goes down under load, and would be silent for ever.
pub(super) const GIVE_UP: Duration = Duration::from_secs(2);

/// What is to be done about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Due {
    Nothing,
    Question,
    End,
}

/// What is known of the peer's being there. Completions of any kind are heard.
#[derive(Clone, Copy, Debug)]
pub(super) struct Silence {
    heard: bool,
    heard_at: Nanos,
    asked_at: Nanos,
}

impl Silence {
    pub(super) fn new(now: Nanos) -> Self {
        Self { heard: false, heard_at: now, asked_at: now }
    }

    /// Completions came, at a time that is asked for later: this is called for every poll.
    #[inline]
    pub(super) fn hear(&mut self) {
        self.heard = true;
    }

    /// What is due. Whoever gets anything but [`Due::Nothing`] looks for completions once more first: who has not polled for long has heard
    /// nothing for long.
    pub(super) fn due(&mut self, now: Nanos) -> Due {
        self.note(now);
        let (asking, patience) = if self.is_asking() { (true, GIVE_UP) } else { (false, SILENCE) };
        let since = if asking { self.asked_at } else { self.heard_at };
        match (now.since(since) >= patience, asking) {
            (false, _) => Due::Nothing,
            (true, false) => Due::Question,
            (true, true) => Due::End,
        }
    }

    /// The question is asked.
    pub(super) fn asked(&mut self, now: Nanos) {
        self.asked_at = now;
    }

    /// When something is due next, if nothing is heard.
    pub(super) fn alarm(&mut self, now: Nanos) -> Nanos {
        self.note(now);
        if self.is_asking() { self.asked_at + GIVE_UP } else { self.heard_at + SILENCE }
    }

    fn note(&mut self, now: Nanos) {
        if std::mem::take(&mut self.heard) {
            self.heard_at = now;
        }
    }

    fn is_asking(&self) -> bool {
        self.asked_at > self.heard_at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: Nanos = Nanos(5_000_000_000);
    const JUST: Duration = Duration::from_nanos(1);

    #[test]
    fn a_silent_peer_is_asked_once_and_given_up_when_nothing_is_reported_of_it() {
        let mut silence = Silence::new(START);
        let asked = START + SILENCE;
        assert_eq!((silence.due(asked - JUST), silence.due(asked)), (Due::Nothing, Due::Question));
        assert_eq!(silence.alarm(START), asked);
        silence.asked(asked);
        assert_eq!(silence.alarm(asked), asked + GIVE_UP, "nobody is woken for nothing");
        assert_eq!((silence.due(asked + SILENCE), silence.due(asked + GIVE_UP - JUST)), (Due::Nothing, Due::Nothing));
        assert_eq!(silence.due(asked + GIVE_UP), Due::End);
    }

    #[test]
    fn whatever_is_heard_begins_the_silence_anew() {
        let mut silence = Silence::new(START);
        let asked = START + SILENCE;
        silence.asked(asked);
        silence.hear();
        // It was heard by now, if only this late.
        let late = asked + 2 * GIVE_UP;
        assert_eq!((silence.due(late), silence.due(late + SILENCE - JUST)), (Due::Nothing, Due::Nothing));
        assert_eq!(silence.due(late + SILENCE), Due::Question);
    }
}
