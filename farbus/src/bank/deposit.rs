//! `farbus bank deposit`: files become a machine.
//!
//! `--disk a.img --disk root=b.img` are the sections `disk0` and `root`; `--dirty memory=vm7.bitmap` says which pages of `memory` to read.

use std::fs::File;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use farbus_machine_bank::cloud_hypervisor::Other;
use farbus_machine_bank::deposit::DepositReport;
use farbus_machine_bank::manifest::LEAF;
use farbus_machine_bank::qemu::{Refused, SECTION, Saved};
use farbus_machine_bank::{Bank, Changes, DepositOptions, FileSource, Parent, SectionKind, Source};

use super::args::{DepositArgs, Part};
use super::help::Helped;
use super::progress::Bar;
use super::{cloud_hypervisor, open, say, size, wire, wire_line};
use crate::count::count;
use crate::failure::{Advise, misuse, refusal};

/// Deposits a machine.
pub fn run(args: &DepositArgs) -> anyhow::Result<()> {
    let sections = sections(args);
    if sections.is_empty() && args.qemu.is_none() && args.cloud_hypervisor.is_none() {
        return Err(misuse("nothing to deposit", "name files: --memory FILE, --disk FILE, --device-state FILE, --qemu FILE"));
    }
    let qemu = args.qemu.as_deref().map(file).transpose()?;
    let saved = qemu.as_ref().map(|file| Saved::open(file)).transpose().or_else(|refused| refused_qemu(args, refused))?;
    for part in &args.dirty {
        let name = part.name.as_deref().unwrap_or_default();
        let of_qemu = saved.iter().flat_map(Saved::blocks).any(|block| block.section == name);
        if !of_qemu && !sections.iter().any(|(_, section, _)| section == name) {
            return Err(misuse(
                format!("--dirty names {name}, and no section is called that"),
                "use the section's name, \"memory\" say",
            ));
        }
    }
    for (at, (_, name, _)) in sections.iter().enumerate() {
        if sections[..at].iter().any(|(_, other, _)| other == name) {
            return Err(misuse(format!("there are two sections {name}"), "name one of them otherwise: NAME=FILE"));
        }
    }
    if !args.dirty.is_empty() && args.parent.is_none() {
        return Err(misuse(
            "--dirty says what changed since a deposit, and none is named",
            "name it: --parent MACHINE@NUMBER; the last one may be somebody else's",
        ));
    }
    let bank = open(&args.place)?;
    let parent = match args.parent.as_deref() {
        None => Parent::Last,
        Some("none") => Parent::None,
        Some(wish) => Parent::Named(wish.to_owned()),
    };
    let what = || format!("cannot deposit {}", args.machine);
    let options = DepositOptions { parent };
    if let Some(path) = &args.cloud_hypervisor {
        let files = sections.iter().map(|(_, _, path)| file(path)).collect::<Result<Vec<_>, _>>()?;
        let others: Vec<Other<'_>> =
            sections.iter().zip(&files).map(|((kind, name, _), file)| (*kind, name.as_str(), file as &dyn Source)).collect();
        return tell(args, &bank, &cloud_hypervisor::deposit(&bank, args, path, &options, &others)?);
    }
    let mut deposit = bank.deposit(&args.machine, &options).helped(what(), &args.place)?;
    if !args.dirty.is_empty() && deposit.parent().is_none() {
        return Err(refusal(
            "--dirty says what changed since a parent, and there is none",
            "leave --dirty out for the first deposit, or name the parent with --parent MACHINE",
        ));
    }
    let mut section = |kind, name: &str, source: &dyn Source| -> anyhow::Result<()> {
        let dirty = args.dirty.iter().find(|part| part.name.as_deref() == Some(name));
        let dirty = dirty.map(|part| bitmap(&part.file)).transpose()?;
        let changes = dirty.as_deref().map_or(Changes::HashAll, Changes::Bitmap);
        let bar = Bar::new(name);
        deposit.section(kind, name, source, changes, &|progress| bar.show(progress)).helped(what(), &args.place)
    };
    if let Some(saved) = &saved {
        for block in saved.blocks() {
            section(SectionKind::Memory, &block.section, &saved.pages(block))?;
        }
        section(SectionKind::DeviceState, SECTION, &saved.rest())?;
    }
    for (kind, name, path) in &sections {
        section(*kind, name, &file(path)?)?;
    }
    tell(args, &bank, &deposit.commit().helped(what(), &args.place)?)
}

fn tell(args: &DepositArgs, bank: &Bank, report: &DepositReport) -> anyhow::Result<()> {
    let wire = wire(bank);
    let mut object = serde_json::to_value(report)?;
    if let Some(wire) = wire {
        object["wire"] = serde_json::to_value(wire)?;
    }
    say(&args.place, &object, || {
        let counts = &report.counts;
        let line = format!(
            "{}: {}: {} zero, {} as in {}, {} known, {} new; {} added",
            report.machine,
            count(counts.pages, "page"),
            counts.zero,
            counts.position,
            report.parent.as_deref().unwrap_or("a parent"),
            counts.content,
            counts.new,
            size(report.pack_bytes + report.manifest_bytes),
        );
        line + &wire_line(wire, counts.pages.div_ceil(LEAF as u64))
    })
}

fn file(path: &Path) -> anyhow::Result<FileSource> {
    let (what, advice) = (|| format!("cannot read {}", path.display()), "name a file or a block device that this user can read");
    // Before it is opened: a pipe would be waited for, and a terminal or /dev/zero has no end.
    let about = std::fs::metadata(path).advise(what(), advice)?.file_type();
    if !about.is_file() && !about.is_block_device() {
        return Err(refusal(format!("{} is neither a file nor a block device", path.display()), advice));
    }
    File::open(path).and_then(FileSource::new).advise(what(), advice)
}

fn refused_qemu<T>(args: &DepositArgs, refused: Refused) -> anyhow::Result<T> {
    let path = args.qemu.as_deref().unwrap_or(Path::new(""));
    let advice = match refused {
        Refused::Source(_) => "name a file that this user can read, and that nobody shortens meanwhile",
        _ => {
            "save the machine with QEMU 9 or newer: stop, migrate_set_capability mapped-ram on, migrate file:FILE; \
             or deposit its parts: --memory FILE, --device-state FILE"
        }
    };
    Err(refused).advise(format!("cannot deposit {}", path.display()), advice)
}

/// The sections with their names.
fn sections(args: &DepositArgs) -> Vec<(SectionKind, String, &Path)> {
    let mut sections = Vec::new();
    let mut add = |kind, parts: &'_ [Part], plain: &dyn Fn(usize) -> String| {
        for (at, part) in parts.iter().enumerate() {
            sections.push((kind, part.name.clone().unwrap_or_else(|| plain(at)), at));
        }
    };
    let numbered = |word: &'static str| move |at: usize| if at == 0 { word.to_owned() } else { format!("{word}{at}") };
    add(SectionKind::Memory, &args.memory, &numbered("memory"));
    add(SectionKind::Disk, &args.disk, &|at| format!("disk{at}"));
    add(SectionKind::DeviceState, &args.device_state, &numbered("devices"));
    let file = |kind, at: usize| match kind {
        SectionKind::Memory => args.memory[at].file.as_path(),
        SectionKind::Disk => args.disk[at].file.as_path(),
        _ => args.device_state[at].file.as_path(),
    };
    sections.into_iter().map(|(kind, name, at)| (kind, name, file(kind, at))).collect()
}

fn bitmap(path: &Path) -> anyhow::Result<Vec<u64>> {
    let bytes = std::fs::read(path).advise(
        format!("cannot read the bitmap {}", path.display()),
        "name a file that this user can read, or leave --dirty out",
    )?;
    let (words, rest) = bytes.as_chunks::<8>();
    if !rest.is_empty() {
        let what = format!("{} is no bitmap: it has {}", path.display(), count(bytes.len() as u64, "byte"));
        return Err(misuse(what, "a bitmap is 64-bit words, 8 bytes each, of which bit j of word i is page 64 i + j"));
    }
    Ok(words.iter().map(|word| u64::from_le_bytes(*word)).collect())
}
