//! The second process of the demo: this same program as `farbus lend`.
//!
//! It is ready when it has printed `{"event":"listening",…}`; it is ended by SIGTERM, and killed if this process fails before.

use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use serde_json::Value;

use crate::failure::Advise;
use crate::link_address::LinkAddress;

/// Longer than any pause inside a round, so that the device's thread does not sleep while it is measured; as the native device's.
const SPIN: &str = "2ms";

/// How long a process whose sockets are closed may take to be dead.
const LINGER: Duration = Duration::from_millis(500);

/// A running `farbus lend`.
pub struct LenderProcess {
    child: Child,
    address: LinkAddress,
}

impl LenderProcess {
    /// Lends `image` at `at` with more `options`, from `core` where one is given; returns when it listens.
    pub fn start(image: &Path, at: &LinkAddress, options: &[OsString], core: Option<usize>) -> anyhow::Result<Self> {
        let image = image
            .to_str()
            .filter(|path| !path.contains(','))
            .ok_or_else(|| anyhow!("a scratch folder with a comma or odd letters in its name"))?;
        let program = std::env::current_exe().context("cannot find this program to start it again")?;
        let mut child = Command::new(program)
            .args(["lend", "--once", "--json", "--spin", SPIN, "--device", &format!("nvme:{image}"), "--listen", &at.to_string()])
            .args(options)
            .args(core.map(|core| format!("--core={core}")))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start the lender")?;
        let mut line = String::new();
        if let Some(stdout) = child.stdout.as_mut() {
            BufReader::new(stdout).read_line(&mut line).context("cannot hear the lender")?;
        }
        let mut lender = Self { child, address: at.clone() };
        let said: Value = serde_json::from_str(&line).unwrap_or_default();
        match (said["event"].as_str(), said["error"].as_str(), said["address"].as_str()) {
            // Its port may have been chosen by the kernel.
            (Some("listening"), _, Some(address)) => lender.address = address.parse().context("the lender's address")?,
            (_, Some(error), _) => bail!("the lender did not start: {error}"),
            _ => bail!("the lender did not start; it said {line:?}"),
        }
        Ok(lender)
    }

    /// Where it listens.
    pub fn address(&self) -> &LinkAddress {
        &self.address
    }

    /// Explains a failure of the demo by the end of the lender, if that ended first.
    pub fn blame<T>(&mut self, result: anyhow::Result<T>) -> anyhow::Result<T> {
        let Err(error) = result else { return result };
        // Its sockets are closed a moment before it can be waited for.
        let deadline = Instant::now() + LINGER;
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) if !status.success() => {
                    let hint = "look for what ended it: what it said itself, or the kernel's log (dmesg) where memory ran out";
                    return Err(error).advise(format!("the lender process died ({status})"), hint);
                }
                Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(10)),
                _ => return Err(error),
            }
        }
    }

    /// Waits for its end: with `--once` it follows when the borrower has left.
    pub fn end(mut self) -> anyhow::Result<()> {
        let status = self.child.wait().context("cannot wait for the lender")?;
        if !status.success() {
            bail!("the lender ended with {status}");
        }
        Ok(())
    }
}

impl Drop for LenderProcess {
    fn drop(&mut self) {
        // Ended already in the good case; nothing can be done about the other.
        if self.child.try_wait().is_ok_and(|status| status.is_none()) && self.child.kill().is_ok() {
            drop(self.child.wait());
        }
    }
}
