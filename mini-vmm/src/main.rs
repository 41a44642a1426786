//! A small VMM on /dev/kvm: a bare guest that uses a borrowed NVMe drive, kept in a bank while it runs, and taken out of it anywhere.
//!
//! `mini-vmm home disk.img --lend-at shm:/run/drive --bank /var/lib/bank --machine vm7` is the host with the drive; `mini-vmm run --from shm:/run/drive
//! --bank shm:/run/bank --deposit vm7` the one with the machine. Kill that one, and the first says what was written since, and runs the machine itself.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand};
use farbus_machine_bank::Bank;
use farbus_machine_bank::lazy::Area;
use farbus_mini_vmm::kvm::guest;
use farbus_mini_vmm::kvm::machine::Machine;
use farbus_mini_vmm::link::{borrow, borrow_again};
use farbus_mini_vmm::{BankArgs, Depositor, Device, Home, Withdrawn, meanwhile, say};
use farbus_remote_dma::model::{Nvme, NvmeOptions};
use farbus_remote_dma::wait::Waker;

/// A small VMM whose bare guest reads, verifies and writes 256 blocks of 4 KiB of a borrowed NVMe drive, for ever.
#[derive(Parser)]
#[command(
    version,
    after_help = "The host with the drive, and beside it a machine that is deposited while it runs. Kill the machine, and it goes on at home:
  truncate -s 64M disk.img
  farbus bank init /srv/bank
  mini-vmm home disk.img --lend-at /run/drive --bank /srv/bank --machine vm7
  mini-vmm run --from /run/drive --bank /srv/bank --deposit vm7 --seconds 30

A machine that left its drive in order goes on in another process, which withdraws it:
  mini-vmm run --from /run/drive --bank /srv/bank --deposit vm7 --seconds 5
  mini-vmm go-on vm7 --from /run/drive --bank /srv/bank --seconds 5

It needs /dev/kvm. Exit status: 0 done, 1 failed, 2 the arguments make no sense."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// The host with the drive: lends it, keeps it for a machine that moves, and runs the machine when its borrower died.
    Home(HomeArgs),
    /// A new machine with the drive of a lender.
    Run(RunArgs),
    /// A machine out of a bank, with the drive that is kept for it.
    GoOn(GoOnArgs),
}

#[derive(Args)]
struct HomeArgs {
    /// The image of the drive: at least 1 MiB. The guest overwrites its first MiB.
    image: PathBuf,
    /// Where to lend it: a unix socket, as shm:PATH or by its path alone.
    #[arg(long, value_name = "shm:PATH", value_parser = lender)]
    lend_at: PathBuf,
    #[command(flatten)]
    bank: BankArgs,
    /// The machine that is restarted here when its borrower died.
    #[arg(long, value_name = "NAME", requires = "bank")]
    machine: Option<String>,
    /// How long a machine that was restarted runs.
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    seconds: u64,
}

#[derive(Args)]
struct RunArgs {
    /// The lender, as `farbus borrow` takes it: shm:PATH, or the path of its socket alone.
    #[arg(long, value_name = "shm:PATH", value_parser = lender)]
    from: PathBuf,
    #[command(flatten)]
    bank: BankArgs,
    /// Deposit the machine under this name, once a second and at the end.
    #[arg(long, value_name = "NAME", requires = "bank")]
    deposit: Option<String>,
    /// How long it runs here; then it leaves, and the drive is kept for it for a minute.
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    seconds: u64,
}

#[derive(Args)]
struct GoOnArgs {
    /// Which machine.
    machine: String,
    #[command(flatten)]
    run: RunArgs,
}

const LEASE: Duration = Duration::from_secs(60);
const BETWEEN_DEPOSITS: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Home(args) => home(&args),
        Command::Run(args) => run(&args),
        Command::GoOn(args) => go_on(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// A socket of this host.
fn lender(text: &str) -> Result<PathBuf, String> {
    match text.split_once(':') {
        Some(("rdma", _)) => Err(format!(
            "{text} is a lender of another host, and this VMM borrows on its own: run farbus borrow for it, with a VMM of vfio-user"
        )),
        Some(("shm", "")) => Err("shm: needs a path, as in shm:/run/drive".to_owned()),
        Some(("shm", path)) => Ok(path.into()),
        _ => Ok(text.into()),
    }
}

fn home(args: &HomeArgs) -> Result<()> {
    let bank = args.bank.open()?;
    let nvme = Nvme::open(&args.image, NvmeOptions::default())?;
    let least = guest::BLOCKS * guest::BLOCK_BYTES / 512;
    if nvme.blocks() < least {
        bail!("{} has {} blocks of 512 bytes, and the guest needs {least}: make it longer", args.image.display(), nvme.blocks());
    }
    let home = Home::open(&args.lend_at)?;
    let never = Waker::new()?;
    let mut device = Device::Reset(Box::new(nvme));
    loop {
        println!("lending {} at {}", args.image.display(), args.lend_at.display());
        let left = home.serve(device, &never)?;
        device = left.device;
        if let Device::Kept(_) = device {
            println!("the machine left, and the drive is kept for it");
            continue;
        }
        println!("the borrower is gone: {}", left.reason);
        if let (Some(bank), Some(machine)) = (&bank, &args.machine) {
            return restart(bank, machine, device, Duration::from_secs(args.seconds));
        }
    }
}

/// The machine at home, from its last deposit.
fn restart(bank: &Bank, machine: &str, device: Device, time: Duration) -> Result<()> {
    let withdrawn = Withdrawn::from_bank(bank, machine)?;
    let state = withdrawn.state()?;
    println!("{}", say(meanwhile(device.get(), &state).as_ref(), state.saved_at()));
    guest::went_back(withdrawn.area.memory())?;
    let (mut machine, _) = Machine::again(&withdrawn, device.attach_here(&state.rest().token)?)?;
    machine.run_for(time)?;
    report(&machine);
    Ok(())
}

fn run(args: &RunArgs) -> Result<()> {
    let area = Area::shared(guest::MEMORY_BYTES)?;
    let machine = Machine::begin(&area, borrow(&args.from, None)?)?;
    let depositor = Depositor::new(&area)?;
    keep_running(machine, depositor, args)
}

fn go_on(args: &GoOnArgs) -> Result<()> {
    let bank = args.run.bank.open()?.context("say where the machine is: --bank BANK")?;
    let withdrawn = Withdrawn::from_bank(&bank, &args.machine)?;
    let device = borrow_again(&args.run.from, withdrawn.state()?.rest().token)?;
    let (machine, restored) = Machine::again(&withdrawn, device)?;
    let mut depositor = Depositor::new(&withdrawn.area)?;
    depositor.follow(&withdrawn.entry);
    // After what it follows: this changes the machine's memory.
    if restored.revived {
        println!("the drive was reset since, and was brought back: what it wrote after the deposit is not known here");
        guest::went_back(withdrawn.area.memory())?;
    }
    keep_running(machine, depositor, &args.run)
}

fn keep_running(mut machine: Machine, mut depositor: Depositor<'_>, args: &RunArgs) -> Result<()> {
    let bank = args.bank.open()?;
    let until = Instant::now() + Duration::from_secs(args.seconds);
    let (Some(bank), Some(name)) = (bank, &args.deposit) else {
        machine.run_for(until.saturating_duration_since(Instant::now()))?;
        report(&machine);
        return Ok(());
    };
    loop {
        let left = until.saturating_duration_since(Instant::now());
        machine.run_for(left.min(BETWEEN_DEPOSITS))?;
        if left <= BETWEEN_DEPOSITS {
            break;
        }
        mark_lost(&mut depositor, &bank);
        let frozen = machine.freeze(&mut depositor)?;
        match machine.run_while(|| frozen.put(&bank, name))? {
            Ok(report) => {
                depositor.done(&report);
                println!("{}: {} pages, a pause of {:?}", report.machine, frozen.pages(), frozen.pause.total());
            }
            // The next one has its pages too.
            Err(error) => {
                depositor.failed(&frozen);
                eprintln!("mini-vmm: a deposit failed, and the machine runs on: {error:#}");
            }
        }
    }
    mark_lost(&mut depositor, &bank);
    let mut frozen = machine.freeze_and_leave(&mut depositor, LEASE)?;
    // What is frozen is all that there is of the machine, for as long as the drive is kept for it.
    let until = Instant::now() + LEASE;
    let deposited = loop {
        match frozen.put(&bank, name) {
            Err(error) if Instant::now() < until => {
                eprintln!("mini-vmm: the last deposit failed, and is tried again: {error:#}");
                std::thread::sleep(Duration::from_secs(2));
                // A repair may have come between.
                if let Err(error) = depositor.add_lost(&bank, &mut frozen) {
                    eprintln!("mini-vmm: what the bank has lost is not known: {error:#}");
                }
            }
            done => break done?,
        }
    };
    println!("{}: left, and the drive is kept for a minute", deposited.machine);
    report(&machine);
    Ok(())
}

/// Where that is not known, the deposit may fail, and the next one looks again.
fn mark_lost(depositor: &mut Depositor<'_>, bank: &Bank) {
    match depositor.mark_lost(bank) {
        Ok(0) => {}
        Ok(pages) => println!("{pages} pages are deposited again, which the bank has lost"),
        Err(error) => eprintln!("mini-vmm: what the bank has lost is not known: {error:#}"),
    }
}

fn report(machine: &Machine) {
    let (counts, exits) = (machine.vm.counts(), machine.vm.exits);
    println!(
        "{} blocks verified, {} written, {} interrupts, {} reads and {} writes of registers",
        counts.verified, counts.written, counts.interrupts, exits.reads, exits.writes
    );
}
