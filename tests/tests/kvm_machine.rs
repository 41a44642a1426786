//! A machine on /dev/kvm whose guest drives a borrowed NVMe function by MSI-X: it verifies every block that it reads, is deposited while it runs, goes on in
//! another process, and restarts at home when its borrower was killed.
//!
//! Where there is no /dev/kvm that can do this, each test says "not run" and why. Its guest program is in `mini-vmm/src/kvm/guest.rs`.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use farbus_machine_bank::Bank;
use farbus_machine_bank::lazy::Area;
use farbus_mini_vmm::kvm::guest::{self, BLOCK_BYTES, BLOCKS, MEMORY_BYTES};
use farbus_mini_vmm::kvm::machine::Machine;
use farbus_mini_vmm::link::borrow;
use farbus_mini_vmm::moving::receive;
use farbus_mini_vmm::{Depositor, Device, Home, Withdrawn, meanwhile, say};
use farbus_pci_shim::FunctionState;
use farbus_remote_dma::lender::PollOptions;
use farbus_remote_dma::native::Native;
use farbus_remote_dma::wait::Waker;
use farbus_tests::bank_home::{BankHome, Part, bank_at, part};
use farbus_tests::process::Running;
use farbus_transport::Memory;

const LEASE: Duration = Duration::from_secs(60);
const LIMIT: Duration = Duration::from_secs(60);

/// Whether there is a KVM that can do what is asked of it here; otherwise the test is not run.
fn kvm(what: &str) -> bool {
    let area = Area::shared(MEMORY_BYTES).unwrap();
    match farbus_mini_vmm::kvm::Vm::new(&area) {
        Ok(_) => true,
        Err(error) => {
            eprintln!("{what}: not run: {error:#}");
            false
        }
    }
}

fn place() -> BankHome {
    BankHome::new(BLOCKS * BLOCK_BYTES)
}

/// Every block is of the generation that the guest knows; but one, whose write may be under way.
#[track_caller]
fn judge(place: &BankHome, memory: &Memory) {
    let mut ahead = 0;
    for block in 0..BLOCKS {
        let bytes = place.block(block, BLOCK_BYTES);
        let known = guest::generation(memory, block).unwrap();
        if bytes != guest::pattern(block, known) {
            assert_eq!(bytes, guest::pattern(block, known + 1), "block {block} is not of generation {known}, nor of the next");
            ahead += 1;
        }
    }
    assert!(ahead <= 1, "{ahead} blocks are ahead of a guest that writes one at a time");
}

/// Runs until so many more blocks are verified.
fn run(machine: &mut Machine, blocks: u64) {
    let until = machine.vm.counts().verified + blocks;
    let (mut last, mut moved) = (0, Instant::now());
    while machine.vm.counts().verified < until {
        machine.run_for(Duration::from_millis(20)).unwrap();
        let verified = machine.vm.counts().verified;
        if verified > last {
            (last, moved) = (verified, Instant::now());
        }
        // Slow is no fault: a KVM that carries out instructions one by one, beside others, takes its time.
        assert!(moved.elapsed() < LIMIT, "the guest stands still: {:?}", machine.vm.counts());
    }
}

/// Not a test of its own: what a borrower does in its process.
#[test]
fn the_other_process() {
    let Some(Part { name, socket, bank }) = part() else { return };
    match name.as_str() {
        "works and deposits until it is killed" => {
            let area = Area::shared(MEMORY_BYTES).unwrap();
            let mut depositor = Depositor::new(&area).unwrap();
            let mut machine = Machine::begin(&area, borrow(&socket, None).unwrap()).unwrap();
            loop {
                run(&mut machine, 20);
                let frozen = machine.freeze(&mut depositor).unwrap();
                let report = machine.run_while(|| frozen.put(&bank, "vm").unwrap()).unwrap();
                depositor.done(&report);
            }
        }
        "goes on from the bank and ends" => {
            let withdrawn = Withdrawn::from_bank(&bank, "vm").unwrap();
            let token = withdrawn.state().unwrap().rest().token;
            let (mut machine, restored) = Machine::again(&withdrawn, borrow(&socket, Some(token)).unwrap()).unwrap();
            assert!(!restored.revived, "a device that was kept was reset");
            let mut depositor = Depositor::new(&withdrawn.area).unwrap();
            depositor.follow(&withdrawn.entry);
            run(&mut machine, 100);
            let frozen = machine.freeze_and_leave(&mut depositor, LEASE).unwrap();
            frozen.put(&bank, "vm").unwrap();
        }
        "moves, first" | "moves, second" => moves(name == "moves, first", &socket, &bank),
        other => panic!("no such part: {other}"),
    }
}

/// How often the machine moves in each direction.
const MOVES: u64 = 3;

/// One of two processes between which a machine moves; the last to have it deposits it.
fn moves(first: bool, socket: &Path, bank: &Bank) {
    let place = |first: bool| socket.with_file_name(if first { "first" } else { "second" });
    let listener = UnixListener::bind(place(first)).unwrap();
    let mut here = first.then(|| {
        let area = Area::shared(MEMORY_BYTES).unwrap();
        (Machine::begin(&area, borrow(socket, None).unwrap()).unwrap(), area)
    });
    for at in 0..=2 * MOVES {
        let (mut machine, area) = match here.take() {
            Some(here) => here,
            None if at == 2 * MOVES && !first => return,
            None => {
                let (mut stream, _) = listener.accept().unwrap();
                let arrived = receive(&mut stream).unwrap();
                let token = FunctionState::parse(&arrived.function).unwrap().rest().token;
                let (machine, restored) = Machine::arrive(&arrived, borrow(socket, Some(token)).unwrap()).unwrap();
                let downtime = arrived.stopped.elapsed().unwrap_or_default();
                assert!(!restored.revived);
                println!("move {at}: downtime {downtime:?}");
                stream.write_all(&[1]).unwrap();
                here = Some((machine, arrived.area));
                continue;
            }
        };
        run(&mut machine, 30);
        if at == 2 * MOVES {
            let mut depositor = Depositor::new(&area).unwrap();
            machine.freeze_and_leave(&mut depositor, LEASE).unwrap().put(bank, "vm").unwrap();
            return;
        }
        let began = Instant::now();
        let mut stream = loop {
            match UnixStream::connect(place(!first)) {
                Ok(stream) => break stream,
                Err(error) => assert!(began.elapsed() < LIMIT, "{error}"),
            }
        };
        let left = machine.move_away(&area, &mut stream, 2, LEASE).unwrap();
        println!("move {at}: {left:?}");
        stream.read_exact(&mut [0]).unwrap();
    }
}

#[test]
fn a_kvm_guest_drives_a_function_by_interrupts_and_finds_every_block_right() {
    if !kvm("a KVM guest on a function") {
        return;
    }
    let place = place();
    let area = Area::shared(MEMORY_BYTES).unwrap();
    let native = Native::threaded(place.nvme(), PollOptions::default()).unwrap();
    let mut machine = Machine::begin(&area, Box::new(native)).unwrap();
    let began = Instant::now();
    run(&mut machine, BLOCKS + 64);
    let (counts, exits, time) = (machine.vm.counts(), machine.vm.exits, began.elapsed());
    println!("{counts:?}, {exits:?}, {time:?}: {:?} a command", time / (counts.verified + counts.written) as u32);
    // Two that come while the guest has interrupts off are one.
    assert!(counts.interrupts > (counts.verified + counts.written) / 2, "the guest did not hear of its completions: {counts:?}");
    judge(&place, area.memory());
}

#[test]
fn a_kvm_guest_is_deposited_while_it_runs_and_goes_on_in_another_process_and_home_again() {
    if !kvm("a KVM guest in a bank") {
        return;
    }
    let place = place();
    let bank = place.bank();
    let home = Home::open(&place.socket()).unwrap();
    let lending = home.serve_aside(Device::Reset(place.nvme()), Waker::new().unwrap()).unwrap();
    let area = Area::shared(MEMORY_BYTES).unwrap();
    let mut depositor = Depositor::new(&area).unwrap();
    let mut machine = Machine::begin(&area, borrow(&place.socket(), None).unwrap()).unwrap();
    for at in 0..4 {
        run(&mut machine, 50);
        let frozen = machine.freeze(&mut depositor).unwrap();
        let report = machine.run_while(|| frozen.put(&bank, "vm").unwrap()).unwrap();
        depositor.done(&report);
        println!("deposit {at}: {} pages, a pause of {:?}: {:?}", frozen.pages(), frozen.pause.total(), frozen.pause);
    }
    let frozen = machine.freeze_and_leave(&mut depositor, LEASE).unwrap();
    frozen.put(&bank, "vm").unwrap();
    let (home, left) = lending.join().unwrap().unwrap();
    let lending = home.serve_aside(left.device, Waker::new().unwrap()).unwrap();
    assert!(place.borrower("goes on from the bank and ends").wait().unwrap().success(), "the machine did not go on");
    let (_home, left) = lending.join().unwrap().unwrap();
    let withdrawn = Withdrawn::from_bank(&bank, "vm").unwrap();
    let token = withdrawn.state().unwrap().rest().token;
    let (mut machine, restored) = Machine::again(&withdrawn, left.device.attach_here(&token).unwrap()).unwrap();
    assert!(!restored.revived);
    run(&mut machine, 100);
    judge(&place, withdrawn.area.memory());
}

#[test]
fn a_kvm_guest_goes_on_from_a_bank_that_another_process_serves() {
    if !kvm("a KVM guest out of a served bank") {
        return;
    }
    let place = place();
    let folder = place.folder().join("bank");
    let listen = format!("shm:{}", place.folder().join("bank.link").display());
    let mut serving = Running::farbus(&["bank", "serve", folder.to_str().unwrap(), "--listen", &listen, "--json"]);
    serving.event("serving", LIMIT);
    let bank = bank_at(&listen);
    assert!(bank.store().service().is_some(), "the bank is not at the other end of a link");
    let home = Home::open(&place.socket()).unwrap();
    let lending = home.serve_aside(Device::Reset(place.nvme()), Waker::new().unwrap()).unwrap();
    let area = Area::shared(MEMORY_BYTES).unwrap();
    let mut depositor = Depositor::new(&area).unwrap();
    let mut machine = Machine::begin(&area, borrow(&place.socket(), None).unwrap()).unwrap();
    for _ in 0..2 {
        run(&mut machine, 50);
        assert_eq!(depositor.mark_lost(&bank).unwrap(), 0);
        let frozen = machine.freeze(&mut depositor).unwrap();
        let report = machine.run_while(|| frozen.put(&bank, "vm").unwrap()).unwrap();
        depositor.done(&report);
    }
    let frozen = machine.freeze_and_leave(&mut depositor, LEASE).unwrap();
    frozen.put(&bank, "vm").unwrap();
    let (home, left) = lending.join().unwrap().unwrap();
    let lending = home.serve_aside(left.device, Waker::new().unwrap()).unwrap();
    assert!(place.borrower_with("goes on from the bank and ends", &listen).wait().unwrap().success(), "the machine did not go on");
    let (_home, left) = lending.join().unwrap().unwrap();
    // Whoever has the bank itself finds what came over the link.
    let withdrawn = Withdrawn::from_bank(&place.bank(), "vm").unwrap();
    let token = withdrawn.state().unwrap().rest().token;
    let (mut machine, restored) = Machine::again(&withdrawn, left.device.attach_here(&token).unwrap()).unwrap();
    assert!(!restored.revived);
    run(&mut machine, 100);
    judge(&place, withdrawn.area.memory());
    serving.terminate();
    assert_eq!(serving.wait(LIMIT).code(), Some(0));
}

#[test]
fn a_kvm_guest_moves_back_and_forth_between_two_processes_while_it_runs() {
    if !kvm("a KVM guest between two processes") {
        return;
    }
    let place = place();
    let home = Home::open(&place.socket()).unwrap();
    let nvme = place.nvme();
    let lending = std::thread::spawn(move || {
        let never = Waker::new().unwrap();
        let mut device = Device::Reset(nvme);
        for _ in 0..=2 * MOVES {
            device = home.serve(device, &never).unwrap().device;
        }
    });
    let mut processes = ["moves, first", "moves, second"].map(|part| place.borrower(part));
    assert!(processes.iter_mut().all(|process| process.wait().unwrap().success()), "the machine did not come through");
    lending.join().unwrap();
    let withdrawn = Withdrawn::from_bank(&place.bank(), "vm").unwrap();
    judge(&place, withdrawn.area.memory());
}

#[test]
fn a_killed_borrowers_kvm_guest_restarts_at_home_from_its_last_deposit() {
    if !kvm("a KVM guest whose borrower is killed") {
        return;
    }
    for round in 0..2u64 {
        let place = place();
        let bank = place.bank();
        let home = Home::open(&place.socket()).unwrap();
        let lending = home.serve_aside(Device::Reset(place.nvme()), Waker::new().unwrap()).unwrap();
        let mut borrower = place.borrower("works and deposits until it is killed");
        let began = Instant::now();
        while bank.listing().unwrap().0.len() < 2 {
            assert!(began.elapsed() < LIMIT && borrower.try_wait().unwrap().is_none(), "the borrower does not deposit");
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(20 + round * 17));
        borrower.kill().unwrap();
        borrower.wait().unwrap();
        let (_home, left) = lending.join().unwrap().unwrap();
        let withdrawn = Withdrawn::from_bank(&bank, "vm").unwrap();
        let state = withdrawn.state().unwrap();
        let since = meanwhile(left.device.get(), &state).unwrap();
        println!("{} restarts: {}", withdrawn.entry.object(), say(Some(&since), state.saved_at()));
        guest::went_back(withdrawn.area.memory()).unwrap();
        let (mut machine, restored) = Machine::again(&withdrawn, left.device.attach_here(&state.rest().token).unwrap()).unwrap();
        assert!(restored.revived, "a device whose borrower was killed was not reset");
        run(&mut machine, BLOCKS + 64);
        let counts = machine.vm.counts();
        let reported: u64 = since.ranges.iter().chain(&since.torn).map(|range| range.blocks / 8).sum();
        assert!(counts.learnt <= reported, "{counts:?}: more blocks were newer than the {reported} that the report names");
        judge(&place, withdrawn.area.memory());
    }
}
