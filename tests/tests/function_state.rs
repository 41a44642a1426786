//! A function moves with its guest: from one lender's session to another, to the device itself and back, and onto a device that was reset meanwhile.
//!
//! The guest of `scripted_guest` has commands under way in two queues when its function is quiesced, saved and restored over a copy of its memory; it goes on there,
//! and at the end every block of the image is what the guest says it is. Its old memory is touched by nobody any more.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a panic is how a test fails")]

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use farbus_pci_shim::{Embedded, FunctionState, RestoreError};
use farbus_remote_dma::borrower::{BorrowerOptions, BorrowerSession};
use farbus_remote_dma::lender::{LenderSession, PollOptions};
use farbus_remote_dma::model::{Nvme, NvmeOptions};
use farbus_remote_dma::native::{Home, Native};
use farbus_remote_dma::wait::Waker;
use farbus_remote_dma::{Attachment, Backend, Continued, Kept};
use farbus_tests::scripted_guest::{BLOCK_BYTES, BLOCKS, Device, FlagSink, Guest, MEMORY_BYTES, generation_of};
use farbus_transport::shm::{ShmFabric, ShmOptions};
use farbus_transport::{Memory, Nanos};

const LEASE: Duration = Duration::from_secs(600);
const LIMIT: Duration = Duration::from_secs(20);
const DEPTH: u64 = 24;

/// A device, kept or as after power-on.
enum Idle {
    Kept(Kept),
    Reset(Box<dyn Backend>),
}

/// Where a function finds its device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Remote,
    Inline,
    Threaded,
}

/// A device in use: what gives it back when the function has left.
enum InUse {
    Lent(JoinHandle<Idle>),
    Home(Home),
}

impl InUse {
    fn back(self) -> Idle {
        match self {
            Self::Lent(thread) => thread.join().unwrap(),
            Self::Home(home) => Idle::Kept(home.take().expect("the device went home")),
        }
    }
}

fn serve(mut session: LenderSession<ShmFabric>) -> Idle {
    session.run(PollOptions::default(), &Waker::new().unwrap());
    match session.into_kept() {
        Ok(kept) => Idle::Kept(kept),
        Err(session) => Idle::Reset(session.end().unwrap()),
    }
}

fn borrow(fabric: ShmFabric, device: &dyn Backend) -> BorrowerSession<ShmFabric> {
    let options = BorrowerOptions { read_deadline: LIMIT, control_deadline: LIMIT, ..BorrowerOptions::default() };
    BorrowerSession::new(fabric, device.description().clone(), options).unwrap()
}

fn attach(place: Place, device: Box<dyn Backend>) -> (Box<dyn Attachment>, InUse) {
    let home = Home::default();
    match place {
        Place::Remote => {
            let (lender, borrower) = ShmFabric::pair(ShmOptions::default()).unwrap();
            let session = borrow(borrower, &*device);
            let thread = std::thread::spawn(move || serve(LenderSession::new(lender, device).map_err(|(error, _)| error).unwrap()));
            (Box::new(session), InUse::Lent(thread))
        }
        Place::Inline => (Box::new(Native::inline(device).unwrap().at_home(&home)), InUse::Home(home)),
        Place::Threaded => (Box::new(Native::threaded(device, PollOptions::default()).unwrap().at_home(&home)), InUse::Home(home)),
    }
}

fn attach_again(place: Place, device: Continued, state: &[u8]) -> (Box<dyn Attachment>, InUse) {
    let token = FunctionState::parse(state).unwrap().rest().token;
    let home = Home::default();
    match place {
        Place::Remote => {
            let (lender, borrower) = ShmFabric::pair(ShmOptions::default()).unwrap();
            let session = borrow(borrower, device.device()).continuing(token);
            let thread =
                std::thread::spawn(move || serve(LenderSession::continued(lender, device).map_err(|(error, _)| error).unwrap()));
            (Box::new(session), InUse::Lent(thread))
        }
        Place::Inline => {
            let native = Native::continued(device).map_err(|(error, _)| error).unwrap();
            (Box::new(native.at_home(&home)), InUse::Home(home))
        }
        Place::Threaded => {
            let native = farbus_remote_dma::native::ThreadedNative::continued(device, PollOptions::default()).unwrap();
            (Box::new(native.at_home(&home)), InUse::Home(home))
        }
    }
}

struct World {
    image: Arc<Memory>,
}

impl World {
    fn new() -> (Self, Box<dyn Backend>) {
        Self::with(NvmeOptions::default())
    }

    fn with(options: NvmeOptions) -> (Self, Box<dyn Backend>) {
        let image = Memory::memfd("image", BLOCKS * BLOCK_BYTES).unwrap();
        let nvme = Nvme::in_memory(Arc::clone(&image), options).unwrap();
        (Self { image }, Box::new(nvme))
    }

    /// Every block is what the guest says it is.
    #[track_caller]
    fn judge(&self, guest: &Guest) {
        for block in 0..BLOCKS {
            let mut bytes = vec![0; BLOCK_BYTES as usize];
            self.image.read(block * BLOCK_BYTES, &mut bytes).unwrap();
            assert_eq!(generation_of(block, &bytes), Some(guest.generation(block)), "block {block}");
        }
    }
}

fn guest() -> Guest {
    Guest::new(Memory::memfd("guest", MEMORY_BYTES).unwrap())
}

/// The guest in another process: other memory with the same bytes.
fn copy(guest: &Guest) -> Guest {
    let memory = Memory::memfd("copy", MEMORY_BYTES).unwrap();
    memory.copy_from(0, guest.memory(), 0, MEMORY_BYTES).unwrap();
    Guest::new(memory)
}

fn all_of(guest: &Guest) -> Vec<u8> {
    let mut bytes = vec![0; MEMORY_BYTES as usize];
    guest.memory().read(0, &mut bytes).unwrap();
    bytes
}

/// Runs until so many more blocks were verified, and leaves commands under way.
fn run(guest: &Guest, device: &mut Device<FlagSink>, blocks: u64) {
    let (until, began) = (guest.verified() + blocks, Instant::now());
    while guest.verified() < until {
        guest.step(device, DEPTH).unwrap();
        device.poll(Nanos::now());
        assert!(began.elapsed() < LIMIT, "{} of {until} blocks verified: an interrupt was lost", guest.verified());
    }
    guest.step(device, DEPTH).unwrap();
}

fn start(attachment: Box<dyn Attachment>, guest: &Guest, seed: u64) -> Device<FlagSink> {
    let mut device = Embedded::new(attachment, FlagSink(Arc::clone(guest.memory())), guest.slice()).unwrap();
    guest.boot(&mut device, seed).unwrap();
    device
}

fn restore(attachment: Box<dyn Attachment>, guest: &Guest, state: &[u8]) -> Result<Device<FlagSink>, RestoreError> {
    let sink = FlagSink(Arc::clone(guest.memory()));
    let (device, restored) = Embedded::restore(attachment, sink, guest.slice(), state)?;
    println!("restored, revived: {}", restored.revived);
    Ok(device)
}

/// Moves the function and its guest `moves` times, to each of `places` in turn.
fn wander(options: NvmeOptions, places: &[Place], moves: usize) {
    let (world, device) = World::with(options);
    let mut here = guest();
    let (attachment, mut in_use) = attach(places[0], device);
    let mut device = start(attachment, &here, 42);
    let mut downtimes = Vec::new();
    for at in 1..=moves {
        run(&here, &mut device, 40);
        let stopped = Instant::now();
        device.quiesce(LIMIT).unwrap();
        let state = device.save().unwrap();
        device.leave(LEASE).unwrap();
        let there = copy(&here);
        let (old, before) = (device, all_of(&here));
        let Idle::Kept(kept) = in_use.back() else { panic!("the device was reset") };
        let token = FunctionState::parse(&state).unwrap().rest().token;
        let (attachment, next) = attach_again(places[at % places.len()], kept.claim(&token).unwrap(), &state);
        device = restore(attachment, &there, &state).unwrap();
        device.resume();
        downtimes.push(stopped.elapsed());
        in_use = next;
        run(&there, &mut device, 40);
        assert!(all_of(&here) == before, "somebody wrote the memory that the guest has left");
        drop(old);
        here = there;
    }
    here.drain(&mut device).unwrap();
    world.judge(&here);
    downtimes.sort();
    println!("{moves} moves, {} blocks verified, median downtime {:?}", here.verified(), downtimes[moves / 2]);
}

#[test]
fn a_guest_goes_on_with_its_lenders_next_session() {
    wander(NvmeOptions::default(), &[Place::Remote], 20);
}

#[test]
fn a_guest_moves_between_the_device_itself_and_its_lender_and_back() {
    wander(
        NvmeOptions::default(),
        &[Place::Remote, Place::Inline, Place::Remote, Place::Threaded, Place::Inline, Place::Threaded],
        24,
    );
}

#[test]
fn commands_that_take_their_time_end_before_the_rest() {
    let options = NvmeOptions { latency: Duration::from_millis(2), ..NvmeOptions::default() };
    wander(options, &[Place::Remote, Place::Inline, Place::Threaded], 6);
}

#[test]
fn a_device_that_was_reset_is_brought_back_to_where_the_guest_left_it() {
    for (at, place) in [Place::Remote, Place::Inline, Place::Threaded].into_iter().cycle().take(9).enumerate() {
        let (world, device) = World::new();
        let here = guest();
        let (attachment, in_use) = attach(Place::Remote, device);
        let mut device = start(attachment, &here, 7 + at as u64);
        // Long enough for both queues to go round several times, and to be in different rounds.
        run(&here, &mut device, 30 + 57 * at as u64);
        device.quiesce(LIMIT).unwrap();
        let state = device.save().unwrap();
        let there = copy(&here);
        // The host dies: nobody asked to keep the device.
        drop(device);
        let Idle::Reset(device) = in_use.back() else { panic!("a device was kept for nobody") };
        let (attachment, in_use) = attach(place, device);
        let mut device = restore(attachment, &there, &state).unwrap();
        device.resume();
        run(&there, &mut device, 300);
        there.drain(&mut device).unwrap();
        world.judge(&there);
        // And it can be moved on from there.
        there.begin_at_most(u64::MAX);
        run(&there, &mut device, 10);
        device.quiesce(LIMIT).unwrap();
        let state = device.save().unwrap();
        device.leave(LEASE).unwrap();
        drop(device);
        let (Idle::Kept(kept), token) = (in_use.back(), FunctionState::parse(&state).unwrap().rest().token) else {
            panic!("not kept")
        };
        let (attachment, _in_use) = attach_again(Place::Remote, kept.claim(&token).unwrap(), &state);
        let mut device = restore(attachment, &there, &state).unwrap();
        device.resume();
        run(&there, &mut device, 50);
        there.drain(&mut device).unwrap();
        world.judge(&there);
    }
}

#[test]
fn a_state_is_refused_where_it_does_not_fit() {
    let (_world, device) = World::new();
    let here = guest();
    let (attachment, in_use) = attach(Place::Inline, device);
    let mut device = start(attachment, &here, 3);
    run(&here, &mut device, 20);
    assert!(device.save().is_err(), "a function that is not at rest was saved");
    device.quiesce(LIMIT).unwrap();
    let old = device.save().unwrap();
    device.resume();
    run(&here, &mut device, 20);
    device.quiesce(LIMIT).unwrap();
    let state = device.save().unwrap();
    device.leave(LEASE).unwrap();
    drop(device);

    // Another drive of the same kind.
    let (_other, other) = World::new();
    let refused = restore(Box::new(Native::inline(other).unwrap()), &here, &state).unwrap_err();
    assert!(matches!(refused, RestoreError::Device { what: "serial number", .. }), "{refused}");
    // Memory elsewhere.
    let (_other, other) = World::with(NvmeOptions {
        serial: Some(FunctionState::parse(&state).unwrap().device().serial.clone()),
        ..NvmeOptions::default()
    });
    let small = Guest::new(Memory::memfd("small", MEMORY_BYTES / 2).unwrap());
    let refused = restore(Box::new(Native::inline(other).unwrap()), &small, &state).unwrap_err();
    assert!(matches!(refused, RestoreError::Memory(_)), "{refused}");
    // The device is kept at the second rest; the state of the first one is older.
    let Idle::Kept(kept) = in_use.back() else { panic!("not kept") };
    let older = FunctionState::parse(&old).unwrap().rest().token;
    let kept = kept.claim(&older).expect_err("an older state claimed the device");
    let newer = FunctionState::parse(&state).unwrap().rest().token;
    let (attachment, _in_use) = attach_again(Place::Inline, kept.claim(&newer).unwrap(), &state);
    let refused = restore(attachment, &here, &old).unwrap_err();
    assert!(matches!(refused, RestoreError::OtherRest), "{refused}");
}

#[test]
fn a_function_that_was_quiesced_goes_on_where_it_is() {
    for place in [Place::Remote, Place::Inline, Place::Threaded] {
        let (world, device) = World::new();
        let here = guest();
        let (attachment, _in_use) = attach(place, device);
        let mut device = start(attachment, &here, 11);
        for _ in 0..20 {
            run(&here, &mut device, 20);
            let rest = device.quiesce(LIMIT).unwrap();
            assert!(rest.mark.is_some());
            device.resume();
        }
        here.drain(&mut device).unwrap();
        world.judge(&here);
    }
}

#[test]
fn a_device_that_was_reset_and_passes_for_kept_is_found_out() {
    let (_world, device) = World::new();
    let here = guest();
    let (attachment, in_use) = attach(Place::Remote, device);
    let mut device = start(attachment, &here, 5);
    run(&here, &mut device, 100);
    device.quiesce(LIMIT).unwrap();
    let state = device.save().unwrap();
    drop(device);
    let Idle::Reset(device) = in_use.back() else { panic!("a device was kept for nobody") };
    // The lender lies: it says that this is the rest of the state.
    let (lender, borrower) = ShmFabric::pair(ShmOptions::default()).unwrap();
    let session = borrow(borrower, &*device).continuing(FunctionState::parse(&state).unwrap().rest().token);
    let _lender = std::thread::spawn(move || serve(LenderSession::new(lender, device).map_err(|(error, _)| error).unwrap()));
    let mut device = restore(Box::new(session), &here, &state).unwrap();
    device.resume();
    let (before, until) = (here.verified(), Instant::now() + Duration::from_millis(300));
    let mut wrong = None;
    while Instant::now() < until && wrong.is_none() {
        wrong = here.step(&mut device, DEPTH).err();
        device.poll(Nanos::now());
    }
    assert!(wrong.is_some() || here.verified() < before + 100, "a device that knows nothing of the queues served them");
}
