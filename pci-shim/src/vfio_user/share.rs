//! Whether the file behind a map is the memory that the guest uses. With QEMU's `share=off` it is not: the descriptor arrives all the
//! same, QEMU maps it privately, the guest's stores go to private pages and the file keeps what it had.
//!
//! Until that is known, every access goes to the client by message, which is right in both cases, and the mapping is only looked at. A
//! `DMA_WRITE` of 16 bytes was answered, and the mapping, which had others there before, now shows exactly these 16: the file is proven.
//!
//! **Proof.** Only a *change* proves. The mapping showed other bytes before the client was asked to store ours, and shows ours after it
//! answered. Through a private mapping a store never reaches the file (mmap(2), `MAP_PRIVATE`), and nobody else writes our bytes into it, so
//! the client's mapping is shared; and as one descriptor stands for one memory backend with one `share` property, all of the file is.
//! Equality alone is no proof, not even of bytes other than zero: a private mapping of a saved memory image (`share=off` over a template)
//! shows the file's bytes until the guest overwrites them, and a fetch before that would find them equal.
//!
//! **Disproof.** The client's bytes `c` differ from the mapping's. That alone is no disproof, as the guest may be writing: so `c` is compared
//! with the mapping both before the `DMA_READ` was sent (`m0`) and after its answer (`m1`), and counts only where `m0 = m1`. In a shared
//! file that needs a guest that changed the bytes between `m0` and the client's read and changed them back before `m1`; three times in a row
//! is required. A wrong disproof would cost speed, never bytes, since messages are always right. A store that did not show up starts
//! the same check, since the guest may have overwritten it already.
//!
//! **When proof takes effect.** Stores that were asked for by message must not be overtaken by direct ones, so the device is told only once no
//! message is outstanding or waiting.

use farbus_remote_dma::Iova;

use super::maps::{FileKey, Maps};

/// What is known of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trust {
    /// Nothing yet: messages.
    Open,
    /// It is the guest's memory; the device will be told when no message is outstanding.
    Seen,
    /// It is the guest's memory, and the device knows.
    Proven,
    /// It is not: messages for good.
    NotShared,
}

/// What to do where a file is not the guest's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnUnshared {
    /// Serve the client by messages: right, and slow.
    #[default]
    Messages,
    /// Stop serving the client, and say what to do.
    Refuse,
}

/// Differences in a row that disprove a file.
pub(super) const STRIKES: u8 = 3;
/// Comparisons that say nothing, after which a check is given up until the next difference.
pub(super) const MAX_TRIES: u8 = 32;

/// What one comparison says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Evidence {
    /// The mapping changed to what the client stored.
    Shared,
    /// The mapping stayed different from the client's bytes.
    Differs,
    /// Neither.
    Nothing,
}

/// What the mapping showed around one message.
pub(super) struct Sample {
    pub(super) file: FileKey,
    before: Vec<u8>,
}

impl Sample {
    /// Looks before a message is sent; `None` where there is no mapping in question.
    pub(super) fn take(maps: &Maps, iova: Iova, len: usize) -> Option<Self> {
        maps.sample(iova, len).map(|(file, before)| Self { file, before })
    }

    /// Looks again after a `DMA_WRITE` of `stored` was answered.
    pub(super) fn after_store(&self, maps: &Maps, iova: Iova, stored: &[u8]) -> Evidence {
        match maps.sample(iova, stored.len()) {
            Some((file, after)) if file == self.file => store_evidence(&self.before, stored, &after),
            _ => Evidence::Nothing,
        }
    }

    /// Looks again after a `DMA_READ` answered `fetched`.
    pub(super) fn after_fetch(&self, maps: &Maps, iova: Iova, fetched: &[u8]) -> Evidence {
        match maps.sample(iova, fetched.len()) {
            Some((file, after)) if file == self.file => fetch_evidence(&self.before, fetched, &after),
            _ => Evidence::Nothing,
        }
    }
}

fn store_evidence(before: &[u8], stored: &[u8], after: &[u8]) -> Evidence {
    if before == stored {
        Evidence::Nothing
    } else if after == stored {
        Evidence::Shared
    } else {
        Evidence::Differs
    }
}

fn fetch_evidence(before: &[u8], fetched: &[u8], after: &[u8]) -> Evidence {
    if before == after && fetched != after {
        Evidence::Differs
    } else {
        Evidence::Nothing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_that_were_there_before_prove_nothing() {
        assert_eq!(store_evidence(b"same", b"same", b"same"), Evidence::Nothing);
        assert_eq!(fetch_evidence(b"same", b"same", b"same"), Evidence::Nothing);
        assert_eq!(store_evidence(b"old.", b"new.", b"new."), Evidence::Shared);
    }

    #[test]
    fn bytes_that_move_disprove_nothing() {
        assert_eq!(fetch_evidence(b"aaaa", b"bbbb", b"cccc"), Evidence::Nothing);
        assert_eq!(fetch_evidence(b"aaaa", b"bbbb", b"aaaa"), Evidence::Differs);
        assert_eq!(store_evidence(b"old.", b"new.", b"old."), Evidence::Differs);
    }
}
