//! `farbus bank list`, `show`, `diff` and `stats`: what is there, from manifests alone.
//!
//! `farbus bank list /srv/bank` prints a line for each deposit: "vm7@2  2026-11-27 09:14:03  512.00 MiB  9f02ab31c4d5".

use std::process::ExitCode;

use farbus_machine_bank::keep;
use farbus_machine_bank::manifest::{Counts, ManifestError};
use serde::Serialize;
use time::OffsetDateTime;
use time::macros::format_description;

use super::args::{DiffArgs, ListArgs, ShowArgs};
use super::help::Helped;
use super::keep_args::StatsArgs;
use super::{damage, find, open, say, size};
use crate::count::count;

#[derive(Serialize)]
struct Deposited {
    machine: String,
    root: String,
    created_ms: u64,
    parent: Option<String>,
    rests_on: Option<String>,
    bytes: u64,
    manifest_bytes: u64,
    sections: Vec<Part>,
}

/// A line of the list.
#[derive(Serialize)]
#[serde(untagged)]
enum Listed {
    Whole(Deposited),
    Damaged(keep::Unreadable),
}

#[derive(Serialize)]
struct Part {
    name: String,
    kind: farbus_machine_bank::SectionKind,
    bytes: u64,
    #[serde(flatten)]
    counts: Counts,
}

fn deposited(bank: &farbus_machine_bank::Bank, entry: &farbus_machine_bank::Entry) -> Result<Deposited, ManifestError> {
    let manifest = bank.manifest(entry)?;
    let part = |section: &farbus_machine_bank::manifest::Section| Part {
        name: section.name.clone(),
        kind: section.kind,
        bytes: section.len,
        counts: section.counts,
    };
    Ok(Deposited {
        machine: entry.to_string(),
        root: entry.root.to_string(),
        created_ms: manifest.head.created_ms,
        parent: manifest.head.parent.map(|root| root.to_string()),
        rests_on: manifest.table.base.map(|root| root.to_string()),
        bytes: manifest.head.sections.iter().map(|section| section.len).sum(),
        manifest_bytes: entry.len,
        sections: manifest.head.sections.iter().map(part).collect(),
    })
}

/// Lists what is there. One that cannot be read keeps no other from being listed.
pub fn list(args: &ListArgs) -> anyhow::Result<ExitCode> {
    let bank = open(&args.place)?;
    let listing = bank.listing().helped("cannot list the machines", &args.place)?;
    let wanted = listing.0.iter().filter(|entry| args.machine.as_ref().is_none_or(|machine| *machine == entry.machine));
    let (mut machines, mut unreadable) = (Vec::new(), Vec::new());
    for entry in wanted {
        match deposited(&bank, entry) {
            Ok(machine) => machines.push(Listed::Whole(machine)),
            Err(error) => {
                let again = keep::look_again(&bank, entry, error, |_| deposited(&bank, entry));
                match again.helped(format!("cannot read {entry}"), &args.place)? {
                    keep::Again::Read(machine) => machines.push(Listed::Whole(machine)),
                    keep::Again::Gone => {}
                    keep::Again::Unreadable(why) => {
                        unreadable.push(why.clone());
                        machines.push(Listed::Damaged(why));
                    }
                }
            }
        }
    }
    let hint = (!unreadable.is_empty()).then(|| damage::way_out(&args.place, &unreadable));
    say(&args.place, &serde_json::json!({ "machines": machines, "hint": hint }), || {
        let name = |machine: &Listed| match machine {
            Listed::Whole(Deposited { machine, .. }) | Listed::Damaged(keep::Unreadable { machine, .. }) => machine.clone(),
        };
        let width = machines.iter().map(|machine| name(machine).len()).max().unwrap_or(0);
        let line = |machine: &Listed| match machine {
            Listed::Whole(Deposited { machine, created_ms, bytes, root, .. }) => {
                format!("{machine:width$}  {}  {:>10}  {root:.12}", when(*created_ms), size(*bytes))
            }
            Listed::Damaged(one) => format!("{:width$}  {:31}  {:.12}", one.machine, condition(one), one.root),
        };
        if machines.is_empty() {
            "no machine is there".to_owned()
        } else {
            machines.iter().map(line).collect::<Vec<_>>().join("\n")
        }
    })?;
    Ok(damage::status(&args.place, &unreadable))
}

/// In the place of when it was deposited and how large it is.
fn condition(one: &keep::Unreadable) -> String {
    match one {
        keep::Unreadable { damaged: false, .. } => "cannot be read".to_owned(),
        one if one.is_cause() => "damaged".to_owned(),
        one => format!("rests on {}", one.because_of),
    }
}

/// Shows one machine.
pub fn show(args: &ShowArgs) -> anyhow::Result<()> {
    let bank = open(&args.place)?;
    let entry = find(&bank, &args.place, &args.machine)?;
    let machine = deposited(&bank, &entry).helped(format!("cannot read {entry}"), &args.place)?;
    say(&args.place, &machine, || {
        let mut text =
            format!("machine    {}\nroot       {}\ndeposited  {} UTC\n", machine.machine, machine.root, when(machine.created_ms));
        text +=
            &format!("parent     {}\nmanifest   {}\n", machine.parent.as_deref().unwrap_or("none"), size(machine.manifest_bytes));
        for Part { name, kind, bytes, counts } in &machine.sections {
            let Counts { pages, zero, position, content, new, new_bytes } = counts;
            text += &format!(
                "{name} ({kind:?}, {}): {}: {zero} zero, {position} as in the parent, {content} known, {new} new in {}\n",
                size(*bytes),
                count(*pages, "page"),
                size(*new_bytes)
            );
        }
        text.trim_end().to_owned()
    })
}

/// Compares two machines.
pub fn diff(args: &DiffArgs) -> anyhow::Result<()> {
    let bank = open(&args.place)?;
    let (before, after) = (find(&bank, &args.place, &args.before)?, find(&bank, &args.place, &args.after)?);
    let what = || format!("cannot compare {before} and {after}");
    let found = keep::diff(&bank, &before, &after, args.ranges).helped(what(), &args.place)?;
    say(&args.place, &found, || {
        let mut text = String::new();
        for section in &found.sections {
            let here = match (section.len_before, section.len_after) {
                (None, _) => format!(", which {before} does not have"),
                (_, None) => format!(", which {after} does not have"),
                _ => String::new(),
            };
            text += &format!(
                "{}{here}: {} of {} changed, {} of them to zero\n",
                section.name,
                section.changed,
                count(section.pages, "page"),
                section.became_zero
            );
            section.ranges.iter().for_each(|(offset, bytes)| text += &format!("  {offset:#x}  {}\n", size(*bytes)));
            text += if section.more_ranges { "  …\n" } else { "" };
        }
        text.trim_end().to_owned()
    })
}

/// Adds up.
pub fn stats(args: &StatsArgs) -> anyhow::Result<ExitCode> {
    let bank = open(&args.place)?;
    let stats = keep::stats(&bank).helped("cannot add up the bank", &args.place)?;
    say(&args.place, &stats, || {
        let counted = match stats.unreadable.len() as u64 {
            0 => String::new(),
            unreadable => format!(", without {} that cannot be read", count(unreadable, "deposit")),
        };
        [
            format!(
                "{} of {}: {}{counted}",
                count(stats.deposits, "deposit"),
                count(stats.machines, "machine"),
                size(stats.logical)
            ),
            format!("  zero pages          {:>12}", size(stats.saved_zero)),
            format!("  as in the parent    {:>12}", size(stats.saved_position)),
            format!("  in the bank already {:>12}", size(stats.saved_content)),
            format!("  by compression      {:>12}", size(stats.saved_compression)),
            format!("stored: {}", size(stats.stored)),
            format!(
                "  {} {}, manifests {}, index {}",
                count(stats.packs, "pack"),
                size(stats.pack_bytes),
                size(stats.manifest_bytes),
                size(stats.index_bytes)
            ),
        ]
        .join("\n")
    })?;
    Ok(damage::status(&args.place, &stats.unreadable))
}

/// `2026-11-27 09:14:03`, UTC; what is no time is shown as the number that it is.
fn when(ms: u64) -> String {
    i64::try_from(ms / 1000)
        .ok()
        .and_then(|seconds| OffsetDateTime::from_unix_timestamp(seconds).ok())
        .and_then(|time| time.format(format_description!("[year]-[month]-[day] [hour]:[minute]:[second]")).ok())
        .unwrap_or_else(|| ms.to_string())
}
