//! What happened, counted: every outcome has a number, so that nothing is silent.
//!
//! After 1,000 reads of 4 KiB of which one had a wild PRP: `reads` 1,000, `bytes_to_guest` 4,091,904 or a little more, `errors` 1.

/// Counts since the controller was made. Always: `accepted` = `completed` + `dropped` + commands under way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Commands taken from submission queues.
    pub accepted: u64,
    /// Completion entries posted.
    pub completed: u64,
    /// Commands that a reset or the deletion of their queue ended without an entry.
    pub dropped: u64,
    /// Completions with a status other than success.
    pub errors: u64,
    /// Admin commands.
    pub admin: u64,
    /// Read commands.
    pub reads: u64,
    /// Write commands.
    pub writes: u64,
    /// Flush commands.
    pub flushes: u64,
    /// Compare, write zeroes and dataset management commands.
    pub other_io: u64,
    /// Data bytes whose DMA to the guest was started.
    pub bytes_to_guest: u64,
    /// Data bytes whose DMA from the guest was started.
    pub bytes_from_guest: u64,
    /// Jobs that used the guest's pages without a copy.
    pub direct_jobs: u64,
    /// Jobs on a bounce buffer or without data.
    pub buffered_jobs: u64,
    /// Interrupt messages sent and pin levels changed.
    pub interrupts: u64,
    /// Doorbells of queues that do not exist, or values outside a queue.
    pub invalid_doorbells: u64,
    /// Accesses of a width or place that has no meaning.
    pub ignored_accesses: u64,
    /// Times that a command waited for a buffer, a job or its turn.
    pub waits: u64,
    /// Times that a completion waited for room in its queue.
    pub queue_full: u64,
    /// Writes to the guest that failed after they were posted.
    pub late_faults: u64,
    /// Times that CSTS.CFS was set.
    pub fatal: u64,
    /// Resets by the driver or the session.
    pub resets: u64,
}
