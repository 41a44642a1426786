//! The lender is killed with SIGKILL at random instants while a guest keeps 24 commands under way on its drive, and started again: the guest sees a pause.
//!
//! Every block that it reads is of the generation that it wrote last, every command ends, and at the end the image holds exactly what was acknowledged. 20 kills
//! in the normal run, as many as `FARBUS_KILLS` says otherwise; the pause is printed as the sum of its parts.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use farbus_machine_bank::lazy::Area;
use farbus_mini_vmm::link::borrow;
use farbus_mini_vmm::{Device as HomeDevice, Home};
use farbus_pci_shim::{Embedded, NotFound, Reconnector, Search};
use farbus_remote_dma::GuestAddress;
use farbus_remote_dma::guest_memory::SliceMemory;
use farbus_remote_dma::model::{Nvme, NvmeOptions};
use farbus_remote_dma::wait::Waker;
use farbus_tests::scripted_guest::{BLOCK_BYTES, BLOCKS, FlagSink, Guest, MEMORY_BYTES, generation_of};
use farbus_transport::Nanos;

const PART: &str = "FARBUS_TEST_LENDER";
const LIMIT: Duration = Duration::from_secs(60);
const DEPTH: u64 = 24;

fn kills() -> u64 {
    std::env::var("FARBUS_KILLS").ok().filter(|kills| !kills.is_empty()).map_or(20, |kills| kills.parse().unwrap())
}

/// Not a test of its own: the process that lends the drive until it is killed.
#[test]
fn the_lender() {
    let Ok(folder) = std::env::var(PART) else { return };
    let folder = PathBuf::from(folder);
    let never = Waker::new().unwrap();
    let mut device = HomeDevice::Reset(Box::new(Nvme::open(&folder.join("image"), NvmeOptions::default()).unwrap()));
    let home = Home::open(&folder.join("lender")).unwrap();
    std::fs::write(folder.join("ready"), micros().to_string()).unwrap();
    loop {
        device = home.serve(device, &never).unwrap().device;
    }
}

/// The wall clock, which two processes share.
fn micros() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_micros() as u64
}

struct Lender(Child);

impl Lender {
    fn start(folder: &Path) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "the_lender", "--nocapture"]).env(PART, folder);
        Self(command.spawn().unwrap())
    }

    fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
        // Dropped without a word.
        std::mem::forget(self);
    }
}

impl Drop for Lender {
    fn drop(&mut self) {
        // One that has ended is not there to be killed.
        let _ended = self.0.kill();
        let _waited = self.0.wait();
    }
}

#[test]
fn a_lender_that_is_killed_costs_its_guest_a_pause_and_no_block() {
    let folder = tempfile::tempdir().unwrap();
    let path: PathBuf = folder.path().into();
    std::fs::File::create(path.join("image")).unwrap().set_len(BLOCKS * BLOCK_BYTES).unwrap();
    let mut lender = Lender::start(&path);
    let began = Instant::now();
    let socket = path.join("lender");
    let attachment = loop {
        match borrow(&socket, None) {
            Ok(attachment) => break attachment,
            Err(error) => assert!(began.elapsed() < LIMIT, "{error:#}"),
        }
    };
    let area = Area::shared(MEMORY_BYTES).unwrap();
    let memory = area.share().unwrap();
    let heard = Arc::new(Mutex::new(Vec::new()));
    let (tell, at) = (Arc::clone(&heard), socket.clone());
    let reconnector =
        Reconnector::new(Duration::from_secs(20), move || borrow(&at, None).map_err(|error| NotFound::Yet(format!("{error:#}"))))
            .telling(move |search| tell.lock().unwrap().push(search));
    let slice = SliceMemory::new(GuestAddress(0), Arc::clone(&memory));
    let mut device = Embedded::new(attachment, FlagSink(Arc::clone(&memory)), slice).unwrap().reattaching(Box::new(reconnector));
    let guest = Guest::new(memory);
    guest.boot(&mut device, 77).unwrap();

    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let (mut pauses, mut outstanding) = (Vec::new(), 0);
    for kill in 0..kills() {
        random = random.wrapping_mul(0xd134_2543_de82_ef95).wrapping_add(kill);
        let (until, began) = (Duration::from_micros(random >> 33 & 0x3fff), Instant::now());
        let (verified, written) = (guest.verified(), guest.written());
        while began.elapsed() < until || guest.verified() == verified || guest.written() == written {
            guest.step(&mut device, DEPTH).unwrap();
            device.poll(Nanos::now());
            assert!(began.elapsed() < LIMIT, "the guest stands still after {kill} kills: {:?}", heard.lock().unwrap());
        }
        outstanding += guest.in_flight();
        lender.kill();
        let killed = micros();
        std::fs::remove_file(path.join("ready")).unwrap();
        lender = Lender::start(&path);
        // The guest runs on: it may submit, and read registers, while there is no device.
        let (before, began) = (device.function().recoveries(), Instant::now());
        while device.function().recoveries() == before {
            guest.step(&mut device, DEPTH).unwrap();
            device.poll(Nanos::now());
            assert!(began.elapsed() < LIMIT, "the device does not come back: {:?}", heard.lock().unwrap());
        }
        let back = micros();
        let ready: u64 = std::fs::read_to_string(path.join("ready")).unwrap().parse().unwrap();
        let done = guest.verified() + guest.written();
        while guest.verified() + guest.written() == done {
            guest.step(&mut device, DEPTH).unwrap();
            device.poll(Nanos::now());
            assert!(began.elapsed() < LIMIT, "no command ends after the device is back");
        }
        pauses.push([ready - killed, back.saturating_sub(ready), micros() - back]);
    }
    guest.drain(&mut device).unwrap();
    assert_eq!(device.function().recoveries(), kills());
    assert!(outstanding > 0, "nothing was ever outstanding when the lender was killed");
    drop(device);
    drop(lender);
    let image = std::fs::read(path.join("image")).unwrap();
    for block in 0..BLOCKS {
        let bytes = &image[(block * BLOCK_BYTES) as usize..][..BLOCK_BYTES as usize];
        assert_eq!(generation_of(block, bytes), Some(guest.generation(block)), "block {block}");
    }
    let searches = heard.lock().unwrap();
    assert!(!searches.iter().any(|search| matches!(search, Search::GaveUp(_))), "{searches:?}");
    pauses.sort_unstable_by_key(|[_, back, first]| back + first);
    let at = |share: usize| pauses[(pauses.len() * share / 100).min(pauses.len() - 1)];
    println!("{} kills, {outstanding} commands outstanding, {} blocks verified", kills(), guest.verified());
    for (name, [start, back, first]) in [("median", at(50)), ("p99", at(99))] {
        println!(
            "{name}: the lender's start {start} us; from then {} us = found and told again {back} + first answer {first}",
            back + first
        );
    }
}
