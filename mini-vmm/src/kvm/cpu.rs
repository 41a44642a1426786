//! A vCPU's state: at the guest program's first instruction, and saved and loaded between two machines.
//!
//! A vCPU that sleeps in `hlt` with an interrupt on its way is saved with that interrupt in its local APIC, and wakes up in the other machine.

use anyhow::{Context, Result};
use kvm_bindings::{kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_segment, kvm_sregs, kvm_vcpu_events, kvm_xcrs};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use super::guest;

/// As it is saved; by postcard.
#[derive(Serialize, Deserialize)]
struct State {
    version: u16,
    regs: kvm_regs,
    sregs: kvm_sregs,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
    mp_state: kvm_mp_state,
    xcrs: kvm_xcrs,
}

const VERSION: u16 = 1;

/// Long mode, flat, at the guest program's start.
pub(super) fn reset(vcpu: &VcpuFd) -> Result<()> {
    let mut sregs = vcpu.get_sregs()?;
    let code = kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: 0x08,
        type_: 0xb,
        present: 1,
        dpl: 0,
        db: 0,
        s: 1,
        l: 1,
        g: 1,
        ..kvm_segment::default()
    };
    let data = kvm_segment { selector: 0x10, type_: 0x3, l: 0, db: 1, ..code };
    sregs.cs = code;
    [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss].into_iter().for_each(|segment| *segment = data);
    sregs.gdt.base = guest::GDT;
    sregs.gdt.limit = 23;
    sregs.idt.base = guest::IDT;
    sregs.idt.limit = 4095;
    // Paging and protection; physical address extension; long mode enabled and active.
    sregs.cr0 = 1 << 31 | 1;
    sregs.cr3 = guest::PAGE_TABLES;
    sregs.cr4 = 1 << 5;
    sregs.efer = 1 << 8 | 1 << 10;
    vcpu.set_sregs(&sregs).context("KVM takes no long mode")?;
    let regs = kvm_regs { rip: guest::CODE, rsp: guest::STACK, rflags: 2, ..kvm_regs::default() };
    vcpu.set_regs(&regs).context("KVM takes no registers")?;
    Ok(())
}

pub(super) fn save(vcpu: &mut VcpuFd) -> Result<Vec<u8>> {
    let state = State {
        version: VERSION,
        mp_state: vcpu.get_mp_state()?,
        regs: vcpu.get_regs()?,
        sregs: vcpu.get_sregs()?,
        lapic: vcpu.get_lapic()?,
        events: vcpu.get_vcpu_events()?,
        xcrs: vcpu.get_xcrs()?,
    };
    Ok(postcard::to_allocvec(&state)?)
}

pub(super) fn load(vcpu: &VcpuFd, bytes: &[u8]) -> Result<()> {
    let state: State = postcard::from_bytes(bytes).context("this is no state of a vCPU")?;
    anyhow::ensure!(state.version == VERSION, "the vCPU was saved in version {} of its format", state.version);
    vcpu.set_sregs(&state.sregs)?;
    vcpu.set_regs(&state.regs)?;
    vcpu.set_xcrs(&state.xcrs)?;
    // Behind the special registers, which say where the local APIC is.
    vcpu.set_lapic(&state.lapic)?;
    vcpu.set_vcpu_events(&state.events)?;
    vcpu.set_mp_state(state.mp_state)?;
    Ok(())
}
