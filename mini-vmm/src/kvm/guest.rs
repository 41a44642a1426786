//! The bare guest program: it brings an NVMe controller up, and then reads each of 256 blocks, verifies it, writes it anew, and goes on with the next.
//!
//! It sleeps in `hlt` until vector 0x41 comes, counts what it verified in a page at 0x8000 that the VMM looks at, and leaves by port 0xf4 when a block is not
//! what it wrote. A guest that went back in time (the count at 0x8030 is not 0) takes whole blocks of a later generation as they are, and counts them.
//!
//! ```text
//!   0x1000 page tables   0x6000 GDT   0x7000 IDT   0x8000 counts   0x9000 code   0x1_0000 queues   0x1_4000 buffers   0x2_0000 generations
//! ```

use anyhow::{Context, Result};
use farbus_transport::Memory;

/// Bytes of the guest's memory.
pub const MEMORY_BYTES: u64 = 4 << 20;
/// Where the function's BAR 0 lies.
pub const BAR: u64 = 0xd000_0000;
/// Blocks of 4 KiB that the guest uses.
pub const BLOCKS: u64 = 256;
/// Bytes of one.
pub const BLOCK_BYTES: u64 = 4096;
/// Where the local APIC takes messages.
pub(super) const MESSAGE_ADDRESS: u64 = 0xfee0_0000;
/// The vector that makes the guest leave.
pub(super) const KICK: u8 = 0x42;
/// By this port.
pub(super) const KICK_PORT: u16 = 0xf5;
/// What the guest writes to when a block is wrong.
pub(super) const WRONG_PORT: u16 = 0xf4;
pub(super) const PAGE_TABLES: u64 = 0x1000;
pub(super) const GDT: u64 = 0x6000;
pub(super) const IDT: u64 = 0x7000;
pub(super) const CODE: u64 = 0x9000;
pub(super) const STACK: u64 = 0xf000;
const COUNTS: u64 = 0x8000;
const GENERATIONS: u64 = 0x2_0000;
/// Where the program's interrupt handlers are in it.
const HANDLERS: [(u8, u64); 2] = [(0x41, 16), (KICK, 64)];

// Registers in the main loop: r8 the BAR, r10 a block's seed, r12 and r13 the heads of the two queues, r14 the phase, r15 the block, rbx its generation.
std::arch::global_asm!(
    ".pushsection .rodata",
    ".balign 64",
    ".code64",
    ".global farbus_mini_vmm_guest, farbus_mini_vmm_guest_end",
    "farbus_mini_vmm_guest:",
    "jmp 20f",
    ".balign 16",
    // The device's interrupt, at 16.
    "push rax",
    "inc qword ptr [0x8018]",
    "mov eax, 0xfee000b0",
    "mov dword ptr [rax], 0",
    "pop rax",
    "iretq",
    ".balign 64",
    // The VMM's, at 64.
    "push rax",
    "mov eax, 0xfee000b0",
    "mov dword ptr [rax], 0",
    "out 0xf5, al",
    "pop rax",
    "iretq",
    "20:",
    // The local APIC on.
    "mov eax, 0xfee000f0",
    "mov dword ptr [rax], 0x1ff",
    "mov r8d, 0xd0000000",
    // Admin queues of 32 entries, and the controller on.
    "mov eax, 0x001f001f",
    "mov [r8 + 0x24], eax",
    "mov eax, 0x10000",
    "mov [r8 + 0x28], eax",
    "xor eax, eax",
    "mov [r8 + 0x2c], eax",
    "mov eax, 0x11000",
    "mov [r8 + 0x30], eax",
    "xor eax, eax",
    "mov [r8 + 0x34], eax",
    "mov eax, 0x00460001",
    "mov [r8 + 0x14], eax",
    "30:",
    "mov eax, [r8 + 0x1c]",
    "and eax, 3",
    "cmp eax, 1",
    "jne 30b",
    // MSI-X vector 1: 0x41 to this CPU.
    "mov eax, 0xfee00000",
    "mov [r8 + 0x2010], eax",
    "xor eax, eax",
    "mov [r8 + 0x2014], eax",
    "mov eax, 0x41",
    "mov [r8 + 0x2018], eax",
    "xor eax, eax",
    "mov [r8 + 0x201c], eax",
    // Completion queue 1 of 64 entries with vector 1, then submission queue 1.
    "mov dword ptr [0x10000], 5",
    "mov dword ptr [0x10018], 0x13000",
    "mov dword ptr [0x10028], 0x003f0001",
    "mov dword ptr [0x1002c], 0x00010003",
    "mov eax, 1",
    "mov [r8 + 0x1000], eax",
    "40:",
    "mov eax, [0x1100c]",
    "shr eax, 16",
    "jz 40b",
    "cmp eax, 1",
    "jne 90f",
    "mov [r8 + 0x1004], eax",
    "mov dword ptr [0x10040], 0x00010001",
    "mov dword ptr [0x10058], 0x12000",
    "mov dword ptr [0x10068], 0x003f0001",
    "mov dword ptr [0x1006c], 0x00010001",
    "mov eax, 2",
    "mov [r8 + 0x1000], eax",
    "50:",
    "mov eax, [0x1101c]",
    "shr eax, 16",
    "jz 50b",
    "cmp eax, 1",
    "jne 90f",
    "mov eax, 2",
    "mov [r8 + 0x1004], eax",
    "xor r12, r12",
    "xor r13, r13",
    "mov r14, 1",
    "xor r15, r15",
    "60:",
    // Read the block, and look at every line of 64 bytes of it.
    "mov esi, 2",
    "mov edi, 0x15000",
    "call 80f",
    "mov rbx, [0x20000 + r15 * 8]",
    "cmp qword ptr [0x8030], 0",
    "je 61f",
    "dec qword ptr [0x8030]",
    "mov rax, [0x15008]",
    "cmp rax, rbx",
    "jbe 61f",
    "mov rbx, rax",
    "inc qword ptr [0x8038]",
    "61:",
    "call 70f",
    "xor ecx, ecx",
    "62:",
    "call 75f",
    "cmp rax, [0x15000 + rcx * 8]",
    "jne 90f",
    "add ecx, 8",
    "cmp ecx, 512",
    "jne 62b",
    "mov ecx, 1",
    "cmp rbx, [0x15008]",
    "jne 90f",
    "inc qword ptr [0x8008]",
    // Write its next generation.
    "inc rbx",
    "call 70f",
    "xor ecx, ecx",
    "63:",
    "call 75f",
    "mov [0x14000 + rcx * 8], rax",
    "add ecx, 8",
    "cmp ecx, 512",
    "jne 63b",
    "mov [0x14008], rbx",
    "mov esi, 1",
    "mov edi, 0x14000",
    "call 80f",
    "mov [0x20000 + r15 * 8], rbx",
    "inc qword ptr [0x8010]",
    "inc r15",
    "and r15, 255",
    "jmp 60b",
    // r10: the seed of block r15 in generation rbx.
    "70:",
    "mov r10, r15",
    "shl r10, 32",
    "xor r10, rbx",
    "mov rax, 0x9e3779b97f4a7c15",
    "imul r10, rax",
    "ret",
    // rax: the first word of its line rcx / 8; generation 0 is zeros.
    "75:",
    "xor eax, eax",
    "test rbx, rbx",
    "jz 76f",
    "mov rax, r15",
    "test ecx, ecx",
    "jz 76f",
    "mov rax, 0xd1b54a32d192ed03",
    "imul rax, rcx",
    "add rax, r10",
    "76:",
    "ret",
    // Command rsi on block r15 with the buffer at rdi, and its end, by interrupt.
    "80:",
    "mov rdx, r12",
    "shl rdx, 6",
    "add rdx, 0x12000",
    "mov [rdx], esi",
    "mov dword ptr [rdx + 4], 1",
    "mov [rdx + 24], rdi",
    "mov eax, r15d",
    "shl eax, 3",
    "mov [rdx + 40], eax",
    "mov dword ptr [rdx + 48], 7",
    "inc r12",
    "and r12, 63",
    "mov eax, r12d",
    "mov [r8 + 0x1008], eax",
    "81:",
    "cli",
    "mov rdx, r13",
    "shl rdx, 4",
    "mov eax, [0x1300c + rdx]",
    "shr eax, 16",
    "mov edx, eax",
    "and edx, 1",
    "cmp edx, r14d",
    "je 82f",
    "sti",
    "hlt",
    "jmp 81b",
    "82:",
    "sti",
    "shr eax, 1",
    "jnz 90f",
    "inc r13",
    "cmp r13, 64",
    "jne 83f",
    "xor r13, r13",
    "xor r14, 1",
    "83:",
    "mov eax, r13d",
    "mov [r8 + 0x100c], eax",
    "ret",
    // Something is wrong: which block, what was found.
    "90:",
    "mov [0x8020], r15",
    "mov [0x8028], rcx",
    "out 0xf4, al",
    "cli",
    "hlt",
    "farbus_mini_vmm_guest_end:",
    ".popsection",
);

unsafe extern "C" {
    static farbus_mini_vmm_guest: u8;
    static farbus_mini_vmm_guest_end: u8;
}

/// The program's bytes.
fn program() -> &'static [u8] {
    let (start, end) = (&raw const farbus_mini_vmm_guest, &raw const farbus_mini_vmm_guest_end);
    // SAFETY: both labels are of the assembly above, in this order, in one read-only section; the bytes between them are initialised and never change.
    unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) }
}

/// What the guest counts, in a page of its memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Blocks that were read and were right.
    pub verified: u64,
    /// Blocks whose write was acknowledged.
    pub written: u64,
    /// Interrupts that were taken.
    pub interrupts: u64,
    /// Blocks of a later generation that a guest which went back in time took as they are.
    pub learnt: u64,
    /// Where it found something wrong: the block, and the word in it.
    pub wrong: (u64, u64),
}

impl Counts {
    pub(super) fn of(memory: &Memory) -> Self {
        let count = |at| memory.atomic_u64(COUNTS + at).map_or(0, |count| count.load(std::sync::atomic::Ordering::Acquire));
        Self {
            verified: count(0x08),
            written: count(0x10),
            interrupts: count(0x18),
            learnt: count(0x38),
            wrong: (count(0x20), count(0x28)),
        }
    }
}

/// Tells a guest that went back in time: for two rounds it takes whole blocks of later generations as they are.
///
/// # Errors
/// The memory is none of such a guest.
pub fn went_back(memory: &Memory) -> Result<()> {
    memory.write(COUNTS + 0x30, &(2 * BLOCKS).to_le_bytes()).context("the guest's memory is too small")
}

/// The generation of a block, as far as the guest knows.
pub fn generation(memory: &Memory, block: u64) -> Option<u64> {
    let mut bytes = [0; 8];
    memory.read(GENERATIONS + block * 8, &mut bytes).ok()?;
    Some(u64::from_le_bytes(bytes))
}

/// What block `block` holds in its `generation`: its number and generation, and in each line of 64 bytes a word that no other line, block or generation has. Not
/// more, because there are KVMs that carry out one guest instruction after the other, at a microsecond each.
pub fn pattern(block: u64, generation: u64) -> Vec<u8> {
    let seed = (block << 32 ^ generation).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let word = |at: u64| match at {
        _ if generation == 0 => 0,
        0 => block,
        1 => generation,
        _ if !at.is_multiple_of(8) => 0,
        _ => at.wrapping_mul(0xd1b5_4a32_d192_ed03).wrapping_add(seed),
    };
    (0..BLOCK_BYTES / 8).flat_map(|at| word(at).to_le_bytes()).collect()
}

/// Puts the program and its tables into memory.
pub(super) fn load(memory: &Memory) -> Result<()> {
    let word = |at: u64, value: u64| memory.write(at, &value.to_le_bytes()).context("the guest's memory is too small");
    // Four levels, of which the last is pages of 2 MiB: the first GiB, and the fourth, where the BAR and the local APIC are.
    const TABLE: u64 = 0b11;
    const LARGE: u64 = 0b1000_0011;
    word(PAGE_TABLES, 0x2000 | TABLE)?;
    for (gib, table) in [(0, 0x4000), (3, 0x5000)] {
        word(0x2000 + gib * 8, table | TABLE)?;
        for page in 0..512 {
            word(table + page * 8, gib << 30 | page << 21 | LARGE)?;
        }
    }
    for (at, descriptor) in [(1, 0x00af_9b00_0000_ffff), (2, 0x00cf_9300_0000_ffff)] {
        word(GDT + at * 8, descriptor)?;
    }
    for (vector, offset) in HANDLERS {
        // An interrupt gate of 64 bits in segment 8; all addresses are below 64 KiB.
        let handler = CODE + offset;
        word(IDT + u64::from(vector) * 16, handler | 0x08 << 16 | 0x8e00 << 32)?;
    }
    memory.write(CODE, program()).context("the guest's memory is too small")
}
