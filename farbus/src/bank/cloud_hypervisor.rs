//! `farbus bank deposit --cloud-hypervisor` and `withdraw --cloud-hypervisor`: a Cloud Hypervisor hands its machine over, or takes one.
//!
//! `farbus bank deposit /srv/bank vm7 --cloud-hypervisor /run/vm7.save` waits until `ch-remote send-migration destination_url=unix:/run/vm7.save,local=on` was
//! said elsewhere, and ends when the machine is in the bank.

use std::fs;
use std::path::Path;

use farbus_machine_bank::cloud_hypervisor::{Other, RestoreOptions, RestoreReport, restore, save};
use farbus_machine_bank::deposit::DepositReport;
use farbus_machine_bank::{Bank, DepositOptions, Entry};

use super::args::{DepositArgs, WithdrawArgs};
use super::help::Helped;
use super::progress::Bar;
use crate::failure::Advise;

/// Waits for a Cloud Hypervisor and deposits what it hands over, with other sections beside it.
pub fn deposit(
    bank: &Bank,
    args: &DepositArgs,
    path: &Path,
    options: &DepositOptions,
    others: &[Other<'_>],
) -> anyhow::Result<DepositReport> {
    let what = || format!("cannot deposit {}", args.machine);
    let advice =
        "choose a path that is not there, in a folder that this user can write; a socket of another server has to go first";
    let listener = farbus_machine_bank::socket::bind(path).advise(format!("cannot listen at {}", path.display()), advice)?;
    let accepted = listener.accept();
    // One machine comes, so nobody else can connect.
    if let Err(error) = fs::remove_file(path) {
        tracing::debug!(%error, path = %path.display(), "a socket stays");
    }
    let (stream, _) = accepted.advise(what(), "run it again, and then ch-remote send-migration")?;
    let bar = Bar::new("cloud-hypervisor");
    save(bank, &args.machine, options, others, stream, &|_, progress| bar.show(progress)).helped(what(), &args.place)
}

/// Hands a machine to the Cloud Hypervisor that waits for it.
pub fn withdraw(bank: &Bank, entry: &Entry, args: &WithdrawArgs, path: &Path) -> anyhow::Result<RestoreReport> {
    // The log says that a bank is away, and that it is back: what is printed is one object.
    let options = RestoreOptions { on_demand: args.on_demand, resume: args.resume, ..RestoreOptions::default() };
    let bar = Bar::new("cloud-hypervisor");
    restore(bank, entry, path, &options, &|progress| bar.show(progress))
        .helped(format!("cannot restore {entry} at {}", path.display()), &args.place)
}
