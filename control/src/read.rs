//! Reading a file that a user named: a regular file of at most 1 MiB, and nothing that could make a reader wait.
//!
//! `read(Path::new("/run/fifo"))` says "it is no file but a pipe" at once, where opening it would wait for whoever writes to it.

use std::fs::{Metadata, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;
use thiserror::Error;

/// Bytes of the longest file: some 16,000 names of the greatest length, some 500 certificates.
pub const MAX_FILE: u64 = 1 << 20;

/// Why a file was not read. The culprit is this side.
#[derive(Debug, Error)]
pub enum ReadError {
    /// The kernel refused.
    #[error(transparent)]
    Host(#[from] io::Error),
    /// Reading it could wait without end, or have no end.
    #[error("it is no file but {0}")]
    Kind(&'static str),
    /// No list of names and no certificate is that long.
    #[error("it has more than {MAX_FILE} bytes")]
    TooLong,
    /// It is no text.
    #[error("it is no text in UTF-8")]
    NoText,
}

impl ReadError {
    /// Whether there is nothing at all.
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::Host(error) if error.kind() == io::ErrorKind::NotFound)
    }
}

/// The bytes of the file at `path`.
///
/// # Errors
/// [`ReadError`].
pub fn read(path: &Path) -> Result<Vec<u8>, ReadError> {
    // Looked at before it is opened, because opening some devices does something, and after, because it may be another by then.
    regular(&std::fs::metadata(path)?)?;
    let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = OpenOptions::new().read(true).custom_flags(flags.bits().cast_signed()).open(path)?;
    let found = file.metadata()?;
    regular(&found)?;
    if found.len() > MAX_FILE {
        return Err(ReadError::TooLong);
    }
    let mut bytes = Vec::new();
    // One that grows meanwhile, or whose length says nothing (/proc), is not read without end either.
    file.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_FILE { Err(ReadError::TooLong) } else { Ok(bytes) }
}

/// The text of the file at `path`.
///
/// # Errors
/// [`ReadError`].
pub fn read_text(path: &Path) -> Result<String, ReadError> {
    String::from_utf8(read(path)?).map_err(|_| ReadError::NoText)
}

fn regular(found: &Metadata) -> Result<(), ReadError> {
    let kind = found.file_type();
    let other = match () {
        () if kind.is_file() => return Ok(()),
        () if kind.is_dir() => "a directory",
        () if kind.is_fifo() => "a pipe",
        () if kind.is_socket() => "a socket",
        () => "a device",
    };
    Err(ReadError::Kind(other))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn only_a_file_is_read_and_nothing_else_is_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let (file, fifo, socket) = (folder.path().join("file"), folder.path().join("fifo"), folder.path().join("socket"));
        std::fs::write(&file, "vm7\n").unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0).unwrap();
        let _listener = UnixListener::bind(&socket).unwrap();
        assert_eq!(read_text(&file).unwrap(), "vm7\n");
        let kind = |path: &Path| match read(path) {
            Err(ReadError::Kind(kind)) => kind,
            other => panic!("{}: {other:?}", path.display()),
        };
        assert_eq!([kind(&fifo), kind(&socket), kind(folder.path())], ["a pipe", "a socket", "a directory"]);
        assert_eq!(kind(Path::new("/dev/zero")), "a device");
        assert!(read(&folder.path().join("none")).unwrap_err().is_missing());
    }

    #[test]
    fn a_file_has_a_greatest_length_and_a_text_has_letters() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, vec![b'#'; MAX_FILE as usize]).unwrap();
        assert_eq!(read(&path).unwrap().len() as u64, MAX_FILE);
        std::fs::write(&path, vec![b'#'; MAX_FILE as usize + 1]).unwrap();
        assert!(matches!(read(&path), Err(ReadError::TooLong)));
        std::fs::write(&path, [0xff, 0xfe]).unwrap();
        assert!(matches!(read_text(&path), Err(ReadError::NoText)));
    }
}
