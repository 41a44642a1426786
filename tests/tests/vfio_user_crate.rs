//! A device that a server of the crate `vfio_user` has, lent by our client of it: an independent reading of the protocol.
//!
//! The device adds 1 to each byte of a buffer in guest memory, which it maps itself, and raises vector 1; the driver at the borrower sees the sums, and the
//! counts of resets and maps that the server was told of.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use farbus_bench::function::FunctionRegisters;
use farbus_pci_shim::vfio_user::{BackendOptions, VfioUserBackend};
use farbus_pci_shim::{IrqSink, MessageInterrupt};
use farbus_remote_dma::borrower::{BorrowerOptions, BorrowerSession};
use farbus_remote_dma::lender::{LenderSession, PollOptions};
use farbus_remote_dma::wait::Waker;
use farbus_remote_dma::{Backend, BarAddress, Iova, Width};
use farbus_transport::shm::{ShmFabric, ShmOptions};
use farbus_transport::{Memory, Nanos};
use vfio_bindings::bindings::vfio::{VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE, vfio_region_info};
use vfio_user::{DmaMapFlags, DmaUnmapFlags, IrqInfo, Server, ServerBackend, ServerRegion};

const BASE: u64 = 0x1_0000;
const BYTES: u64 = 64 << 10;
const CONFIG: u32 = 7;
const MSIX: u32 = 2;

#[derive(Default)]
struct Told {
    resets: u32,
    maps: Vec<(u64, u64)>,
    unmaps: Vec<(u64, u64)>,
}

struct Adder {
    config: [u8; 4096],
    registers: [u64; 3],
    memory: Option<(u64, Arc<Memory>)>,
    vectors: Vec<Option<File>>,
    told: Arc<Mutex<Told>>,
}

impl ServerBackend for Adder {
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> std::io::Result<()> {
        let at = offset as usize;
        if region == CONFIG {
            data.copy_from_slice(&self.config[at..at + data.len()]);
        } else {
            data.copy_from_slice(&self.registers[at / 8].to_le_bytes()[at % 8..at % 8 + data.len()]);
        }
        Ok(())
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> std::io::Result<()> {
        let at = offset as usize;
        if region == CONFIG {
            self.config[at..at + data.len()].copy_from_slice(data);
            return Ok(());
        }
        let mut value = [0; 8];
        value[..data.len()].copy_from_slice(data);
        if at == 16 {
            // No memory, or not all of it: the device does nothing.
            let Some((base, memory)) = &self.memory else { return Ok(()) };
            let mut bytes = vec![0; self.registers[1] as usize];
            let from = self.registers[0] - base;
            memory.read(from, &mut bytes).map_err(std::io::Error::other)?;
            bytes.iter_mut().for_each(|byte| *byte = byte.wrapping_add(1));
            memory.write(from, &bytes).map_err(std::io::Error::other)?;
            if let Some(Some(vector)) = self.vectors.get_mut(1) {
                vector.write_all(&1_u64.to_ne_bytes())?;
            }
        }
        self.registers[at / 8] = u64::from_le_bytes(value);
        Ok(())
    }

    fn dma_map(&mut self, _: DmaMapFlags, offset: u64, address: u64, size: u64, fd: Option<File>) -> std::io::Result<()> {
        self.told.lock().unwrap().maps.push((address, size));
        if let Some(fd) = fd {
            let memory = Memory::map_file(OwnedFd::from(fd), offset, size, true).map_err(std::io::Error::other)?;
            self.memory = Some((address, memory));
        }
        Ok(())
    }

    fn dma_unmap(&mut self, _: DmaUnmapFlags, address: u64, size: u64) -> std::io::Result<()> {
        self.told.lock().unwrap().unmaps.push((address, size));
        self.memory = None;
        Ok(())
    }

    fn reset(&mut self) -> std::io::Result<()> {
        self.told.lock().unwrap().resets += 1;
        self.registers = [0; 3];
        Ok(())
    }

    fn set_irqs(&mut self, index: u32, _: u32, start: u32, count: u32, fds: Vec<File>) -> std::io::Result<()> {
        if index == MSIX {
            if count == 0 {
                self.vectors.iter_mut().for_each(|vector| *vector = None);
            }
            for (vector, fd) in (start as usize..).zip(fds) {
                self.vectors[vector] = Some(fd);
            }
        }
        Ok(())
    }
}

fn config() -> [u8; 4096] {
    let mut config = [0; 4096];
    config[..4].copy_from_slice(&[0x34, 0x12, 0xad, 0xde]);
    config[6] = 0x10;
    config[0x34] = 0x40;
    // MSI-X of two vectors: its table at BAR0 + 0x800, its pending bits at 0xc00.
    config[0x40..0x4c].copy_from_slice(&[0x11, 0, 1, 0, 0, 8, 0, 0, 0, 0xc, 0, 0]);
    config
}

fn regions() -> Vec<ServerRegion> {
    let region = |index: u32| {
        let size = match index {
            0 => 4096,
            CONFIG => 4096,
            _ => 0,
        };
        let flags = if size > 0 { VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE } else { 0 };
        let region_info = vfio_region_info { argsz: 32, flags, index, size, ..Default::default() };
        ServerRegion { region_info, sparse_areas: Vec::new(), mmap_fd: None }
    };
    (0..9).map(region).collect()
}

struct Counting(Arc<AtomicU64>);

impl IrqSink for Counting {
    fn pin(&mut self, _: bool) {}

    fn message(&mut self, irq: MessageInterrupt) {
        self.0.fetch_add(u64::from(irq.vector == 1), Ordering::Relaxed);
    }
}

#[test]
fn a_device_of_the_vfio_user_crate_is_lent() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("adder.sock");
    let irqs = (0..5).map(|index| IrqInfo { index, flags: 1, count: if index == MSIX { 2 } else { 0 } }).collect();
    let server = Server::new(&path, true, irqs, regions()).unwrap();
    let told = Arc::new(Mutex::new(Told::default()));
    let mut adder = Adder { config: config(), registers: [0; 3], memory: None, vectors: vec![None, None], told: Arc::clone(&told) };
    let serving = std::thread::spawn(move || server.run(&mut adder).unwrap());

    let device = VfioUserBackend::open(&path, BackendOptions::default()).unwrap();
    let description = device.description().clone();
    assert_eq!((description.vendor_id, description.device_id, description.bar_size(0)), (0x1234, 0xdead, Some(4096)));
    let (theirs, ours) = ShmFabric::pair(ShmOptions::default()).unwrap();
    let stop = Waker::new().unwrap();
    let waker = stop.clone();
    let lending = std::thread::spawn(move || {
        let mut session = LenderSession::new(theirs, Box::new(device)).map_err(|(error, _)| error).unwrap();
        session.run(PollOptions::default(), &waker);
        session.end().unwrap()
    });
    let session = BorrowerSession::new(ours, description, BorrowerOptions::default()).unwrap();
    let memory = Memory::memfd("guest", BYTES).unwrap();
    let interrupts = Arc::new(AtomicU64::new(0));
    let mut registers = FunctionRegisters::open(Box::new(session), Counting(Arc::clone(&interrupts)), &memory, Iova(BASE)).unwrap();
    registers.enable_msix(2).unwrap();
    let at = |offset| BarAddress { bar: 0, offset };
    for round in 0..50_u64 {
        let (from, len) = (round * 512, 1 + round * 7);
        let bytes: Vec<u8> = (0..len).map(|i| (i * 3 + round) as u8).collect();
        memory.write(from, &bytes).unwrap();
        let function = registers.function_mut();
        for (register, value) in [(0, BASE + from), (8, len), (16, 1)] {
            function.bar_write(at(register), Width::B8, value).unwrap();
        }
        assert_eq!(function.bar_read(at(8), Width::B4).unwrap(), len);
        let started = Instant::now();
        while interrupts.load(Ordering::Relaxed) <= round {
            function.poll(Nanos::now());
            assert!(started.elapsed() < Duration::from_secs(5), "no interrupt in round {round}");
        }
        let mut sums = vec![0; len as usize];
        memory.read(from, &mut sums).unwrap();
        assert!(sums.iter().zip(&bytes).all(|(sum, byte)| *sum == byte.wrapping_add(1)), "round {round}");
    }
    let before = told.lock().unwrap().resets;
    registers.function_mut().reset(farbus_remote_dma::ResetKind::Conventional).unwrap();
    assert_eq!(told.lock().unwrap().resets, before + 1);
    // Memory space is off after a reset (PCI 3.0, section 6.2.2).
    registers.function_mut().config_write(4, &2_u16.to_le_bytes()).unwrap();
    assert_eq!(registers.function_mut().bar_read(at(8), Width::B4).unwrap(), 0);
    stop.set();
    let device = lending.join().unwrap();
    drop(registers);
    drop(device);
    serving.join().unwrap();
    let told = told.lock().unwrap();
    assert_eq!((&told.maps, &told.unmaps), (&vec![(BASE, BYTES)], &vec![(BASE, BYTES)]));
}
