//! The `farbus` command line: lend a device, borrow it for a VM, save VMs by content, and see how fast that is.
//!
//! `farbus lend --device nvme:disk.img --listen shm:/run/nvme0` on one side, `farbus borrow --from shm:/run/nvme0 --vfio-user /run/vm.sock` on
//! the other, and an unmodified QEMU finds the drive at /run/vm.sock. `farbus demo` does all of it by itself and prints native beside remote.

mod advice;
mod attach;
mod bank;
mod bench;
mod borrow;
mod borrow_args;
mod cert;
mod cli;
mod cores;
mod count;
mod demo;
mod device_spec;
mod devices;
mod failure;
mod lend;
mod link;
mod link_address;
mod manual;
mod output;
mod security;
mod service;
mod signals;
mod socket_access;
mod status;
mod usage;
mod values;
#[cfg(feature = "vfio")]
mod vfio;

use std::process::ExitCode;

use crate::cli::{Command, Json};
use crate::output::Events;

/// Counts allocations, so that the suites can show that the data path makes none.
#[global_allocator]
static ALLOCATOR: farbus_bench::measure::CountingAllocator = farbus_bench::measure::CountingAllocator;

fn main() -> ExitCode {
    let cli = match usage::parse() {
        Ok(cli) => cli,
        Err(status) => return status,
    };
    output::start_log(cli.verbose);
    let shape = cli.command.json();
    let result = match cli.command {
        Command::Lend(args) => lend::run(*args).map(|()| ExitCode::SUCCESS),
        Command::Borrow(args) => borrow::run(&args),
        Command::Demo(args) => demo::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Cert(args) => cert::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Devices(args) => devices::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Bank(args) => bank::run(&args),
        Command::Bench(args) => bench::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Status(args) => status::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Completions(args) => manual::completions(&args).map(|()| ExitCode::SUCCESS),
        Command::Man(args) => manual::pages(&args).map(|()| ExitCode::SUCCESS),
    };
    let status = result.unwrap_or_else(|error| {
        eprintln!("{}", failure::for_people(&error));
        match shape {
            Json::No => {}
            Json::Events => Events::new(true).say("error", failure::fields(&error), ""),
            Json::Object => output::print_line(&failure::fields(&error).to_string()),
        }
        if failure::is_misuse(&error) { ExitCode::from(usage::MISUSE) } else { ExitCode::FAILURE }
    });
    if output::was_lost() && status == ExitCode::SUCCESS { ExitCode::FAILURE } else { status }
}
