//! What the demo is given and where it leaves its picture: looked at before half a minute of measuring, not after it.
//!
//! `--image /dev/sda` is refused as "a block device", `--svg disk.img` because that is the image, and nothing that is there already is touched.

use std::fs::{File, Metadata};
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::Context;
use farbus_bench::workload::UNIT_BYTES;

use crate::failure::{Advise, refusal};

/// The least that the cases need.
const LEAST_BYTES: u64 = 2 << 20;

/// The image that a user gave.
pub struct Given {
    path: PathBuf,
    found: Metadata,
}

impl Given {
    /// Looks at it.
    pub fn look(path: &Path) -> anyhow::Result<Self> {
        let found = std::fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?;
        let kind = found.file_type();
        let other = match () {
            () if kind.is_file() => None,
            () if kind.is_dir() => Some("a directory"),
            () if kind.is_block_device() => Some("a block device"),
            () => Some("no file"),
        };
        let hint = "give --image a file, or leave it out: then files of this machine are packed into one";
        if let Some(other) = other {
            return Err(refusal(format!("{} is {other}", path.display()), hint));
        }
        if found.len() < LEAST_BYTES || found.len() % UNIT_BYTES != 0 {
            let (path, length) = (path.display(), found.len());
            return Err(refusal(
                format!("{path} has {length} bytes: the demo needs a multiple of {UNIT_BYTES}, at least 2 MiB"),
                hint,
            ));
        }
        Ok(Self { path: path.to_owned(), found })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its length in bytes.
    pub fn bytes(&self) -> u64 {
        self.found.len()
    }

    /// Fails where somebody wrote to the image meanwhile: what was compared with it means nothing, also where all was equal.
    pub fn check_unchanged(&self) -> anyhow::Result<()> {
        anyhow::ensure!(self.is_unchanged(), "it has another length or time than at the start");
        Ok(())
    }

    fn is_unchanged(&self) -> bool {
        let stamp = |data: &Metadata| (data.len(), data.mtime(), data.mtime_nsec());
        std::fs::metadata(&self.path).is_ok_and(|now| stamp(&now) == stamp(&self.found))
    }

    /// Explains a failure of the demo by somebody who wrote to the image meanwhile, if somebody did.
    pub fn blame<T>(&self, result: anyhow::Result<T>) -> anyhow::Result<T> {
        if result.is_ok() || self.is_unchanged() {
            return result;
        }
        let what = format!("{} was changed while the demo compared with it", self.path.display());
        result.advise(what, "give --image a file that nobody writes to")
    }
}

/// Whether a file is the image, by whatever name.
fn is_image(image: Option<&Given>, there: &Metadata) -> bool {
    image.is_some_and(|image| (image.found.dev(), image.found.ino()) == (there.dev(), there.ino()))
}

/// Whether a file begins as a picture in SVG does, or is empty.
fn is_picture(path: &Path) -> std::io::Result<bool> {
    let mut head = Vec::new();
    File::open(path)?.take(1024).read_to_end(&mut head)?;
    let text = String::from_utf8_lossy(&head);
    let text = text.trim_start_matches('\u{feff}').trim_start();
    Ok(head.is_empty() || text.starts_with("<svg") || text.starts_with("<?xml") && text.contains("<svg"))
}

/// Refuses a place where no picture can be left, or where it would take the image's.
pub fn check_picture(svg: &Path, image: Option<&Given>) -> anyhow::Result<()> {
    let hint = "name another place with --svg";
    let what = || format!("cannot leave the picture at {}", svg.display());
    if let Ok(there) = std::fs::metadata(svg) {
        let kind = there.file_type();
        // Opening a pipe waits for its reader, and what a block device or another file holds is worth more than a picture.
        if kind.is_fifo() || kind.is_socket() || kind.is_block_device() {
            return Err(refusal(format!("{}: it is no file", what()), hint));
        }
        if kind.is_file() && !is_image(image, &there) && !is_picture(svg).advise(what(), hint)? {
            return Err(refusal(format!("{}: the file that is there is no picture in SVG", what()), hint));
        }
    }
    match File::options().append(true).open(svg) {
        Ok(there) => {
            let there = there.metadata().advise(what(), hint)?;
            if is_image(image, &there) {
                return Err(refusal(format!("{}: that is the image", what()), hint));
            }
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let folder = svg.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
            // A file without a name, which is gone at once.
            drop(tempfile::tempfile_in(folder).advise(what(), hint)?);
        }
        Err(error) => return Err(error).advise(what(), hint),
    }
    Ok(())
}
