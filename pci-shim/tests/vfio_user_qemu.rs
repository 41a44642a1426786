//! A real function served to a real QEMU, without a guest: the `qtest` accelerator lets the test be the CPU (QEMU, docs/devel/testing/qtest.rst).
//!
//! `FARBUS_QEMU=/usr/bin/qemu-system-x86_64 cargo test -p farbus-pci-shim --test vfio_user_qemu -- --ignored` finds the device by its identity on
//! the PCI bus, places BAR0, reads a register through it, and sees a store of the device arrive in guest memory, shared or not.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod vfio_user_support;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use farbus_pci_shim::vfio_user::{ClientInterrupts, Options, Server};
use farbus_pci_shim::{Function, FunctionOptions, InterruptOwner};
use farbus_remote_dma::{InterruptMode, WindowMemory};
use vfio_user_support::{Answer, Handle, Lent, Step, description};

struct Qemu {
    child: Child,
    qtest: BufReader<UnixStream>,
}

const BAR0: u64 = 0xe000_0000;
const SLOT: u64 = 0x8000_1800;
/// How long TCG on a busy machine may take for anything.
const PATIENCE: Duration = Duration::from_secs(60);

impl Qemu {
    fn start(directory: &Path, socket: &Path, share: &str) -> Self {
        let program = std::env::var("FARBUS_QEMU").unwrap();
        let qtest = directory.join("qtest.sock");
        let device =
            format!(r#"{{"driver":"vfio-user-pci","addr":"03.0","socket":{{"type":"unix","path":"{}"}}}}"#, socket.display());
        let child = Command::new(program)
            .args(["-machine", "q35,accel=qtest,memory-backend=mem", "-nodefaults", "-display", "none", "-no-user-config"])
            .args(["-object", &format!("memory-backend-memfd,id=mem,size=64M,share={share}"), "-m", "64M"])
            .args(["-qtest", &format!("unix:{},server=on,wait=off", qtest.display()), "-qtest-log", "/dev/null"])
            .args(["-device", &device])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let start = Instant::now();
        let stream = loop {
            match UnixStream::connect(&qtest) {
                Ok(stream) => break stream,
                Err(_) if start.elapsed() < PATIENCE => std::thread::sleep(Duration::from_millis(10)),
                Err(error) => panic!("no qtest: {error}"),
            }
        };
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { child, qtest: BufReader::new(stream) }
    }

    fn say(&mut self, line: &str) -> String {
        self.qtest.get_mut().write_all(format!("{line}\n").as_bytes()).unwrap();
        loop {
            let mut answer = String::new();
            assert!(self.qtest.read_line(&mut answer).unwrap() > 0, "qemu left at {line}");
            if let Some(rest) = answer.trim().strip_prefix("OK") {
                return rest.trim().to_owned();
            }
            assert!(!answer.starts_with("FAIL"), "{line}: {answer}");
        }
    }

    fn number(&mut self, line: &str) -> u64 {
        let answer = self.say(line);
        u64::from_str_radix(answer.trim_start_matches("0x"), 16).unwrap()
    }

    fn config(&mut self, offset: u64) -> u64 {
        self.say(&format!("outl 0xcf8 {:#x}", SLOT | offset));
        self.number("inl 0xcfc")
    }

    fn set_config(&mut self, offset: u64, value: u64) {
        self.say(&format!("outl 0xcf8 {:#x}", SLOT | offset));
        self.say(&format!("outl 0xcfc {value:#x}"));
    }

    /// Walks the capability list, as a guest does.
    fn capability(&mut self, id: u64) -> u64 {
        let mut at = self.config(0x34) & 0xfc;
        while at != 0 {
            let header = self.config(at);
            if header & 0xff == id {
                return at;
            }
            at = header >> 8 & 0xfc;
        }
        panic!("no capability {id:#x}");
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn run(share: &str, test: impl FnOnce(&mut Qemu, &Handle)) {
    let directory = tempfile::tempdir().unwrap();
    let mut server = Server::bind(directory.path().join("device.sock")).unwrap();
    let socket = server.path().to_owned();
    let stop = server.stop_handle();
    let (device, handle) = Lent::new();
    let options = FunctionOptions { interrupts: InterruptOwner::Client };
    let mut function = Function::new(Box::new(device), ClientInterrupts::new(&description()), options).unwrap();
    std::thread::scope(|scope| {
        let served = scope.spawn(move || server.serve(&mut function, &Options::default()).unwrap());
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let mut qemu = Qemu::start(directory.path(), &socket, share);
            assert_eq!(qemu.config(0), 0x0010_1b36);
            assert_eq!(qemu.config(8) >> 8, 0x01_0802);
            qemu.set_config(0x10, 0xffff_ffff);
            assert_eq!(qemu.config(0x10), 0xffff_c004, "16 KiB, 64-bit");
            qemu.set_config(0x10, BAR0);
            qemu.set_config(0x14, 0);
            qemu.set_config(4, 6);
            test(&mut qemu, &handle);
        }));
        stop.stop();
        served.join().unwrap();
        if let Err(panic) = outcome {
            std::panic::resume_unwind(panic);
        }
    });
}

/// Stores by the device until `enough`, each seen in guest memory by the CPU.
fn store_and_look(qemu: &mut Qemu, handle: &Handle, rounds: u8) {
    for round in 1..=rounds {
        let before = handle.state().answers.len();
        qemu.say("writel 0x1000000 0x11223344");
        handle.play([
            Step::Fetch { iova: 0x100_0000, len: 4 },
            Step::Store { iova: 0x100_1000, bytes: vec![round; 4096], polled: false },
            Step::Store { iova: 0x100_2000, bytes: vec![round; 16], polled: true },
        ]);
        handle.wait("qemu answers three dma accesses", |state| state.answers.len() == before + 3);
        let answers = handle.state().answers[before..].to_vec();
        assert!(answers.iter().any(|(_, answer)| *answer == Answer::Fetched(vec![0x44, 0x33, 0x22, 0x11])), "{answers:?}");
        assert_eq!(answers.iter().filter(|(_, answer)| *answer == Answer::Stored).count(), 2, "{answers:?}");
        let word = u64::from(round) * 0x0101_0101;
        for at in ["0x1001000", "0x1001ffc", "0x1002000", "0x100200c"] {
            assert_eq!(qemu.number(&format!("readl {at}")), word);
        }
    }
}

#[test]
#[ignore = "needs QEMU 11.1.3 or newer in FARBUS_QEMU"]
fn qemu_drives_a_function() {
    run("on", |qemu, handle| {
        handle.state().bar0[0x1c..0x20].copy_from_slice(&0xfeed_f00d_u32.to_le_bytes());
        assert_eq!(qemu.number(&format!("readl {:#x}", BAR0 + 0x1c)), 0xfeed_f00d);
        qemu.say(&format!("writel {:#x} 17", BAR0 + 0x1018));
        // QEMU does not wait for a memory write's reply.
        handle.wait("a write", |state| state.bar0[0x1018] == 17);
        qemu.say(&format!("writeq {:#x} 0x1122334455667788", BAR0 + 0x1020));
        handle.wait("a wide write", |state| state.bar0[0x1020..0x1028] == 0x1122_3344_5566_7788_u64.to_le_bytes());
        // Memory: the device's accesses go by message until one store is seen in the shared file, and then the file is proven.
        assert!(handle.state().windows.iter().any(|window| matches!(window.memory, WindowMemory::Mapped { .. })));
        store_and_look(qemu, handle, 2);
        handle.wait("the memory is proven", |state| state.proven > 0);
        // An address that is no memory answers a fault.
        let before = handle.state().answers.len();
        handle.play([Step::Fetch { iova: 0xffff_ffff_f000, len: 4 }]);
        handle.wait("a fault", |state| state.answers.len() > before);
        assert_eq!(handle.state().answers[before].1, Answer::Fault);
        // MSI-X: vector 3 masked in the table's reset state, then programmed and enabled as a guest does.
        let msix = qemu.capability(0x11);
        let table = BAR0 + 0x2000 + 3 * 16;
        qemu.say(&format!("writel {table:#x} 0x1800000"));
        qemu.say(&format!("writel {:#x} 0", table + 4));
        qemu.say(&format!("writel {:#x} 0x4242", table + 8));
        qemu.say(&format!("writel {:#x} 0", table + 12));
        let control = qemu.config(msix);
        qemu.set_config(msix, control | 1 << 31);
        handle.wait("msi-x is on", |state| state.modes.last() == Some(&InterruptMode::Msix));
        // The message is a write of its data to its address, which here is plain memory.
        handle.play([Step::Raise(3)]);
        let start = Instant::now();
        while qemu.number("readl 0x1800000") != 0x4242 {
            assert!(start.elapsed() < Duration::from_secs(5), "the message is missing");
            std::thread::sleep(Duration::from_millis(5));
        }
        // A reset of the machine resets the device and keeps it usable.
        let resets = handle.state().resets;
        qemu.say(&format!("writel {:#x} 17", BAR0 + 0x1018));
        qemu.say("outb 0xcf9 0x6");
        handle.wait("the device is reset", |state| state.resets > resets);
        assert_eq!(qemu.config(0), 0x0010_1b36);
    });
}

#[test]
#[ignore = "needs QEMU 11.1.3 or newer in FARBUS_QEMU"]
fn qemu_makes_no_access_while_it_waits_and_is_not_kept_waiting_for_one() {
    run("off", |qemu, handle| {
        let store = |round: u8| {
            let before = handle.state().answers.len();
            handle.play([Step::Store { iova: 0x100_1000, bytes: vec![round; 4], polled: false }]);
            before
        };
        // Whether a store or the read is first is chance; where the store is, the read's answer waits for it in vain, but only once.
        let flush_limit = Options::default().flush_limit;
        let (mut waited, mut longest) = (0, Duration::ZERO);
        for round in 1..=20 {
            let before = store(round);
            let start = Instant::now();
            qemu.number(&format!("readl {:#x}", BAR0 + 0x1c));
            waited += u32::from(start.elapsed() >= flush_limit);
            longest = longest.max(start.elapsed());
            handle.wait("qemu makes the access", |state| state.answers.len() == before + 1);
            assert_eq!(qemu.number("readb 0x1001000"), u64::from(round));
        }
        println!("{waited} of 20 reads waited, the longest {longest:?}");
        assert!(waited <= 1, "{waited} of 20 reads waited");
        // A machine that is reset with a store on its way goes on, whatever it is told of the reset.
        for round in 1..=3 {
            let (before, resets) = (store(round), handle.state().resets);
            qemu.say("outb 0xcf9 0x6");
            handle.wait("the device is reset", |state| state.resets > resets);
            assert_eq!(qemu.config(0), 0x0010_1b36);
            handle.wait("the store is answered or given up", |state| state.answers.len() == before + 1);
        }
    });
}

#[test]
#[ignore = "needs QEMU 11.1.3 or newer in FARBUS_QEMU"]
fn qemu_that_does_not_share_its_memory_is_served_by_messages() {
    run("off", |qemu, handle| {
        assert!(
            handle.state().windows.iter().any(|window| matches!(window.memory, WindowMemory::Mapped { .. })),
            "a descriptor comes"
        );
        store_and_look(qemu, handle, 5);
        assert_eq!(handle.state().proven, 0);
    });
}
