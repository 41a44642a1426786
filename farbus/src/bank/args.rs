//! The arguments of `farbus bank`, with its help.
//!
//! `farbus bank deposit /srv/bank vm7 --memory vm7.ram --disk vm7.img` parses into a [`DepositArgs`] with two sections, `memory` and `disk0`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};

use super::address::BankAddress;
use super::archive_args::{ExportArgs, ImportArgs};
use super::keep_args::{CopyArgs, GcArgs, RemoveArgs, StatsArgs, VerifyArgs};
use super::serve_args::{BankLinkArgs, ServeArgs};
use super::{help_text, vmm_help};
use crate::service::ServiceArgs;
use crate::values::{parse_duration, parse_size};

/// `farbus bank`
#[derive(Debug, Args)]
#[command(help_template = help_text::grouped(), after_help = help_text::BANK)]
pub struct BankArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: BankCommand,
}

/// The commands of `farbus bank`.
#[derive(Debug, Subcommand)]
pub enum BankCommand {
    /// Make an empty bank
    Init(InitArgs),
    /// Save a machine: memory, disks and device state from files
    Deposit(DepositArgs),
    /// Write a machine to files again, every page verified
    Withdraw(WithdrawArgs),
    /// Serve a machine's memory to VMMs as they use it (Firecracker's page-fault handler)
    ServeFaults(ServeFaultsArgs),
    /// Let others use the bank over shared memory or RDMA
    Serve(ServeArgs),
    /// Which machines are there
    List(ListArgs),
    /// What a machine consists of, and what became of its pages
    Show(ShowArgs),
    /// What differs between two machines
    Diff(DiffArgs),
    /// Read everything and say what is damaged; exit status 1 if anything is
    Verify(VerifyArgs),
    /// Take machines out, by name or by age; their pages go with the next gc
    Remove(RemoveArgs),
    /// Remove pages that no machine names
    Gc(GcArgs),
    /// What the bank holds, and what it saves
    Stats(StatsArgs),
    /// Take a machine from one bank to another: what the other lacks
    Copy(CopyArgs),
    /// Write a machine to one file or pipe, that any bank of the same tenant can import
    Export(ExportArgs),
    /// Make a machine of such a file or pipe, every page verified
    Import(ImportArgs),
}

impl BankArgs {
    /// Whether one JSON object is wanted.
    pub fn json(&self) -> bool {
        self.place().json
    }

    /// Whether it runs until it is told to end, and prints an object for each thing that happens.
    pub fn is_server(&self) -> bool {
        matches!(self.command, BankCommand::Serve(_) | BankCommand::ServeFaults(_))
    }

    /// The bank that it is about.
    pub fn place(&self) -> &Place {
        match &self.command {
            BankCommand::Init(args) => &args.place,
            BankCommand::Deposit(args) => &args.place,
            BankCommand::Withdraw(args) => &args.place,
            BankCommand::ServeFaults(args) => &args.place,
            BankCommand::Serve(args) => &args.place,
            BankCommand::List(args) => &args.place,
            BankCommand::Show(args) => &args.place,
            BankCommand::Diff(args) => &args.place,
            BankCommand::Verify(args) => &args.place,
            BankCommand::Remove(args) => &args.place,
            BankCommand::Gc(args) => &args.place,
            BankCommand::Stats(args) => &args.place,
            BankCommand::Copy(args) => &args.place,
            BankCommand::Export(args) => &args.place,
            BankCommand::Import(args) => &args.place,
        }
    }
}

/// Over the options that all commands have.
const HEADING: &str = "The bank";

/// Which bank, and how to use it.
#[derive(Clone, Debug, Args)]
pub struct Place {
    /// The bank: a directory, s3://BUCKET/PREFIX, file:///DIRECTORY, or where farbus bank serve serves one (shm:PATH, rdma:HOST:PORT[,dev=NAME])
    #[arg(value_name = "BANK")]
    pub bank: BankAddress,
    /// A file with the tenant's key, 32 bytes or 64 hexadecimal digits: the bank then names pages so that nobody without it can ask for one
    #[arg(long, help_heading = HEADING, value_name = "FILE")]
    pub tenant_key: Option<PathBuf>,
    /// How long to wait for a process that uses the bank in another way (a deposit during a gc), as in 10s or 5m
    #[arg(long, help_heading = HEADING, value_name = "TIME", default_value = "10s", value_parser = parse_duration)]
    pub wait: Duration,
    /// Keep what is read from the bank in this directory, or nowhere: "none"; without it buckets have ~/.cache/farbus/bank, and other banks none.
    /// Of a bank over a link pages are kept, in a file of their own; of a sealed bank nothing that is not sealed
    #[arg(long, help_heading = HEADING, value_name = "DIR")]
    pub cache: Option<PathBuf>,
    /// How large a cache becomes that is made now, or is of another size and not in use, as in 512M or 4G
    #[arg(long, help_heading = HEADING, value_name = "SIZE", default_value = "4G", value_parser = parse_size)]
    pub cache_size: u64,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    /// How the other side is known, where it is at a link.
    #[command(flatten)]
    pub link: BankLinkArgs,
}

/// `farbus bank init`
#[derive(Debug, Args)]
#[command(
    after_help = "With --encrypt nothing of a machine is in the bank but under the key: pages, manifests and the index are sealed, and whoever keeps the bank
can neither read them nor change them unnoticed. Machines' names, and how large and old things are, can be seen. The bank says itself that it is
sealed. Keep the key: without it nothing comes out again."
)]
pub struct InitArgs {
    /// The bank.
    #[command(flatten)]
    pub place: Place,
    /// Seal everything in it under the tenant's key
    #[arg(long, requires = "tenant_key")]
    pub encrypt: bool,
}

/// A section and its file: `FILE`, or `NAME=FILE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// The section.
    pub name: Option<String>,
    /// The file.
    pub file: PathBuf,
}

/// A name is what a section can be called; anything else before a `=` belongs to the file.
fn parse_part(text: &str) -> Result<Part, String> {
    if let Some((name, file)) = text.split_once('=')
        && farbus_machine_bank::manifest::valid_machine(name)
    {
        return if file.is_empty() {
            Err("a file is missing behind the =".to_owned())
        } else {
            Ok(Part { name: Some(name.to_owned()), file: file.into() })
        };
    }
    Ok(Part { name: None, file: text.into() })
}

/// The same with a name that has to be there.
fn parse_named(text: &str) -> Result<Part, String> {
    parse_part(text).and_then(|part| if part.name.is_some() { Ok(part) } else { Err("write SECTION=FILE".to_owned()) })
}

/// What a machine can be called.
pub(super) fn parse_machine(text: &str) -> Result<String, String> {
    if farbus_machine_bank::manifest::valid_machine(text) {
        Ok(text.to_owned())
    } else {
        Err("a machine is called by 1 to 64 letters, digits, '.', '_' and '-', and does not begin with '.' or '-'".to_owned())
    }
}

/// What people call a machine that is there: its name, one of its deposits, digits of its root.
pub(super) fn parse_wish(text: &str) -> Result<String, String> {
    let (machine, number) = text.split_once('@').map_or((text, None), |(machine, number)| (machine, Some(number)));
    if number.is_some_and(|number| number.parse::<u64>().is_err()) {
        return Err("write MACHINE, MACHINE@NUMBER, or 6 or more digits of a root".to_owned());
    }
    parse_machine(machine).map(|_| text.to_owned())
}

/// `farbus bank deposit`
#[derive(Debug, Args)]
#[command(after_help = vmm_help::DEPOSIT)]
pub struct DepositArgs {
    /// The bank.
    #[command(flatten)]
    pub place: Place,
    /// What the machine is called
    #[arg(value_name = "MACHINE", value_parser = parse_machine)]
    pub machine: String,
    /// A memory image (section "memory", or NAME; repeatable)
    #[arg(long, value_name = "[NAME=]FILE", value_parser = parse_part)]
    pub memory: Vec<Part>,
    /// A raw disk image (sections "disk0", "disk1" …, or NAME; repeatable)
    #[arg(long, value_name = "[NAME=]FILE", value_parser = parse_part)]
    pub disk: Vec<Part>,
    /// State of devices, in any format (section "devices", or NAME; repeatable)
    #[arg(long, value_name = "[NAME=]FILE", value_parser = parse_part)]
    pub device_state: Vec<Part>,
    /// A machine that QEMU saved into one file with the capability mapped-ram: a section for each block of memory, and one for the rest
    #[arg(long, value_name = "FILE")]
    pub qemu: Option<PathBuf>,
    /// A machine that Cloud Hypervisor hands over: listen at this socket until it does (sections "slot0" …, "config", "state")
    #[arg(long, value_name = "SOCKET", conflicts_with_all = ["qemu", "memory", "dirty"])]
    pub cloud_hypervisor: Option<PathBuf>,
    /// Which pages of a section may have changed since the parent (repeatable)
    #[arg(long, value_name = "SECTION=FILE", value_parser = parse_named)]
    pub dirty: Vec<Part>,
    /// What to compare with: a machine, or "none"; without it the last deposit of this machine
    #[arg(long, value_name = "MACHINE", value_parser = parse_wish)]
    pub parent: Option<String>,
}

/// `farbus bank withdraw`
#[derive(Debug, Args)]
#[command(
    after_help = vmm_help::WITHDRAW
)]
pub struct WithdrawArgs {
    /// The bank.
    #[command(flatten)]
    pub place: Place,
    /// The machine
    #[arg(value_name = "MACHINE", value_parser = parse_wish)]
    pub machine: String,
    /// Write all sections to files of their names in this folder, which is made where it is missing
    #[arg(long, value_name = "DIR", required_unless_present_any = ["section", "qemu", "cloud_hypervisor"])]
    pub to: Option<PathBuf>,
    /// Write the machine to this file, that QEMU resumes from, if it was deposited with --qemu
    #[arg(long, value_name = "FILE")]
    pub qemu: Option<PathBuf>,
    /// Hand the machine to the Cloud Hypervisor that waits at this socket, if one had handed it over
    #[arg(long, value_name = "SOCKET", conflicts_with = "qemu")]
    pub cloud_hypervisor: Option<PathBuf>,
    /// Its guest goes on at once, and each page comes when it is used; it has to wait with memory_mode=postcopy
    #[arg(long, requires = "cloud_hypervisor")]
    pub on_demand: bool,
    /// Its guest runs then, and is not paused
    #[arg(long, requires = "cloud_hypervisor")]
    pub resume: bool,
    /// Write this section to this file (repeatable)
    #[arg(long, value_name = "SECTION=FILE", value_parser = parse_named)]
    pub section: Vec<Part>,
    /// Put it in the place of files that are there
    #[arg(long)]
    pub replace: bool,
}

/// `farbus bank serve-faults`
#[derive(Debug, Args)]
#[command(
    after_help = "A VMM that loads a snapshot connects, passes its userfaultfd and says where its memory lies; from then on each page comes when it is
used, verified, 64 KiB at a time. In Firecracker's API: PUT /snapshot/load with \"mem_backend\": {\"backend_type\": \"Uffd\", \"backend_path\": PATH}.

All VMMs get the same machine, and what one of them fetched the cache has for the others. A client that says something wrong is refused, and the
next one is served. SIGINT and SIGTERM end it; a VMM whose memory is not all there then waits for ever, so end the VMMs first.

A bank that is away is waited for, by whoever needs more of it than the cache has: it is asked again after 10 ms and then more and more seldom, at last
every 2 s, for as long as it takes or until --give-up. What is damaged or lost in a bank that is there is a SIGBUS in the VMM, and never another byte."
)]
pub struct ServeFaultsArgs {
    /// The bank.
    #[command(flatten)]
    pub place: Place,
    /// Where to listen: a unix socket, which is made
    #[arg(long, value_name = "PATH")]
    pub socket: PathBuf,
    /// The machine
    #[arg(long, value_name = "MACHINE", value_parser = parse_wish)]
    pub machine: String,
    /// Which section is the memory
    #[arg(long, value_name = "SECTION", default_value = "memory")]
    pub section: String,
    /// Fetch everything, in the background, and not only what is used
    #[arg(long)]
    pub rest: bool,
    /// Keep with the machine, as a deposit of its own, what the first VMM used, in that order: the next withdrawal fetches it ahead
    #[arg(long)]
    pub keep_working_set: bool,
    /// How much of verified pages is kept in memory for VMMs to come, as in 512M or 2G
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = parse_size)]
    pub memory_cache: u64,
    /// Take what is needed of a bank that is away for so long for lost: its use is then a SIGBUS in the VMM, for ever
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub give_up: Option<Duration>,
    /// What it is as a service.
    #[command(flatten)]
    pub service: ServiceArgs,
}

/// `farbus bank list`
#[derive(Debug, Args)]
pub struct ListArgs {
    /// The bank.
    #[command(flatten)]
    pub place: Place,
    /// Only deposits of this machine
    #[arg(value_name = "MACHINE", value_parser = parse_machine)]
    pub machine: Option<String>,
}

/// `farbus bank show`
#[derive(Debug, Args)]
pub struct ShowArgs {
    /// The bank.
    #[command(flatten)]
    pub place: Place,
    /// The machine
    #[arg(value_name = "MACHINE", value_parser = parse_wish)]
    pub machine: String,
}

/// `farbus bank diff`
#[derive(Debug, Args)]
pub struct DiffArgs {
    /// The bank.
    #[command(flatten)]
    pub place: Place,
    /// The earlier machine
    #[arg(value_name = "BEFORE", value_parser = parse_wish)]
    pub before: String,
    /// The later one
    #[arg(value_name = "AFTER", value_parser = parse_wish)]
    pub after: String,
    /// List at most so many stretches of each section that differ
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub ranges: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_a_file_with_or_without_a_name() {
        let part = |name: Option<&str>, file: &str| Ok(Part { name: name.map(str::to_owned), file: file.into() });
        assert_eq!(parse_part("vm7.ram"), part(None, "vm7.ram"));
        assert_eq!(parse_part("ram1=vm7.ram"), part(Some("ram1"), "vm7.ram"));
        assert_eq!(parse_part("./a=b"), part(None, "./a=b"));
        assert!(parse_part("ram=").is_err() && parse_named("vm7.ram").is_err());
    }
}
