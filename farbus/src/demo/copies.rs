//! The copies of the image that the two sides change: in memory that cannot become shorter, which a lender maps, or in files.
//!
//! With room in memory both are sealed memfds, and `/proc/4711/fd/9` is what the second process lends; without, they are files in the scratch
//! folder, which are read and written.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use farbus_transport::Memory;

use super::progress_bar;
use super::scratch::Scratch;

/// A copy, as long as this lives.
pub struct Copy {
    path: PathBuf,
    /// What the path leads to, where it is memory of this process.
    _memory: Option<File>,
}

impl Copy {
    /// A copy of `original`, in memory where there is room for it.
    pub fn of(original: &Path, scratch: &Scratch, name: &str) -> anyhow::Result<Self> {
        let mut source = File::open(original).with_context(|| format!("cannot read {}", original.display()))?;
        let length = source.metadata()?.len();
        let (path, mut file) = if scratch.in_memory() { memory(length)? } else { on_disk(scratch.path(name))? };
        let bar = progress_bar("copying the image");
        bar.set_length(length);
        let copied = std::io::copy(&mut bar.wrap_read(&mut source), &mut file);
        let copied = copied.with_context(|| format!("cannot write {}", path.display()))?;
        if copied != length {
            bail!("{} changed while it was copied: {copied} of {length} bytes", original.display());
        }
        bar.finish_and_clear();
        Ok(Self { path, _memory: scratch.in_memory().then_some(file) })
    }

    /// Where it can be opened, by a process that this one starts, too.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn memory(length: u64) -> anyhow::Result<(PathBuf, File)> {
    let memory = Memory::memfd("farbus-demo", length).context("cannot make an image in memory")?;
    let (fd, _) = memory.file().context("memory without a descriptor")?;
    let file = File::from(fd.try_clone_to_owned().context("cannot keep an image in memory")?);
    Ok((PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd())), file))
}

fn on_disk(path: PathBuf) -> anyhow::Result<(PathBuf, File)> {
    let file = File::create_new(&path).with_context(|| format!("cannot make {}", path.display()))?;
    Ok((path, file))
}
