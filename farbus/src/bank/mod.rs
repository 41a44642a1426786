//! `farbus bank`: machines saved by content, and taken out again.
//!
//! `farbus bank deposit /srv/bank vm7 --memory vm7.ram` prints "vm7@2: 131072 pages, 46721 zero, 25070 unchanged, 18915 known, 40366 new; 50.9 MiB
//! added" or the same as one JSON object. A failure says what to do about it.

mod address;
mod archive;
pub mod archive_args;
pub mod args;
mod bucket;
mod cloud_hypervisor;
mod damage;
mod deposit;
mod help;
mod help_text;
mod keep;
mod keep_args;
mod look;
mod parts;
mod progress;
mod serve;
mod serve_args;
mod serve_faults;
mod vmm_help;
mod withdraw;

use std::process::ExitCode;
use std::sync::Arc;

use farbus_control::read::ReadError;
use farbus_machine_bank::page::{KEY, key_of};
use farbus_machine_bank::remote::WireCounts;
use farbus_machine_bank::store::{CacheCounters, Kind, Store, StoreError};
use farbus_machine_bank::{Bank, BankError, Entry};
use serde::Serialize;

use crate::bank::address::{AtPlace, BankAddress};
use crate::bank::args::{BankArgs, BankCommand, InitArgs, Place};
use crate::count::count;
use crate::failure::{Advise, misuse};
use crate::output::print_line;
use help::Helped;

/// Runs one of its commands.
pub fn run(args: &BankArgs) -> anyhow::Result<ExitCode> {
    check_link(args)?;
    // What is no key makes no sense, whatever the bank is.
    key(args.place())?;
    match &args.command {
        BankCommand::Init(args) => init(args)?,
        BankCommand::Deposit(args) => deposit::run(args)?,
        BankCommand::Withdraw(args) => withdraw::run(args)?,
        BankCommand::ServeFaults(args) => serve_faults::run(args)?,
        BankCommand::Serve(args) => serve::run(args)?,
        BankCommand::List(args) => return look::list(args),
        BankCommand::Show(args) => look::show(args)?,
        BankCommand::Diff(args) => look::diff(args)?,
        BankCommand::Stats(args) => return look::stats(args),
        BankCommand::Verify(args) => return keep::verify(args),
        BankCommand::Remove(args) => keep::remove(args)?,
        BankCommand::Gc(args) => keep::gc(args)?,
        BankCommand::Copy(args) => keep::copy(args)?,
        BankCommand::Export(args) => archive::export(args)?,
        BankCommand::Import(args) => archive::import(args)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Options that do nothing are a misunderstanding.
fn check_link(args: &BankArgs) -> anyhow::Result<()> {
    let place = args.place();
    let over_link = match &args.command {
        BankCommand::Serve(_) => true,
        BankCommand::Copy(args) if matches!(args.to, BankAddress::Link(_)) => true,
        _ => matches!(place.bank, BankAddress::Link(_)),
    };
    let here = match &args.command {
        BankCommand::Verify(_) => Some("verify"),
        BankCommand::Remove(_) => Some("remove"),
        BankCommand::Gc(_) => Some("gc"),
        _ => None,
    };
    if let (Some(command), BankAddress::Link(_)) = (here, &place.bank) {
        let hint = format!("run `farbus bank {command} DIRECTORY` on the host that has it; it can be served meanwhile");
        return Err(misuse(format!("{command} needs the bank itself, and {} is a link to one", place.bank), hint));
    }
    if place.link.is_given() && !over_link {
        return Err(misuse(format!("{} takes no options of TLS and the like", place.bank), "leave them out: it is on this host"));
    }
    Ok(())
}

fn init(args: &InitArgs) -> anyhow::Result<()> {
    let place = &args.place;
    let (key, bank) = (key(place)?, &place.bank);
    let store = bank.create(place)?;
    let made = match &key {
        Some(key) if args.encrypt => Bank::init_sealed(store, key),
        key => Bank::init(store, key.as_ref()),
    };
    made.helped(format!("cannot make a bank in {bank}"), place)?;
    let keyed = key.is_some();
    say(place, &serde_json::json!({ "bank": bank.to_string(), "keyed": keyed, "encrypted": args.encrypt }), || {
        let and = if args.encrypt { ", and is sealed under it" } else { "" };
        format!(
            "an empty bank is in {bank}{}",
            if keyed { format!("; it opens with this tenant key only{and}") } else { String::new() }
        )
    })
}

/// Opens the bank that the arguments name.
fn open(place: &Place) -> anyhow::Result<Bank> {
    Ok(open_counted(place)?.0)
}

/// Opens a bank, and says where what its cache does is counted.
fn open_counted(place: &Place) -> anyhow::Result<(Bank, Option<Arc<CacheCounters>>)> {
    let (store, counters) = place.bank.open_cached(place)?;
    Ok((with_key(store, place)?, counters))
}

/// Opens the bank without a cache, for what must see what is really there.
fn open_itself(place: &Place) -> anyhow::Result<Bank> {
    with_key(place.bank.open(place)?, place)
}

fn with_key(store: Box<dyn Store>, place: &Place) -> anyhow::Result<Bank> {
    let address = &place.bank;
    let bank = Bank::open(store, key(place)?.as_ref());
    if address.is_bucket()
        && let Err(BankError::Store(StoreError::Missing { .. })) = &bank
    {
        // Asked for one object a service does not say that there is no bucket; asked for a list it does.
        address.open(place)?.list(Kind::Config).helped(format!("cannot open the bank {address}"), place)?;
    }
    Ok(bank.helped(format!("cannot open the bank {address}"), place)?.patience(place.wait))
}

/// The tenant's key, where a file is named.
fn key(place: &Place) -> anyhow::Result<Option<[u8; KEY]>> {
    let Some(path) = &place.tenant_key else { return Ok(None) };
    let no_key = || {
        misuse(format!("{} is no tenant key", path.display()), "a key is 32 bytes, or 64 lower-case hexadecimal digits on one line")
    };
    let bytes = match farbus_control::read::read(path) {
        Err(ReadError::TooLong | ReadError::Kind(_)) => return Err(no_key()),
        read => read.advise(
            format!("cannot read the tenant key {}", path.display()),
            "name a file that this user can read; head -c 32 /dev/urandom >FILE makes a key",
        )?,
    };
    key_of(&bytes).map(Some).ok_or_else(no_key)
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

/// What went over the link so far, where the bank is at one.
fn wire(bank: &Bank) -> Option<WireCounts> {
    bank.store().service().map(|service| service.wire())
}

/// The same for people; `leaves` of 16 MiB were moved. Nothing where there is no link.
fn wire_line(wire: Option<WireCounts>, leaves: u64) -> String {
    let Some(WireCounts { messages_sent, messages_received, message_bytes, reads, read_bytes, offered_bytes }) = wire else {
        return String::new();
    };
    let messages = messages_sent + messages_received;
    format!(
        "\nover the link: {} fetched in {}, {} offered, {} of {} ({:.1} for each 16 MiB)",
        size(read_bytes),
        count(reads, "read"),
        size(offered_bytes),
        count(messages, "message"),
        size(message_bytes),
        messages as f64 / leaves.max(1) as f64
    )
}

/// Bytes for people: `50.9 MiB`.
fn size(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}
