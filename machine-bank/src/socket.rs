//! A unix socket at a path where an earlier server may have died.
//!
//! `bind(path)` listens in the place of a socket at which nobody listens any more, and refuses a path that is a file, or that another process serves.

use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

/// Listens at `path`, in the place of a socket whose server is dead.
///
/// # Errors
/// There is something else, or a server that lives.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    match UnixListener::bind(path) {
        // A connection to a plain file is refused as well.
        Err(error) if error.kind() == io::ErrorKind::AddrInUse && fs::symlink_metadata(path)?.file_type().is_socket() => {
            match UnixStream::connect(path) {
                Err(gone) if gone.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path)?,
                _ => return Err(error),
            }
            UnixListener::bind(path)
        }
        other => other,
    }
}
