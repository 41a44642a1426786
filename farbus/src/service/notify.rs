//! What systemd is told and what it gives: READY=1 when borrowers can come, STOPPING=1 when no more can, a word of what happens, and sockets that it opened.
//!
//! Under `Type=notify` a lender is "active" once it listens, and `systemctl status` shows "lent to vm7". Without NOTIFY_SOCKET nothing is said and nothing is lost.

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Duration;

use listenfd::ListenFd;
use sd_notify::NotifyState;

use crate::failure::misuse;

/// The service does what it is for.
pub fn ready(status: &str) {
    tell(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// What it does now.
pub fn status(status: &str) {
    tell(&[NotifyState::Status(status)]);
}

/// It ends.
pub fn stopping(status: &str) {
    tell(&[NotifyState::Stopping, NotifyState::Status(status)]);
}

fn tell(state: &[NotifyState<'_>]) {
    if std::env::var_os("NOTIFY_SOCKET").is_some()
        && let Err(error) = sd_notify::notify(state)
    {
        tracing::warn!(%error, "systemd could not be told");
    }
}

/// Says that whoever waits for this is alive, twice in the time that WATCHDOG_USEC gives; nothing where it gives none. Never ends.
pub async fn watchdog() {
    let Some(limit) = sd_notify::watchdog_enabled() else { return std::future::pending().await };
    loop {
        tell(&[NotifyState::Watchdog]);
        tokio::time::sleep((limit / 2).max(Duration::from_millis(1))).await;
    }
}

/// The socket at `path` that was opened for this process (LISTEN_FDS, sd_listen_fds(3)); `None` where none was.
///
/// # Errors
/// There are such sockets, and none is at `path`.
pub fn passed_socket(path: &Path) -> anyhow::Result<Option<UnixListener>> {
    let mut passed = ListenFd::from_env();
    let mut places = Vec::new();
    for index in 0..passed.len() {
        // A descriptor of another kind is somebody else's.
        let Ok(Some(listener)) = passed.take_unix_listener(index) else { continue };
        match listener.local_addr() {
            Ok(address) if address.as_pathname() == Some(path) => return Ok(Some(listener)),
            Ok(address) => places.push(address.as_pathname().map_or("no path".to_owned(), |path| path.display().to_string())),
            Err(error) => places.push(error.to_string()),
        }
    }
    if passed.len() == 0 {
        return Ok(None);
    }
    Err(misuse(
        format!("a socket was passed to this process, and none at {}: {}", path.display(), places.join(", ")),
        "let ListenStream= of the .socket unit and --listen shm:PATH name the same path",
    ))
}

/// For addresses at which nobody can pass a socket.
///
/// # Errors
/// Somebody did.
pub fn no_passed_socket() -> anyhow::Result<()> {
    if ListenFd::from_env().len() > 0 {
        return Err(misuse("a socket was passed to this process, and it listens elsewhere", "start it without the .socket unit"));
    }
    Ok(())
}
