//! `farbus bank verify`, `remove`, `gc` and `copy`: whether it is whole, what may go, and where else it should be.
//!
//! `farbus bank verify /srv/bank` prints "11 packs, 66243 pages, 3 machines: all is well" and ends with 0, or a line for each fault and 1.

use std::process::ExitCode;

use farbus_machine_bank::Bank;
use farbus_machine_bank::keep::{self, CopyError, Keep, Look, RepairReport, SweepOptions};
use farbus_machine_bank::store::StoreError;

use super::args::Place;
use super::help::Helped;
use super::keep_args::{CopyArgs, GcArgs, RemoveArgs, VerifyArgs};
use super::progress::Bar;
use super::{damage, find, open, open_itself, say, size};
use crate::count::count;

/// Verifies a bank.
pub fn verify(args: &VerifyArgs) -> anyhow::Result<ExitCode> {
    let bank = open_itself(&args.place)?;
    if args.repair {
        return repair(&bank, args);
    }
    let bar = Bar::new("verify");
    let report = keep::verify(&bank, &|progress| bar.show(progress)).helped("cannot verify the bank", &args.place)?;
    drop(bar);
    say(&args.place, &report, || {
        let read =
            format!("{}, {}, {}", count(report.packs, "pack"), count(report.pages, "page"), count(report.machines, "machine"));
        if report.faults.is_empty() {
            return format!("{read}: all is well");
        }
        let faults = report.faults.iter().map(|fault| format!("  {fault}\n")).collect::<String>();
        let mut text =
            format!("{read}: {}\n{faults}Machines that are not named are whole.", count(report.faults.len() as u64, "fault"));
        if report.damaged_packs > 0 {
            let bank = &args.place.bank;
            text += &format!(
                "\nfarbus bank verify {bank} --repair puts damaged packs aside, so that what they had can be stored again."
            );
        }
        text
    })?;
    damage::status(&args.place, &report.unreadable);
    Ok(if report.faults.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn repair(bank: &Bank, args: &VerifyArgs) -> anyhow::Result<ExitCode> {
    let bar = Bar::new("repair");
    let report = keep::repair(bank, &|progress| bar.show(progress)).helped("cannot repair the bank", &args.place)?;
    drop(bar);
    say(&args.place, &report, || {
        let RepairReport { packs, damaged, put_aside, moved, lost, machines, .. } = &report;
        if damaged.is_empty() && machines.is_empty() {
            return format!("{}: all is well", count(*packs, "pack"));
        }
        let lines = |faults: &[keep::Fault]| faults.iter().map(|fault| format!("  {fault}\n")).collect::<String>();
        let mut text = format!(
            "of {}, {} put aside; {} of them in new packs, {lost} lost\n",
            count(*packs, "pack"),
            put_aside.len(),
            count(*moved, "page")
        );
        text += &lines(damaged);
        text += &lines(machines);
        text += match (machines.is_empty(), *lost) {
            (true, _) => "Every machine is whole.",
            (_, 0) => "No page is lost.",
            _ => "The next deposit of such a machine as it was, a copy from another bank or an import stores again what is lost.",
        };
        text
    })?;
    damage::status(&args.place, &report.unreadable);
    Ok(if report.machines.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Removes machines.
pub fn remove(args: &RemoveArgs) -> anyhow::Result<()> {
    let bank = open_itself(&args.place)?;
    let entries = if args.damaged && !args.dry_run {
        Vec::new()
    } else if args.damaged {
        let found = keep::unreadable(&bank, Look::Leaves).helped("cannot tell what is damaged", &args.place)?;
        // What a later version wrote is none of it.
        found.into_iter().filter(|one| one.damaged).map(|one| one.entry).collect()
    } else if args.machines.is_empty() {
        let keep = Keep { last: args.keep_last.map(|last| last as usize), within: args.keep_within };
        keep::expired(&bank, args.machine.as_deref(), &keep).helped("cannot tell what has expired", &args.place)?
    } else {
        args.machines.iter().map(|wish| find(&bank, &args.place, wish)).collect::<Result<_, _>>()?
    };
    if args.dry_run {
        let names: Vec<_> = entries.iter().map(ToString::to_string).collect();
        return say(&args.place, &serde_json::json!({ "would_remove": names }), || format!("would remove: {}", words(&names)));
    }
    // Those that are damaged are found again where nobody else writes.
    let report = if args.damaged { keep::remove_damaged(&bank) } else { keep::remove(&bank, &entries) };
    let report = report.helped("cannot remove machines", &args.place)?;
    say(&args.place, &report, || {
        let stays = report.in_use.iter().map(|(machine, pid)| format!("\n{machine} stays: process {pid} withdraws it"));
        let needed = report.needed.iter().map(|(machine, by)| {
            let bank = &args.place.bank;
            format!("\n{machine} stays: {by} may rest on it and cannot be read: `farbus bank verify {bank}` tells why")
        });
        format!("removed: {}{}", words(&report.removed), stays.chain(needed).collect::<String>())
    })
}

fn words(names: &[String]) -> String {
    if names.is_empty() { "nothing".to_owned() } else { names.join(", ") }
}

/// Sweeps a bank.
pub fn gc(args: &GcArgs) -> anyhow::Result<()> {
    let bank = open_itself(&args.place)?;
    let options = SweepOptions { grace: args.grace, repack_below: args.repack_below, dry_run: args.dry_run };
    let report = keep::sweep(&bank, &options).helped("cannot collect garbage", &args.place)?;
    say(&args.place, &report, || {
        let verb = if args.dry_run { "would remove" } else { "removed" };
        let mut text = format!("{verb} {} of {}, {}", report.removed, count(report.packs, "pack"), size(report.removed_bytes));
        if report.moved > 0 {
            text += &format!("; {} of them still needed", count(report.moved, "page"));
        }
        if report.written_bytes > 0 {
            text += &format!(", now in {} of new packs", size(report.written_bytes));
        }
        if report.put_aside_bytes > 0 {
            text += &format!("; {} of packs that a repair had put aside", size(report.put_aside_bytes));
        }
        for pack in &report.damaged {
            text += &format!("\npack {pack} is damaged and stays");
        }
        if report.missing > 0 {
            text +=
                &format!("\nmachines miss {}: `farbus bank verify {}` tells which", count(report.missing, "page"), args.place.bank);
        }
        text
    })
}

/// Copies a machine.
pub fn copy(args: &CopyArgs) -> anyhow::Result<()> {
    // Of which of the two banks something is said decides what to do.
    let there = Place { bank: args.to.clone(), ..args.place.clone() };
    let (from, to) = (open(&args.place)?, open(&there)?);
    let entry = find(&from, &args.place, &args.machine)?;
    let bar = Bar::new("copy");
    let report = keep::copy(&from, &to, &entry, &|progress| bar.show(progress)).or_else(|error| {
        // Only the other one is written.
        let writes = matches!(error, CopyError::Store(StoreError::Full(_) | StoreError::ReadOnly(_) | StoreError::Lapsed { .. }));
        Err(error).helped(format!("cannot copy {entry}"), if writes { &there } else { &args.place })
    })?;
    drop(bar);
    say(&args.place, &report, || {
        let to = &args.to;
        if report.was_there {
            return format!("{entry} is in {to} already, as {}", report.machine);
        }
        format!("{entry} is in {to} as {}: copied {} in {}", report.machine, count(report.pages, "page"), size(report.pack_bytes))
    })
}
