//! The arguments of `farbus borrow`, with their help.
//!
//! `farbus borrow --from shm:/tmp/link --vfio-user /run/vfio.sock --reconnect 30s` looks for a lender that is gone for half a minute.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};

use crate::link_address::{LinkAddress, lender_address, socket_path};
use crate::security::{PeerArgs, SecurityArgs};
use crate::service::ServiceArgs;
use crate::values::{parse_duration, parse_mode, parse_wait};

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
    -device '{\"driver\":\"vfio-user-pci\",\"socket\":{\"type\":\"unix\",\"path\":\"SOCKET\"}}'

Do not migrate such a virtual machine: stock QEMU (11.1.3) moves it without the state of this device, and without a word.

Where the lender is gone (with --json the event \"lender-lost\") it is looked for as long as --reconnect says. Found again (\"lender-back\"), an NVMe drive
is put where it was and told again what the VM has no answer to: the VM sees a pause. After that time, and at once for other devices,
it is gone for good (\"lender-gone\"): the VM reads all ones, and the command stays until the VM leaves.

Exit status: 0 after a signal or the lender's goodbye, 3 where the lender is gone without one or broke the protocol.")]
pub struct BorrowArgs {
    /// The lender.
    #[arg(
        long,
        value_name = "ADDR",
        help = "The lender: shm:PATH, or rdma:HOST:PORT[,dev=NAME][,port=N][,gid=N] with the lender's host and TCP port, and the RDMA device \
                of this host to use",
        value_parser = lender_address
    )]
    pub from: LinkAddress,
    /// The socket that the VMM connects to
    #[arg(long, value_name = "SOCKET", value_parser = socket_path)]
    pub vfio_user: PathBuf,
    /// Who may connect to the socket, as the octal mode of a file (a VMM must be allowed to write); without it 600, with --socket-group 660
    #[arg(long, value_name = "MODE", value_parser = parse_mode)]
    pub socket_mode: Option<u32>,
    /// The group of the socket, by name or number, for a VMM that runs as another user
    #[arg(long, value_name = "GROUP")]
    pub socket_group: Option<String>,
    /// What to do where the VMM's memory is not shared (share=off)
    #[arg(long, value_enum, default_value = "messages")]
    pub unshared: Unshared,
    /// How long to poll without work before sleeping, as in 20us, 1.5ms or 2s
    #[arg(long, value_name = "TIME", default_value = "20us", value_parser = parse_duration)]
    pub spin: Duration,
    /// How long the guest waits for a register read before it gets all ones, as in 500ms or 2s
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = parse_wait)]
    pub read_deadline: Duration,
    /// How long to look for a lender that is gone, as in 500ms or 4s; 0s: not at all. A register read of the VM waits as long. QEMU gives a device up
    /// that does not answer for 5 s (x-msg-timeout)
    #[arg(long, value_name = "TIME", default_value = "4s", value_parser = parse_duration)]
    pub reconnect: Duration,
    /// Print one JSON object a line
    #[arg(long)]
    pub json: bool,
    /// What it is as a service.
    #[command(flatten)]
    pub service: ServiceArgs,
    /// How it is known to the lender.
    #[command(flatten)]
    pub security: SecurityArgs,
    /// Which lender it wants.
    #[command(flatten)]
    pub peer: PeerArgs,
}
