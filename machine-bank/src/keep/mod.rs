//! Keeping: what is there, whether it is whole, what may go, and taking machines from one bank to another.
//!
//! `remove(&bank, &entries)` takes machines out, `sweep(&bank, …)` the pages that no machine names any more; `verify(&bank)` reads everything.

mod copy;
mod diff;
pub(crate) mod lost;
pub(crate) mod numbers;
mod remove;
mod repair;
mod stats;
mod sweep;
mod unreadable;
mod verify;

pub use copy::{CopyError, CopyReport, copy};
pub use diff::{Diff, SectionDiff, diff};
pub use lost::lost_pages;
pub use remove::{Keep, RemoveError, RemoveReport, expired, remove};
pub use repair::{RepairError, RepairReport, repair};
pub use stats::{Stats, stats};
pub use sweep::{SweepError, SweepOptions, SweepReport, sweep};
pub use unreadable::{Look, Unreadable, unreadable, why_unreadable};
pub use verify::{Fault, VerifyReport, verify};
