//! A machine moves back and forth between two processes while it works on a borrowed drive: every block that it reads is right, none is lost or written twice,
//! and the time for which it stands still is printed as the sum of its parts.
//!
//! 20 moves in the normal run, as many as `FARBUS_MOVES` says otherwise; the scripted guest keeps 24 commands under way in two queues, the KVM guest one at a time.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use farbus_machine_bank::lazy::Area;
use farbus_mini_vmm::link::borrow;
use farbus_mini_vmm::moving::{Arrived, Left, begin, receive, send_ahead, send_last};
use farbus_mini_vmm::{Depositor, Device as HomeDevice, Home};
use farbus_pci_shim::{Embedded, FunctionState};
use farbus_remote_dma::guest_memory::SliceMemory;
use farbus_remote_dma::model::{Nvme, NvmeOptions};
use farbus_remote_dma::wait::Waker;
use farbus_remote_dma::{Attachment, GuestAddress};
use farbus_tests::scripted_guest::{BLOCK_BYTES, BLOCKS, Device, FlagSink, Guest, MEMORY_BYTES, generation_of};
use farbus_transport::{Memory, Nanos};

const PART: &str = "FARBUS_TEST_MOVES";
const LEASE: Duration = Duration::from_secs(60);
const LIMIT: Duration = Duration::from_secs(60);
const DEPTH: u64 = 24;

fn moves() -> u64 {
    std::env::var("FARBUS_MOVES").ok().filter(|moves| !moves.is_empty()).map_or(20, |moves| moves.parse().unwrap())
}

struct Machine {
    guest: Guest,
    device: Device<FlagSink>,
}

impl Machine {
    fn begin(area: &Area, attachment: Box<dyn Attachment>) -> Self {
        let memory = area.share().unwrap();
        let slice = SliceMemory::new(GuestAddress(0), Arc::clone(&memory));
        let mut device = Embedded::new(attachment, FlagSink(Arc::clone(&memory)), slice).unwrap();
        let guest = Guest::new(memory);
        guest.boot(&mut device, 77).unwrap();
        Self { guest, device }
    }

    fn run(&mut self, blocks: u64) {
        let (until, began) = (self.guest.verified() + blocks, Instant::now());
        while self.guest.verified() < until {
            self.guest.step(&mut self.device, DEPTH).unwrap();
            self.device.poll(Nanos::now());
            assert!(began.elapsed() < LIMIT, "the guest stands still: an interrupt was lost");
        }
    }

    /// Sends it away, its memory first.
    fn leave(&mut self, area: &Area, stream: &mut UnixStream) -> Left {
        let mut depositor = Depositor::new(area).unwrap();
        begin(stream, area).unwrap();
        let mut ahead = 0;
        for _ in 0..2 {
            let pages = depositor.look_ahead(&mut self.device).unwrap();
            ahead += pages.pages();
            std::thread::scope(|scope| {
                let mut writing = stream.try_clone().unwrap();
                let sending = scope.spawn(move || send_ahead(&mut writing, &pages).unwrap());
                while !sending.is_finished() {
                    self.run(1);
                }
            });
        }
        // Leaves commands under way.
        self.guest.step(&mut self.device, DEPTH).unwrap();
        let stopped = SystemTime::now();
        let left = send_last(stream, &mut depositor, &mut self.device, LEASE, stopped, || Ok(Vec::new())).unwrap();
        Left { ahead, ..left }
    }

    /// Goes on here; the time for which it stood still, and of that, for the device to be had, for the function to be restored, and to go on.
    fn arrive(arrived: &Arrived, socket: &Path) -> (Self, Duration, [Duration; 3]) {
        let token = FunctionState::parse(&arrived.function).unwrap().rest().token;
        // The lender may not have heard yet that the other side has left.
        let began = Instant::now();
        let attachment = loop {
            match borrow(socket, Some(token)) {
                Ok(attachment) => break attachment,
                Err(error) => assert!(began.elapsed() < LIMIT, "{error:#}"),
            }
        };
        let borrowed = Instant::now();
        let memory = arrived.area.share().unwrap();
        let slice = SliceMemory::new(GuestAddress(0), Arc::clone(&memory));
        let (device, restored) = Embedded::restore(attachment, FlagSink(Arc::clone(&memory)), slice, &arrived.function).unwrap();
        assert!(!restored.revived, "a device that was kept was reset");
        let mut machine = Self { guest: Guest::new(memory), device };
        let restored = Instant::now();
        machine.device.resume();
        let downtime = SystemTime::now().duration_since(arrived.stopped).unwrap_or_default();
        (machine, downtime, [borrowed - began, restored - borrowed, restored.elapsed()])
    }
}

/// Not a test of its own: one of the two processes. Says how each move went by lines in its file, and leaves the guest's memory there at the end.
#[test]
fn one_of_the_two_processes() {
    let Ok(part) = std::env::var(PART) else { return };
    let words: Vec<&str> = part.split('\n').collect();
    let [name, folder, count] = words[..] else { panic!("{part}") };
    let (folder, count): (&Path, u64) = (Path::new(folder), count.parse().unwrap());
    let (lender, mine) = (folder.join("lender"), folder.join(name));
    let listener = UnixListener::bind(&mine).unwrap();
    let other = folder.join(if name == "a" { "b" } else { "a" });
    let mut report = std::fs::File::create(folder.join(format!("{name}.report"))).unwrap();
    let mut here = (name == "a").then(|| {
        let area = Area::shared(MEMORY_BYTES).unwrap();
        let machine = Machine::begin(&area, borrow(&lender, None).unwrap());
        (machine, area)
    });
    let mut at = u64::from(name == "b");
    while at <= count {
        match here.take() {
            Some((mut machine, area)) => {
                machine.run(30);
                if at == count {
                    machine.guest.drain(&mut machine.device).unwrap();
                    let mut bytes = vec![0; MEMORY_BYTES as usize];
                    area.memory().read(0, &mut bytes).unwrap();
                    std::fs::write(folder.join("memory"), bytes).unwrap();
                    break;
                }
                let mut stream = connect(&other);
                let left = machine.leave(&area, &mut stream);
                writeln!(report, "left {at}: {left:?}").unwrap();
                // Until the other side has it.
                stream.read_exact(&mut [0]).unwrap();
                at += 2;
            }
            None => {
                let (mut stream, _) = listener.accept().unwrap();
                let arrived = receive(&mut stream).unwrap();
                let (machine, downtime, [borrow, restore, resume]) = Machine::arrive(&arrived, &lender);
                writeln!(report, "arrived: borrow {borrow:?}, restore {restore:?}, resume {resume:?}").unwrap();
                writeln!(report, "downtime {} us", downtime.as_micros()).unwrap();
                stream.write_all(&[1]).unwrap();
                here = Some((machine, arrived.area));
            }
        }
    }
}

fn connect(path: &Path) -> UnixStream {
    let began = Instant::now();
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return stream,
            Err(error) => assert!(began.elapsed() < LIMIT, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

struct Children(Vec<Child>);

impl Drop for Children {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // One that has ended is not there to be killed.
            let _ended = child.kill();
            let _waited = child.wait();
        }
    }
}

#[test]
fn a_machine_moves_back_and_forth_between_two_processes_and_no_block_is_lost() {
    let folder = tempfile::tempdir().unwrap();
    let path: PathBuf = folder.path().into();
    let image = Memory::memfd("image", BLOCKS * BLOCK_BYTES).unwrap();
    let nvme = Nvme::in_memory(Arc::clone(&image), NvmeOptions::default()).unwrap();
    let home = Home::open(&path.join("lender")).unwrap();
    let count = moves();
    let lending = std::thread::spawn(move || {
        let never = Waker::new().unwrap();
        let mut device = HomeDevice::Reset(Box::new(nvme));
        for _ in 0..=count {
            device = home.serve(device, &never).unwrap().device;
        }
    });
    let start = |name: &str| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "one_of_the_two_processes", "--nocapture"]);
        command.env(PART, format!("{name}\n{}\n{count}", path.display())).spawn().unwrap()
    };
    let mut children = Children(vec![start("a"), start("b")]);
    let last = usize::from(count % 2 == 1);
    assert!(children.0[last].wait().unwrap().success(), "the machine did not come through");
    drop(children);
    lending.join().unwrap();

    let guest = Guest::new(Memory::memfd("guest", MEMORY_BYTES).unwrap());
    guest.memory().write(0, &std::fs::read(path.join("memory")).unwrap()).unwrap();
    for block in 0..BLOCKS {
        let mut bytes = vec![0; BLOCK_BYTES as usize];
        image.read(block * BLOCK_BYTES, &mut bytes).unwrap();
        assert_eq!(generation_of(block, &bytes), Some(guest.generation(block)), "block {block}");
    }
    let reports = ["a", "b"].map(|name| std::fs::read_to_string(path.join(format!("{name}.report"))).unwrap()).concat();
    let mut downtimes: Vec<u64> =
        reports.lines().filter_map(|line| line.strip_prefix("downtime ")?.strip_suffix(" us")?.parse().ok()).collect();
    downtimes.sort_unstable();
    assert_eq!(downtimes.len() as u64, count);
    for begins in ["left", "arrived"] {
        reports.lines().filter(|line| line.starts_with(begins)).take(3).for_each(|line| println!("{line}"));
    }
    let at = |share: usize| downtimes[(downtimes.len() * share / 100).min(downtimes.len() - 1)];
    println!("{count} moves, {} blocks verified: downtime {} us median, {} us p99", guest.verified(), at(50), at(99));
}
