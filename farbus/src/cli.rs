//! The arguments, with the help that `farbus --help` and `farbus lend --help` print.
//!
//! `farbus lend --device nvme:disk.img,ro,latency=80us --listen shm:/tmp/link` parses into a [`LendArgs`] whose device is read-only and slow.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use farbus_control::identity::Name;

use crate::bank::args::BankArgs;
use crate::borrow_args::BorrowArgs;
use crate::device_spec::{DeviceSpec, HELP};
use crate::link_address::{LinkAddress, lender_address};
use crate::security::{AllowArgs, PeerArgs, SecurityArgs};
use crate::service::ServiceArgs;
use crate::status::StatusArgs;
use crate::values::{parse_duration, parse_pairs, parse_rate, parse_seconds};

/// Lend a PCIe device to a virtual machine on another host, borrow it there.
#[derive(Debug, Parser)]
#[command(name = "farbus", version, about, long_about = None, after_help = "Times are a number and a unit, ns, us, ms, s, m, h or d: 80us, 10s, 5m, 30d. Sizes are a number and a unit, B, K, M, G or T, which are powers of 1024: 512M, 2G.
Options that are called by their unit (--seconds, --days, --large-gib) take a number of it.

Exit status:
  0  done; lend, borrow, bank serve and serve-faults: ended by a signal, or by a peer that said goodbye
  1  failed; bank list, stats and verify: something is damaged
  2  the arguments make no sense, whatever is on this host: one is missing, contradicts another, is no name, time, size, key or address, asks a bank
     for what cannot be done there, or means nothing here
  3  borrow: the lender is gone without a goodbye, or broke the protocol
  128 + N  demo: ended by signal N, 130 after Ctrl-C, 143 after SIGTERM; a bench is killed by the signal, which a shell shows as the same

Why it was 1 or 2 is on standard error, and with --json also an object with \"error\", \"causes\" and \"hint\" on standard output.")]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// Say more on standard error (-v: what happens, -vv: details).
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Offer a device of this host to one borrower after the other
    Lend(Box<LendArgs>),
    /// Borrow a device and serve it to a VMM at a vfio-user socket
    Borrow(Box<BorrowArgs>),
    /// Lend an image from a second process, drive it remotely and natively, compare
    Demo(DemoArgs),
    /// Make and show the certificates by which lenders and borrowers know each other
    Cert(CertArgs),
    /// What can be lent here, and which fabrics work
    Devices(DevicesArgs),
    /// Save machines by content, and take them out again
    Bank(Box<BankArgs>),
    /// What the services of this user do: lend, borrow, bank serve, bank serve-faults
    Status(StatusArgs),
    /// Run a benchmark suite
    Bench(BenchArgs),
    /// Print completions for a shell
    Completions(CompletionsArgs),
    /// Write the manual: a page for each command
    Man(ManArgs),
}

/// What a command prints on standard output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Json {
    /// Text for people.
    No,
    /// A line for each event.
    Events,
    /// One object.
    Object,
}

impl Command {
    /// What it was asked to print.
    pub fn json(&self) -> Json {
        let (wanted, shape) = match self {
            Self::Lend(args) => (args.json, Json::Events),
            Self::Borrow(args) => (args.json, Json::Events),
            Self::Demo(args) => (args.json, Json::Object),
            Self::Cert(args) => (args.json(), Json::Object),
            Self::Devices(args) => (args.json, Json::Object),
            Self::Bank(args) if args.is_server() => (args.json(), Json::Events),
            Self::Bank(args) => (args.json(), Json::Object),
            Self::Bench(BenchArgs { command: Some(BenchCommand::Compare(args)), .. }) => (args.json, Json::Object),
            Self::Bench(args) => (args.json, Json::Object),
            Self::Status(args) => (args.json, Json::Object),
            Self::Completions(_) => (false, Json::No),
            Self::Man(args) => (args.json, Json::Object),
        };
        if wanted { shape } else { Json::No }
    }
}

/// `farbus lend`
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub struct LendArgs {
    /// What to lend
    #[arg(long, value_name = "SPEC")]
    pub device: DeviceSpec,
    /// Where borrowers connect.
    #[arg(
        long,
        value_name = "ADDR",
        help = "Where borrowers connect: shm:PATH, or rdma:HOST:PORT[,dev=NAME][,port=N][,gid=N] with an address of this host, a TCP port \
                (0: any that is free) and the RDMA device to use"
    )]
    pub listen: LinkAddress,
    /// End after the first borrower has left
    #[arg(long)]
    pub once: bool,
    /// How long to poll without work before sleeping, as in 50us, 1.5ms or 2s; longer is faster and costs a core
    #[arg(long, value_name = "TIME", default_value = "50us", value_parser = parse_duration)]
    pub spin: Duration,
    /// How long the device is kept, at most, for a machine that leaves it on purpose and comes again from elsewhere, as in 10m; 0s resets it at once
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = parse_duration)]
    pub keep_at_most: Duration,
    /// Use guest memory that is not sealed against shrinking (memory-backend-file); whoever can shrink it can crash this process
    #[arg(long)]
    pub accept_unsealed: bool,
    /// Run the session's thread on this core, one that this process may use
    #[arg(long, value_name = "CORE")]
    pub core: Option<usize>,
    /// How long what the device has begun may take to end, when the command is told to end, before it is cut off, as in 500ms or 5s; a second signal
    /// cuts it off at once
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = parse_duration)]
    pub drain: Duration,
    /// How much data a borrower's commands move in a second at most, both directions together, as in 200M or 1G: beyond, its commands wait. For nvme: devices
    #[arg(long, value_name = "SIZE", value_parser = parse_rate)]
    pub max_bandwidth: Option<u64>,
    /// How long the device is held for a borrower whose link was lost, or whose lender was killed, and who may come back, as in 5s; others wait
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = parse_duration)]
    pub hold: Duration,
    /// Print one JSON object a line
    #[arg(long)]
    pub json: bool,
    /// What it is as a service.
    #[command(flatten)]
    pub service: ServiceArgs,
    /// How it is known to borrowers.
    #[command(flatten)]
    pub security: SecurityArgs,
    /// Who may borrow.
    #[command(flatten)]
    pub allow: AllowArgs,
}

/// `farbus demo`
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// A disk image to lend (it is only read; writes go to a copy); without it real files of this machine are packed into one of 256 MiB
    #[arg(long, value_name = "FILE")]
    pub image: Option<PathBuf>,
    /// Where to leave the picture of both latency distributions; a file that is there already is only replaced if it is a picture in SVG
    #[arg(long, value_name = "FILE", default_value = "farbus-demo.svg")]
    pub svg: PathBuf,
    /// Seconds for each case and side, 0.01 to 3600
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = parse_seconds)]
    pub seconds: f64,
    /// Where the second process lends.
    #[arg(
        long,
        value_name = "ADDR",
        conflicts_with = "from",
        help = "Where the second process lends: shm:PATH, or rdma:HOST:PORT[,dev=NAME][,port=N][,gid=N] with an address of this host; without \
                it shared memory"
    )]
    pub link: Option<LinkAddress>,
    /// Start no second process: drive the device that `farbus lend` lends there, on this host or another. It must be a copy of --image, and is
    /// written to
    #[arg(long, value_name = "ADDR", requires = "image", value_parser = lender_address)]
    pub from: Option<LinkAddress>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    /// How it is known to the lender of --from.
    #[command(flatten)]
    pub security: SecurityArgs,
    /// Which lender it wants.
    #[command(flatten)]
    pub peer: PeerArgs,
}

/// `farbus cert`
#[derive(Debug, Args)]
#[command(after_help = "A lab with one lender and one borrower:
  farbus cert init lab
  farbus cert issue lab --name nas --role lender --address nas.example.org --address 10.0.0.7
  farbus cert issue lab --name vm7 --role borrower

Then copy lab/lender/nas to the lender's host and lab/borrower/vm7 to the borrower's, each as it is, and keep lab/authority.key to yourself:
whoever has it can make any certificate. On the hosts:
  farbus lend --device nvme:disk.img --listen rdma:0.0.0.0:7000 --tls nas --allow vm7
  farbus borrow --from rdma:nas.example.org:7000 --tls vm7 --vfio-user /tmp/farbus.vm")]
pub struct CertArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: CertCommand,
}

/// The commands of `farbus cert`.
#[derive(Debug, Subcommand)]
pub enum CertCommand {
    /// Make an authority in a folder: authority.pem, and authority.key, which stays there
    Init(CertInitArgs),
    /// Make the certificate and key of a lender or borrower, in a folder below the authority's
    Issue(CertIssueArgs),
    /// Print whose a certificate is, for which role, and until when
    Show(CertShowArgs),
}

impl CertArgs {
    fn json(&self) -> bool {
        match &self.command {
            CertCommand::Init(args) => args.json,
            CertCommand::Issue(args) => args.json,
            CertCommand::Show(args) => args.json,
        }
    }
}

/// `farbus cert init`
#[derive(Debug, Args)]
pub struct CertInitArgs {
    /// The authority's folder; it is made where it is missing
    #[arg(value_name = "DIR")]
    pub folder: PathBuf,
    /// What the authority is called
    #[arg(long, value_name = "NAME", default_value = "farbus")]
    pub name: Name,
    /// Days until it and all that it signed are worth nothing
    #[arg(long, value_name = "N", default_value_t = 3650, value_parser = clap::value_parser!(u32).range(1..=36_500))]
    pub days: u32,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// `farbus cert issue`
#[derive(Debug, Args)]
pub struct CertIssueArgs {
    /// The authority's folder
    #[arg(value_name = "DIR")]
    pub folder: PathBuf,
    /// What the lender or borrower is called: --allow and --peer name it so
    #[arg(long, value_name = "NAME")]
    pub name: Name,
    /// What it may be
    #[arg(long, value_enum)]
    pub role: CertRole,
    /// A DNS name or IP address by which borrowers reach the lender (repeatable); its name is one already
    #[arg(long = "address", value_name = "HOST")]
    pub addresses: Vec<String>,
    /// Days until it is worth nothing; without it 365, or as long as the authority
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=36_500))]
    pub days: Option<u32>,
    /// Put a new one in the place of the one that is there
    #[arg(long)]
    pub replace: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// `farbus cert show`
#[derive(Debug, Args)]
pub struct CertShowArgs {
    /// A file of certificates in PEM form
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// What a certificate's owner may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CertRole {
    /// Lends devices
    Lender,
    /// Borrows them
    Borrower,
}

/// `farbus devices`
#[derive(Debug, Args)]
pub struct DevicesArgs {
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// `farbus bench`
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  farbus bench shm --seconds 0.5
  farbus bench soft-roce --dev rxe0
  farbus bench migrate --effort 0.1
  farbus bench faults --json >faults.json
  PATH=$(ci/bank/peers):$PATH farbus bench bank --series series
  ci/softroce --seconds 900 target/release/farbus bench soft-roce --json    in the lab, where this host has no RDMA
  farbus bench shm --json >before.json
  farbus bench compare before.json after.json

Each row is on standard error as soon as it is there, so what was measured stays where the suite is ended before its end. That suite takes
one or two minutes over a device; in an emulated guest, on a slow machine, more than the 300 s that the lab gives a program by itself.")]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct BenchArgs {
    /// What to do with reports.
    #[command(subcommand)]
    pub command: Option<BenchCommand>,
    /// Which suite
    #[arg(value_enum, required = true)]
    pub suite: Option<Suite>,
    /// Seconds for each side, 0.01 to 3600: of an NVMe case (shm, 1 by default), of a row (soft-roce, 1.65 by default)
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds)]
    pub seconds: Option<f64>,
    /// Pairs of measurements for each row, 5 to 1000 (soft-roce, 11 by default; bank, 5)
    #[arg(long, value_name = "N", value_parser = parse_pairs)]
    pub pairs: Option<usize>,
    /// The RDMA device (soft-roce); without it the only one with an active port
    #[arg(long, value_name = "NAME")]
    pub dev: Option<String>,
    /// A series of a guest's images (bank), as ci/bank/series makes it; without it a small synthetic one
    #[arg(long, value_name = "DIR")]
    pub series: Option<PathBuf>,
    /// GiB of the large machine (bank)
    #[arg(long, value_name = "GIB", default_value_t = 10.0)]
    pub large_gib: f64,
    /// How much of the usual number of moves, kills and cuts, 0.01 to 3600 (migrate, faults; 1 by default)
    #[arg(long, value_name = "FRACTION", value_parser = parse_seconds)]
    pub effort: Option<f64>,
    #[arg(long, value_enum, value_name = "PART", help = "Only these rows (bank)")]
    pub only: Option<crate::bench::BankPart>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// The commands of `farbus bench`, beside running a suite.
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// What is better, what is worse, and what is noise, between two runs of a suite
    Compare(CompareArgs),
    /// One of the other processes of a suite
    #[command(hide = true)]
    Part {
        /// Which, and what it needs
        words: Vec<String>,
    },
}

/// `farbus bench compare`
#[derive(Debug, Args)]
#[command(
    after_help = "Ratios are compared, because each was measured within one run. Where the intervals of both runs meet, the difference is noise."
)]
pub struct CompareArgs {
    /// What the earlier run printed with --json
    #[arg(value_name = "BEFORE")]
    pub before: PathBuf,
    /// What the later one printed
    #[arg(value_name = "AFTER")]
    pub after: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// `farbus completions`
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  farbus completions bash >/usr/share/bash-completion/completions/farbus
  farbus completions zsh >~/.zfunc/_farbus")]
pub struct CompletionsArgs {
    /// The shell
    #[arg(value_enum)]
    pub shell: clap_complete::Shell,
}

/// `farbus man`
#[derive(Debug, Args)]
#[command(after_help = "Example:
  farbus man man1 && man man1/farbus-lend.1")]
pub struct ManArgs {
    /// The folder, which is made where it is missing; pages that are there are written anew
    #[arg(value_name = "DIR")]
    pub folder: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// The suites.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Suite {
    /// Shared memory, against the limits of this machine
    Shm,
    /// RDMA verbs, against perftest over the same device in the same run
    SoftRoce,
    /// The Machine Bank, against restic, borg, casync, cp and qemu-img on the same images
    Bank,
    /// A machine that moves between two processes under verified IO: how long it stands still
    Migrate,
    /// Lenders, links and borrowers that are killed under verified IO, and a device that nobody uses
    Faults,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_arguments_are_consistent() {
        Cli::command().debug_assert();
    }
}
