//! The arguments of `farbus bank`, with its help.
//!
//! `farbus bank deposit /srv/bank vm7 --memory vm7.ram --disk vm7.img` parses into a [`DepositArgs`] with two sections, `memory` and `disk0`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};

use super::address::BankAddress;
use super::archive_args::{ExportArgs, ImportArgs};
use super::serve_args::{BankLinkArgs, ServeArgs};
use super::vmm_help;
use crate::values::{parse_duration, parse_size, parse_wait};

/// `farbus bank`
#[derive(Debug, Args)]
#[command(after_help = "A machine is what people write: vm7 (its last deposit), vm7@3 (its third), or at least 6 digits of a root.

A bank is a directory of this host (/srv/bank), a bucket of an S3-compatible service (s3://BUCKET/PREFIX), or a directory that is used as if it were one
(file:///DIRECTORY). Where the service is and who asks say AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the others of their kind;
http:// without encryption is used only with AWS_ALLOW_HTTP=true. What was read from a bucket is kept in a local cache (--cache).

Save a machine twice, look, and take it out again:
  farbus bank init /srv/bank
  farbus bank deposit /srv/bank vm7 --memory vm7.ram --disk vm7.img --device-state vm7.dev
  farbus bank deposit /srv/bank vm7 --memory vm7.ram --disk vm7.img --device-state vm7.dev
  farbus bank list /srv/bank
  farbus bank withdraw /srv/bank vm7@1 --to vm7-yesterday")]
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

/// Which bank, and how to use it.
#[derive(Debug, Args)]
pub struct Place {
    /// The bank: a directory, s3://BUCKET/PREFIX, file:///DIRECTORY, or where farbus bank serve serves one (shm:PATH, rdma:HOST:PORT[,dev=NAME])
    #[arg(value_name = "BANK")]
    pub bank: BankAddress,
    /// A file with the tenant's key, 32 bytes or 64 hexadecimal digits: the bank then names pages so that nobody without it can ask for one
    #[arg(long, value_name = "FILE")]
    pub tenant_key: Option<PathBuf>,
    /// How long to wait for a process that uses the bank in another way (a deposit during a gc)
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_duration)]
    pub wait: Duration,
    /// Keep what is read from the bank in this directory, for all banks and processes, or nowhere: "none". Without it a bucket has
    /// $XDG_CACHE_HOME/farbus/bank or ~/.cache/farbus/bank, and other banks none. A sealed bank's cache is as sealed as the bank; verify reads past it
    #[arg(long, value_name = "DIR")]
    pub cache: Option<PathBuf>,
    /// How large a cache becomes that is made now, or is of another size and not in use: 512MiB, 4GiB
    #[arg(long, value_name = "SIZE", default_value = "4GiB", value_parser = parse_size)]
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

/// `farbus bank deposit`
#[derive(Debug, Args)]
#[command(after_help = vmm_help::DEPOSIT)]
pub struct DepositArgs {
    /// The bank.
    #[command(flatten)]
    pub place: Place,
    /// What the machine is called
    #[arg(value_name = "MACHINE")]
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
    #[arg(long, value_name = "MACHINE")]
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
    #[arg(value_name = "MACHINE")]
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
    #[arg(long, value_name = "MACHINE")]
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
    /// MiB of verified pages that are kept for VMMs to come
    #[arg(long, value_name = "MIB", default_value_t = 1024)]
    pub memory_cache: u64,
    /// Take what is needed of a bank that is away for so long for lost: its use is then a SIGBUS in the VMM, for ever
    #[arg(long, value_name = "SECONDS")]
    pub give_up: Option<u64>,
}

/// `farbus bank list`
#[derive(Debug, Args)]
pub struct ListArgs {
    /// The bank.
    #[command(flatten)]
    pub place: Place,
    /// Only deposits of this machine
    #[arg(value_name = "MACHINE")]
    pub machine: Option<String>,
}

/// `farbus bank show`
#[derive(Debug, Args)]
pub struct ShowArgs {
    /// The bank.
    #[command(flatten)]
    pub place: Place,
    /// The machine
    #[arg(value_name = "MACHINE")]
    pub machine: String,
}

/// `farbus bank diff`
#[derive(Debug, Args)]
pub struct DiffArgs {
    /// The bank.
    #[command(flatten)]
    pub place: Place,
    /// The earlier machine
    #[arg(value_name = "BEFORE")]
    pub before: String,
    /// The later one
    #[arg(value_name = "AFTER")]
    pub after: String,
    /// List at most so many stretches of each section that differ
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub ranges: usize,
}

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
    #[arg(value_name = "MACHINE", required_unless_present_any = ["keep_last", "keep_within"])]
    pub machines: Vec<String>,
    /// Remove all but the last N deposits of each machine
    #[arg(long, value_name = "N", conflicts_with = "machines", value_parser = clap::value_parser!(u32).range(1..))]
    pub keep_last: Option<u32>,
    /// Remove deposits older than this: 90m, 12h, 30d
    #[arg(long, value_name = "AGE", conflicts_with = "machines", value_parser = parse_age)]
    pub keep_within: Option<Duration>,
    /// Only deposits of this machine
    #[arg(long, value_name = "MACHINE", conflicts_with = "machines")]
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
    /// Keep packs that no machine needs while they are younger than this: an interrupted deposit finds its pages there
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
    #[arg(value_name = "MACHINE")]
    pub machine: String,
    /// The other bank
    #[arg(value_name = "TO")]
    pub to: BankAddress,
}

/// `90s`, `15m`, `12h`, `30d`.
fn parse_age(text: &str) -> Result<Duration, String> {
    let unit = match text.chars().next_back() {
        Some('m') => 60,
        Some('h') => 3600,
        Some('d') => 86_400,
        _ => return if text == "0s" { Ok(Duration::ZERO) } else { parse_wait(text) },
    };
    let number: u64 = text[..text.len() - 1].parse().map_err(|_| format!("{text:?} is no age: use 90s, 15m, 12h or 30d"))?;
    number.checked_mul(unit).map(Duration::from_secs).ok_or_else(|| format!("{text} is no length of time"))
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

    #[test]
    fn ages_have_units() {
        assert_eq!(parse_age("30d"), Ok(Duration::from_secs(30 * 86_400)));
        assert_eq!((parse_age("0s"), parse_age("90s")), (Ok(Duration::ZERO), Ok(Duration::from_secs(90))));
        for wrong in ["", "30", "d", "-1d", "99999999999999999999d", "ä"] {
            assert!(parse_age(wrong).is_err(), "{wrong}");
        }
    }
}
