//! `farbus bank`: machines saved by content, and taken out again.
//!
//! `farbus bank deposit /srv/bank vm7 --memory vm7.ram` prints "vm7@2: 131072 pages, 46721 zero, 25070 unchanged, 18915 known, 40366 new; 50.9 MiB
//! added" or the same as one JSON object. A failure says what to do about it.

mod address;
mod archive;
pub mod archive_args;
pub mod args;
mod cloud_hypervisor;
mod deposit;
mod help;
mod keep;
mod look;
mod progress;
mod serve_faults;
mod vmm_help;
mod withdraw;

use std::fs;
use std::process::ExitCode;

use farbus_machine_bank::page::{KEY, from_hex};
use farbus_machine_bank::{Bank, Entry};
use serde::Serialize;

use crate::bank::address::BankAddress;
use crate::bank::args::{BankArgs, BankCommand, Place};
use crate::failure::{Advise, refusal};
use crate::output::print_line;
use help::Helped;

/// Runs one of its commands.
pub fn run(args: &BankArgs) -> anyhow::Result<ExitCode> {
    match &args.command {
        BankCommand::Init(args) => init(&args.place)?,
        BankCommand::Deposit(args) => deposit::run(args)?,
        BankCommand::Withdraw(args) => withdraw::run(args)?,
        BankCommand::ServeFaults(args) => serve_faults::run(args)?,
        BankCommand::List(args) => look::list(args)?,
        BankCommand::Show(args) => look::show(args)?,
        BankCommand::Diff(args) => look::diff(args)?,
        BankCommand::Stats(args) => look::stats(args)?,
        BankCommand::Verify(args) => return keep::verify(args),
        BankCommand::Remove(args) => keep::remove(args)?,
        BankCommand::Gc(args) => keep::gc(args)?,
        BankCommand::Copy(args) => keep::copy(args)?,
        BankCommand::Export(args) => archive::export(args)?,
        BankCommand::Import(args) => archive::import(args)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn init(place: &Place) -> anyhow::Result<()> {
    let key = key(place)?;
    let bank = &place.bank;
    Bank::init(bank.create(place)?, key.as_ref()).helped(format!("cannot make a bank in {bank}"), place)?;
    let keyed = key.is_some();
    say(place, &serde_json::json!({ "bank": bank.to_string(), "keyed": keyed }), || {
        format!("an empty bank is in {bank}{}", if keyed { "; it opens with this tenant key only" } else { "" })
    })
}

/// Opens the bank that the arguments name.
fn open(place: &Place) -> anyhow::Result<Bank> {
    open_at(&place.bank, place)
}

fn open_at(address: &BankAddress, place: &Place) -> anyhow::Result<Bank> {
    let key = key(place)?;
    let bank = Bank::open(address.open(place)?, key.as_ref());
    Ok(bank.helped(format!("cannot open the bank {address}"), place)?.patience(place.wait))
}

/// The tenant's key, where a file is named.
fn key(place: &Place) -> anyhow::Result<Option<[u8; KEY]>> {
    let Some(path) = &place.tenant_key else { return Ok(None) };
    let bytes = fs::read(path).advise(
        format!("cannot read the tenant key {}", path.display()),
        "name a file that this user can read; head -c 32 /dev/urandom >FILE makes a key",
    )?;
    let hex = std::str::from_utf8(&bytes).ok().and_then(|text| from_hex::<KEY>(text.trim_ascii_end()));
    hex.or_else(|| bytes.try_into().ok()).map(Some).ok_or_else(|| {
        refusal(
            format!("{} is no tenant key", path.display()),
            "a key is 32 bytes, or 64 lower-case hexadecimal digits on one line",
        )
    })
}

/// A machine by what people write.
fn find(bank: &Bank, place: &Place, wish: &str) -> anyhow::Result<Entry> {
    bank.find(wish).helped(format!("cannot find {wish}"), place)
}

/// Prints an object for machines, or what `text` makes of it.
fn say(place: &Place, object: &impl Serialize, text: impl FnOnce() -> String) -> anyhow::Result<()> {
    print_line(&if place.json { serde_json::to_string(object)? } else { text() });
    Ok(())
}

/// Bytes for people: `50.9 MiB`.
fn size(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}
