//! Connecting to a lender: a session over whatever link its address stands for.
//!
//! `shm:/run/nvme0` gives a session over shared memory, `rdma:nas:7000` one over a queue pair; a function does not see which.

use std::sync::Arc;

use anyhow::Context;
use farbus_remote_dma::borrower::{BorrowerOptions, BorrowerSession};
use farbus_remote_dma::{Attachment, Claim, DeviceDescription};
use farbus_transport::link::hello::{Hello, Role, SPOKEN};
use farbus_transport::{Fabric, Tally};

use crate::link::{Linked, Purpose, connect};
use crate::link_address::LinkAddress;
use crate::security::{PeerArgs, SecurityArgs};

/// Connects to the lender at `from`, for and as what `claim` says; `tally` hears what the session counts.
pub fn attach(
    from: &LinkAddress,
    security: &SecurityArgs,
    peer: &PeerArgs,
    options: BorrowerOptions,
    claim: &Claim,
    tally: Option<Arc<Tally>>,
) -> anyhow::Result<Box<dyn Attachment>> {
    let hello = Hello { versions: SPOKEN, role: Role::Borrower, features: 0, epoch: 0, description: claim.encode() };
    let (linked, agreed) = connect(from, Purpose::Device, security, peer, &hello)?;
    let description = DeviceDescription::decode(&agreed.peer.description)
        .with_context(|| format!("the lender at {from} is wrong about its device"))?;
    match linked {
        Linked::Shm(fabric) => over(*fabric, description, options, tally),
        Linked::Rdma(fabric) => over(*fabric, description, options, tally),
    }
}

fn over<F: Fabric + 'static>(
    fabric: F,
    description: DeviceDescription,
    options: BorrowerOptions,
    tally: Option<Arc<Tally>>,
) -> anyhow::Result<Box<dyn Attachment>> {
    let session = BorrowerSession::new(fabric, description, options).context("cannot share memory with the lender")?;
    Ok(match tally {
        Some(tally) => Box::new(session.telling(tally)),
        None => Box::new(session),
    })
}
