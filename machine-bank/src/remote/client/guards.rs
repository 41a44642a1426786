//! Holds and pins at a server, which outlive the link that they were taken on.
//!
//! `hold(Deposit)` is handle 7 of the first link and handle 0 of the second; where the second server is just collecting garbage it is lost, and the deposit that rests
//! on it hears "the hold on the bank ended with its link: …" at its next step.

use std::sync::{Arc, PoisonError};

use super::super::wire::Op;
use super::again::Remote;
use super::{Client, RemoteStore};
use crate::page::Root;
use crate::store::{Guard, StoreError};

/// What is held, and under which number on the link that there is.
pub(super) struct Kept {
    pub op: Op,
    pub handle: u32,
    /// Whether it was taken anew, so that there was a time when nothing was held.
    pub anew: bool,
    /// Why it could not be taken anew.
    pub lost: Option<String>,
}

/// A hold or a pin at the server.
#[derive(Debug)]
pub(super) struct RemoteGuard {
    remote: Arc<Remote>,
    key: u64,
}

impl Guard for RemoteGuard {
    fn check(&self) -> Result<(), StoreError> {
        let kept = self.remote.kept.lock().unwrap_or_else(PoisonError::into_inner);
        match kept.get(&self.key).and_then(|kept| kept.lost.as_deref()) {
            Some(why) => Err(ended(why)),
            None => Ok(()),
        }
    }
}

impl Drop for RemoteGuard {
    fn drop(&mut self) {
        let mut all = self.remote.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = all.remove(&self.key).filter(|kept| kept.lost.is_none());
        // Under the lock, so that the number is this link's.
        let (client, _) = self.remote.current();
        client.keep(all.len());
        drop(all);
        let Some(kept) = kept else { return };
        // With the link it ends anyhow.
        if let Err(error) = client.call(&Op::LetGo(kept.handle)) {
            tracing::debug!(%error, "a hold on a bank ended with its link");
        }
    }
}

/// The number of what was taken.
pub(super) fn number(client: &Client, answer: &[u8]) -> Result<u32, StoreError> {
    let handle = answer.first_chunk::<4>().map(|bytes| u32::from_le_bytes(*bytes));
    handle.ok_or_else(|| client.wrong("a hold without a number"))
}

fn ended(why: &str) -> StoreError {
    StoreError::Gone(format!("what was held there ended with its link, and could not be taken anew: {why}; begin again"))
}

impl RemoteStore {
    pub(super) fn guard(&self, op: &Op) -> Result<Box<dyn Guard>, StoreError> {
        let remote = &self.0;
        remote.ask(|client| {
            let handle = number(client, &client.call(op)?)?;
            let mut kept = remote.kept.lock().unwrap_or_else(PoisonError::into_inner);
            let (current, _) = remote.current();
            if !Arc::ptr_eq(client, &current) {
                // It ended with its link, while another was made without knowing of it.
                return Err(client.gone());
            }
            let key = kept.last_key_value().map_or(0, |(key, _)| key + 1);
            kept.insert(key, Kept { op: op.clone(), handle, anew: false, lost: None });
            client.keep(kept.len());
            Ok(Box::new(RemoteGuard { remote: remote.clone(), key }) as Box<dyn Guard>)
        })
    }
}

impl Remote {
    fn lost(&self, is: impl Fn(&Op) -> bool) -> Result<(), StoreError> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let lost = kept.values().filter(|kept| is(&kept.op)).find_map(|kept| kept.lost.as_deref());
        lost.map_or(Ok(()), |why| Err(ended(why)))
    }

    /// Whether what deposits rest on is still held.
    pub fn holds(&self) -> Result<(), StoreError> {
        self.lost(|op| matches!(op, Op::Hold(_)))
    }

    /// Whether what deposits rest on was not held for a while.
    pub fn had_a_gap(&self) -> bool {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.values().any(|kept| kept.anew && matches!(kept.op, Op::Hold(_)))
    }

    /// Whether a machine is pinned by all who pinned it.
    pub fn pins(&self, root: &Root) -> Result<(), StoreError> {
        self.lost(|op| *op == Op::Pin(*root))
    }
}
