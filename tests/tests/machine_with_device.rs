//! A machine with a borrowed device in a bank: deposited while it works, withdrawn in another process where it finds its device again, and restarted at home
//! with the device attached natively when its borrower was killed.
//!
//! The borrower is killed 40 ms after its second deposit: "1,317 writes acknowledged since the deposit of …: LBA …" names every block that the guest's memory
//! does not know, and no other; the guest is told of these, goes on, and at the end every block of the image is what it says.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use farbus_machine_bank::{Bank, Entry, keep};
use farbus_mini_vmm::link::{borrow, borrow_again};
use farbus_mini_vmm::{Depositor, Device as HomeDevice, Home, Pause, Withdrawn, meanwhile, say};
use farbus_pci_shim::Embedded;
use farbus_remote_dma::guest_memory::SliceMemory;
use farbus_remote_dma::wait::Waker;
use farbus_remote_dma::{Attachment, BlockRange, GuestAddress, Since};
use farbus_tests::bank_home::{BankHome, Part, part};
use farbus_tests::scripted_guest::{BLOCK_BYTES, BLOCKS, Device, FlagSink, Guest, LOGICAL, MEMORY_BYTES, generation_of};
use farbus_transport::{CloseReason, Memory, Nanos};

const DEPTH: u64 = 24;
const LIMIT: Duration = Duration::from_secs(60);
const LEASE: Duration = Duration::from_secs(60);
fn place() -> BankHome {
    BankHome::new(BLOCKS * BLOCK_BYTES)
}

fn device(place: &BankHome) -> HomeDevice {
    HomeDevice::Reset(place.nvme())
}

fn on_disk(place: &BankHome, block: u64) -> Option<u64> {
    generation_of(block, &place.block(block, BLOCK_BYTES))
}

#[track_caller]
fn judge(place: &BankHome, guest: &Guest) {
    for block in 0..BLOCKS {
        assert_eq!(on_disk(place, block), Some(guest.generation(block)), "block {block}");
    }
}

struct Machine {
    guest: Guest,
    device: Device<FlagSink>,
}

impl Machine {
    fn begin(memory: Arc<Memory>, attachment: Box<dyn Attachment>, seed: u64) -> Self {
        let guest = Guest::new(Arc::clone(&memory));
        let slice = SliceMemory::new(GuestAddress(0), Arc::clone(&memory));
        let mut device = Embedded::new(attachment, FlagSink(memory), slice).unwrap();
        guest.boot(&mut device, seed).unwrap();
        Self { guest, device }
    }

    fn again(withdrawn: &Withdrawn, attachment: Box<dyn Attachment>) -> (Self, bool) {
        let memory = withdrawn.area.share().unwrap();
        let slice = SliceMemory::new(GuestAddress(0), Arc::clone(&memory));
        let guest = Guest::new(Arc::clone(&memory));
        let (device, restored) = Embedded::restore(attachment, FlagSink(memory), slice, &withdrawn.function).unwrap();
        (Self { guest, device }, restored.revived)
    }

    fn step(&mut self) {
        self.guest.step(&mut self.device, DEPTH).unwrap();
        self.device.poll(Nanos::now());
    }

    fn run(&mut self, blocks: u64) {
        let (until, began) = (self.guest.verified() + blocks, Instant::now());
        while self.guest.verified() < until {
            self.step();
            assert!(began.elapsed() < LIMIT, "the guest stands still: an interrupt was lost");
        }
    }

    /// Deposits it; the guest works meanwhile.
    fn deposit(&mut self, depositor: &mut Depositor<'_>, bank: &Bank) -> (Pause, u64) {
        let frozen = depositor.freeze(&mut self.device, || Ok(Vec::new())).unwrap();
        let report = std::thread::scope(|scope| {
            let putting = scope.spawn(|| frozen.put(bank, "vm").unwrap());
            while !putting.is_finished() {
                self.step();
            }
            putting.join().unwrap()
        });
        depositor.done(&report);
        (frozen.pause, frozen.pages())
    }
}

/// Not a test of its own: what a borrower does in its process.
#[test]
fn the_other_process() {
    let Some(Part { name, socket, bank }) = part() else { return };
    match name.as_str() {
        "works and deposits until it is killed" => {
            let area = farbus_machine_bank::lazy::Area::shared(MEMORY_BYTES).unwrap();
            let mut depositor = Depositor::new(&area).unwrap();
            let mut machine = Machine::begin(area.share().unwrap(), borrow(&socket, None).unwrap(), u64::from(std::process::id()));
            loop {
                machine.run(50);
                machine.deposit(&mut depositor, &bank);
            }
        }
        "goes on from the bank and ends" => {
            let withdrawn = Withdrawn::from_bank(&bank, "vm").unwrap();
            let token = withdrawn.state().unwrap().rest().token;
            let (mut machine, revived) = Machine::again(&withdrawn, borrow(&socket, Some(token)).unwrap());
            assert!(!revived, "a device that was kept was reset");
            let mut depositor = Depositor::new(&withdrawn.area).unwrap();
            depositor.follow(&withdrawn.entry);
            machine.device.resume();
            machine.run(500);
            machine.guest.drain(&mut machine.device).unwrap();
            let frozen = depositor.freeze_and_leave(&mut machine.device, LEASE, || Ok(Vec::new())).unwrap();
            frozen.put(&bank, "vm").unwrap();
        }
        other => panic!("no such part: {other}"),
    }
}

#[test]
fn a_machine_is_deposited_while_it_works_and_goes_on_elsewhere_with_its_device() {
    let place = place();
    let bank = place.bank();
    let home = Home::open(&place.socket()).unwrap();
    let lending = home.serve_aside(device(&place), Waker::new().unwrap()).unwrap();
    let area = farbus_machine_bank::lazy::Area::shared(MEMORY_BYTES).unwrap();
    let mut depositor = Depositor::new(&area).unwrap();
    let mut machine = Machine::begin(area.share().unwrap(), borrow(&place.socket(), None).unwrap(), 17);
    for at in 0..5 {
        machine.run(100);
        let (pause, pages) = machine.deposit(&mut depositor, &bank);
        println!("deposit {at}: {pages} pages, a pause of {:?}: {pause:?}", pause.total());
        if at > 0 && depositor.tracks() {
            assert!(pages < MEMORY_BYTES / 4096, "a deposit that follows another looked at everything");
        }
    }
    machine.run(50);
    let frozen = depositor.freeze_and_leave(&mut machine.device, LEASE, || Ok(Vec::new())).unwrap();
    frozen.put(&bank, "vm").unwrap();
    let (home, left) = lending.join().unwrap().unwrap();
    assert!(matches!(left.device, HomeDevice::Kept(_)), "the device was not kept");

    // A stranger comes while it is kept, and is refused; then the other process with the state.
    let lending = home.serve_aside(left.device, Waker::new().unwrap()).unwrap();
    let refused = borrow(&place.socket(), None).err().unwrap().to_string();
    assert!(refused.contains("is kept for a function"), "{refused}");
    let mut other = place.borrower("goes on from the bank and ends");
    assert!(other.wait().unwrap().success(), "the machine did not go on in the other process");
    let (_home, left) = lending.join().unwrap().unwrap();
    let after = Withdrawn::from_bank(&bank, "vm").unwrap();
    let guest = Guest::new(after.area.share().unwrap());
    assert!(guest.verified() >= machine.guest.verified() + 500);
    judge(&place, &guest);

    // And home again, without a link, from the bank.
    let token = after.state().unwrap().rest().token;
    let (mut machine, revived) = Machine::again(&after, left.device.attach_here(&token).unwrap());
    assert!(!revived);
    machine.device.resume();
    machine.guest.begin_at_most(u64::MAX);
    machine.run(300);
    machine.guest.drain(&mut machine.device).unwrap();
    judge(&place, &machine.guest);
}

/// Tears every pack, and has the bank find out what it lost by it.
fn lose_all(place: &BankHome, bank: &Bank) {
    for pack in std::fs::read_dir(place.folder().join("bank/packs")).unwrap() {
        let pack = std::fs::OpenOptions::new().write(true).open(pack.unwrap().path()).unwrap();
        pack.set_len(pack.metadata().unwrap().len() - 10).unwrap();
    }
    let report = keep::repair(bank, &|_| {}).unwrap();
    assert!(report.lost > 10, "{report:?}");
}

/// The last deposit is whole, and is what is in `area`; the others are of no more use.
fn assert_healed(bank: &Bank, area: &farbus_machine_bank::lazy::Area) {
    let last = bank.find("vm").unwrap();
    let others: Vec<_> = bank.listing().unwrap().0.iter().filter(|entry| entry.root != last.root).cloned().collect();
    keep::remove(bank, &others).unwrap();
    assert_eq!(keep::verify(bank, &|_| {}).unwrap().faults, []);
    let withdrawn = Withdrawn::from_bank(bank, "vm").unwrap();
    let bytes = |area: &farbus_machine_bank::lazy::Area| {
        let mut bytes = vec![0; area.len() as usize];
        area.memory().read(0, &mut bytes).unwrap();
        bytes
    };
    assert!(bytes(&withdrawn.area) == bytes(area), "another machine came out");
}

#[test]
fn what_a_bank_has_lost_the_next_deposit_brings_back_though_it_looks_at_changes_only() {
    let place = place();
    let bank = place.bank();
    let home = Home::open(&place.socket()).unwrap();
    let lending = home.serve_aside(device(&place), Waker::new().unwrap()).unwrap();
    let area = farbus_machine_bank::lazy::Area::shared(MEMORY_BYTES).unwrap();
    let mut depositor = Depositor::new(&area).unwrap();
    let mut machine = Machine::begin(area.share().unwrap(), borrow(&place.socket(), None).unwrap(), 23);
    for _ in 0..2 {
        machine.run(100);
        machine.deposit(&mut depositor, &bank);
    }
    lose_all(&place, &bank);
    if depositor.tracks() {
        // The rule, broken: what is lost is not looked for.
        machine.run(10);
        let frozen = depositor.freeze(&mut machine.device, || Ok(Vec::new())).unwrap();
        let error = format!("{:#}", frozen.put(&bank, "vm").unwrap_err());
        assert!(error.contains("was not copied"), "{error}");
        depositor.failed(&frozen);
    }
    assert!(depositor.mark_lost(&bank).unwrap() > 0 || !depositor.tracks());
    machine.run(10);
    let (_, pages) = machine.deposit(&mut depositor, &bank);
    assert!(pages < MEMORY_BYTES / 4096 || !depositor.tracks(), "all of the machine was deposited");

    // Lost again when the machine has left already, and what is frozen is all that there is.
    machine.run(50);
    let mut frozen = depositor.freeze_and_leave(&mut machine.device, LEASE, || Ok(Vec::new())).unwrap();
    lose_all(&place, &bank);
    if depositor.tracks() {
        assert!(frozen.put(&bank, "vm").is_err());
        assert!(depositor.add_lost(&bank, &mut frozen).unwrap() > 0);
    }
    frozen.put(&bank, "vm").unwrap();
    assert_healed(&bank, &area);
    let (_home, left) = lending.join().unwrap().unwrap();
    assert!(matches!(left.device, HomeDevice::Kept(_)));

    // A deposit that was removed is nothing that another can follow.
    depositor.follow(&bank.find("vm").unwrap());
    keep::remove(&bank, &bank.listing().unwrap().0).unwrap();
    depositor.add_lost(&bank, &mut frozen).unwrap();
    assert_eq!(frozen.pages(), MEMORY_BYTES / 4096);
    frozen.put(&bank, "vm").unwrap();
    assert_healed(&bank, &area);
}

#[test]
fn a_lease_that_is_over_leaves_a_device_that_is_reset_and_brought_back() {
    let place = place();
    let bank = place.bank();
    let home = Home::open(&place.socket()).unwrap();
    let lending = home.serve_aside(device(&place), Waker::new().unwrap()).unwrap();
    let area = farbus_machine_bank::lazy::Area::shared(MEMORY_BYTES).unwrap();
    let mut depositor = Depositor::new(&area).unwrap();
    let mut machine = Machine::begin(area.share().unwrap(), borrow(&place.socket(), None).unwrap(), 23);
    machine.run(200);
    let frozen = depositor.freeze_and_leave(&mut machine.device, Duration::from_millis(1), || Ok(Vec::new())).unwrap();
    frozen.put(&bank, "vm").unwrap();
    let (home, left) = lending.join().unwrap().unwrap();
    std::thread::sleep(Duration::from_millis(5));
    let lending = home.serve_aside(left.device, Waker::new().unwrap()).unwrap();
    let withdrawn = Withdrawn::from_bank(&bank, "vm").unwrap();
    let token = withdrawn.state().unwrap().rest().token;
    let refused = borrow(&place.socket(), Some(token)).err().unwrap().to_string();
    assert!(refused.contains("not kept for this function any more"), "{refused}");
    let (mut machine, revived) = Machine::again(&withdrawn, borrow_again(&place.socket(), token).unwrap());
    assert!(revived);
    machine.device.resume();
    machine.run(200);
    machine.guest.drain(&mut machine.device).unwrap();
    judge(&place, &machine.guest);
    drop(machine);
    lending.join().unwrap().unwrap();
}

fn among(ranges: &[BlockRange], block: u64) -> bool {
    ranges.iter().any(|range| range.first < (block + 1) * LOGICAL && block * LOGICAL < range.first + range.blocks)
}

/// The report says the truth about every block, and the guest is told what it cannot know.
fn check_and_tell(place: &BankHome, guest: &Guest, since: &Since) {
    assert_eq!(since.unlisted, 0);
    for block in 0..BLOCKS {
        let (found, known) = (on_disk(place, block), guest.acknowledged_generation(block));
        match (among(&since.ranges, block), among(&since.torn, block)) {
            (false, false) => assert_eq!(found, Some(known), "block {block} was written, and the report does not say so"),
            (true, false) => {
                assert!(found > Some(known), "block {block} was acknowledged as written and is of {found:?}, not after {known}")
            }
            (_, true) => println!("block {block} was under way: {found:?} where the guest knows {known}"),
        }
        // A block whose write was cut off would be torn; in memory it is not, because a copy that began ends.
        guest.learn(block, found.unwrap_or_else(|| panic!("block {block} is torn")));
    }
}

#[test]
fn a_killed_borrowers_machine_restarts_at_home_and_is_told_what_its_device_did_meanwhile() {
    let mut most = 0;
    for round in 0..6u64 {
        let place = place();
        let bank = place.bank();
        let home = Home::open(&place.socket()).unwrap();
        let lending = home.serve_aside(device(&place), Waker::new().unwrap()).unwrap();
        let mut borrower = place.borrower("works and deposits until it is killed");
        let began = Instant::now();
        while bank.listing().unwrap().0.len() < 2 {
            assert!(began.elapsed() < LIMIT && borrower.try_wait().unwrap().is_none(), "the borrower does not deposit");
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(round * 13));
        borrower.kill().unwrap();
        borrower.wait().unwrap();
        let (_home, left) = lending.join().unwrap().unwrap();
        assert!(matches!(left.reason, CloseReason::PeerGone | CloseReason::PeerClosed), "{:?}", left.reason);

        let last: Entry = bank.find("vm").unwrap();
        let withdrawn = Withdrawn::from_bank(&bank, "vm").unwrap();
        let state = withdrawn.state().unwrap();
        let since = meanwhile(left.device.get(), &state).expect("the journal of the very device");
        println!("{} restarts: {}", last.object(), say(Some(&since), state.saved_at()));
        most = most.max(since.acknowledged);
        let guest = Guest::new(withdrawn.area.share().unwrap());
        check_and_tell(&place, &guest, &since);
        let (mut machine, revived) = Machine::again(&withdrawn, left.device.attach_here(&state.rest().token).unwrap());
        assert!(revived, "a device whose borrower was killed was not reset");
        machine.device.resume();
        machine.run(500);
        machine.guest.drain(&mut machine.device).unwrap();
        judge(&place, &machine.guest);
    }
    assert!(most > 0, "the borrower was never killed between a deposit and a write: nothing was tried");
}
