//! An object on its way to the bank at the other end of a link: its bytes go ahead in pieces, and are seen when the server has checked all of them.
//!
//! A pack of 8 MiB is nine pieces, four under way at a time, each read by the server out of this side's memory; `commit` then names the pack.

use std::collections::VecDeque;
use std::sync::Arc;

use super::client::{Client, Flight};
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
    client: Arc<Client>,
    kind: Kind,
    stream: u32,
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
    pub fn new(client: Arc<Client>, kind: Kind) -> Self {
        let stream = client.stream();
        Self { client, kind, stream, rest: Vec::new(), sent: 0, flights: VecDeque::new(), ended: false }
    }

    fn piece(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        while self.flights.len() >= AHEAD {
            self.wait()?;
        }
        let head = Op::Stage(self.stream, self.sent, Vec::new());
        self.flights.push_back(self.client.send(head.code(), &head.body(), bytes, 1)?);
        self.sent += bytes.len() as u64;
        Ok(())
    }

    /// Waits for the oldest piece.
    fn wait(&mut self) -> Result<(), StoreError> {
        match self.flights.pop_front() {
            Some(flight) => flight.only(&mut Vec::new()),
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
        self.client.call(&Op::Pack(self.stream, self.sent, id.0))?;
        self.ended = true;
        Ok(())
    }

    fn commit_deposit(mut self: Box<Self>, entry: Entry) -> Result<Entry, StoreError> {
        self.finish()?;
        let Entry { machine, number, root: Root(root), len } = entry;
        let op = Op::Commit(self.stream, self.sent, Root(root), number, machine.clone());
        let answer = self.client.call(&op)?;
        self.ended = true;
        let number = answer.first_chunk::<8>().map(|bytes| u64::from_le_bytes(*bytes));
        let number = number.ok_or_else(|| self.client.wrong("a deposit without a number"))?;
        Ok(Entry { machine, number, root: Root(root), len })
    }
}

impl Drop for RemoteDraft {
    fn drop(&mut self) {
        self.flights.clear();
        if !self.ended
            && self.sent > 0
            && let Err(error) = self.client.call(&Op::Discard(self.stream))
        {
            tracing::debug!(%error, "what was sent of an object ended with the link");
        }
    }
}
