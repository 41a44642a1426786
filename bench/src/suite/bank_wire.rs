//! What comes over the wire when a machine is withdrawn and the cache holds an earlier deposit of it.
//!
//! S0 is withdrawn through an empty cache from a bank of objects, and then S2: of its 512 MiB some 53 MB are fetched, because the rest is zero, or in S0 as well.
//! The cache counts what it asked its store for, so no wire is needed to know.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::bank_peers::{deposit, farbus, text};
use super::bank_series::Series;
use crate::report::{Row, Target};

/// The row.
pub fn row(series: &Series, program: &Path, scratch: &Path) -> Row {
    let (case, peer, target) =
        ("withdrawal of S2 where the cache holds S0, bytes from the store", "the full image", Target::AtMost(0.15));
    match wire(series, program, scratch) {
        Ok((bytes, full)) => Row::measured(case, "bytes", bytes, (peer, full), bytes / full, target),
        Err(error) => Row::missing(case, "bytes", peer, target, format!("{error:#}")),
    }
}

/// Bytes that came from the store, and those of the image.
fn wire(series: &Series, program: &Path, scratch: &Path) -> Result<(f64, f64)> {
    let folder = scratch.join("wire");
    fs::create_dir(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let bank = format!("file://{}", text(&folder.join("bank"))?);
    farbus(program, &["bank", "init", &bank])?;
    for image in ["S0", "S2"] {
        deposit(program, Path::new(&bank), "vm", "--memory", &series.image(image))?;
    }
    withdraw(program, &bank, "vm@1", &folder)?;
    let fetched = withdraw(program, &bank, "vm@2", &folder)?;
    let full = fs::metadata(series.image("S2")).context("S2 is gone")?.len() as f64;
    // Whoever withdraws compares what came, so that few bytes are not few because they are wrong.
    let same =
        fs::read(folder.join("vm@2/memory")).context("nothing came out")? == fs::read(series.image("S2")).context("S2 is gone")?;
    ensure!(same, "what came out is not S2");
    fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    Ok((fetched, full))
}

fn withdraw(program: &Path, bank: &str, machine: &str, folder: &Path) -> Result<f64> {
    let (to, cache) = (folder.join(machine), folder.join("cache"));
    let words = ["bank", "withdraw", "--json", bank, machine, "--to", text(&to)?, "--cache", text(&cache)?];
    let output = Command::new(program).args(words).stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("{} does not start", program.display()))?;
    ensure!(output.status.success(), "a withdrawal failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    let report: Value = serde_json::from_slice(&output.stdout).context("a withdrawal printed no JSON")?;
    report.pointer("/cache/wire_bytes").and_then(Value::as_f64).context("a withdrawal does not say what came over the wire")
}
