//! The one place where the kinds of links differ: listening, greeting, connecting, and the fabric that comes of it.
//!
//! At `shm:/run/nvme0` a visitor is greeted over a unix socket and gets rings in shared memory, at `rdma:nas:7000` over TCP and TLS and gets a queue
//! pair. A fabric is not wrapped: each kind has its own code behind it, with nothing between.

use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use farbus_control::{BorrowerSecurity, LenderSecurity, MeetError};
use farbus_remote_dma::Claim;
use farbus_transport::link::hello::{Agreed, Hello};
use farbus_transport::link::verdict::Refusal;
use farbus_transport::shm::{self, Connection, ListenError, ShmFabric, ShmOptions};
use farbus_transport::verbs::{DeviceChoice, VerbsError, VerbsFabric, check};
use thiserror::Error;
use tokio::net::UnixListener;

use crate::advice;
use crate::failure::Advise;
use crate::link_address::{LinkAddress, RdmaAddress};
use crate::security::{AllowArgs, PeerArgs, SecurityArgs};
use crate::service::notify;

/// Why there is no link with a peer.
#[derive(Debug, Error)]
pub enum LinkError {
    /// Over shared memory.
    #[error(transparent)]
    Shm(#[from] ListenError),
    /// Before there is RDMA.
    #[error(transparent)]
    Meet(#[from] MeetError),
    /// By RDMA itself.
    #[error(transparent)]
    Verbs(#[from] VerbsError),
}

/// A link that is ready.
pub enum Linked {
    /// Rings in shared memory.
    Shm(Box<ShmFabric>),
    /// A queue pair.
    Rdma(Box<VerbsFabric>),
}

/// What a link is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// A device is lent.
    Device,
    /// A bank is served.
    Bank,
}

impl Purpose {
    /// What does not work at a listening side.
    fn listening(self) -> &'static str {
        match self {
            Self::Device => "cannot lend there",
            Self::Bank => "cannot serve the bank there",
        }
    }

    /// What cannot be done where there is no RDMA device.
    fn over_rdma(self) -> &'static str {
        match self {
            Self::Device => "cannot lend over RDMA",
            Self::Bank => "cannot serve over RDMA",
        }
    }
}

/// Where borrowers come to.
pub enum Door {
    /// A unix socket; the listener removes it at the end. Processes of these users may come too.
    Shm { listener: shm::Listener, accepting: UnixListener, users: Arc<[u32]> },
    /// A TCP port.
    Rdma { listener: farbus_control::Listener, address: RdmaAddress },
}

impl Door {
    /// Listens at `at`, for processes of `users` beside this one's and root where it is on this host.
    pub async fn open(
        at: &LinkAddress,
        purpose: Purpose,
        security: &SecurityArgs,
        allow: &AllowArgs,
        users: &[u32],
    ) -> anyhow::Result<Self> {
        let what = purpose.listening();
        match at {
            LinkAddress::Shm(path) => {
                security.none(at, !allow.allow.is_empty() || allow.allow_file.is_some())?;
                let passed = notify::passed_socket(path)?.map(|passed| shm::Listener::adopt(passed, path.clone()));
                let listener = passed.map_or_else(|| shm::Listener::bind(path), Ok).or_else(|error| {
                    let hint = match &error {
                        ListenError::InUse { .. } => "choose another path for --listen, or end what uses this one",
                        ListenError::NotASocket { .. } => "choose another path for --listen",
                        _ => "choose a path for --listen in a folder that is there and may be written to",
                    };
                    Err(error).advise(what, hint)
                })?;
                if !users.is_empty() {
                    listener.open_to_all_users().context(what)?;
                }
                let accepting =
                    listener.nonblocking_socket().and_then(UnixListener::from_std).context("cannot wait for borrowers")?;
                Ok(Self::Shm { listener, accepting, users: users.into() })
            }
            LinkAddress::Rdma(address) => {
                notify::no_passed_socket()?;
                let security: LenderSecurity = security.lender(allow, at)?;
                let listener = farbus_control::Listener::bind(&address.meet, security).await;
                let listener = listener.or_else(|error| advice::give(what, error))?;
                check(&choice(address)).or_else(|error| advice::give(purpose.over_rdma(), error))?;
                Ok(Self::Rdma { listener, address: address.clone() })
            }
        }
    }

    /// Where it listens: what a borrower on this host would be given.
    pub fn address(&self) -> String {
        match self {
            Self::Shm { listener, .. } => LinkAddress::Shm(listener.path().to_path_buf()).to_string(),
            Self::Rdma { listener, address } => {
                let mut address = address.clone();
                // The port that the kernel chose.
                address.meet.port = listener.address().port();
                address.to_string()
            }
        }
    }

    /// Waits for a visitor.
    pub async fn accept(&self) -> anyhow::Result<Arrival> {
        match self {
            Self::Shm { listener, accepting, users } => {
                let stream = accept(accepting).await.context("cannot accept a borrower")?;
                Ok(Arrival::Shm { stream, path: listener.path().to_path_buf(), users: users.clone() })
            }
            Self::Rdma { listener, address } => Ok(Arrival::Rdma { arrival: listener.accept().await?, choice: choice(address) }),
        }
    }
}

async fn accept(listener: &UnixListener) -> std::io::Result<UnixStream> {
    loop {
        match listener.accept().await {
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionAborted => {}
            // The borrower that is served may have offered as much memory as there are descriptors: that must not end its session.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM)) => {
                tracing::warn!(%error, "a borrower cannot be accepted yet");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
            accepted => return accepted?.0.into_std(),
        }
    }
}

/// A visitor who has said nothing yet.
pub enum Arrival {
    /// From this host.
    Shm { stream: UnixStream, path: PathBuf, users: Arc<[u32]> },
    /// From a network.
    Rdma { arrival: farbus_control::Arrival, choice: DeviceChoice },
}

impl Arrival {
    /// A second hold of its socket, to end it by; `None` where its own listener sees to it that visitors do not become too many.
    pub fn hold(&self) -> std::io::Result<Option<UnixStream>> {
        match self {
            Self::Shm { stream, .. } => stream.try_clone().map(Some),
            Self::Rdma { .. } => Ok(None),
        }
    }

    /// Where it comes from, if that can be told.
    pub fn from(&self) -> Option<String> {
        match self {
            Self::Shm { .. } => None,
            Self::Rdma { arrival, .. } => Some(arrival.from().to_string()),
        }
    }

    /// Finds out who it is and exchanges hellos with it. Blocks for some seconds at most.
    pub fn greet(self, hello: &Hello) -> Result<Greeted, LinkError> {
        match self {
            Self::Shm { stream, path, users } => {
                Ok(Greeted::Shm(shm::Greeted::greet_if(stream, hello, path, &|uid| users.contains(&uid))?))
            }
            Self::Rdma { arrival, choice } => Ok(Greeted::Rdma { greeted: arrival.greet(hello)?, choice }),
        }
    }
}

/// A visitor whose hello was good and who waits for the verdict.
pub enum Greeted {
    /// From this host.
    Shm(shm::Greeted),
    /// From a network.
    Rdma { greeted: farbus_control::Greeted, choice: DeviceChoice },
}

impl Greeted {
    /// The name in its certificate, if it showed one.
    pub fn peer(&self) -> Option<String> {
        match self {
            Self::Shm(_) => None,
            Self::Rdma { greeted, .. } => greeted.peer().map(|identity| identity.name.to_string()),
        }
    }

    /// What it said of itself.
    pub fn description(&self) -> &[u8] {
        match self {
            Self::Shm(greeted) => &greeted.agreed().peer.description,
            Self::Rdma { greeted, .. } => &greeted.agreed().peer.description,
        }
    }

    /// Who it is: the name in its certificate, `uid:1000` on this host, nothing over plain TCP.
    pub fn identity(&self) -> Option<String> {
        match self {
            Self::Shm(greeted) => Some(format!("uid:{}", greeted.uid())),
            Self::Rdma { .. } => self.peer(),
        }
    }

    /// What it comes for, and as whom.
    pub fn claim(&self) -> Claim {
        let agreed = match self {
            Self::Shm(greeted) => greeted.agreed(),
            Self::Rdma { greeted, .. } => greeted.agreed(),
        };
        Claim::parse(&agreed.peer.description)
    }

    /// Tells it why there is no link.
    pub fn refuse(self, refusal: Refusal) -> Result<(), LinkError> {
        match self {
            Self::Shm(greeted) => greeted.refuse(refusal)?,
            Self::Rdma { greeted, .. } => greeted.refuse(refusal)?,
        }
        Ok(())
    }

    /// Welcomes it and makes the link.
    pub fn link(self, options: ShmOptions) -> Result<Linked, LinkError> {
        match self {
            Self::Shm(greeted) => Ok(Linked::Shm(Box::new(greeted.link(options)?.fabric))),
            Self::Rdma { greeted, choice } => {
                let met = greeted.welcome()?;
                Ok(Linked::Rdma(Box::new(VerbsFabric::establish(&choice, met.control)?)))
            }
        }
    }
}

/// Connects to the lender, or to who serves a bank, at `from`.
pub fn connect(
    from: &LinkAddress,
    purpose: Purpose,
    security: &SecurityArgs,
    peer: &PeerArgs,
    hello: &Hello,
) -> anyhow::Result<(Linked, Agreed)> {
    let what = || match purpose {
        Purpose::Device => format!("cannot borrow from {from}"),
        Purpose::Bank => format!("cannot reach the bank at {from}"),
    };
    match from {
        LinkAddress::Shm(path) => {
            security.none(from, peer.peer.is_some())?;
            // A bank may be served by another user: whoever owns the place that was named.
            let owner = path.symlink_metadata().ok().filter(|_| purpose == Purpose::Bank).map(|about| about.uid());
            let connected = shm::connect_if(path, hello, ShmOptions::default(), &|uid| owner == Some(uid));
            let Connection { fabric, agreed } = connected.or_else(|error| advice::give_for(purpose, what(), error.into()))?;
            Ok((Linked::Shm(Box::new(fabric)), agreed))
        }
        LinkAddress::Rdma(address) => {
            let security = security.borrower(peer, from)?;
            let choice = choice(address);
            // Before the lender is asked, so that a device is not taken for a host that cannot use it.
            check(&choice).or_else(|error| advice::give_for(purpose, what(), error.into()))?;
            let linked = link_by_rdma(address, &security, &choice, hello);
            linked.or_else(|error| advice::give_for(purpose, what(), error))
        }
    }
}

fn link_by_rdma(
    address: &RdmaAddress,
    security: &BorrowerSecurity,
    choice: &DeviceChoice,
    hello: &Hello,
) -> Result<(Linked, Agreed), LinkError> {
    let here = |source| MeetError::Host { what: "connect to", address: address.meet.to_string(), source };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(here)?;
    let dialled = runtime.block_on(farbus_control::connect(&address.meet, security));
    // A resolver that does not answer may still hold a thread of it.
    runtime.shutdown_background();
    let met = dialled?.greet(hello)?;
    let fabric = VerbsFabric::establish(choice, met.control)?;
    Ok((Linked::Rdma(Box::new(fabric)), met.agreed))
}

/// What an address says of the device.
fn choice(address: &RdmaAddress) -> DeviceChoice {
    DeviceChoice { device: address.device.clone(), port: address.port, gid: address.gid, ..DeviceChoice::default() }
}
