//! The lender of the demo: a second process of this host, or one that was started elsewhere; and how to connect to it.
//!
//! `farbus demo --link rdma:127.0.0.1:0,dev=rxe0` makes an authority and two certificates for this one run, so that the link is the one that two
//! hosts would have.

use std::path::Path;

use anyhow::Context;
use farbus_control::authority::{Authority, Request};
use farbus_control::certificate::Validity;
use farbus_control::identity::{Identity, Name};
use farbus_control::store::save_issued;
use farbus_transport::link::hello::Role;

use super::lender::LenderProcess;
use super::scratch::Scratch;
use crate::cli::DemoArgs;
use crate::failure::misuse;
use crate::link_address::LinkAddress;
use crate::security::{PeerArgs, SecurityArgs};

/// Both sides of the demo are called so.
const NAME: &str = "demo";

/// Where the remote device is.
pub struct FarSide {
    /// The process, where it is ours.
    lender: Option<LenderProcess>,
    /// Where it listens.
    pub address: LinkAddress,
    /// What this side shows it.
    pub security: SecurityArgs,
    /// Who it must be.
    pub peer: PeerArgs,
}

/// Refuses options for a lender that is not there.
pub fn check(args: &DemoArgs) -> anyhow::Result<()> {
    if args.from.is_none() && (args.security.is_given() || args.peer.peer.is_some()) {
        let hint = "leave these options out, or name a lender that is running with --from";
        return Err(misuse("the demo makes the certificates for its own lender itself", hint));
    }
    Ok(())
}

impl FarSide {
    /// Lends `image` from a second process; `scratch` is for this run only.
    pub fn here(args: &DemoArgs, image: &Path, scratch: &Scratch, core: Option<usize>) -> anyhow::Result<Self> {
        let at = args.link.clone().unwrap_or_else(|| LinkAddress::Shm(scratch.path("link")));
        let (security, peer, options) = match at {
            LinkAddress::Shm(_) => (SecurityArgs::default(), PeerArgs::default(), Vec::new()),
            LinkAddress::Rdma(_) => {
                let name: Name = NAME.parse()?;
                let (lender, borrower) =
                    certificates(&name, &scratch.path("certificates")).context("cannot make certificates for the demo")?;
                let options = ["--tls".into(), lender.into(), "--allow".into(), NAME.into()];
                (SecurityArgs { tls: Some(borrower), ..SecurityArgs::default() }, PeerArgs { peer: Some(name) }, options.into())
            }
        };
        let lender = LenderProcess::start(image, &at, &options, core)?;
        Ok(Self { address: lender.address().clone(), lender: Some(lender), security, peer })
    }

    /// One that is lent at `from` already.
    pub fn elsewhere(from: &LinkAddress, args: &DemoArgs) -> Self {
        Self { lender: None, address: from.clone(), security: args.security.clone(), peer: args.peer.clone() }
    }

    /// The fabric's name.
    pub fn fabric(&self) -> &'static str {
        match self.address {
            LinkAddress::Shm(_) => "shm",
            LinkAddress::Rdma(_) => "rdma",
        }
    }

    /// The link in words.
    pub fn link(&self) -> &'static str {
        match self.address {
            LinkAddress::Shm(_) => "shared memory",
            LinkAddress::Rdma(_) => "RDMA",
        }
    }

    /// Explains a failure by the process that was started, if that died.
    pub fn blame<T>(&mut self, result: anyhow::Result<T>) -> anyhow::Result<T> {
        match &mut self.lender {
            Some(lender) => lender.blame(result),
            None => result,
        }
    }

    /// Waits for the end of the process that was started.
    pub fn end(self) -> anyhow::Result<()> {
        self.lender.map_or(Ok(()), LenderProcess::end)
    }
}

/// The folders of a lender's and a borrower's certificate.
fn certificates(name: &Name, folder: &Path) -> anyhow::Result<(std::path::PathBuf, std::path::PathBuf)> {
    let authority = Authority::create(name, Validity::days_from_now(2))?;
    let make = |role| {
        let identity = Identity { role, name: name.clone() };
        let request = Request { identity, addresses: Vec::new(), validity: Validity::days_from_now(1) };
        anyhow::Ok(save_issued(folder, &request.identity, &authority.issue(&request)?, false)?)
    };
    Ok((make(Role::Lender)?, make(Role::Borrower)?))
}
