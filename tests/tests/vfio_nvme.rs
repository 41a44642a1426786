//! A real NVMe controller behind VFIO, driven by our driver on the borrower's side: the controller itself reads commands and moves data in the
//! borrower's memory, through the IOMMU.
//!
//! Every byte that is read was written before by another queue; resets come while commands are in flight; and after each of them, and after a
//! borrower was killed, nothing moves any more. `ci/softroce --pci` has the controller.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod vfio_support;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use farbus_bench::driver::{CSTS, DmaBuffer, DmaMemory, Driver, DriverOptions, Io, QueueIndex, Registers as _};
use farbus_bench::function::FunctionRegisters;
use farbus_pci_shim::irq::{RecorderSink, Told};
use farbus_remote_dma::{Iova, ResetKind, Width};
use farbus_tests::Running;
use farbus_tests::process::{AMPLE, End, run};
use farbus_transport::{Memory, Nanos};
use vfio_support::{Lent, Registers, bind, borrow, driver, is_bus_master, lab, unbind, wait_until};

const BASE: Iova = Iova(0x1_0000_0000);
const QUEUES: u16 = 4;
const DEPTH: u16 = 32;
const BLOCK: u64 = 512;
/// Of the link that a process borrows at until it is killed.
const KILLED: &str = "FARBUS_TEST_KILLED_BORROWER";

fn options() -> DriverOptions {
    DriverOptions { queues: QUEUES, depth: DEPTH, command_timeout: Duration::from_secs(30), ..DriverOptions::default() }
}

fn started(registers: Registers, memory: &Arc<Memory>) -> Driver<Registers> {
    Driver::start(registers, DmaMemory::new(Arc::clone(memory), BASE), options()).unwrap()
}

fn guest_memory() -> Arc<Memory> {
    Memory::memfd("guest", 32 << 20).unwrap()
}

/// Bytes that tell their place and their round.
fn pattern(block: u64, round: u64, len: u64) -> Vec<u8> {
    let words = (0..len / 8).map(|word| (block * BLOCK + word * 8).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ round);
    words.flat_map(u64::to_le_bytes).collect()
}

/// Writes `count` pieces of `len` bytes over all queues, as many at once as fit, and reads each by another queue than wrote it.
fn write_and_verify(driver: &mut Driver<Registers>, buffers: &[DmaBuffer], first: u64, len: u64, count: u64, round: u64) {
    let blocks = len / BLOCK;
    for reading in [false, true] {
        let mut at = 0;
        while at < count {
            let batch = (count - at).min(buffers.len() as u64);
            for (n, buffer) in (at..at + batch).zip(buffers) {
                let (block, buffer) = (first + n * blocks, &buffer.slice(0, len).unwrap());
                let queue = QueueIndex(1 + ((n + u64::from(reading)) % u64::from(QUEUES)) as u16);
                let io = if reading {
                    buffer.write(0, &vec![0xee; len as usize]).unwrap();
                    Io::Read { block, into: buffer }
                } else {
                    buffer.write(0, &pattern(block, round, len)).unwrap();
                    Io::Write { block, from: buffer }
                };
                driver.submit(queue, &io, n).unwrap();
            }
            let mut done = 0;
            for queue in (1..=QUEUES).map(QueueIndex) {
                driver.ring(queue).unwrap();
                while driver.in_flight(queue).unwrap() > 0 {
                    done += driver.reap_some(queue, |completion| assert!(completion.status.ok(), "{completion:?}")).unwrap();
                }
            }
            assert_eq!(done as u64, batch);
            if reading {
                for (n, buffer) in (at..at + batch).zip(buffers) {
                    let mut seen = vec![0; len as usize];
                    buffer.read(0, &mut seen).unwrap();
                    assert!(seen == pattern(first + n * blocks, round, len), "piece {n} of {len} bytes in round {round}");
                }
            }
            at += batch;
        }
    }
}

#[test]
#[ignore = "needs a PCI device behind an IOMMU; ci/softroce --pci has it"]
fn a_real_nvme_controller_reads_and_writes_the_right_bytes_on_all_queues() {
    let mut lent = Lent::here(&lab("FARBUS_LAB_NVME"));
    let memory = guest_memory();
    let mut driver = started(lent.open(&memory, BASE), &memory);
    assert_eq!(driver.namespace().bytes(), 256 << 20);
    let buffers: Vec<_> = (0..DEPTH).map(|_| driver.allocate(128 << 10).unwrap()).collect();
    let start = Instant::now();
    let (mut bytes, mut first) = (0, 0);
    for (round, (len, count)) in [(512, 64), (4096, 512), (12 << 10, 64), (128 << 10, 128)].into_iter().enumerate() {
        write_and_verify(&mut driver, &buffers, first, len, count, round as u64);
        first += len / BLOCK * count;
        bytes += 2 * len * count;
    }
    driver.execute(QueueIndex(1), &Io::Flush).unwrap();
    let seconds = start.elapsed().as_secs_f64();
    println!(
        "{} MiB in {seconds:.2} s, verified; depth 1: {:.0} reads of 4 KiB a second",
        bytes >> 20,
        depth_one(&mut driver, &buffers[0])
    );
    drop(driver.shutdown().unwrap());
    assert_eq!(lent.counters.dma_faults.load(Ordering::Relaxed), 0);
    assert_eq!(lent.counters.protected.load(Ordering::Relaxed), 0);
}

fn depth_one(driver: &mut Driver<Registers>, buffer: &DmaBuffer) -> f64 {
    let into = &buffer.slice(0, 4096).unwrap();
    let start = Instant::now();
    for block in 0..200 {
        driver.execute(QueueIndex(1), &Io::Read { block: block * 8, into }).unwrap();
    }
    200.0 / start.elapsed().as_secs_f64()
}

#[test]
#[ignore = "needs a PCI device behind an IOMMU; ci/softroce --pci has it"]
fn completions_come_by_msi_x_each_on_its_own_vector() {
    let mut lent = Lent::here(&lab("FARBUS_LAB_NVME"));
    let memory = guest_memory();
    let mut registers = lent.open(&memory, BASE);
    registers.enable_msix(QUEUES + 1).unwrap();
    let options = DriverOptions { vectors: (1..=QUEUES).collect(), ..options() };
    let mut driver = Driver::start(registers, DmaMemory::new(Arc::clone(&memory), BASE), options).unwrap();
    let into = &driver.allocate(4096).unwrap();
    for queue in 1..=QUEUES {
        driver.registers_mut().function_mut().sink_mut().take();
        driver.submit(QueueIndex(queue), &Io::Read { block: 8, into }, 7).unwrap();
        driver.ring(QueueIndex(queue)).unwrap();
        let mut vectors = Vec::new();
        wait_until("the vector", AMPLE, || {
            let function = driver.registers_mut().function_mut();
            function.poll(Nanos::now());
            for told in function.sink_mut().take() {
                let Told::Message(message) = told else { panic!("{told:?}") };
                vectors.extend((message.vector != 0).then_some(message.vector));
            }
            !vectors.is_empty()
        });
        assert_eq!(vectors, [queue]);
        // The interrupt announced it: it is there, without looking again.
        assert_eq!(driver.reap(QueueIndex(queue), |_| {}).unwrap(), 1);
    }
}

#[test]
#[ignore = "needs a PCI device behind an IOMMU; ci/softroce --pci has it"]
fn nothing_moves_after_a_reset_that_came_while_commands_were_in_flight() {
    let mut lent = Lent::here(&lab("FARBUS_LAB_NVME"));
    let memory = guest_memory();
    let mut registers = lent.open(&memory, BASE);
    for round in 0..6 {
        let mut driver = started(registers, &memory);
        let buffers: Vec<_> = (0..DEPTH - 1).map(|_| driver.allocate(128 << 10).unwrap()).collect();
        if round > 0 {
            write_and_verify(&mut driver, &buffers, 0, 16 << 10, 32, round);
        }
        for queue in 1..=QUEUES {
            for (n, into) in buffers.iter().enumerate() {
                driver.submit(QueueIndex(queue), &Io::Read { block: 1024 + n as u64 * 256, into }, 0).unwrap();
            }
            driver.ring(QueueIndex(queue)).unwrap();
        }
        let kind = if round % 2 == 0 { ResetKind::Function } else { ResetKind::Conventional };
        let mut bare = driver.into_registers();
        bare.function_mut().reset(kind).unwrap();
        let poison = vec![0x5a; memory.len() as usize];
        memory.write(0, &poison).unwrap();
        std::thread::sleep(Duration::from_millis(200));
        let mut seen = vec![0; poison.len()];
        memory.read(0, &mut seen).unwrap();
        let moved = seen.iter().zip(&poison).position(|(a, b)| a != b);
        assert_eq!(moved, None, "round {round}: a byte landed after the reset");
        // As after power-on: not ready, and no bus master until the driver says so.
        bare.function_mut().config_write(4, &6_u16.to_le_bytes()).unwrap();
        assert_eq!(bare.read(CSTS, Width::B4) & 1, 0, "round {round}");
        registers = bare;
    }
    assert!(lent.counters.resets.load(Ordering::Relaxed) >= 6);
    assert_eq!(lent.counters.failed_resets.load(Ordering::Relaxed), 0);
}

/// `farbus lend` of `address`, at the link `listen`.
fn lend(address: &str, listen: &str) -> Running {
    let mut lender = Running::farbus(&["lend", "--json", "--device", &format!("vfio:{address}"), "--listen", listen]);
    let listening = lender.event("listening", AMPLE);
    assert!(listening["device"].as_str().unwrap().starts_with(&format!("vfio {address} (")), "{listening}");
    lender
}

/// A round of verified IO with what is lent at `link`.
fn assert_served(link: &Path) {
    let memory = guest_memory();
    let registers = FunctionRegisters::open(borrow(link), RecorderSink::default(), &memory, BASE).unwrap();
    let mut driver = started(registers, &memory);
    let buffers: Vec<_> = (0..8).map(|_| driver.allocate(64 << 10).unwrap()).collect();
    write_and_verify(&mut driver, &buffers, 0, 64 << 10, 16, 1);
    drop(driver.shutdown().unwrap());
}

/// Reads and writes until somebody ends this process.
fn borrow_until_killed(link: &Path) {
    let memory = guest_memory();
    let registers = FunctionRegisters::open(borrow(link), RecorderSink::default(), &memory, BASE).unwrap();
    let mut driver = started(registers, &memory);
    let buffers: Vec<_> = (0..DEPTH - 1).map(|_| driver.allocate(128 << 10).unwrap()).collect();
    for round in 0.. {
        write_and_verify(&mut driver, &buffers, 4096, 128 << 10, 31, round);
    }
}

#[test]
#[ignore = "needs a PCI device behind an IOMMU; ci/softroce --pci has it"]
fn the_device_of_a_borrower_that_was_killed_is_quiet_and_is_lent_again() {
    if let Some(link) = std::env::var_os(KILLED) {
        return borrow_until_killed(Path::new(&link));
    }
    let (nvme, folder) = (lab("FARBUS_LAB_NVME"), tempfile::tempdir().unwrap());
    bind(&nvme);
    let (path, link) = (folder.path().join("link"), format!("shm:{}/link", folder.path().display()));
    let mut lender = lend(&nvme, &link);
    assert_served(&path);
    lender.event("returned", AMPLE);
    for _ in 0..3 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "the_device_of_a_borrower_that_was_killed_is_quiet_and_is_lent_again"])
            .env(KILLED, &path)
            .spawn()
            .unwrap();
        lender.event("lent", AMPLE);
        wait_until("the driver of the process to be killed", AMPLE, || is_bus_master(&nvme));
        std::thread::sleep(Duration::from_millis(700));
        assert!(child.try_wait().unwrap().is_none(), "it ended by itself");
        child.kill().unwrap();
        child.wait().unwrap();
        lender.event("returned", AMPLE);
        assert!(!is_bus_master(&nvme));
        assert_served(&path);
        lender.event("returned", AMPLE);
    }
    // Two cannot have it.
    let second = run(&["lend", "--device", &format!("vfio:{nvme}"), "--listen", &format!("shm:{}/other", folder.path().display())]);
    second.assert_refusal(1, &["in use by another process", "hint: "]);
    lender.terminate();
    assert_eq!(lender.wait(AMPLE).code(), Some(0));
    assert!(!is_bus_master(&nvme));
}

#[test]
#[ignore = "needs a PCI device behind an IOMMU; ci/softroce --pci has it"]
fn a_device_that_cannot_be_lent_is_refused_with_the_commands_that_change_it() {
    let (nvme, shared, folder) = (lab("FARBUS_LAB_NVME"), lab("FARBUS_LAB_EDU_SHARED"), tempfile::tempdir().unwrap());
    let link = format!("shm:{}/link", folder.path().display());
    let lend = |address: &str, link: &str| -> End { run(&["lend", "--device", &format!("vfio:{address}"), "--listen", link]) };
    unbind(&nvme);
    let commands = format!("echo {nvme} > /sys/bus/pci/drivers_probe");
    lend(&nvme, &link).assert_refusal(1, &["is bound to no driver, not to vfio-pci", "hint: ", "driver_override", &commands]);
    lend("0000:7f:00.0", &link).assert_refusal(1, &["there is no PCI device 0000:7f:00.0", "farbus devices"]);
    lend("0000:00:11.0", &link).assert_refusal(1, &["0000:00:11.0 is a bridge"]);
    lend("nvme0", &link).assert_refusal(2, &["\"nvme0\" is no PCI address", "0000:03:00.0"]);

    bind(&shared);
    let neighbour = shared.replace("01.0", "02.0");
    assert_eq!(driver(&neighbour).as_deref(), Some("virtio-pci"));
    let words = [&format!("{neighbour} is in the same IOMMU group")[..], "driver virtio-pci", "hint: ", "driver/unbind"];
    lend(&shared, &link).assert_refusal(1, &words);

    bind(&nvme);
    lend(&nvme, "rdma:192.0.2.1:0").assert_refusal(2, &["its borrower's memory must be on this host", "shm:"]);
    let listed = run(&["devices"]);
    assert_eq!(listed.code(), Some(0));
    let text = format!("{listed:?}");
    assert!(text.contains(&format!("vfio:{nvme}  yes")) && text.contains("driver virtio-pci"), "{text}");
}
