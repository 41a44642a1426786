//! Every error of a bank's operations, and the hint that it has to have.
//!
//! A parent that is not there: "--parent none"; a page that is in no pack: `verify --repair`, and no other error leads there.

use std::io;
use std::time::Duration;

use clap::Parser;
use farbus_machine_bank::pack::PackId;
use farbus_machine_bank::{PageId, Root};

use super::*;
use crate::bank::args::BankCommand;
use crate::cli::{Cli, Command};

/// The hint for an error with the bank at `address`.
fn said(error: &(dyn Error + 'static), address: &str) -> String {
    let Command::Bank(args) = Cli::try_parse_from(["farbus", "bank", "list", address]).unwrap().command else {
        panic!("another command");
    };
    assert!(matches!(args.command, BankCommand::List(_)));
    hint(error, args.place())
}

fn host(kind: ErrorKind) -> StoreError {
    StoreError::Io { what: "cannot read".to_owned(), source: kind.into() }
}

/// An error, and what its hint has to say.
type Case = (Box<dyn Error>, &'static str);

fn of_stores() -> Vec<Case> {
    let missing = |kind| StoreError::Missing { kind, name: "x".to_owned() };
    let other = || io::Error::other("x");
    let unsealed = |kind| StoreError::Unsealed { kind, name: "x".to_owned() };
    vec![
        (Box::new(missing(Kind::Config)), "make a bank first: `farbus bank init"),
        (Box::new(missing(Kind::Manifest)), "farbus bank list"),
        (Box::new(missing(Kind::Pack)), "--repair"),
        (Box::new(StoreError::Ends { kind: Kind::Index, name: "x".to_owned(), wanted: 1 }), "--repair"),
        (Box::new(StoreError::TooLong { kind: Kind::Config, name: "x".to_owned(), len: 2, most: 1 }), "config/bank from a copy"),
        (Box::new(unsealed(Kind::Config)), "config/bank from a copy"),
        (Box::new(unsealed(Kind::Pack)), "--repair"),
        (Box::new(StoreError::Name("x y".to_owned())), "letters"),
        (Box::new(StoreError::Busy { by: "a deposit".to_owned() }), "--wait 5m"),
        (Box::new(StoreError::Refused("no".to_owned())), "--read, --write"),
        (Box::new(StoreError::Gone("gone".to_owned())), "whether farbus bank serve runs"),
        (Box::new(StoreError::Full(other())), "farbus bank gc"),
        (Box::new(StoreError::ReadOnly(other())), "a user that may"),
        (Box::new(StoreError::Unreachable { what: "x".to_owned(), source: other() }), "run the same again"),
        (Box::new(StoreError::Lapsed { silent: Duration::from_secs(40) }), "run the same again"),
        (Box::new(host(ErrorKind::NotFound)), "farbus bank init"),
        (Box::new(host(ErrorKind::NotADirectory)), "farbus bank init"),
        (Box::new(host(ErrorKind::AlreadyExists)), "empty"),
        (Box::new(host(ErrorKind::Other)), "look at the disk"),
    ]
}

fn of_operations() -> Vec<Case> {
    let other = || io::Error::other("x");
    let none = || FindError::None("vm8".to_owned());
    let wrong = || Malformed::Magic("bank");
    let full = || StoreError::Full(io::Error::other("x"));
    let (page, pack) = (PageId([1; 32]), PackId::from_name(&"9f".repeat(16)).unwrap());
    vec![
        (Box::new(BankError::KeyNeeded), "--tenant-key FILE"),
        (Box::new(BankError::WrongKey), "--tenant-key FILE"),
        (Box::new(BankError::Exists), "another place"),
        (Box::new(BankError::Malformed(wrong())), "config/bank from a copy"),
        (Box::new(BankError::Malformed(Malformed::Version(9, 2))), "version of farbus"),
        (Box::new(BankError::Store(full())), "farbus bank gc"),
        (Box::new(none()), "farbus bank list"),
        (Box::new(FindError::Store(full())), "farbus bank gc"),
        (Box::new(DepositError::Name("/".to_owned())), "another name"),
        (Box::new(DepositError::Twice("x".to_owned())), "another name"),
        (Box::new(DepositError::Sections), "fewer sections"),
        (Box::new(DepositError::TooLong { name: "x".to_owned(), len: 1 }), "several sections"),
        (Box::new(DepositError::Empty), "--memory FILE"),
        (Box::new(DepositError::Overtaken("vm7@1".to_owned())), "run it again"),
        (Box::new(DepositError::Source(other())), "can read"),
        (Box::new(DepositError::Parent(none())), "--parent none"),
        (Box::new(DepositError::Memory(other())), "memory"),
        (Box::new(DepositError::Store(full())), "farbus bank gc"),
        (Box::new(ReadError::Missing(page)), "--repair"),
        (Box::new(ReadError::Damaged { id: page, pack }), "--repair"),
        (Box::new(ReadError::Sent(page)), "on the host that serves"),
        (Box::new(ReadError::Memory(other())), "memory"),
        (Box::new(IndexError::Pack { pack, error: wrong() }), "--repair"),
        (Box::new(WithdrawError::Section("x".to_owned())), "farbus bank show"),
        (Box::new(WithdrawError::Target(other())), "can write"),
        (Box::new(WithdrawError::Read(ReadError::Store(full()))), "farbus bank gc"),
        (Box::new(WithdrawError::Page { section: "memory".to_owned(), offset: 0, error: ReadError::Missing(page) }), "--repair"),
        (Box::new(CopyError::Keys), "one tenant"),
        (Box::new(CopyError::Memory(other())), "memory"),
        (Box::new(SweepError::Memory(other())), "memory"),
        (Box::new(RepairError::Memory(other())), "memory"),
        (Box::new(RemoveError::Store(StoreError::Busy { by: "x".to_owned() })), "--wait 5m"),
        (Box::new(ExportError::Target(other())), "can write"),
        (Box::new(ExportError::Memory(other())), "memory"),
        (Box::new(ImportError::Malformed(wrong())), "export the machine again"),
        (Box::new(ImportError::Malformed(Malformed::Version(9, 1))), "version of farbus"),
        (Box::new(ImportError::Keys(true)), "same tenant"),
        (Box::new(ImportError::NoBase(Root([1; 32]))), "without --since"),
        (Box::new(ImportError::Source(other())), "can read"),
        (Box::new(ImportError::Memory(other())), "memory"),
        (Box::new(RestoreError::Other("config".to_owned())), "--to DIR"),
        (Box::new(RestoreError::Page(1)), "--repair"),
        (Box::new(RestoreError::Stray(1, 2)), "Cloud Hypervisor"),
        (Box::new(RestoreError::Memory(other())), "memory"),
        (Box::new(RestoreError::Withdraw(WithdrawError::Target(other()))), "can write"),
        (Box::new(SaveError::Deposit(DepositError::Empty)), "--memory FILE"),
        (Box::new(QemuError::Other), "--to DIR"),
        (Box::new(QemuError::Malformed(wrong())), "--to DIR"),
        (Box::new(QemuError::Block { section: "x".to_owned(), len: 1 }), "--to DIR"),
        (Box::new(QemuError::Withdraw(WithdrawError::Target(other()))), "can write"),
    ]
}

#[test]
fn every_error_has_the_hint_that_helps_and_none_leads_to_verify_for_nothing() {
    for (error, wanted) in of_stores().into_iter().chain(of_operations()) {
        let hint = said(&*error, "/nowhere/bank");
        assert!(hint.contains(wanted), "{error:?}: {hint}");
        // Reading everything helps only where what is kept is damaged.
        assert!(!hint.contains("verify") || wanted == "--repair" || wanted.contains("on the host"), "{error:?}: {hint}");
    }
}

#[test]
fn over_a_link_what_is_to_be_done_at_the_bank_is_to_be_done_on_its_host() {
    for error in [StoreError::Full(io::Error::other("x")), StoreError::ReadOnly(io::Error::other("x")), host(ErrorKind::NotFound)] {
        let hint = said(&error, "shm:/run/bank");
        assert!(hint.contains("on the host that serves"), "{error:?}: {hint}");
    }
    assert!(said(&ReadError::Missing(PageId([1; 32])), "shm:/run/bank").contains("on the host that serves"));
}
