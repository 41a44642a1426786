//! The arguments, with the help that `farbus --help` and `farbus lend --help` print.
//!
//! `farbus lend --device nvme:disk.img,ro,latency=80us --listen shm:/tmp/link` parses into a [`LendArgs`] whose device is read-only and slow.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::device_spec::DeviceSpec;
use crate::link_address::LinkAddress;

/// Lend a PCIe device to a virtual machine on another host, borrow it there.
#[derive(Debug, Parser)]
#[command(name = "farbus", version, about, long_about = None)]
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
    Lend(LendArgs),
    /// Borrow a device and serve it to a VMM at a vfio-user socket
    Borrow(BorrowArgs),
    /// Lend an image from a second process, drive it remotely and natively, compare
    Demo(DemoArgs),
    /// What can be lent here, and which fabrics work
    Devices(DevicesArgs),
    /// Run a benchmark suite
    Bench(BenchArgs),
}

/// `farbus lend`
#[derive(Debug, Args)]
#[command(after_help = "Devices:
  nvme:FILE[,ro][,latency=80us][,serial=TEXT]
                an NVMe 1.4 controller over an image file or a block device
  edu           the register file and DMA engine of QEMU's edu device

Example:
  farbus lend --device nvme:disk.img --listen shm:/tmp/farbus.link")]
pub struct LendArgs {
    /// What to lend
    #[arg(long, value_name = "SPEC")]
    pub device: DeviceSpec,
    /// Where borrowers connect: shm:PATH
    #[arg(long, value_name = "ADDR")]
    pub listen: LinkAddress,
    /// End after the first borrower has left
    #[arg(long)]
    pub once: bool,
    /// How long to poll without work before sleeping; longer is faster and costs a core
    #[arg(long, value_name = "TIME", default_value = "50us", value_parser = parse_duration)]
    pub spin: Duration,
    /// Use guest memory that is not sealed against shrinking (memory-backend-file); whoever can shrink it can crash this process
    #[arg(long)]
    pub accept_unsealed: bool,
    /// Run the session's thread on this core
    #[arg(long, value_name = "CORE")]
    pub core: Option<usize>,
    /// Print one JSON object a line
    #[arg(long)]
    pub json: bool,
}

/// What to do with guest memory whose descriptor is not the guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Unshared {
    /// Reach it by messages to the VMM: slow, and right
    Messages,
    /// Send the VMM away with a message that says what to do
    Refuse,
}

/// `farbus borrow`
#[derive(Debug, Args)]
#[command(after_help = "Then start the VMM, for QEMU 10.1 or newer:
  qemu-system-x86_64 … -object memory-backend-memfd,id=mem,size=2G,share=on -machine q35,memory-backend=mem \\
    -device '{\"driver\":\"vfio-user-pci\",\"socket\":{\"type\":\"unix\",\"path\":\"SOCKET\"}}'")]
pub struct BorrowArgs {
    /// The lender: shm:PATH
    #[arg(long, value_name = "ADDR")]
    pub from: LinkAddress,
    /// The socket that the VMM connects to
    #[arg(long, value_name = "SOCKET")]
    pub vfio_user: PathBuf,
    /// What to do where the VMM's memory is not shared (share=off)
    #[arg(long, value_enum, default_value = "messages")]
    pub unshared: Unshared,
    /// How long to poll without work before sleeping
    #[arg(long, value_name = "TIME", default_value = "20us", value_parser = parse_duration)]
    pub spin: Duration,
    /// How long the guest waits for a register read before it gets all ones
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = parse_duration)]
    pub read_deadline: Duration,
    /// Print one JSON object a line
    #[arg(long)]
    pub json: bool,
}

/// `farbus demo`
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// A disk image to lend (it is only read; writes go to a copy); without it real files of this machine are packed into one of 256 MiB
    #[arg(long, value_name = "FILE")]
    pub image: Option<PathBuf>,
    /// Where to leave the picture of both latency distributions
    #[arg(long, value_name = "FILE", default_value = "farbus-demo.svg")]
    pub svg: PathBuf,
    /// Seconds for each case and side
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0)]
    pub seconds: f64,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
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
  ci/softroce target/release/farbus bench soft-roce --json    in the lab, where this host has no RDMA")]
pub struct BenchArgs {
    /// Which suite
    #[arg(value_enum)]
    pub suite: Suite,
    /// Seconds for each side: of an NVMe case (shm, 1 by default), of a row (soft-roce, 1.65 by default)
    #[arg(long, value_name = "SECONDS")]
    pub seconds: Option<f64>,
    /// Pairs of measurements for each row, at least 5 (soft-roce)
    #[arg(long, value_name = "N")]
    pub pairs: Option<usize>,
    /// The RDMA device (soft-roce); without it the only one with an active port
    #[arg(long, value_name = "NAME")]
    pub dev: Option<String>,
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
}

/// `80us`, `2s`, `1.5ms`, `100ns`.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let split = text.find(|c: char| c.is_ascii_alphabetic()).ok_or("a time needs a unit: 80us, 1.5ms, 2s")?;
    let (number, unit) = text.split_at(split);
    let number: f64 = number.parse().map_err(|_| format!("{number:?} is no number"))?;
    let seconds = match unit {
        "ns" => 1e-9,
        "us" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        _ => return Err(format!("{unit:?} is no unit of time: use ns, us, ms or s")),
    };
    Duration::try_from_secs_f64(number * seconds).map_err(|_| format!("{text} is no length of time"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_arguments_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn times_have_units() {
        assert_eq!(parse_duration("80us"), Ok(Duration::from_micros(80)));
        assert_eq!(parse_duration("1.5ms"), Ok(Duration::from_micros(1500)));
        for wrong in ["80", "us", "-1s", "1m", "1e400s", ""] {
            assert!(parse_duration(wrong).is_err(), "{wrong}");
        }
    }
}
