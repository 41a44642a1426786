//! `farbus bank export` and `import`: a machine as one file, or through a pipe.
//!
//! `farbus bank export /srv/bank vm7 - | ssh other farbus bank import /srv/bank -` takes the last deposit of `vm7` to another host's bank; each says what it did
//! when it has, the first on standard error, because its standard output is the archive.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, IsTerminal, Write};
use std::path::Path;

use farbus_machine_bank::archive::{self, ExportReport};

use super::archive_args::{ExportArgs, ImportArgs};
use super::help::Helped;
use super::parts::{self, PLACE, Part};
use super::progress::Bar;
use super::{find, open, say, size};
use crate::count::count;
use crate::failure::{Advise, misuse};

/// Where a pipe is meant.
const PIPE: &str = "-";

/// Exports a machine.
pub fn export(args: &ExportArgs) -> anyhow::Result<()> {
    let bank = open(&args.place)?;
    let entry = find(&bank, &args.place, &args.machine)?;
    let since = args.since.as_deref().map(|wish| find(&bank, &args.place, wish)).transpose()?;
    let write = |to: &mut dyn Write| {
        let bar = Bar::new("export");
        archive::export(&bank, &entry, since.as_ref(), to, &|progress| bar.show(progress))
            .helped(format!("cannot export {entry}"), &args.place)
    };
    if args.file == Path::new(PIPE) {
        let out = io::stdout();
        if out.is_terminal() {
            return Err(misuse(
                "an archive is nothing for a terminal",
                "name a file, or pipe it: farbus bank export BANK MACHINE - | …",
            ));
        }
        let report = write(&mut BufWriter::new(out.lock()))?;
        let said = if args.place.json { serde_json::to_string(&report)? } else { told(&report) };
        eprintln!("{said}");
        return Ok(());
    }
    let file = &args.file;
    if file.exists() && !args.replace {
        return Err(parts::there(file));
    }
    let part = Part::begin(file)?;
    let what = || format!("cannot write {}", file.display());
    // What an earlier process wrote of it is nothing to go on with.
    let written = part.target().set_len(0).advise(what(), PLACE).and_then(|()| write(&mut BufWriter::new(part.target())));
    let synced = written.and_then(|report| part.target().sync_all().advise(what(), PLACE).map(|()| report));
    let report = match synced {
        Ok(report) => report,
        Err(error) => {
            // Half an archive is of no use to anybody.
            part.forget();
            return Err(error);
        }
    };
    part.finish(args.replace)?;
    say(&args.place, &report, || told(&report))
}

fn told(report: &ExportReport) -> String {
    let since = report.since.as_ref().map_or(String::new(), |since| format!(" since {since}"));
    format!("{}{since}: {} in {}; root {}", report.machine, count(report.pages, "page"), size(report.bytes), report.root)
}

/// Imports a machine.
pub fn import(args: &ImportArgs) -> anyhow::Result<()> {
    let bank = open(&args.place)?;
    let what = || format!("cannot import {}", args.file.display());
    let bar = Bar::new("import");
    let report = if args.file == Path::new(PIPE) {
        archive::import(&bank, &mut io::stdin().lock(), &|progress| bar.show(progress))
    } else {
        let file = File::open(&args.file).advise(what(), "name a file that this user can read, or - for standard input")?;
        archive::import(&bank, &mut BufReader::new(file), &|progress| bar.show(progress))
    };
    let report = report.helped(what(), &args.place)?;
    drop(bar);
    say(&args.place, &report, || {
        if report.was_there {
            return format!("{} is the machine with the root {}: it was there", report.machine, report.root);
        }
        let (machine, pages, new) = (&report.machine, count(report.pages, "page"), report.new);
        format!("{machine}: {pages} verified, {new} new in {}; root {}", size(report.pack_bytes), report.root)
    })
}
