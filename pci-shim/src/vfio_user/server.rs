//! A listening socket for one device: one client after the other, until somebody stops it or the device goes.
//!
//! `Server::bind("/run/nvme.sock")` takes over a socket file that a killed server left behind, but neither one that answers nor a file
//! that is no socket; `serve` then runs on the caller's thread until `stop_handle().stop()` is called from another.

use std::fmt;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Once};
use std::thread;

use farbus_remote_dma::Activity;
use farbus_transport::{CloseReason, Nanos};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use thiserror::Error;

use super::door::Door;
use super::options::{ClientEnd, Options, ServeError, host};
use super::served::Served;
use super::session::serve_client;

/// Why a socket cannot be listened on.
#[derive(Debug, Error)]
pub enum BindError {
    /// Another server answers there.
    #[error("{0} is in use: another server listens there")]
    InUse(PathBuf),
    /// Something else has that name.
    #[error("{0} exists and is not a socket")]
    NotASocket(PathBuf),
    /// The kernel refused.
    #[error("cannot listen on {path}: {source}")]
    Host {
        /// The path.
        path: PathBuf,
        /// What the kernel answered.
        source: io::Error,
    },
}

/// Ends a server from another thread; clones end the same one.
#[derive(Clone, Debug)]
pub struct StopHandle(Arc<Stop>);

#[derive(Debug)]
struct Stop {
    stopped: AtomicBool,
    wake: OwnedFd,
}

impl StopHandle {
    fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(Stop {
            stopped: AtomicBool::new(false),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })))
    }

    /// Makes [`Server::serve`] return soon, now or when it is called.
    pub fn stop(&self) {
        self.0.stopped.store(true, Ordering::Release);
        // The only failure is a full counter, which wakes as well.
        let _ = rustix::io::write(&self.0.wake, &1_u64.to_ne_bytes());
    }

    /// Whether [`StopHandle::stop`] was called.
    pub fn is_stopped(&self) -> bool {
        self.0.stopped.load(Ordering::Acquire)
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.0.wake.as_fd()
    }
}

/// Why [`Server::serve`] returned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// [`StopHandle::stop`] was called.
    Stopped,
    /// The device is gone.
    DeviceGone(CloseReason),
}

/// Clients that wait until they are accepted, at most.
const BACKLOG: i32 = 128;

/// Who may connect to a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketAccess {
    /// The socket file's mode, whatever the umask is: connecting takes the right to write (unix(7)).
    pub mode: u32,
    /// Its group; without it, the one that a new file has there.
    pub group: Option<u32>,
}

impl Default for SocketAccess {
    /// This user and root.
    fn default() -> Self {
        Self { mode: 0o600, group: None }
    }
}

impl SocketAccess {
    fn give(self, path: &Path) -> io::Result<()> {
        if self.group.is_some() {
            std::os::unix::fs::lchown(path, None, self.group)?;
        }
        fs::set_permissions(path, fs::Permissions::from_mode(self.mode))
    }
}

/// A socket that clients of one device connect to.
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
    path: PathBuf,
    /// Device number and inode of the socket file, so that only our own is removed.
    identity: Option<(u64, u64)>,
    stop: StopHandle,
    told: Told,
}

/// What somebody is told once, and how.
pub(super) struct Told {
    /// Done when the first client was served, whose user is told what a migration would do.
    pub(super) no_migration: Once,
    /// Hears that the device is gone under a client; without it the log does.
    pub(super) gone: Option<OnLoss>,
}

type OnLoss = Box<dyn Fn(CloseReason) + Send + Sync>;

impl fmt::Debug for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (migration, gone) = (self.no_migration.is_completed(), self.gone.is_some());
        f.debug_struct("Told").field("no_migration", &migration).field("gone", &gone).finish()
    }
}

impl Server {
    /// Listens on `path`, for processes of this user. A socket file on which nobody listens is replaced.
    ///
    /// # Errors
    /// [`BindError`].
    pub fn bind(path: impl AsRef<Path>) -> Result<Self, BindError> {
        Self::bind_for(path, SocketAccess::default())
    }

    /// As [`Server::bind`], for whom `access` says.
    ///
    /// # Errors
    /// [`BindError`].
    pub fn bind_for(path: impl AsRef<Path>, access: SocketAccess) -> Result<Self, BindError> {
        let path = path.as_ref().to_owned();
        let failed = |source| BindError::Host { path: path.clone(), source };
        let bind = || {
            let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
            rustix::net::bind(&socket, &SocketAddrUnix::new(&path)?)?;
            Ok(socket)
        };
        let socket = match bind() {
            Err(Errno::ADDRINUSE) => {
                remove_stale(&path)?;
                bind()
            }
            other => other,
        };
        let socket = socket.map_err(|errno: Errno| failed(errno.into()))?;
        // Nobody can connect before listen(2), so nobody does in the time in which the umask decides.
        access.give(&path).and_then(|()| Ok(rustix::net::listen(&socket, BACKLOG)?)).map_err(|error| {
            // Ours, and served by nobody.
            drop(fs::remove_file(&path));
            failed(error)
        })?;
        let listener = UnixListener::from(socket);
        listener.set_nonblocking(true).map_err(failed)?;
        let identity = fs::symlink_metadata(&path).ok().map(|data| (data.dev(), data.ino()));
        let stop = StopHandle::new().map_err(failed)?;
        Ok(Self { listener, path, identity, stop, told: Told { no_migration: Once::new(), gone: None } })
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Ends [`Server::serve`].
    pub fn stop_handle(&self) -> StopHandle {
        self.stop.clone()
    }

    /// Calls `hear` as soon as the device is gone under a client that goes on being served ([`super::OnGone::ServeAllOnes`]), on the thread that
    /// serves. Without it the log says so.
    pub fn on_loss(&mut self, hear: impl Fn(CloseReason) + Send + Sync + 'static) {
        self.told.gone = Some(Box::new(hear));
    }

    /// Serves one client after the other with `device`. The device is reset between two. One that comes while another is served is refused with
    /// `EBUSY`, by a thread that sleeps otherwise; one that comes when the last has hung up waits for the reset.
    ///
    /// # Errors
    /// [`ServeError`] where the kernel does not let us wait or accept; no client can cause one.
    pub fn serve<D: Served>(&mut self, device: &mut D, options: &Options) -> Result<Ended, ServeError> {
        thread::scope(|scope| {
            let door = Door::open(scope, &self.listener, options.version_deadline)
                .map_err(|source| ServeError::Host { what: "start the thread that accepts clients", source })?;
            self.serve_at(&door, device, options)
        })
    }

    fn serve_at<D: Served>(&self, door: &Door, device: &mut D, options: &Options) -> Result<Ended, ServeError> {
        loop {
            let client = loop {
                let activity = device.poll(Nanos::now());
                // Nobody is there to be told or to answer.
                while let Some(access) = device.next_mediation() {
                    device.answer(access.ticket, farbus_remote_dma::MediationAnswer::Fault);
                }
                device.interrupts().clear();
                if self.stop.is_stopped() {
                    return Ok(Ended::Stopped);
                }
                if let Some(reason) = device.gone() {
                    return Ok(Ended::DeviceGone(reason));
                }
                match door.visitor().map_err(host("accept a client"))? {
                    Some(client) => break client,
                    None => self.wait(door, device, activity)?,
                }
            };
            let end = serve_client(device, options, client.as_fd(), &self.stop, &self.told)?;
            drop(client);
            door.left();
            match end {
                ClientEnd::Stopped => return Ok(Ended::Stopped),
                ClientEnd::Misbehaved(why) => tracing::warn!(why, "a client was sent away"),
                end => tracing::info!(?end, "a client's session ended"),
            }
        }
    }

    fn wait<D: Served>(&self, door: &Door, device: &mut D, activity: Activity) -> Result<(), ServeError> {
        let limit = match activity {
            Activity::Busy => return Ok(()),
            Activity::Idle(limit) => limit,
        };
        let armed = device.arm();
        if !armed && device.wake_fd().is_some() {
            return Ok(());
        }
        let unarmed = (!armed).then_some(std::time::Duration::from_millis(1));
        let timeout = limit.into_iter().chain(unarmed).min().map(|limit| Timespec {
            tv_sec: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(limit.subsec_nanos()),
        });
        let mut fds = Vec::with_capacity(3);
        fds.push(PollFd::from_borrowed_fd(door.fd(), PollFlags::IN));
        fds.push(PollFd::from_borrowed_fd(self.stop.fd(), PollFlags::IN));
        fds.extend(device.wake_fd().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        match rustix::event::poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(errno) => Err(host("wait for a client")(errno)),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path).ok().map(|data| (data.dev(), data.ino()));
        if ours.is_some()
            && ours == self.identity
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::debug!(%error, path = %self.path.display(), "a socket file stays behind");
        }
    }
}

/// Runs several servers, each on a thread of its own, until all have ended; results in the same order.
///
/// # Errors
/// Per server, as [`Server::serve`]. A device that panics ends its own server only, and the panic goes on here after all have ended.
pub fn serve_all<D: Served + Send>(servers: Vec<(Server, D)>, options: &Options) -> Vec<Result<Ended, ServeError>> {
    thread::scope(|scope| {
        let threads: Vec<_> =
            servers.into_iter().map(|(mut server, mut device)| scope.spawn(move || server.serve(&mut device, options))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    })
}

/// Removes a socket file on which nobody listens.
fn remove_stale(path: &Path) -> Result<(), BindError> {
    let failed = |source| BindError::Host { path: path.to_owned(), source };
    let kind = fs::symlink_metadata(path).map_err(failed)?.file_type();
    if !kind.is_socket() {
        return Err(BindError::NotASocket(path.to_owned()));
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path).map_err(failed),
        Ok(_) => Err(BindError::InUse(path.to_owned())),
        // A full backlog, say: somebody listens.
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(BindError::InUse(path.to_owned())),
        Err(error) => Err(failed(error)),
    }
}
