//! Where the demo's images lie while it runs: in memory where there is room, and gone afterwards, however the demo ends.
//!
//! Three images of 256 MiB go to /dev/shm, and to /tmp where /dev/shm has less room than 768 MiB. Their names are taken away as soon as
//! everybody has opened them; until then a Ctrl-C does it.

use std::path::{Path, PathBuf};

use anyhow::Context;
use tempfile::TempDir;

use crate::failure::{Advise, refusal};
use crate::signals::EndSignals;

/// A folder for images.
pub struct Scratch {
    folder: TempDir,
    in_memory: bool,
}

impl Scratch {
    /// One for `needed` bytes. From now on the signals that end a command remove it first.
    pub fn new(needed: u64) -> anyhow::Result<Self> {
        let in_memory = Path::new("/dev/shm");
        let builder = |folder: &Path| tempfile::Builder::new().prefix("farbus-demo-").tempdir_in(folder);
        let (folder, in_memory) = match (room(in_memory) >= needed).then(|| builder(in_memory)) {
            Some(Ok(folder)) => (folder, true),
            _ => {
                let elsewhere = std::env::temp_dir();
                let mib = |bytes: u64| bytes >> 20;
                let hint = format!("set TMPDIR to a folder with {} MiB of room", needed.div_ceil(1 << 20));
                if room(&elsewhere) < needed {
                    let (there, room) = (elsewhere.display(), mib(room(&elsewhere)));
                    return Err(refusal(format!("there is not enough room for the images: {there} has {room} MiB"), hint));
                }
                (builder(&elsewhere).advise("cannot make a folder for the images", hint)?, false)
            }
        };
        remove_when_ended(folder.path().to_owned()).context("cannot wait for signals")?;
        Ok(Self { folder, in_memory })
    }

    /// Where `name` is.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Whether there is memory for the images.
    pub fn in_memory(&self) -> bool {
        self.in_memory
    }

    /// Takes all names away: the files live as long as somebody has them open.
    pub fn remove_names(self) {
        let path = self.folder.path().to_owned();
        if let Err(error) = self.folder.close() {
            tracing::warn!(%error, path = %path.display(), "a folder with images stays behind");
        }
    }
}

/// Bytes that this user may write in a folder; none where that cannot be told.
fn room(folder: &Path) -> u64 {
    rustix::fs::statvfs(folder).map(|stat| stat.f_bavail * stat.f_frsize).unwrap_or(0)
}

/// Ends the process at the first signal, after the folder is gone.
fn remove_when_ended(folder: PathBuf) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut signals = {
        let _inside = runtime.enter();
        EndSignals::new()?
    };
    std::thread::Builder::new().name("farbus-signals".into()).spawn(move || {
        let signal = runtime.block_on(signals.next());
        // It may be gone already, and there is nothing else to be done about it.
        let _gone = std::fs::remove_dir_all(&folder);
        eprintln!("farbus: ended by {signal}");
        // As a shell says it of a program that the signal killed.
        std::process::exit(match signal {
            "SIGHUP" => 128 + 1,
            "SIGINT" => 128 + 2,
            _ => 128 + 15,
        });
    })?;
    Ok(())
}
