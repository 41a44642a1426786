//! The arguments of `farbus bank verify`, `remove`, `gc`, `stats` and `copy`, with their help.
//!
//! `farbus bank remove /srv/bank --keep-last 7 --keep-within 30d` parses into a [`RemoveArgs`] that keeps what either of the two keeps.

use std::time::Duration;

use clap::Args;

use super::address::BankAddress;
use super::args::{Place, parse_machine, parse_wish};
use crate::values::parse_age;

/// `farbus bank verify`
#[derive(Debug, Args)]
#[command(
    after_help = "With --repair, while nobody deposits: packs that are damaged are put aside, with what is whole in them moved to new packs, and what is lost
is noted, so that the next deposit of the same machine, a copy or an import stores it again. That heals every machine that needs it. The next
farbus bank gc removes what was put aside."
)]
pub struct VerifyArgs {
    /// The bank.
    #[command(flatten)]
    pub place: Place,
    /// Put damaged packs aside, so that what they had can be stored again
    #[arg(long)]
    pub repair: bool,
}

/// `farbus bank remove`
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  farbus bank remove /srv/bank vm7@1 vm7@2
  farbus bank remove /srv/bank --keep-last 7 --keep-within 30d --machine vm7
  farbus bank gc /srv/bank

With both --keep-last and --keep-within a deposit stays that either of them keeps.")]
pub struct RemoveArgs {
    /// The bank.
    #[command(flatten)]
    pub place: Place,
    /// Machines to remove
    #[arg(value_name = "MACHINE", value_parser = parse_wish, required_unless_present_any = ["keep_last", "keep_within", "damaged"])]
    pub machines: Vec<String>,
    /// Remove all but the last N deposits of each machine
    #[arg(long, value_name = "N", conflicts_with = "machines", value_parser = clap::value_parser!(u32).range(1..))]
    pub keep_last: Option<u32>,
    /// Remove deposits older than this, as in 90m, 12h or 30d
    #[arg(long, value_name = "AGE", conflicts_with = "machines", value_parser = parse_age)]
    pub keep_within: Option<Duration>,
    /// Remove the deposits whose manifests are damaged, and those that can only be read by one of them
    #[arg(long, conflicts_with_all = ["machines", "keep_last", "keep_within", "machine"])]
    pub damaged: bool,
    /// Only deposits of this machine
    #[arg(long, value_name = "MACHINE", value_parser = parse_machine, conflicts_with = "machines")]
    pub machine: Option<String>,
    /// Only say what would be removed
    #[arg(long)]
    pub dry_run: bool,
}

/// `farbus bank gc`
#[derive(Debug, Args)]
pub struct GcArgs {
    /// The bank.
    #[command(flatten)]
    pub place: Place,
    /// Keep packs that no machine needs while they are younger than this: an interrupted deposit finds its pages there; as in 2h
    #[arg(long, value_name = "AGE", default_value = "0s", value_parser = parse_age)]
    pub grace: Duration,
    /// Write packs anew of which less than this part is needed
    #[arg(long, value_name = "PERCENT", default_value_t = 50, value_parser = clap::value_parser!(u8).range(0..=100))]
    pub repack_below: u8,
    /// Only say what would be removed
    #[arg(long)]
    pub dry_run: bool,
}

/// `farbus bank stats`
#[derive(Debug, Args)]
pub struct StatsArgs {
    /// The bank.
    #[command(flatten)]
    pub place: Place,
}

/// `farbus bank copy`
#[derive(Debug, Args)]
#[command(
    after_help = "The other bank has to be there (farbus bank init), and to have the same tenant key or none. The machine keeps its root."
)]
pub struct CopyArgs {
    /// The bank.
    #[command(flatten)]
    pub place: Place,
    /// The machine
    #[arg(value_name = "MACHINE", value_parser = parse_wish)]
    pub machine: String,
    /// The other bank
    #[arg(value_name = "TO")]
    pub to: BankAddress,
}
