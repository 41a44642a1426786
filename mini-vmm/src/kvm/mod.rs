//! A machine of one vCPU on /dev/kvm: 4 MiB of memory, a bare guest program, and an NVMe function at `0xd000_0000` that interrupts by MSI-X.
//!
//! The guest's store of 17 to `0xd000_1008` exits, and goes to the function through its port; the device raises vector 1, the function finds address
//! `0xfee0_0000` and data 0x41 in its MSI-X table, and KVM_SIGNAL_MSI wakes the guest from its `hlt`.

mod cpu;
pub mod guest;
pub mod machine;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use farbus_machine_bank::lazy::Area;
use farbus_pci_shim::{Embedded, IrqSink, MessageInterrupt, VcpuPort};
use farbus_remote_dma::guest_memory::SliceMemory;
use farbus_remote_dma::{BarAddress, GuestAddress, Width};
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_msi, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

/// The function of such a machine.
pub type Function = Embedded<KvmSink, SliceMemory>;

/// Has KVM deliver what the function says; the guest uses messages only.
#[derive(Clone, Debug)]
pub struct KvmSink(Arc<VmFd>);

impl KvmSink {
    fn send(&self, address: u64, data: u32) {
        let message = kvm_msi { address_lo: address as u32, address_hi: (address >> 32) as u32, data, ..kvm_msi::default() };
        if let Err(error) = self.0.signal_msi(message) {
            tracing::error!(%error, "the guest misses an interrupt");
        }
    }
}

impl IrqSink for KvmSink {
    fn pin(&mut self, asserted: bool) {
        if asserted {
            tracing::warn!("the device asserts its pin, which the guest does not use");
        }
    }

    fn message(&mut self, irq: MessageInterrupt) {
        self.send(irq.address, irq.data);
    }
}

/// Stops a machine that runs on another thread: at its next instruction, also from its sleep.
#[derive(Clone, Debug)]
pub struct Stop {
    wanted: Arc<AtomicBool>,
    sink: KvmSink,
}

impl Stop {
    /// Has [`Vm::run`] return.
    pub fn stop(&self) {
        self.wanted.store(true, Ordering::Release);
        // An interrupt of our own, whose handler leaves the guest by a port.
        self.sink.send(guest::MESSAGE_ADDRESS, u32::from(guest::KICK));
    }
}

/// Why the guest was left.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Exits {
    /// Reads of the function's registers.
    pub reads: u64,
    /// Writes of them.
    pub writes: u64,
}

/// A machine.
#[derive(Debug)]
pub struct Vm {
    vcpu: VcpuFd,
    sink: KvmSink,
    wanted: Arc<AtomicBool>,
    memory: Arc<farbus_transport::Memory>,
    /// How often the guest was left.
    pub exits: Exits,
}

impl Vm {
    /// Of the memory in `area`, from guest address 0.
    ///
    /// # Errors
    /// There is no /dev/kvm, or it cannot do this.
    pub fn new(area: &Area) -> Result<Self> {
        let memory = area.share().context("the machine's memory cannot be shared with a device")?;
        let kvm = Kvm::new().context("/dev/kvm cannot be used")?;
        let vm = kvm.create_vm().context("KVM makes no machine")?;
        vm.create_irq_chip().context("KVM makes no interrupt controllers")?;
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: area.len(),
            userspace_addr: area.address(),
        };
        // SAFETY: the range is the whole mapping of `memory`, which lives as long as this machine, and of which nobody makes references
        // (transport/src/memory.rs); it is KVM's slot until the machine's last descriptor is closed, and those are fields here.
        unsafe { vm.set_user_memory_region(region) }.context("KVM takes no memory")?;
        let vcpu = vm.create_vcpu(0).context("KVM makes no vCPU")?;
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).context("KVM says no CPUID")?;
        vcpu.set_cpuid2(&cpuid).context("KVM takes no CPUID")?;
        Ok(Self { vcpu, sink: KvmSink(Arc::new(vm)), wanted: Arc::default(), memory, exits: Exits::default() })
    }

    /// Loads the guest program, and puts the vCPU at its first instruction.
    ///
    /// # Errors
    /// The memory is too small, or KVM's.
    pub fn boot(&mut self) -> Result<()> {
        guest::load(&self.memory)?;
        cpu::reset(&self.vcpu)
    }

    /// Puts the vCPU where [`Vm::save`] had it.
    ///
    /// # Errors
    /// The bytes are no vCPU's state, or KVM refuses them.
    pub fn load(&mut self, state: &[u8]) -> Result<()> {
        cpu::load(&self.vcpu, state)
    }

    /// What the vCPU is like. It must not run.
    ///
    /// # Errors
    /// KVM's.
    pub fn save(&mut self) -> Result<Vec<u8>> {
        cpu::save(&mut self.vcpu)
    }

    /// Where the function's interrupts go.
    pub fn sink(&self) -> KvmSink {
        self.sink.clone()
    }

    /// The guest's memory, as a function needs it.
    pub fn memory(&self) -> SliceMemory {
        SliceMemory::new(GuestAddress(0), Arc::clone(&self.memory))
    }

    /// What the guest counts.
    pub fn counts(&self) -> guest::Counts {
        guest::Counts::of(&self.memory)
    }

    /// To stop it by from another thread.
    pub fn stop(&self) -> Stop {
        Stop { wanted: Arc::clone(&self.wanted), sink: self.sink.clone() }
    }

    /// Runs the guest until it is stopped.
    ///
    /// # Errors
    /// The guest found something wrong, or did what it never does.
    pub fn run(&mut self, port: &mut VcpuPort) -> Result<()> {
        while !self.wanted.load(Ordering::Acquire) {
            match self.vcpu.run() {
                Ok(VcpuExit::MmioRead(address, data)) => {
                    self.exits.reads += 1;
                    let (at, width) = place(address, data.len())?;
                    let value = port.bar_read(at, width)?.to_le_bytes();
                    data.copy_from_slice(value.get(..data.len()).context("a read of more than 8 bytes")?);
                }
                Ok(VcpuExit::MmioWrite(address, data)) => {
                    self.exits.writes += 1;
                    let (at, width) = place(address, data.len())?;
                    let value = data.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte));
                    port.bar_write(at, width, value)?;
                }
                Ok(VcpuExit::IoOut(guest::KICK_PORT, _)) => {}
                Ok(VcpuExit::IoOut(guest::WRONG_PORT, _)) => {
                    let counts = guest::Counts::of(&self.memory);
                    bail!("the guest read a block that is not what it wrote: {counts:?}");
                }
                Ok(VcpuExit::Intr) => {}
                Ok(other) => bail!("the guest did what it never does: {other:?}"),
                Err(error) if error.errno() == 4 => {}
                Err(error) => return Err(error).context("KVM does not run the guest"),
            }
        }
        self.wanted.store(false, Ordering::Release);
        // What the last exit began (a read's value, a port) is part of the state only once KVM was entered again.
        self.vcpu.set_kvm_immediate_exit(1);
        let completed = self.vcpu.run().map(|exit| format!("{exit:?}"));
        self.vcpu.set_kvm_immediate_exit(0);
        match completed {
            Err(error) if error.errno() == 4 => Ok(()),
            Ok(exit) if exit == "Intr" => Ok(()),
            Ok(exit) => bail!("the guest ran on when it was to stop: {exit}"),
            Err(error) => Err(error).context("KVM does not end the guest's last instruction"),
        }
    }
}

/// Which register an access is of: the function's one BAR lies where this VMM's firmware put it.
fn place(address: u64, len: usize) -> Result<(BarAddress, Width)> {
    let offset = address.checked_sub(guest::BAR).with_context(|| format!("the guest uses {address:#x}, where nothing is"))?;
    let width = Width::from_bytes(len as u64).with_context(|| format!("an access of {len} bytes"))?;
    Ok((BarAddress { bar: 0, offset }, width))
}

/// What firmware does: places the BAR, enables memory space and bus master, and MSI-X.
///
/// # Errors
/// The function refuses, which it does not.
pub fn firmware(function: &mut Function) -> Result<()> {
    function.config_write(0x10, &(guest::BAR as u32).to_le_bytes())?;
    function.config_write(0x04, &[0x06, 0x00])?;
    function.config_write(0x72, &[0x00, 0x80])?;
    Ok(())
}
