//! `farbus bank withdraw`: a machine becomes files.
//!
//! `--to vm7` writes `vm7/memory.farbus-part` and `vm7/disk0.farbus-part`, and when every page of both is there and right gives both their names; run again after a
//! power cut it goes on where it was.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use farbus_machine_bank::Withdrawal;
use farbus_machine_bank::cloud_hypervisor::RestoreReport;
use farbus_machine_bank::deposit::{FileSource, Source};
use farbus_machine_bank::manifest::LEAF;
use farbus_machine_bank::qemu::{QemuReport, SECTION};
use farbus_machine_bank::store::CacheFigures;
use farbus_machine_bank::withdraw::{Target, WithdrawError, WithdrawReport};
use serde::Serialize;

use super::args::WithdrawArgs;
use super::help::Helped;
use super::parts::{self, Part};
use super::progress::Bar;
use super::{cloud_hypervisor, find, open_counted, say, size, wire, wire_line};
use crate::count::count;
use crate::failure::{Advise, misuse, refusal};

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
    let (bank, counters) = open_counted(&args.place)?;
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
    // Then some of the files may have their names already.
    let resumes = all.iter().any(|path| parts::is_begun(path));
    for (at, path) in all.iter().enumerate() {
        if all[..at].contains(path) {
            return Err(misuse(format!("{} is named twice", path.display()), "write each section to a file of its own"));
        }
        let may_be_ours = resumes && at < files.len();
        match path.symlink_metadata() {
            Ok(about) if !(args.replace || may_be_ours && about.is_file()) => return Err(parts::there(path)),
            Ok(about) if !about.is_file() => {
                let what = format!("{} is no ordinary file, and only such are replaced", path.display());
                return Err(refusal(what, "withdraw to a file, and write it from there: dd if=FILE of=/dev/vdb bs=4M conv=fsync"));
            }
            _ => {}
        }
    }
    if args.qemu.is_some() {
        // Before anything is made in its place.
        withdrawal.qemu_file().helped(what(), &args.place)?;
    }
    let (mut written, mut whole) = (Vec::new(), Vec::new());
    for (section, file) in files {
        let report = if !args.replace && file.exists() {
            finished(&withdrawal, &section, &file, args)?
        } else {
            let part = Part::begin(&file)?;
            let bar = Bar::new(&section);
            let report = withdrawal.section(&section, part.target(), &|progress| bar.show(progress)).helped(what(), &args.place)?;
            whole.push(part);
            report
        };
        written.push(Written { section, file, report });
    }
    // The last to get its name, so that it has none where one of the others has not.
    let qemu = args.qemu.as_deref().map(|file| qemu(&withdrawal, file, args, &what(), &mut whole)).transpose()?;
    whole.into_iter().try_for_each(|part| part.finish(args.replace))?;
    let handed = args.cloud_hypervisor.as_deref().map(|path| cloud_hypervisor::withdraw(&bank, &entry, args, path)).transpose()?;
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
            format!("{section}: {} in {}: {zero} zero, {fetched} verified{there}", count(*pages, "page"), file.display())
        };
        let mut lines: Vec<_> = written.iter().map(line).collect();
        if let Some(Qemu { file, report }) = &qemu {
            let fetched: u64 = report.sections.iter().map(|(_, report)| report.fetched).sum();
            let (sections, fetched) = (count(report.sections.len() as u64, "section"), count(fetched, "page"));
            lines.push(format!("{}: {}, of {sections}: {fetched} verified", file.display(), size(report.bytes)));
        }
        if let Some(RestoreReport { slots, bytes, faults, placed, .. }) = &handed {
            let on_demand = if args.on_demand {
                format!(": {} for {}", count(*placed, "page"), count(*faults, "request"))
            } else {
                String::new()
            };
            lines.push(format!("Cloud Hypervisor has {entry}, {} of {}{on_demand}", count(*slots, "slot"), size(*bytes)));
        }
        lines.extend(cache.map(|CacheFigures { hits, misses, wire_bytes, .. }| {
            if wire.is_some() {
                return format!("{} came from the bank, and {} from the cache", count(misses, "page"), count(hits, "page"));
            }
            format!("{} came from the bank, and {} of 32 KiB from the cache", size(wire_bytes), count(hits, "block"))
        }));
        let leaves = written.iter().map(|written| written.report.pages.div_ceil(LEAF as u64)).sum();
        lines.join("\n") + &wire_line(wire, leaves)
    })
}

/// A file that has its name already, of an earlier withdrawal that was interrupted when others had not: it is what the section is, or somebody else's.
fn finished(withdrawal: &Withdrawal<'_>, section: &str, file: &Path, args: &WithdrawArgs) -> anyhow::Result<WithdrawReport> {
    let what = || format!("cannot read {}", file.display());
    let advice = "choose another name, or say --replace";
    let source = File::open(file).and_then(FileSource::new).advise(what(), advice)?;
    let manifest = withdrawal.manifest();
    let len = manifest.section(section).map(|at| manifest.head.sections[at].len);
    if len != Some(source.len()) {
        return Err(parts::there(file));
    }
    let bar = Bar::new(section);
    match withdrawal.section_to(section, &Finished(source), false, &|progress| bar.show(progress)) {
        Err(WithdrawError::Target(error)) if error.kind() == io::ErrorKind::AlreadyExists => Err(parts::there(file)),
        compared => compared.helped(what(), &args.place),
    }
}

/// What is only looked at.
struct Finished(FileSource);

impl Target for Finished {
    fn there(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0.read_at(offset, buf)
    }

    fn write_at(&self, _offset: u64, _bytes: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::AlreadyExists.into())
    }
}

fn qemu(withdrawal: &Withdrawal<'_>, file: &Path, args: &WithdrawArgs, what: &str, whole: &mut Vec<Part>) -> anyhow::Result<Qemu> {
    let (part, bar) = (Part::begin(file)?, Bar::new("qemu"));
    let report = withdrawal.qemu(part.target(), &|progress| bar.show(progress)).helped(what, &args.place)?;
    whole.push(part);
    Ok(Qemu { file: file.to_owned(), report })
}
