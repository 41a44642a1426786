//! `farbus bank withdraw`: a machine becomes files.
//!
//! `--to vm7` writes `vm7/memory.part`, and when every page is there and right renames it to `vm7/memory`; run again after a power cut it goes on where it was.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use farbus_machine_bank::Withdrawal;
use farbus_machine_bank::cloud_hypervisor::RestoreReport;
use farbus_machine_bank::manifest::LEAF;
use farbus_machine_bank::qemu::{QemuReport, SECTION};
use farbus_machine_bank::store::CacheFigures;
use farbus_machine_bank::withdraw::WithdrawReport;
use serde::Serialize;

use super::args::WithdrawArgs;
use super::help::Helped;
use super::progress::Bar;
use super::{cloud_hypervisor, find, open_counted, say, size, wire, wire_line};
use crate::failure::{Advise, refusal};

#[derive(Serialize)]
struct Written {
    section: String,
    file: PathBuf,
    #[serde(flatten)]
    report: WithdrawReport,
}

#[derive(Serialize)]
struct Qemu {
    file: PathBuf,
    #[serde(flatten)]
    report: QemuReport,
}

/// Withdraws a machine.
pub fn run(args: &WithdrawArgs) -> anyhow::Result<()> {
    let (bank, counters) = open_counted(&args.place.bank, &args.place)?;
    let entry = find(&bank, &args.place, &args.machine)?;
    let what = || format!("cannot withdraw {entry}");
    let withdrawal = bank.withdraw(&entry).helped(what(), &args.place)?;
    let mut files: Vec<(String, PathBuf)> =
        args.section.iter().map(|part| (part.name.clone().unwrap_or_default(), part.file.clone())).collect();
    for (name, _) in &files {
        if withdrawal.manifest().section(name).is_none() {
            return Err(refusal(
                format!("{entry} has no section {name}"),
                format!("farbus bank show {} {entry} lists them", args.place.bank),
            ));
        }
    }
    if let Some(folder) = &args.to {
        fs::create_dir_all(folder)
            .advise(format!("cannot make {}", folder.display()), "choose a folder that this user can write")?;
        let mut inside = Vec::new();
        if args.qemu.is_some() {
            let kept = withdrawal.qemu_file().helped(what(), &args.place)?;
            inside.extend(kept.blocks().iter().map(|block| block.section.clone()).chain([SECTION.to_owned()]));
        }
        let others = withdrawal.manifest().head.sections.iter().map(|section| section.name.clone());
        let others: Vec<_> =
            others.filter(|name| !inside.contains(name) && !files.iter().any(|(other, _)| other == name)).collect();
        files.extend(others.into_iter().map(|name| (name.clone(), folder.join(name))));
    }
    let all: Vec<_> = files.iter().map(|(_, path)| path).chain(&args.qemu).collect();
    for (at, path) in all.iter().enumerate() {
        if all[..at].contains(path) {
            return Err(refusal(format!("{} is named twice", path.display()), "write each section to a file of its own"));
        }
        match path.symlink_metadata() {
            Ok(_) if !args.replace => {
                return Err(refusal(format!("{} is there", path.display()), "choose another name, or say --replace"));
            }
            Ok(about) if !about.is_file() => {
                let what = format!("{} is no ordinary file, and only such are replaced", path.display());
                return Err(refusal(what, "withdraw to a file, and write it from there: dd if=FILE of=/dev/vdb bs=4M conv=fsync"));
            }
            _ => {}
        }
    }
    let mut written = Vec::new();
    for (section, file) in files {
        let report = whole(&file, |target| {
            let bar = Bar::new(&section);
            withdrawal.section(&section, target, &|progress| bar.show(progress)).helped(what(), &args.place)
        })?;
        written.push(Written { section, file, report });
    }
    let handed = args.cloud_hypervisor.as_deref().map(|path| cloud_hypervisor::withdraw(&bank, &entry, args, path)).transpose()?;
    let qemu = args.qemu.as_deref().map(|file| qemu(&withdrawal, file, args, &what())).transpose()?;
    let cache = counters.map(|counters| counters.figures());
    let mut object = serde_json::json!({ "machine": entry.to_string(), "root": entry.root.to_string(), "sections": written, "cache": cache, "qemu": qemu, "cloud_hypervisor": handed });
    let wire = wire(&bank);
    if let Some(wire) = wire {
        object["wire"] = serde_json::to_value(wire)?;
    }
    say(&args.place, &object, || {
        let line = |Written { section, file, report }: &Written| {
            let WithdrawReport { pages, zero, there, fetched } = report;
            let there = if *there > 0 { format!(", {there} there already") } else { String::new() };
            format!("{section}: {pages} pages in {}: {zero} zero, {fetched} verified{there}", file.display())
        };
        let mut lines: Vec<_> = written.iter().map(line).collect();
        if let Some(Qemu { file, report }) = &qemu {
            let fetched: u64 = report.sections.iter().map(|(_, report)| report.fetched).sum();
            let sections = report.sections.len();
            lines.push(format!("{}: {}, of {sections} sections: {fetched} pages verified", file.display(), size(report.bytes)));
        }
        if let Some(RestoreReport { slots, bytes, faults, placed, .. }) = &handed {
            let on_demand = if args.on_demand { format!(": {placed} pages for {faults} requests") } else { String::new() };
            lines.push(format!("Cloud Hypervisor has {entry}, {slots} slots of {}{on_demand}", size(*bytes)));
        }
        lines.extend(cache.map(|CacheFigures { hits, misses, wire_bytes, .. }| {
            if wire.is_some() {
                return format!("{misses} pages came from the bank, and {hits} from the cache");
            }
            format!("{} came from the bank, and {hits} blocks of 32 KiB from the cache", size(wire_bytes))
        }));
        let leaves = written.iter().map(|written| written.report.pages.div_ceil(LEAF as u64)).sum();
        lines.join("\n") + &wire_line(wire, leaves)
    })
}

/// Writes a file under another name, and gives it its own when all of it is there.
fn whole<T>(file: &Path, write: impl FnOnce(&File) -> anyhow::Result<T>) -> anyhow::Result<T> {
    let part = part(file);
    let advice = "choose a place that this user can write, on a file system with room for it";
    let target = File::options().create(true).truncate(false).read(true).write(true).open(&part);
    let target = target.advise(format!("cannot write {}", part.display()), advice)?;
    let report = write(&target)?;
    fs::rename(&part, file).advise(format!("cannot write {}", file.display()), advice)?;
    Ok(report)
}

fn qemu(withdrawal: &Withdrawal<'_>, file: &Path, args: &WithdrawArgs, what: &str) -> anyhow::Result<Qemu> {
    // Before anything is made in its place.
    withdrawal.qemu_file().helped(what, &args.place)?;
    let report = whole(file, |target| {
        let bar = Bar::new("qemu");
        withdrawal.qemu(target, &|progress| bar.show(progress)).helped(what, &args.place)
    })?;
    Ok(Qemu { file: file.to_owned(), report })
}

/// What a file is called until all of it is there.
pub(super) fn part(file: &Path) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(".part");
    name.into()
}
