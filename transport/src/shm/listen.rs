//! How two processes find each other: a unix socket at a path, the hello, the lender's verdict, then the rings.
//!
//! `Listener::bind("/run/farbus/nvme0")` leaves a socket that only its owner may use; a stale one (nobody listens) is replaced, a live one is
//! not. A peer of another user is turned away before it learns anything. `Greeted::greet(stream, &hello, path)?` only makes acquaintance: the
//! peer is then welcomed (`link`) or turned away (`refuse`), so that no device need be taken for somebody who only knocks.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use thiserror::Error;

use super::{ShmFabric, ShmOptions, Side};
use crate::link::hello::{Agreed, ExchangeError, Hello, exchange};
use crate::link::verdict::{Refusal, hear, tell};

/// How long a peer may take over its hello, and a lender over its verdict.
pub const HELLO_LIMIT: Duration = Duration::from_secs(5);

/// Why there is no link.
#[derive(Debug, Error)]
pub enum ListenError {
    /// Another process listens there.
    #[error("{path} is in use by another process")]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// Something that is no socket is there.
    #[error("{path} exists and is no socket")]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// Nobody listens there.
    #[error("nobody listens at {path}")]
    NobodyThere {
        /// The socket.
        path: PathBuf,
    },
    /// The peer is somebody else.
    #[error("the peer runs as user {peer}, this process as user {ours}")]
    Stranger {
        /// The peer's user id.
        peer: u32,
        /// Ours.
        ours: u32,
    },
    /// The hello failed.
    #[error(transparent)]
    Hello(#[from] ExchangeError),
    /// The lender's verdict.
    #[error("no link at {path}: {refusal}")]
    Refused {
        /// The socket.
        path: PathBuf,
        /// Why.
        refusal: Refusal,
    },
    /// The peer left after its hello, without a word.
    #[error("the peer at {path} gave no link after its hello")]
    Dropped {
        /// The socket.
        path: PathBuf,
    },
    /// The host refused.
    #[error("cannot {what} {path}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// The socket.
        path: PathBuf,
        /// What the kernel answered.
        source: io::Error,
    },
}

/// A link that is ready, and what the peer said of itself.
#[derive(Debug)]
pub struct Connection {
    /// The data path.
    pub fabric: ShmFabric,
    /// Version, features, and the peer's hello.
    pub agreed: Agreed,
}

/// A socket that borrowers connect to. Removed when dropped.
#[derive(Debug)]
pub struct Listener {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the socket that was made at `path`: what is there later may be another lender's. `None` where somebody else made it and removes it.
    identity: Option<(u64, u64)>,
}

impl Listener {
    /// Listens at `path`, for processes of this user and root only.
    ///
    /// # Errors
    /// [`ListenError::InUse`], [`ListenError::NotASocket`], [`ListenError::Host`].
    pub fn bind(path: impl AsRef<Path>) -> Result<Self, ListenError> {
        let path = path.as_ref().to_path_buf();
        let host = |what| {
            let path = path.clone();
            move |source| ListenError::Host { what, path, source }
        };
        if let Ok(found) = std::fs::symlink_metadata(&path) {
            if !found.file_type().is_socket() {
                return Err(ListenError::NotASocket { path });
            }
            match UnixStream::connect(&path) {
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    std::fs::remove_file(&path).map_err(host("replace the stale socket"))?;
                }
                _ => return Err(ListenError::InUse { path }),
            }
        }
        let listener = UnixListener::bind(&path).map_err(host("listen at"))?;
        let identity = std::fs::symlink_metadata(&path).map(|made| identity(&made)).map_err(host("look at"))?;
        let own = Self { listener, path: path.clone(), identity: Some(identity) };
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).map_err(host("protect"))?;
        Ok(own)
    }

    /// Goes on with a socket at `path` on which somebody else listens already, systemd say: who may connect is as it was decided there, and the socket
    /// stays when this is dropped.
    pub fn adopt(listener: UnixListener, path: impl Into<PathBuf>) -> Self {
        Self { listener, path: path.into(), identity: None }
    }

    /// Lets processes of all users connect; whoever greets them looks at who they are ([`Greeted::greet_if`]).
    ///
    /// # Errors
    /// [`ListenError::Host`].
    pub fn open_to_all_users(&self) -> Result<(), ListenError> {
        if self.identity.is_none() {
            return Ok(());
        }
        let opened = std::fs::set_permissions(&self.path, std::fs::Permissions::from_mode(0o666));
        opened.map_err(|source| ListenError::Host { what: "open", path: self.path.clone(), source })
    }

    /// Waits for a connection; its hello is not read yet.
    ///
    /// # Errors
    /// What accept(2) answers; `WouldBlock` after [`Listener::nonblocking_socket`].
    pub fn accept(&self) -> io::Result<UnixStream> {
        self.listener.accept().map(|(stream, _)| stream)
    }

    /// The socket itself, for a runtime that accepts by itself (tokio's `UnixListener::from_std`): now non-blocking, for both.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn nonblocking_socket(&self) -> io::Result<UnixListener> {
        self.listener.set_nonblocking(true)?;
        self.listener.try_clone()
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let Some(own) = self.identity else { return };
        // Our inode is kept alive by the listening socket, so no other file can have its number by now.
        let removed = match std::fs::symlink_metadata(&self.path) {
            Ok(found) if identity(&found) != own => {
                tracing::info!(path = %self.path.display(), "the socket's place was taken by another, which is left alone");
                return;
            }
            Ok(_) => std::fs::remove_file(&self.path),
            Err(error) => Err(error),
        };
        if let Err(error) = removed {
            tracing::debug!(%error, path = %self.path.display(), "the socket was removed already");
        }
    }
}

fn identity(file: &std::fs::Metadata) -> (u64, u64) {
    (file.dev(), file.ino())
}

/// A borrower whose hello was good and who waits for the verdict.
#[derive(Debug)]
pub struct Greeted {
    stream: UnixStream,
    agreed: Agreed,
    uid: u32,
    path: PathBuf,
}

impl Greeted {
    /// Checks who the peer on `stream` is and exchanges hellos with it; errors name `path`, where it came to. Blocks for at most
    /// [`HELLO_LIMIT`], and needs no [`Listener`], so that many can be greeted at once and none keeps the socket there.
    ///
    /// # Errors
    /// [`ListenError::Stranger`], [`ListenError::Hello`], [`ListenError::Host`].
    pub fn greet(stream: UnixStream, hello: &Hello, path: impl Into<PathBuf>) -> Result<Self, ListenError> {
        Self::greet_if(stream, hello, path, &|_| false)
    }

    /// The same, where processes of users for whom `also` holds may come too.
    ///
    /// # Errors
    /// As [`Greeted::greet`].
    pub fn greet_if(
        mut stream: UnixStream,
        hello: &Hello,
        path: impl Into<PathBuf>,
        also: &dyn Fn(u32) -> bool,
    ) -> Result<Self, ListenError> {
        let path = path.into();
        let host = |what| {
            let path = path.clone();
            move |source| ListenError::Host { what, path, source }
        };
        stream.set_nonblocking(false).map_err(host("use the connection at"))?;
        let credentials =
            rustix::net::sockopt::socket_peercred(&stream).map_err(io::Error::from).map_err(host("identify the peer at"))?;
        let (peer, ours) = (credentials.uid.as_raw(), rustix::process::geteuid().as_raw());
        if peer != ours && peer != 0 && !also(peer) {
            return Err(ListenError::Stranger { peer, ours });
        }
        let agreed = exchange(&mut stream, hello, HELLO_LIMIT)?;
        Ok(Self { stream, agreed, uid: peer, path })
    }

    /// What it said.
    pub fn agreed(&self) -> &Agreed {
        &self.agreed
    }

    /// The user whose process it is.
    pub fn uid(&self) -> u32 {
        self.uid
    }

    /// Welcomes it and shares the rings. Blocks for at most a few seconds.
    ///
    /// # Errors
    /// [`ListenError::Dropped`], [`ListenError::Hello`], [`ListenError::Host`].
    pub fn link(mut self, options: ShmOptions) -> Result<Connection, ListenError> {
        match tell(&mut self.stream, Ok(()), HELLO_LIMIT) {
            Err(ExchangeError::PeerClosed { .. }) => Err(ListenError::Dropped { path: self.path }),
            Err(error) => Err(error.into()),
            Ok(()) => self.share(Side::Lender, options),
        }
    }

    /// Tells it why there is no link.
    ///
    /// # Errors
    /// [`ListenError::Hello`] where it does not listen any more.
    pub fn refuse(mut self, refusal: Refusal) -> Result<(), ListenError> {
        Ok(tell(&mut self.stream, Err(refusal), HELLO_LIMIT)?)
    }

    fn share(self, side: Side, options: ShmOptions) -> Result<Connection, ListenError> {
        let Self { stream, agreed, path, .. } = self;
        match ShmFabric::establish(stream, side, options) {
            Ok(fabric) => Ok(Connection { fabric, agreed }),
            Err(error) if is_the_end(&error) => Err(ListenError::Dropped { path }),
            Err(source) => Err(ListenError::Host { what: "share rings at", path, source }),
        }
    }
}

/// Connects to a lender at `path`.
///
/// # Errors
/// [`ListenError`].
pub fn connect(path: impl AsRef<Path>, hello: &Hello, options: ShmOptions) -> Result<Connection, ListenError> {
    connect_if(path, hello, options, &|_| false)
}

/// The same, where the lender may also be a process of a user for whom `also` holds.
///
/// # Errors
/// [`ListenError`].
pub fn connect_if(
    path: impl AsRef<Path>,
    hello: &Hello,
    options: ShmOptions,
    also: &dyn Fn(u32) -> bool,
) -> Result<Connection, ListenError> {
    let path = path.as_ref();
    let stream = UnixStream::connect(path).map_err(|source| match source.kind() {
        // The kernel refuses a connection to a file as it does to a socket that nobody serves.
        io::ErrorKind::ConnectionRefused if std::fs::metadata(path).is_ok_and(|found| !found.file_type().is_socket()) => {
            ListenError::NotASocket { path: path.to_path_buf() }
        }
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => ListenError::NobodyThere { path: path.to_path_buf() },
        _ => ListenError::Host { what: "connect to", path: path.to_path_buf(), source },
    })?;
    // Seen from here the lender is the one to be greeted: the same checks and the same hello, and then its verdict.
    let mut lender = Greeted::greet_if(stream, hello, path, also)?;
    match hear(&mut lender.stream, HELLO_LIMIT) {
        Ok(Ok(())) => lender.share(Side::Borrower, options),
        Ok(Err(refusal)) => Err(ListenError::Refused { path: lender.path, refusal }),
        Err(ExchangeError::PeerClosed { .. }) => Err(ListenError::Dropped { path: lender.path }),
        Err(error) => Err(error.into()),
    }
}

/// Which of them is seen depends on who was faster.
fn is_the_end(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::hello::{Role, SPOKEN};

    fn hello(role: Role) -> Hello {
        Hello { versions: SPOKEN, role, features: 0, epoch: 1, description: b"a device".to_vec() }
    }

    #[test]
    fn two_ends_find_each_other_and_a_live_socket_is_not_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("link");
        let listener = Listener::bind(&path).unwrap();
        assert!(matches!(Listener::bind(&path), Err(ListenError::InUse { .. })));
        // That attempt connected to see whether somebody listens; it is accepted and gives nothing.
        let probe = listener.accept().unwrap();
        assert!(matches!(Greeted::greet(probe, &hello(Role::Lender), &path), Err(ListenError::Hello(_))));
        let borrower = {
            let path = path.clone();
            std::thread::spawn(move || connect(path, &hello(Role::Borrower), ShmOptions::default()).unwrap())
        };
        let stream = listener.accept().unwrap();
        let lender = Greeted::greet(stream, &hello(Role::Lender), &path).unwrap().link(ShmOptions::default()).unwrap();
        assert_eq!(borrower.join().unwrap().agreed.peer.description, b"a device");
        drop((lender, listener));
        assert!(matches!(connect(&path, &hello(Role::Borrower), ShmOptions::default()), Err(ListenError::NobodyThere { .. })));
    }

    #[test]
    fn a_refused_peer_hears_why_and_one_that_is_dropped_hears_that() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("link");
        let listener = Listener::bind(&path).unwrap();
        let greet = || {
            let target = path.clone();
            let borrower = std::thread::spawn(move || connect(target, &hello(Role::Borrower), ShmOptions::default()));
            let greeted = Greeted::greet(listener.accept().unwrap(), &hello(Role::Lender), &path).unwrap();
            assert_eq!(greeted.agreed().peer, hello(Role::Borrower));
            (greeted, borrower)
        };
        let (to_refuse, borrower) = greet();
        to_refuse.refuse(Refusal::Lent).unwrap();
        let error = borrower.join().unwrap().unwrap_err();
        assert!(matches!(error, ListenError::Refused { refusal: Refusal::Lent, .. }), "{error}");
        let (to_drop, borrower) = greet();
        drop(to_drop);
        let error = borrower.join().unwrap().unwrap_err();
        assert!(matches!(error, ListenError::Dropped { .. }), "{error}");
    }

    #[test]
    fn a_lender_that_ends_leaves_the_socket_of_the_next_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("link");
        let first = Listener::bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let second = Listener::bind(&path).unwrap();
        drop(first);
        assert!(path.exists(), "the second lender's socket");
        drop(second);
        assert!(!path.exists(), "its own");
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_file_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("link");
        drop(UnixListener::bind(&path).unwrap());
        assert!(Listener::bind(&path).is_ok());
        std::fs::write(&path, "precious").unwrap();
        assert!(matches!(Listener::bind(&path), Err(ListenError::NotASocket { .. })));
        let taken_for_a_lender = connect(&path, &hello(Role::Borrower), ShmOptions::default());
        assert!(matches!(taken_for_a_lender, Err(ListenError::NotASocket { .. })));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    }
}
