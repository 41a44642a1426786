//! A man in the middle of the control connection, who makes an attacker of an honest fabric: what it believes of a grant is what he lets through.
//!
//! `Middle::new(control, |frame| …)` hands each frame that comes in to a function and lets through what that returns: with a grant's length
//! doubled, the fabric behind it writes past the end of memory that it was given.

use std::collections::VecDeque;
use std::io::Write;
use std::net::Shutdown;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;

use farbus_transport::link::control::{Control, ControlError, Framed};
use farbus_transport::verbs::{VerbsError, VerbsFabric};

use super::choice;

type Change = Box<dyn FnMut(Vec<u8>) -> Vec<u8> + Send>;

/// A control connection whose incoming frames are changed.
pub struct Middle {
    inner: Framed<UnixStream>,
    change: Change,
    waiting: VecDeque<Vec<u8>>,
}

impl Middle {
    pub fn new(inner: Framed<UnixStream>, change: impl FnMut(Vec<u8>) -> Vec<u8> + Send + 'static) -> Self {
        Self { inner, change: Box::new(change), waiting: VecDeque::new() }
    }
}

impl Control for Middle {
    fn send(&mut self, frame: &[u8]) -> Result<(), ControlError> {
        self.inner.send(frame)
    }

    fn receive(&mut self) -> Result<Option<Vec<u8>>, ControlError> {
        while let Some(frame) = self.inner.receive()? {
            self.waiting.push_back((self.change)(frame));
        }
        Ok(self.waiting.pop_front())
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.inner.fd()
    }
}

/// A grant as it travels on the control connection: kind 2, number, address, length, key, access (transport/src/verbs/wire.rs).
#[derive(Clone, Copy, Debug)]
pub struct GrantFrame {
    pub number: u64,
    pub address: u64,
    pub len: u64,
    pub key: u32,
    pub access: u8,
}

impl GrantFrame {
    pub fn parse(frame: &[u8]) -> Option<Self> {
        let [2, rest @ ..] = frame else { return None };
        let word = |at: usize| Some(u64::from_le_bytes(rest.get(at..at + 8)?.try_into().ok()?));
        let key = u32::from_le_bytes(rest.get(24..28)?.try_into().ok()?);
        Some(Self { number: word(0)?, address: word(8)?, len: word(16)?, key, access: *rest.get(28)? })
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![2];
        for word in [self.number, self.address, self.len] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        bytes.extend_from_slice(&self.key.to_le_bytes());
        bytes.push(self.access);
        bytes
    }
}

/// Two connected ends; what the first (the attacker) hears of grants passes `change`.
pub fn pair_with_middle(mut change: impl FnMut(GrantFrame) -> GrantFrame + Send + 'static) -> (VerbsFabric, VerbsFabric) {
    let (left, right) = UnixStream::pair().unwrap();
    let left = Middle::new(Framed::new(left).unwrap(), move |frame| match GrantFrame::parse(&frame) {
        Some(grant) => change(grant).encode(),
        None => frame,
    });
    let victim = std::thread::spawn(move || VerbsFabric::establish(&choice(), Box::new(Framed::new(right).unwrap())));
    let attacker = VerbsFabric::establish(&choice(), Box::new(left)).unwrap();
    (attacker, victim.join().unwrap().unwrap())
}

/// Two connected ends, and a way to write any bytes to the control connection of the second, as if the first did.
pub fn pair_with_writer() -> (VerbsFabric, VerbsFabric, UnixStream) {
    let (left, right) = UnixStream::pair().unwrap();
    let writer = left.try_clone().unwrap();
    let victim = std::thread::spawn(move || VerbsFabric::establish(&choice(), Box::new(Framed::new(right).unwrap())));
    let attacker = VerbsFabric::establish(&choice(), Box::new(Framed::new(left).unwrap())).unwrap();
    (attacker, victim.join().unwrap().unwrap(), writer)
}

/// What a victim makes of a peer that sends these bytes where its queue pair's description is due, and then nothing more: it stays silent, or says
/// that nothing will come.
pub fn establish_against(bytes: &[u8], silent: bool) -> Result<VerbsFabric, VerbsError> {
    let (mut peer, ours) = UnixStream::pair().unwrap();
    peer.write_all(bytes).unwrap();
    if !silent {
        peer.shutdown(Shutdown::Write).unwrap();
    }
    VerbsFabric::establish(&choice(), Box::new(Framed::new(ours).unwrap()))
}

/// A frame with its length before it.
pub fn framed(frame: &[u8]) -> Vec<u8> {
    [&(frame.len() as u32).to_le_bytes()[..], frame].concat()
}
