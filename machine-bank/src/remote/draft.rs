//! An object on its way to the bank at the other end of a link: its bytes go ahead in pieces, and are seen when the server has checked all of them.
//!
//! A pack of 8 MiB is nine pieces, four under way at a time, each read by the server out of this side's memory; `commit` then names the pack. All of it goes over one
//! link: where that ends nothing of the object is there, which its deposit is told. What has no piece under way yet goes over the next link.

use std::collections::VecDeque;
use std::sync::Arc;

use super::client::{Client, Flight, Remote};
use super::wire::{BODY, LANES, Op};
use crate::manifest::Entry;
use crate::pack::PackId;
use crate::page::Root;
use crate::store::{Draft, Durability, Kind, StoreError};

/// Bytes of a piece: a body without the stream's number and the offset.
const PIECE: usize = BODY - 12;
/// Pieces under way.
const AHEAD: usize = LANES / 2;

/// An object that is being sent.
pub(super) struct RemoteDraft {
    remote: Arc<Remote>,
    /// The link that has its pieces, and the stream's number there.
    on: Option<(Arc<Client>, u32)>,
    kind: Kind,
    /// What is not yet a piece.
    rest: Vec<u8>,
    sent: u64,
    flights: VecDeque<Flight>,
    ended: bool,
}

impl std::fmt::Debug for RemoteDraft {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RemoteDraft").field("kind", &self.kind).field("sent", &self.sent).finish_non_exhaustive()
    }
}

impl RemoteDraft {
    pub fn new(remote: Arc<Remote>, kind: Kind) -> Self {
        Self { remote, on: None, kind, rest: Vec::new(), sent: 0, flights: VecDeque::new(), ended: false }
    }

    /// Where its pieces go.
    fn on(&mut self) -> Result<(Arc<Client>, u32), StoreError> {
        if let Some(on) = &self.on {
            return Ok(on.clone());
        }
        let client = self.remote.link()?;
        self.remote.holds()?;
        let stream = client.stream();
        Ok(self.on.insert((client, stream)).clone())
    }

    fn piece(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        while self.flights.len() >= AHEAD {
            self.wait()?;
        }
        let (client, stream) = self.on()?;
        let head = Op::Stage(stream, self.sent, Vec::new());
        let flight = client.send(head.code(), &head.body(), bytes, 1).map_err(|error| self.told(error))?;
        self.flights.push_back(flight);
        self.sent += bytes.len() as u64;
        Ok(())
    }

    /// What the end of a link means for what was on its way.
    fn told(&self, error: StoreError) -> StoreError {
        match error {
            StoreError::Gone(why) => StoreError::Gone(format!(
                "{why}; a {} was on its way and is not there. Deposit again: what had arrived before is not sent twice",
                self.kind
            )),
            other => other,
        }
    }

    /// Waits for the oldest piece.
    fn wait(&mut self) -> Result<(), StoreError> {
        match self.flights.pop_front() {
            Some(flight) => flight.only(&mut Vec::new()).map_err(|error| self.told(error)),
            None => Ok(()),
        }
    }

    /// Everything is there.
    fn finish(&mut self) -> Result<(), StoreError> {
        let rest = std::mem::take(&mut self.rest);
        if !rest.is_empty() {
            self.piece(&rest)?;
        }
        while !self.flights.is_empty() {
            self.wait()?;
        }
        Ok(())
    }
}

impl Draft for RemoteDraft {
    fn append(&mut self, mut bytes: &[u8]) -> Result<(), StoreError> {
        while self.rest.len() + bytes.len() >= PIECE {
            let (front, behind) = bytes.split_at(PIECE - self.rest.len());
            bytes = behind;
            if self.rest.is_empty() {
                self.piece(front)?;
            } else {
                let mut rest = std::mem::take(&mut self.rest);
                rest.extend_from_slice(front);
                self.piece(&rest)?;
            }
        }
        self.rest.extend_from_slice(bytes);
        Ok(())
    }

    fn commit(mut self: Box<Self>, name: &str, _: Durability) -> Result<(), StoreError> {
        let id = PackId::from_name(name).filter(|_| self.kind == Kind::Pack);
        let id = id.ok_or_else(|| StoreError::Name(name.to_owned()))?;
        self.finish()?;
        let (client, stream) = self.on()?;
        client.call(&Op::Pack(stream, self.sent, id.0)).map_err(|error| self.told(error))?;
        self.ended = true;
        Ok(())
    }

    fn commit_deposit(mut self: Box<Self>, entry: Entry) -> Result<Entry, StoreError> {
        self.finish()?;
        let Entry { machine, number, root: Root(root), len } = entry;
        let (client, stream) = self.on()?;
        let op = Op::Commit(stream, self.sent, Root(root), number, machine.clone());
        let answer = match client.call(&op) {
            Err(error @ StoreError::Gone(_)) if client.is_over() => return self.whether_there(&machine, Root(root), error),
            Err(StoreError::Refused(why)) if self.remote.had_a_gap() => {
                return Err(StoreError::Gone(format!(
                    "{why}; the link ended while {machine} was deposited, and pages that the bank had may have been collected before it was made anew. Deposit again"
                )));
            }
            answer => answer?,
        };
        self.ended = true;
        let number = answer.first_chunk::<8>().map(|bytes| u64::from_le_bytes(*bytes));
        let number = number.ok_or_else(|| self.remote.wrong("a deposit without a number"))?;
        Ok(Entry { machine, number, root: Root(root), len })
    }
}

impl RemoteDraft {
    /// The deposit where it is there although its answer got lost: its root is nobody else's.
    fn whether_there(&mut self, machine: &str, root: Root, error: StoreError) -> Result<Entry, StoreError> {
        let unknown = |why: StoreError| {
            StoreError::Gone(format!(
                "{why}; whether {machine} was deposited was not heard. Look whether a deposit with the root {root} is listed, and deposit again where none is"
            ))
        };
        if !self.remote.comes_back() {
            return Err(unknown(error));
        }
        let listed = super::client::list(&self.remote, Kind::Manifest).map_err(unknown)?;
        let found = listed.iter().filter_map(Entry::parse).find(|entry| entry.root == root);
        self.ended = true;
        found.ok_or_else(|| unknown(error))
    }
}

impl Drop for RemoteDraft {
    fn drop(&mut self) {
        self.flights.clear();
        if !self.ended
            && let Some((client, stream)) = &self.on
            && let Err(error) = client.call(&Op::Discard(*stream))
        {
            tracing::debug!(%error, "what was sent of an object ended with the link");
        }
    }
}
