//! The socket at which a service says what it does, and where such sockets are.
//!
//! `farbus lend` of root with process id 4711 has /run/farbus/lend-4711.sock, mode 600: who connects gets one JSON object and the end of the stream, and nothing
//! that it says is read.

use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tokio::io::AsyncWriteExt;

use super::board::Board;

/// How long who asks may take over the answer.
const LIMIT: Duration = Duration::from_secs(2);
/// Connections that wait until they are accepted, at most.
const BACKLOG: i32 = 16;

/// Where services of this user have their sockets, the first of which is where a new one has its own: what systemd gave this service, this user's folder for such
/// things, and root's.
pub fn folders() -> Vec<PathBuf> {
    let given = std::env::var_os("RUNTIME_DIRECTORY").and_then(|all| {
        // systemd.exec(5): several are separated by colons.
        let all = all.into_string().ok()?;
        all.split(':').find(|path| path.starts_with('/')).map(PathBuf::from)
    });
    let user = std::env::var_os("XDG_RUNTIME_DIR").filter(|path| !path.is_empty()).map(|path| Path::new(&path).join("farbus"));
    let root = rustix::process::geteuid().is_root().then(|| PathBuf::from("/run/farbus"));
    let mut folders: Vec<PathBuf> = Vec::new();
    for folder in given.into_iter().chain(user).chain(root) {
        if !folders.contains(&folder) {
            folders.push(folder);
        }
    }
    folders
}

/// A socket that is removed when this is dropped.
pub struct ControlSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl ControlSocket {
    /// Listens in the first of [`folders`].
    ///
    /// # Errors
    /// There is no such folder, or it cannot be written to.
    pub fn bind(command: &str) -> io::Result<Self> {
        let none = || io::Error::new(io::ErrorKind::NotFound, "XDG_RUNTIME_DIR is not set");
        let folder = folders().into_iter().next().ok_or_else(none)?;
        match std::fs::DirBuilder::new().mode(0o700).create(&folder) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        let path = folder.join(format!("{command}-{}.sock", std::process::id()));
        Self::bind_at(path)
    }

    fn bind_at(path: PathBuf) -> io::Result<Self> {
        // Only a dead process can have had this process's number.
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        rustix::net::bind(&socket, &SocketAddrUnix::new(&path)?)?;
        // Nobody can connect before listen(2), so nobody does while the umask decides.
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
        rustix::net::listen(&socket, BACKLOG)?;
        Ok(Self { listener: socket.into(), path })
    }

    /// The socket, which does not block.
    pub fn listener(&self) -> io::Result<UnixListener> {
        self.listener.try_clone()
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::debug!(%error, path = %self.path.display(), "a socket stays behind");
        }
    }
}

/// Answers without end, one after the other: who does not take the answer has 2 s.
pub async fn serve(listener: &tokio::net::UnixListener, board: &Arc<Board>) {
    loop {
        match listener.accept().await {
            Ok((mut stream, _)) => {
                let text = format!("{}\n", board.json());
                let answer = async {
                    stream.write_all(text.as_bytes()).await?;
                    stream.shutdown().await
                };
                if !matches!(tokio::time::timeout(LIMIT, answer).await, Ok(Ok(()))) {
                    tracing::debug!("whoever asked for the status did not take it");
                }
            }
            Err(error) => {
                tracing::debug!(%error, "nobody can be told the status yet");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_socket_is_for_its_user_and_goes_with_its_service() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lend-1.sock");
        std::fs::write(&path, "left behind").unwrap();
        let socket = ControlSocket::bind_at(path.clone()).unwrap();
        let mode = std::fs::symlink_metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        drop(socket);
        assert!(!path.exists());
    }
}
