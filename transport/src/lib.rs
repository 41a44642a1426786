//! One-sided operations between two hosts: the [`Fabric`] seam, the memory it may touch, and the links that carry it.
//!
//! A borrower registers the guest's memory and exports it; the lender imports the grant, takes a [`RemoteSpan`] of 4 KiB
//! from it and posts a [`Op::Write`] followed by a [`Op::Send`]: whoever sees the message also sees the 4 KiB.
//!
//! Two fabrics implement the seam today: [`shm`] (two processes of one host, the embedded default) and [`sim`] (virtual time from one
//! seed). Wrappers in [`wrap`] inject faults and record traces, and are fabrics themselves.

pub mod barrier;
#[cfg(feature = "conformance")]
pub mod conformance;
pub mod fabric;
mod hold;
pub mod link;
pub mod local;
pub mod memory;
pub mod ring;
pub mod shm;
pub mod sim;
pub mod span;
mod sync;
mod table;
pub mod tally;
pub mod time;
pub mod verbs;
pub mod wrap;

pub use fabric::{
    CloseReason, Event, Events, Fabric, Grant, GrantError, Limits, Message, Op, OpError, OpId, PostError, Regions, RegisterError,
    RevokeError, Signal,
};
pub use memory::{Mapped, Memory, MemoryError};
pub use span::{Access, LocalRegion, LocalSpan, RemoteRegion, RemoteSpan, SpanError};
pub use tally::{Tally, Teller};
pub use time::Nanos;
