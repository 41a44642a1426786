//! `farbus bank withdraw`: a machine becomes files.
//!
//! `--to vm7` writes `vm7/memory.part`, and when every page is there and right renames it to `vm7/memory`; run again after a power cut it goes on where it was.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use farbus_machine_bank::store::CacheFigures;
use farbus_machine_bank::withdraw::WithdrawReport;
use serde::Serialize;

use super::args::WithdrawArgs;
use super::help::Helped;
use super::progress::Bar;
use super::{find, open_counted, say, size};
use crate::failure::{Advise, refusal};

#[derive(Serialize)]
struct Written {
    section: String,
    file: PathBuf,
    #[serde(flatten)]
    report: WithdrawReport,
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
        let others = withdrawal.manifest().head.sections.iter().map(|section| section.name.clone());
        let others: Vec<_> = others.filter(|name| !files.iter().any(|(other, _)| other == name)).collect();
        files.extend(others.into_iter().map(|name| (name.clone(), folder.join(name))));
    }
    for (_, path) in files.iter().filter(|_| !args.replace) {
        if path.exists() {
            return Err(refusal(format!("{} is there", path.display()), "choose another name, or say --replace"));
        }
    }
    let mut written = Vec::new();
    for (section, file) in files {
        let part = part(&file);
        let advice = "choose a place that this user can write, on a file system with room for it";
        let target = File::options().create(true).truncate(false).read(true).write(true).open(&part);
        let target = target.advise(format!("cannot write {}", part.display()), advice)?;
        let bar = Bar::new(&section);
        let report = withdrawal.section(&section, &target, &|progress| bar.show(progress)).helped(what(), &args.place)?;
        drop(bar);
        fs::rename(&part, &file).advise(format!("cannot write {}", file.display()), advice)?;
        written.push(Written { section, file, report });
    }
    let cache = counters.map(|counters| counters.figures());
    let object =
        serde_json::json!({ "machine": entry.to_string(), "root": entry.root.to_string(), "sections": written, "cache": cache });
    say(&args.place, &object, || {
        let line = |Written { section, file, report }: &Written| {
            let WithdrawReport { pages, zero, there, fetched } = report;
            let there = if *there > 0 { format!(", {there} there already") } else { String::new() };
            format!("{section}: {pages} pages in {}: {zero} zero, {fetched} verified{there}", file.display())
        };
        let of_cache = cache.map(|CacheFigures { hits, wire_bytes, .. }| {
            format!("{} came from the bank, and {hits} blocks of 32 KiB from the cache", size(wire_bytes))
        });
        written.iter().map(line).chain(of_cache).collect::<Vec<_>>().join("\n")
    })
}

/// What a file is called until all of it is there.
fn part(file: &Path) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(".part");
    name.into()
}
