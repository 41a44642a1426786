//! A machine of one vCPU on /dev/kvm that starts on memory of which nothing may be there yet: how long until its guest has executed its first instructions.
//!
//! An image of 512 MiB is prepared by a page of code, where a page of zeros was; the guest reads 8 words out of 8 groups and writes what comes of them to a port.
//! That exit says that the code and all 8 pages were those of the image. The same start is made on memory that comes lazily and on a file that was restored.

use std::fs::{self, File};
use std::marker::PhantomData;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use farbus_machine_bank::PAGE;
use farbus_transport::Memory;
use kvm_bindings::{kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

use super::bank_lazy::first_pages;

/// Where the guest writes its answer.
const PORT: u16 = 0xf4;
/// Where KVM may have pages of its own on processors that need them, beyond every image.
const KVM_PAGES: usize = 0xfffb_d000;
/// The largest image: all of it is below the device memory that a guest of 32 bits expects.
const MOST: u64 = 3 << 30;

/// An image with a guest in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Guest {
    /// Where its first instruction is.
    start: u64,
    /// What it answers.
    answer: u32,
}

/// Whether there can be a machine at all.
///
/// # Errors
/// There is no /dev/kvm, or it cannot be used.
pub fn possible() -> Result<()> {
    Kvm::new().map(drop).context("no VM is started: /dev/kvm cannot be used")
}

impl Guest {
    /// Copies `image` to `to`, with a guest in it.
    ///
    /// # Errors
    /// It is too large, has no page of zeros, or has fewer than 8 groups of 64 KiB that are not zero.
    pub fn prepare(image: &Path, to: &Path) -> Result<Self> {
        let pages = first_pages(image)?;
        fs::copy(image, to).with_context(|| format!("cannot copy {}", image.display()))?;
        let file = File::options().read(true).write(true).open(to)?;
        let len = file.metadata()?.len();
        ensure!(len <= MOST, "an image of {len} bytes is too large to start");
        let mut page = [0; PAGE];
        let mut free = None;
        // Not the first page, which would be where a null pointer leads.
        for at in (PAGE as u64..len / PAGE as u64 * PAGE as u64).step_by(PAGE) {
            file.read_exact_at(&mut page, at)?;
            if page == [0; PAGE] {
                free = Some(at);
                break;
            }
        }
        let start = free.context("the image has no page of zeros for the guest's code")?;
        let mut code = vec![0x31, 0xc0]; // xor eax, eax
        let mut answer = 0_u32;
        for (at, bytes) in &pages {
            let (word, four) =
                bytes.as_chunks::<4>().0.iter().enumerate().find(|(_, four)| **four != [0; 4]).context("a page of zeros")?;
            let address = u32::try_from(*at)? + word as u32 * 4;
            code.extend([0xc1, 0xc0, 5, 0x33, 0x05]); // rol eax, 5; xor eax, [address]
            code.extend(address.to_le_bytes());
            answer = answer.rotate_left(5) ^ u32::from_le_bytes(*four);
        }
        code.extend([0x66, 0xba]); // mov dx, PORT
        code.extend(PORT.to_le_bytes());
        code.extend([0xef, 0xf4]); // out dx, eax; hlt
        file.write_all_at(&code, start)?;
        file.sync_all()?;
        Ok(Self { start, answer })
    }

    /// Starts a machine on `memory`, and returns when its guest has answered.
    ///
    /// # Errors
    /// KVM's, or the answer is another than that of the image.
    pub fn run(&self, memory: &Memory) -> Result<()> {
        let mut vm = Vm::new(memory)?;
        vm.begin_at(self.start)?;
        match vm.vcpu.run().context("KVM does not run")? {
            VcpuExit::IoOut(PORT, bytes) if bytes == self.answer.to_le_bytes() => Ok(()),
            VcpuExit::IoOut(PORT, bytes) => {
                bail!("the guest found {bytes:x?}, and {:x?} is in the image", self.answer.to_le_bytes())
            }
            other => bail!("the guest did something else: {other:?}"),
        }
    }
}

/// A machine, which goes before its memory does.
struct Vm<'m> {
    vcpu: VcpuFd,
    _vm: VmFd,
    _memory: PhantomData<&'m Memory>,
}

impl<'m> Vm<'m> {
    fn new(memory: &'m Memory) -> Result<Self> {
        let kvm = Kvm::new().context("/dev/kvm cannot be used")?;
        let vm = kvm.create_vm().context("KVM makes no machine")?;
        vm.set_tss_address(KVM_PAGES).context("KVM takes no place for pages of its own")?;
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: memory.len(),
            userspace_addr: memory.at(0, memory.len())?.as_ptr() as u64,
        };
        // SAFETY: the range is all of `memory`, which is borrowed for longer than the machine's descriptors live (they are fields here, and their only
        // copies), and of which nobody makes references (transport/src/memory.rs).
        unsafe { vm.set_user_memory_region(region) }.context("KVM takes no memory")?;
        let vcpu = vm.create_vcpu(0).context("KVM makes no vCPU")?;
        Ok(Self { vcpu, _vm: vm, _memory: PhantomData })
    }

    /// Protected mode, flat, without paging: nothing but the code is needed in memory.
    fn begin_at(&mut self, start: u64) -> Result<()> {
        let mut sregs = self.vcpu.get_sregs().context("KVM says no registers")?;
        let data =
            kvm_segment { limit: 0xffff_ffff, selector: 0x10, type_: 0x3, present: 1, db: 1, s: 1, g: 1, ..kvm_segment::default() };
        sregs.cs = kvm_segment { selector: 0x08, type_: 0xb, ..data };
        [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss].into_iter().for_each(|segment| *segment = data);
        sregs.cr0 |= 1;
        self.vcpu.set_sregs(&sregs).context("KVM takes no protected mode")?;
        let regs = kvm_regs { rip: start, rflags: 2, ..kvm_regs::default() };
        self.vcpu.set_regs(&regs).context("KVM takes no registers")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_says_what_is_in_its_memory_and_is_not_believed_when_that_is_something_else() {
        if let Err(error) = possible() {
            eprintln!("a guest's first instructions: not run: {error:#}");
            return;
        }
        let scratch = tempfile::tempdir().unwrap();
        let (image, prepared) = (scratch.path().join("image"), scratch.path().join("prepared"));
        let file = File::create(&image).unwrap();
        file.set_len(4 << 20).unwrap();
        // Ten groups, all in the first quarter.
        (0..10_u64).for_each(|n| file.write_all_at(&[n as u8 + 1; 700], n * (64 << 10) + 5000).unwrap());
        let guest = Guest::prepare(&image, &prepared).unwrap();
        let memory = || Memory::map_file(File::options().read(true).write(true).open(&prepared).unwrap().into(), 0, 4 << 20, true);
        guest.run(&memory().unwrap()).unwrap();
        let (at, _) = first_pages(&image).unwrap()[3];
        memory().unwrap().write(at, &[0x77; PAGE]).unwrap();
        assert!(guest.run(&memory().unwrap()).unwrap_err().to_string().contains("is in the image"));
        // Without its code it does something else.
        memory().unwrap().write(guest.start, &[0xf4; 64]).unwrap();
        assert!(guest.run(&memory().unwrap()).unwrap_err().to_string().contains("something else"));
    }
}
