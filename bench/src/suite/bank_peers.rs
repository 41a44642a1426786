//! What `farbus bench bank` runs: a series of images into a store and out of it, by ours and by others, each as its own program.
//!
//! `Tool::Restic.round(&series, scratch)` makes a repository, backs S0, S1 and S2 up, restores S2, and returns seconds and bytes added for each.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::bank_series::Series;

/// A program that keeps images.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tool {
    /// `farbus bank`, this program.
    Farbus,
    /// restic, as it comes.
    Restic,
    /// borg, as it comes, without encryption.
    Borg,
    /// casync with chunks of 64 KiB, as it comes.
    Casync,
    /// A plain copy.
    Cp,
    /// qemu-img to qcow2.
    QemuImg,
}

/// One round of a tool.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Round {
    /// Seconds of the first image, S0.
    pub first_s: f64,
    /// Seconds of S1, which is S0 after a while of idling; ours is told which pages that concerns.
    pub idle_s: f64,
    /// Bytes that it added.
    pub idle_bytes: f64,
    /// Seconds of S2, which is S0 after work.
    pub second_s: f64,
    /// Bytes that it added.
    pub second_bytes: f64,
    /// Seconds of S2 out into a file, which is then compared.
    pub restore_s: f64,
}

impl Tool {
    /// The peers.
    pub const PEERS: [Self; 5] = [Self::Restic, Self::Borg, Self::Casync, Self::Cp, Self::QemuImg];

    /// The program's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Farbus => "farbus",
            Self::Restic => "restic",
            Self::Borg => "borg",
            Self::Casync => "casync",
            Self::Cp => "cp",
            Self::QemuImg => "qemu-img",
        }
    }

    /// All of a series in and S2 out, in a new store in `scratch`, which is removed afterwards.
    ///
    /// # Errors
    /// The program is not there or fails, or what comes out is not what went in.
    pub fn round(self, farbus: &Path, series: &Series, scratch: &Path) -> Result<Round> {
        let place = scratch.join(self.name());
        fs::create_dir(&place).with_context(|| format!("cannot make {}", place.display()))?;
        let round = Place { tool: self, farbus, place: place.clone() }.round(series);
        fs::remove_dir_all(&place).with_context(|| format!("cannot remove {}", place.display()))?;
        round
    }
}

/// A folder in which a tool has its store.
pub struct Place<'a> {
    tool: Tool,
    farbus: &'a Path,
    place: PathBuf,
}

impl<'a> Place<'a> {
    /// restic in an empty folder, with one image in its store.
    ///
    /// # Errors
    /// restic is not there, or fails.
    pub fn restic(farbus: &'a Path, place: PathBuf, image: &Path) -> Result<Self> {
        fs::create_dir(&place).with_context(|| format!("cannot make {}", place.display()))?;
        let one = Self { tool: Tool::Restic, farbus, place };
        one.init(&one.place.join("store"))?;
        one.keep(&one.place.join("store"), "S2", image, &[])?;
        Ok(one)
    }

    /// The image that was kept last, out into a file of an empty folder of this place.
    ///
    /// # Errors
    /// It fails.
    pub fn restored(&self, out: &str, image: &Path) -> Result<PathBuf> {
        self.restore(&self.place.join("store"), &self.place.join(out), image)
    }

    fn init(&self, store: &Path) -> Result<()> {
        match self.tool {
            Tool::Farbus => self.run(&["bank", "init", text(store)?]),
            Tool::Restic => self.run(&["init", "--quiet", "--repo", text(store)?]),
            Tool::Borg => self.run(&["init", "--encryption", "none", text(store)?]),
            Tool::Casync | Tool::Cp | Tool::QemuImg => Ok(fs::create_dir(store)?),
        }
    }

    fn round(&self, series: &Series) -> Result<Round> {
        let store = self.place.join("store");
        self.init(&store)?;
        let (first_s, _) = self.keep(&store, "S0", &series.image("S0"), &[])?;
        let dirty = format!("memory={}", text(&series.idle_bitmap)?);
        let (idle_s, idle_bytes) = self.keep(&store, "S1", &series.image("S1"), &["--dirty", &dirty, "--parent", "vm@1"])?;
        // Both S1 and S2 are what S0 became.
        let (second_s, second_bytes) = self.keep(&store, "S2", &series.image("S2"), &["--parent", "vm@1"])?;
        let out = self.place.join("out");
        let start = Instant::now();
        let restored = self.restore(&store, &out, &series.image("S2"))?;
        let restore_s = start.elapsed().as_secs_f64();
        ensure!(same(&restored, &series.image("S2"))?, "{} gave out something else than it got", self.tool.name());
        Ok(Round { first_s, idle_s, idle_bytes, second_s, second_bytes, restore_s })
    }

    /// Keeps an image: seconds, and bytes by which the store grew. `ours` are arguments that only ours takes.
    fn keep(&self, store: &Path, name: &str, image: &Path, ours: &[&str]) -> Result<(f64, f64)> {
        let before = bytes_in(store)?;
        let (store_text, image) = (text(store)?, text(image)?);
        let start = Instant::now();
        match self.tool {
            Tool::Farbus => self.run(&[&["bank", "deposit", store_text, "vm", "--memory", image, "--json"], ours].concat())?,
            Tool::Restic => self.run(&["backup", "--quiet", "--repo", store_text, "--tag", name, image])?,
            Tool::Borg => self.run(&["create", &format!("{store_text}::{name}"), image])?,
            Tool::Casync => {
                let (index, chunks) = (self.place.join(format!("store/{name}.caibx")), self.place.join("store/chunks.castr"));
                self.run(&["make", &format!("--store={}", text(&chunks)?), text(&index)?, image])?;
            }
            Tool::Cp => self.run(&["--reflink=never", "--sparse=never", image, text(&store.join(name))?])?,
            Tool::QemuImg => self.run(&["convert", "-f", "raw", "-O", "qcow2", image, text(&store.join(name))?])?,
        }
        Ok((start.elapsed().as_secs_f64(), bytes_in(store)? - before))
    }

    /// S2 into a file below `out`; which is returned.
    fn restore(&self, store: &Path, out: &Path, image: &Path) -> Result<PathBuf> {
        let store_text = text(store)?;
        let below = |folder: &Path| folder.join(image.strip_prefix("/").unwrap_or(image));
        Ok(match self.tool {
            Tool::Farbus => {
                self.run(&["bank", "withdraw", store_text, "vm@3", "--section", &format!("memory={}", text(out)?)])?;
                out.to_owned()
            }
            Tool::Restic => {
                self.run(&["restore", "--quiet", "--repo", store_text, "latest", "--target", text(out)?])?;
                below(out)
            }
            Tool::Borg => {
                fs::create_dir(out)?;
                self.run_in(out, &["extract", &format!("{store_text}::S2")])?;
                below(out)
            }
            Tool::Casync => {
                let (index, chunks) = (store.join("S2.caibx"), store.join("chunks.castr"));
                self.run(&["extract", &format!("--store={}", text(&chunks)?), text(&index)?, text(out)?])?;
                out.to_owned()
            }
            Tool::Cp => {
                self.run(&["--reflink=never", "--sparse=never", text(&store.join("S2"))?, text(out)?])?;
                out.to_owned()
            }
            Tool::QemuImg => {
                self.run(&["convert", "-f", "qcow2", "-O", "raw", text(&store.join("S2"))?, text(out)?])?;
                out.to_owned()
            }
        })
    }

    fn run(&self, words: &[&str]) -> Result<()> {
        self.run_in(&self.place, words)
    }

    fn run_in(&self, folder: &Path, words: &[&str]) -> Result<()> {
        let program = if self.tool == Tool::Farbus { self.farbus } else { Path::new(self.tool.name()) };
        let home = self.place.join("home");
        let output = Command::new(program)
            .args(words)
            .current_dir(folder)
            .env("RESTIC_PASSWORD", "bench")
            .env("RESTIC_CACHE_DIR", &home)
            .env("BORG_BASE_DIR", &home)
            .env("BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK", "yes")
            .stdin(Stdio::null())
            .output();
        let output = output.with_context(|| format!("{} does not start; ci/bank/peers fetches it", program.display()))?;
        if !output.status.success() {
            bail!(
                "{} {words:?} ended with {}: {}",
                program.display(),
                output.status,
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(())
    }
}

/// A bank that is removed with the scratch folder.
pub struct Bank<'a> {
    farbus: &'a Path,
    /// Where it is.
    pub path: PathBuf,
}

impl<'a> Bank<'a> {
    /// An empty one in the scratch folder.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn new(program: &'a Path, scratch: &Path, name: &str) -> Result<Self> {
        let path = scratch.join(name);
        farbus(program, &["bank", "init", text(&path)?])?;
        Ok(Self { farbus: program, path })
    }

    /// What a deposit says.
    ///
    /// # Errors
    /// It fails.
    pub fn deposit(&self, machine: &str, section: &str, image: &Path) -> Result<Value> {
        deposit(self.farbus, &self.path, machine, section, image)
    }
}

/// What a deposit by ours says, as JSON: `counts` and bytes.
///
/// # Errors
/// It fails.
pub fn deposit(farbus: &Path, store: &Path, machine: &str, section: &str, image: &Path) -> Result<Value> {
    let output = Command::new(farbus)
        .args(["bank", "deposit", "--json", text(store)?, machine, section, text(image)?])
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("{} does not start", farbus.display()))?;
    ensure!(output.status.success(), "a deposit failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    serde_json::from_slice(&output.stdout).context("a deposit printed no JSON")
}

/// Runs ours for its effect.
///
/// # Errors
/// It fails.
pub fn farbus(program: &Path, words: &[&str]) -> Result<()> {
    let output = Command::new(program).args(words).stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("{} does not start", program.display()))?;
    ensure!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}

/// A path as an argument.
///
/// # Errors
/// It is no UTF-8.
pub fn text(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{} is no UTF-8", path.display()))
}

/// Bytes of all files below a folder.
fn bytes_in(folder: &Path) -> Result<f64> {
    let mut bytes = 0.0;
    for entry in fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))? {
        let entry = entry?;
        let about = entry.metadata()?;
        bytes += if about.is_dir() { bytes_in(&entry.path())? } else { about.len() as f64 };
    }
    Ok(bytes)
}

fn same(one: &Path, other: &Path) -> Result<bool> {
    use std::io::Read;
    let open = |path: &Path| fs::File::open(path).with_context(|| format!("cannot read {}", path.display()));
    let (mut one, mut other) = (open(one)?, open(other)?);
    if one.metadata()?.len() != other.metadata()?.len() {
        return Ok(false);
    }
    let mut buffers = [vec![0; 1 << 20], vec![0; 1 << 20]];
    loop {
        let read = one.read(&mut buffers[0])?;
        if read == 0 {
            return Ok(true);
        }
        other.read_exact(&mut buffers[1][..read])?;
        if buffers[0][..read] != buffers[1][..read] {
            return Ok(false);
        }
    }
}
