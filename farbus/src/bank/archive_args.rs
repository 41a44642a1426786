//! The arguments of `farbus bank export` and `import`, with their help.
//!
//! `farbus bank export /srv/bank vm7 --since vm7@3 -` parses into an [`ExportArgs`] whose file is `-`, standard output.

use std::path::PathBuf;

use clap::Args;

use super::args::{Place, parse_wish};

/// `farbus bank export`
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  farbus bank export /srv/bank vm7@3 vm7.archive
  farbus bank export /srv/bank vm7 --since vm7@3 vm7-changes.archive
  farbus bank export /srv/bank vm7 - | ssh other farbus bank import /srv/bank -

An archive has the machine's pages and no other's, compressed and not encrypted. That of a bank with a tenant key is imported with that key only. The root
that is printed says what the machine is: compare it with what the import prints.")]
pub struct ExportArgs {
    /// The bank.
    #[command(flatten)]
    pub place: Place,
    /// The machine
    #[arg(value_name = "MACHINE", value_parser = parse_wish)]
    pub machine: String,
    /// The archive, or - for standard output; what was done is then said on standard error
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Leave out what this machine has: the archive is then imported only where it is
    #[arg(long, value_name = "MACHINE", value_parser = parse_wish)]
    pub since: Option<String>,
    /// Put it in the place of a file that is there
    #[arg(long)]
    pub replace: bool,
}

/// `farbus bank import`
#[derive(Debug, Args)]
#[command(
    after_help = "The machine keeps its root, its name and its time, and becomes the last deposit of that name. An archive that was cut off or changed
is refused, and no machine is made; pages that came are removed by the next farbus bank gc."
)]
pub struct ImportArgs {
    /// The bank.
    #[command(flatten)]
    pub place: Place,
    /// The archive, or - for standard input
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}
