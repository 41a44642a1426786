//! Firecracker's page-fault handler protocol: a VMM that loads a snapshot connects, says where its memory lies, and passes its userfaultfd.
//!
//! One message on a unix stream socket: `[{"base_host_virt_addr":140000000000000,"size":536870912,"offset":0,"page_size":4096,…}]` with one
//! descriptor beside it (SCM_RIGHTS). It may close the connection then (versions differ): faults come by that descriptor, and that the VMM is gone is seen by a pidfd of its
//! process, which the kernel named when it connected (SO_PEERCRED).
//!
//! Source: Firecracker's `docs/snapshotting/handling-page-faults-on-snapshot-resume.md` and the regions of its `persist.rs`. `page_size_kib` is older,
//! and holds bytes in spite of its name; 4 and 4096 are both taken for pages of 4 KiB, and others are refused. A balloon's pages come as remove events,
//! and are zero from then on. Firecracker waits for ever where its handler dies; so whoever runs this should end the VMM then.

use std::fs;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use rustix::process::PidfdFlags;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::regions::Region;
use super::server::{FaultServer, LazyError, LazyMachine, LazyOptions};
use super::uffd::{Uffd, UffdError};
use crate::bank::Bank;
use crate::manifest::Entry;
use crate::page::PAGE;

/// Bytes of a region list at most.
const MOST_BYTES: usize = 1 << 20;
/// Descriptors that are looked at; one is right.
const MOST_FDS: usize = 4;
/// Clients at the same time.
pub const MOST_CLIENTS: usize = 256;
/// How long a client may take to say where its memory is.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// How often a server looks whether it shall end.
const LOOK: Duration = Duration::from_millis(100);

/// A region as a client writes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mapping {
    /// Its address in the client.
    pub base_host_virt_addr: u64,
    /// Bytes.
    pub size: u64,
    /// Where its contents begin.
    pub offset: u64,
    /// Bytes of a page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub page_size: Option<u64>,
    /// The same, of older clients.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub page_size_kib: Option<u64>,
}

/// Why a client is refused.
#[derive(Debug, Error)]
pub enum Refused {
    /// It went before it had said anything whole.
    #[error("the client closed the connection after {0} bytes of its regions")]
    Closed(usize),
    /// It said nothing whole in time.
    #[error("the client did not say in {PATIENCE:?} where its memory is")]
    Silent,
    /// It says more than there can be.
    #[error("the client's regions have more than {MOST_BYTES} bytes")]
    TooLong,
    /// It says something else.
    #[error("the client's regions are no list of regions: {0}")]
    Json(serde_json::Error),
    /// Its pages are not of 4 KiB.
    #[error("the client's pages have {0} bytes, and 4096 are served")]
    PageSize(u64),
    /// It passed none, or several.
    #[error("the client passed {0} descriptors, and one userfaultfd is needed")]
    Descriptors(usize),
    /// It passed something else.
    #[error(transparent)]
    Uffd(#[from] UffdError),
    /// Its regions make no sense, or the machine cannot be read.
    #[error(transparent)]
    Lazy(#[from] LazyError),
    /// It is gone, or of a process that we cannot see.
    #[error("the client's process cannot be watched: {0}")]
    Process(io::Error),
    /// There are too many.
    #[error("{MOST_CLIENTS} clients are served already")]
    Many,
    /// The host's fault.
    #[error("the connection: {0}")]
    Host(#[from] io::Error),
}

/// What a server tells while it serves.
#[derive(Debug)]
pub enum Told<'a> {
    /// A client is served.
    Begun(u64),
    /// A client is gone, with what became of its machine.
    Ended(u64, &'a LazyMachine),
    /// A client was refused; the next one is served.
    Refused(u64, Refused),
}

/// A socket at which clients connect.
#[derive(Debug)]
pub struct FaultSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl FaultSocket {
    /// Listens at `path`, in the place of a socket whose server is dead.
    ///
    /// # Errors
    /// There is something else, or a server that lives.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let listener = crate::socket::bind(path)?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener, path: path.to_owned() })
    }

    /// Serves all who connect, each with the same machine, until `end`. A client that is silent or wrong holds up nobody.
    ///
    /// # Errors
    /// Nobody can connect any more.
    pub fn serve(
        &self,
        server: &FaultServer,
        bank: &Arc<Bank>,
        entry: &Entry,
        options: &LazyOptions,
        end: &AtomicBool,
        told: &(dyn Fn(Told<'_>) + Sync),
    ) -> io::Result<()> {
        let clients = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            let mut number = 0;
            while !end.load(Ordering::Relaxed) {
                if !readable(&self.listener, LOOK)? {
                    continue;
                }
                let stream = match self.listener.accept() {
                    Ok((stream, _)) => stream,
                    Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted) => continue,
                    // Clients that go give descriptors and memory back.
                    Err(error) if scarce(&error) => {
                        tracing::warn!(%error, "a client has to wait");
                        std::thread::sleep(LOOK);
                        continue;
                    }
                    Err(error) => return Err(error),
                };
                number += 1;
                if clients.fetch_add(1, Ordering::Relaxed) >= MOST_CLIENTS {
                    clients.fetch_sub(1, Ordering::Relaxed);
                    told(Told::Refused(number, Refused::Many));
                    continue;
                }
                let clients = &clients;
                scope.spawn(move || {
                    match begin(server, bank, entry, options, stream) {
                        Ok(machine) => {
                            told(Told::Begun(number));
                            while !machine.wait_over(LOOK) && !end.load(Ordering::Relaxed) {}
                            told(Told::Ended(number, &machine));
                        }
                        Err(refused) => told(Told::Refused(number, refused)),
                    }
                    clients.fetch_sub(1, Ordering::Relaxed);
                });
            }
            Ok(())
        })
    }
}

impl Drop for FaultSocket {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::debug!(%error, path = %self.path.display(), "a socket stays");
        }
    }
}

fn begin(
    server: &FaultServer,
    bank: &Arc<Bank>,
    entry: &Entry,
    options: &LazyOptions,
    stream: UnixStream,
) -> Result<LazyMachine, Refused> {
    let process = process(&stream)?;
    let (uffd, regions) = receive(&stream)?;
    Ok(server.adopt(bank, entry, uffd, regions, Some(process), options.clone())?)
}

/// Whoever connected.
fn process(stream: &UnixStream) -> Result<OwnedFd, Refused> {
    let peer = rustix::net::sockopt::socket_peercred(stream).map_err(|errno| Refused::Process(errno.into()))?;
    rustix::process::pidfd_open(peer.pid, PidfdFlags::empty()).map_err(|errno| Refused::Process(errno.into()))
}

fn scarce(error: &io::Error) -> bool {
    use rustix::io::Errno;
    matches!(Errno::from_io_error(error), Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM))
}

/// Takes what a client says first.
///
/// # Errors
/// See [`Refused`].
pub fn receive(stream: &UnixStream) -> Result<(Uffd, Vec<Region>), Refused> {
    let until = Instant::now() + PATIENCE;
    let (mut bytes, mut fds) = (Vec::new(), Vec::new());
    let regions = loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Refused::Silent);
        }
        if !readable(stream, left)? {
            continue;
        }
        if !take(stream, &mut bytes, &mut fds)? {
            return Err(Refused::Closed(bytes.len()));
        }
        // At once: a client may send a few with every byte.
        if fds.len() > 1 {
            return Err(Refused::Descriptors(fds.len()));
        }
        if let Some(regions) = parse(&bytes)? {
            break regions;
        }
    };
    match (fds.pop(), fds.len()) {
        (Some(fd), 0) => Ok((Uffd::passed(fd)?, regions)),
        (one, others) => Err(Refused::Descriptors(others + usize::from(one.is_some()))),
    }
}

/// The regions of a list; `None`: it ends too early and may go on, because a stream may hand it over in pieces.
///
/// # Errors
/// It is no such list, is too long, or its pages are not of 4 KiB.
pub fn parse(list: &[u8]) -> Result<Option<Vec<Region>>, Refused> {
    match serde_json::from_slice::<Vec<Mapping>>(list) {
        Ok(mappings) => mappings.iter().map(region).collect::<Result<_, _>>().map(Some),
        Err(error) if !error.is_eof() => Err(Refused::Json(error)),
        Err(_) if list.len() >= MOST_BYTES => Err(Refused::TooLong),
        Err(_) => Ok(None),
    }
}

fn region(mapping: &Mapping) -> Result<Region, Refused> {
    let page = mapping.page_size.or(mapping.page_size_kib).unwrap_or(PAGE as u64);
    let older = mapping.page_size.is_none() && page == 4;
    if page != PAGE as u64 && !older {
        return Err(Refused::PageSize(page));
    }
    Ok(Region { address: mapping.base_host_virt_addr, len: mapping.size, offset: mapping.offset })
}

/// One `recvmsg`; false at the end.
fn take(stream: &UnixStream, bytes: &mut Vec<u8>, fds: &mut Vec<OwnedFd>) -> io::Result<bool> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut piece = vec![0; 64 << 10];
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let message = match rustix::net::recvmsg(stream, &mut [IoSliceMut::new(&mut piece)], &mut control, flags) {
        Ok(message) => message,
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(true),
        Err(errno) => return Err(errno.into()),
    };
    for ancillary in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = ancillary {
            fds.extend(rights);
        }
    }
    bytes.extend_from_slice(&piece[..message.bytes]);
    Ok(message.bytes > 0)
}

fn readable(fd: &impl std::os::fd::AsFd, most: Duration) -> io::Result<bool> {
    let most = Timespec { tv_sec: most.as_secs().cast_signed(), tv_nsec: most.subsec_nanos().into() };
    let mut fds = [PollFd::new(fd, PollFlags::IN)];
    match poll(&mut fds, Some(&most)) {
        Ok(ready) => Ok(ready > 0),
        // Whoever waits looks again.
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}
