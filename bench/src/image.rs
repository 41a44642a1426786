//! An image of real bytes for the demo: files of this machine, packed one after the other until the image is full.
//!
//! `pack(target, 256 << 20, &sources(), …)` fills 256 MiB from the Rust installation, /usr/share and /usr/include. The layout:
//!
//! | bytes | what |
//! |---|---|
//! | 0 to 4,095 | header: `farbus demo image\n`, then lines `bytes: N`, `files: N`, `rounds: N`; zero to the end |
//! | 4,096 on | files, each beginning at a multiple of 4,096: a header of 4,096 bytes (`path: …\n`, `bytes: N\n`, zero to the end), then the file's bytes, zero to the next multiple |
//!
//! When the files do not fill the image, they come again, in the same order, as often as needed; the last one is cut off at the end.

use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::workload::Progress;

/// Bytes of the demo's image.
pub const DEMO_BYTES: u64 = 256 << 20;
/// Files and headers begin at multiples of this.
const ALIGN: u64 = 4096;
/// No directory tree is walked deeper than this.
const MAX_DEPTH: usize = 32;

/// Why an image could not be packed.
#[derive(Debug, Error)]
pub enum ImageError {
    /// Not a size that a device can have.
    #[error("an image of {0} bytes: give a multiple of 4096, at least 8192")]
    Size(u64),
    /// No file was found.
    #[error("no readable file under {0:?}: name a folder with files")]
    NoFiles(Vec<PathBuf>),
    /// The image could not be written.
    #[error("cannot write the image: {0}")]
    Write(#[source] std::io::Error),
}

/// What was packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packed {
    /// Bytes of the image.
    pub bytes: u64,
    /// Files in it, each counted once.
    pub files: u64,
    /// How often the files were begun from the first.
    pub rounds: u64,
    /// Files that were named but could not be read, and were left out.
    pub unreadable: u64,
}

/// Folders with real files, as far as this machine has them: the Rust installation, then what every system has.
pub fn sources() -> Vec<PathBuf> {
    let sysroot = std::process::Command::new("rustc")
        .args(["--print", "sysroot"])
        .output()
        .ok()
        .filter(|output| output.status.success())
        .map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
        .map(|sysroot| Path::new(&sysroot).join("lib/rustlib"));
    let usual = ["/usr/include", "/usr/share/doc", "/usr/share", "/usr/lib", "/bin", "/etc"].map(PathBuf::from);
    sysroot.into_iter().chain(usual).filter(|path| path.is_dir()).collect()
}

/// Packs the files under `sources` into `target`, which is made `bytes` long (a multiple of 4,096, at least 8,192).
///
/// # Errors
/// [`ImageError`].
pub fn pack(target: &mut File, bytes: u64, sources: &[PathBuf], mut progress: impl FnMut(Progress)) -> Result<Packed, ImageError> {
    if bytes < 2 * ALIGN || !bytes.is_multiple_of(ALIGN) {
        return Err(ImageError::Size(bytes));
    }
    let files = list(sources, bytes);
    let mut packed = Packed { bytes, files: 0, rounds: 0, unreadable: 0 };
    target.set_len(0).map_err(ImageError::Write)?;
    target.set_len(bytes).map_err(ImageError::Write)?;
    target.seek(SeekFrom::Start(ALIGN)).map_err(ImageError::Write)?;
    let mut writer = Writer { target: BufWriter::with_capacity(1 << 20, &mut *target), at: ALIGN, end: bytes };
    while writer.at < writer.end {
        let before = writer.at;
        packed.rounds += 1;
        for path in &files {
            if writer.at >= writer.end {
                break;
            }
            let copied = writer.file(path).map_err(ImageError::Write)?;
            if packed.rounds == 1 {
                packed.files += u64::from(copied);
                packed.unreadable += u64::from(!copied);
            }
            progress(Progress { done: writer.at.min(bytes), total: bytes });
        }
        if writer.at == before {
            return Err(ImageError::NoFiles(sources.to_vec()));
        }
    }
    writer.target.flush().map_err(ImageError::Write)?;
    drop(writer);
    let Packed { files, rounds, .. } = packed;
    let header = format!("farbus demo image\nbytes: {bytes}\nfiles: {files}\nrounds: {rounds}\n");
    target.seek(SeekFrom::Start(0)).map_err(ImageError::Write)?;
    target.write_all(header.as_bytes()).map_err(ImageError::Write)?;
    target.flush().map_err(ImageError::Write)?;
    Ok(packed)
}

struct Writer<'a> {
    target: BufWriter<&'a mut File>,
    at: u64,
    end: u64,
}

impl Writer<'_> {
    /// One file with its header; false where it cannot be read, and then nothing was written.
    fn file(&mut self, path: &Path) -> std::io::Result<bool> {
        let Ok(mut source) = File::open(path) else {
            return Ok(false);
        };
        let Ok(len) = source.metadata().map(|metadata| metadata.len()) else {
            return Ok(false);
        };
        let mut header = format!("path: {}\nbytes: {len}\n", path.display()).into_bytes();
        header.resize(ALIGN as usize, 0);
        self.put(&header)?;
        let mut piece = vec![0; 64 << 10];
        let mut left = len;
        while left > 0 && self.at < self.end {
            let wanted = piece.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            // A file that became shorter while it was read, or fails: zeroes stand for the rest.
            let got = source.read(&mut piece[..wanted]).unwrap_or(0);
            if got == 0 {
                piece[..wanted].fill(0);
            }
            let got = if got == 0 { wanted } else { got };
            self.put(&piece[..got])?;
            left -= got as u64;
        }
        let padding = self.at.next_multiple_of(ALIGN) - self.at;
        self.put(&[0; ALIGN as usize][..padding as usize])?;
        Ok(true)
    }

    /// As much of `bytes` as still fits.
    fn put(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        let fits = bytes.len().min(usize::try_from(self.end - self.at).unwrap_or(usize::MAX));
        self.target.write_all(&bytes[..fits])?;
        self.at += fits as u64;
        Ok(())
    }
}

/// Regular files under `sources` in a stable order, no more than needed for `bytes`. Symbolic links are not followed.
fn list(sources: &[PathBuf], bytes: u64) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut left = bytes;
    for source in sources {
        walk(source, 0, &mut left, &mut files);
    }
    files
}

fn walk(folder: &Path, depth: usize, left: &mut u64, files: &mut Vec<PathBuf>) {
    // A folder that cannot be read has nothing for us: there are others.
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    let mut entries: Vec<_> = entries.flatten().collect();
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        if *left == 0 {
            return;
        }
        let Ok(kind) = entry.file_type() else { continue };
        if kind.is_dir() && depth < MAX_DEPTH {
            walk(&entry.path(), depth + 1, left, files);
        } else if kind.is_file() {
            let len = entry.metadata().map_or(0, |metadata| metadata.len());
            if len > 0 {
                *left = left.saturating_sub(ALIGN + len.next_multiple_of(ALIGN));
                files.push(entry.path());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packed(bytes: u64) -> (Packed, Vec<u8>) {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("sub")).unwrap();
        std::fs::write(folder.path().join("a"), [b'a'; 5000]).unwrap();
        std::fs::write(folder.path().join("sub/b"), b"bb").unwrap();
        std::os::unix::fs::symlink("/", folder.path().join("loop")).unwrap();
        let mut image = tempfile::tempfile().unwrap();
        let mut last = 0;
        let packed = pack(&mut image, bytes, &[folder.path().to_owned()], |progress| last = progress.done).unwrap();
        assert_eq!(last, bytes);
        let mut found = Vec::new();
        image.seek(SeekFrom::Start(0)).unwrap();
        image.read_to_end(&mut found).unwrap();
        (packed, found)
    }

    #[test]
    fn the_layout_is_the_documented_one_and_files_repeat_until_the_end() {
        let (packed, image) = packed(16 * ALIGN);
        assert_eq!((packed.files, packed.rounds, packed.unreadable), (2, 3, 0));
        assert_eq!(image.len() as u64, 16 * ALIGN);
        assert!(image.starts_with(b"farbus demo image\nbytes: 65536\nfiles: 2\nrounds: 3\n\0"));
        let page = |index: usize| &image[index * 4096..(index + 1) * 4096];
        assert!(page(1).starts_with(b"path: /") && String::from_utf8_lossy(page(1)).contains("/a\nbytes: 5000\n"));
        assert_eq!(page(2), [b'a'; 4096]);
        assert_eq!(page(3)[..904], [b'a'; 904]);
        assert!(page(3)[904..].iter().all(|byte| *byte == 0));
        assert!(page(5).starts_with(b"bb\0"));
        assert_eq!(page(6), page(1), "the second round begins where the first ended");
    }

    #[test]
    fn a_size_that_no_device_has_and_an_empty_folder_are_refused() {
        let mut image = tempfile::tempfile().unwrap();
        assert!(matches!(pack(&mut image, 10_000, &[], |_| {}), Err(ImageError::Size(10_000))));
        assert!(matches!(pack(&mut image, 8192, &[], |_| {}), Err(ImageError::NoFiles(_))));
    }
}
