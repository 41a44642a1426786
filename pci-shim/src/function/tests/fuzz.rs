//! Anything, in any order, from guest, device and owner at once: nothing panics, and no rule that can be checked from outside is broken.

use proptest::prelude::*;

use super::*;
use crate::scripted::Say;
use farbus_remote_dma::Iova;

#[derive(Clone, Debug)]
enum Step {
    ConfigWrite(u16, Vec<u8>),
    ConfigRead(u16, usize),
    Read(BarAddress, Width),
    Write(BarAddress, Width, u64),
    Mask(u64, bool),
    Say(Say),
    Take,
    Answer(usize),
    Unmap(u64, u64),
    Client(InterruptMode),
}

fn width() -> impl Strategy<Value = Width> {
    prop_oneof![Just(Width::B1), Just(Width::B2), Just(Width::B4), Just(Width::B8)]
}

fn at() -> impl Strategy<Value = BarAddress> {
    let offset = prop_oneof![0..0x40u64, 0x1000..0x1100u64, TABLE..TABLE + 0x420, PENDING..PENDING + 0x20, any::<u64>()];
    (0..8u8, offset).prop_map(|(bar, offset)| BarAddress { bar, offset })
}

fn step() -> impl Strategy<Value = Step> {
    let offset = prop_oneof![0..0xc0u16, any::<u16>()];
    // Bus mastering and MSI-X are mostly on, so that messages do flow.
    let command =
        (any::<bool>(), 0..8u8).prop_map(|(disable, off)| vec![if off == 0 { 0x03 } else { 0x07 }, u8::from(disable) << 2]);
    let interesting = prop_oneof![
        4 => command.prop_map(|command| Step::ConfigWrite(COMMAND, command)),
        3 => (0..6u8).prop_map(|bits| Step::ConfigWrite(MSIX_CONTROL + 1, vec![[0, 0, 0x80, 0x80, 0xc0, 0x40][usize::from(bits)]])),
        2 => (0..128u8).prop_map(|bits| Step::ConfigWrite(MSI_CONTROL, vec![bits | 1])),
        2 => any::<u8>().prop_map(|masks| Step::ConfigWrite(0x60, vec![masks])),
        1 => (0..4u8).prop_map(|state| Step::ConfigWrite(0x44, vec![state])),
    ];
    let reset = Just(Step::ConfigWrite(0x89, vec![0x80]));
    let mode = prop_oneof![Just(InterruptMode::Pin), any::<u8>().prop_map(InterruptMode::Msi), Just(InterruptMode::Msix)];
    let page = || (0..0x4000u64).prop_map(Iova);
    let say = prop_oneof![
        4 => (0..12u16).prop_map(Say::Vector),
        1 => (0..70u16).prop_map(Say::Vector),
        2 => any::<bool>().prop_map(Say::Pin),
        1 => (0..50u32, page(), 0..20u32).prop_map(|(ticket, iova, len)| Say::Fetch(Ticket(ticket), iova, len)),
        1 => (0..50u32, page(), 0..20usize).prop_map(|(ticket, iova, len)| Say::Store(Ticket(ticket), iova, vec![1; len])),
    ];
    prop_oneof![
        1 => (offset, prop::collection::vec(any::<u8>(), 0..12)).prop_map(|(offset, bytes)| Step::ConfigWrite(offset, bytes)),
        12 => interesting,
        1 => reset,
        1 => (any::<u16>(), 0..300usize).prop_map(|(offset, len)| Step::ConfigRead(offset, len)),
        2 => (at(), width()).prop_map(|(at, width)| Step::Read(at, width)),
        2 => (at(), width(), any::<u64>()).prop_map(|(at, width, value)| Step::Write(at, width, value)),
        8 => (0..12u64, any::<bool>()).prop_map(|(vector, masked)| Step::Mask(vector, masked)),
        16 => say.prop_map(Step::Say),
        4 => Just(Step::Take),
        4 => (0..8usize).prop_map(Step::Answer),
        1 => (0..0x4000u64, 0..0x3000u64).prop_map(|(start, len)| Step::Unmap(start, len)),
        1 => mode.prop_map(Step::Client),
    ]
}

/// What must hold after every step, whatever it was; how many messages it told. `steady` where the step wrote no register.
fn check(bench: &mut Bench, level: &mut bool, steady: bool) -> u64 {
    let mut messages = 0;
    for told in bench.told() {
        match told {
            Told::Pin(asserted) => {
                assert_ne!(asserted, *level, "a level that did not change was told");
                *level = asserted;
            }
            Told::Message(irq) => {
                messages += 1;
                let owned = bench.function.front.owner == InterruptOwner::Function;
                assert!(!steady || !owned || may_be_told(bench, irq), "{irq:?} is masked");
            }
        }
    }
    if bench.function.config().interrupt_disabled() {
        assert!(!*level, "a disabled pin is up");
    }
    let kept = bench.function.decoded;
    assert_eq!(kept, bench.function.front.decoded(), "the decoded bars are not those of the registers");
    let mut status = [0; 2];
    bench.function.config_read(0x06, &mut status).unwrap();
    assert!(!*level || status[0] & 8 != 0, "a pin is up without its status bit");
    messages
}

/// Whether every mask is open for a message, and it is the one that the guest programmed.
fn may_be_told(bench: &Bench, irq: MessageInterrupt) -> bool {
    let front = &bench.function.front;
    let (msix, msi) = (front.space.msix(), front.space.msi());
    let open = if msix.enabled {
        let table = front.msix.as_ref().unwrap();
        let entry = u64::from(irq.vector) * 16;
        let programmed = (table.read_table(entry, Width::B8), table.read_table(entry + 8, Width::B8));
        // The upper half of the second word is the mask bit.
        !msix.masked && programmed == (irq.address, u64::from(irq.data))
    } else {
        msi.enabled && msi.mask >> irq.vector & 1 == 0 && irq.vector < u16::from(msi.vectors) && irq.address == msi.address
    };
    open && front.space.bus_master()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn nothing_that_guest_device_or_owner_do_breaks_the_function(
        client in prop::bool::weighted(0.2),
        running in any::<bool>(),
        steps in prop::collection::vec(step(), 0..120),
    ) {
        let owner = if client { InterruptOwner::Client } else { InterruptOwner::Function };
        let mut bench = if running && !client { Bench::running() } else { Bench::new(owner) };
        let (mut level, mut handed_out) = (false, Vec::new());
        let (mut raised, mut messages) = (0, 0);
        for step in steps {
            let steady = !matches!(step, Step::ConfigWrite(..) | Step::Write(..) | Step::Mask(..));
            raised += u64::from(matches!(step, Step::Say(Say::Vector(_))));
            match step {
                Step::ConfigWrite(offset, bytes) => {
                    let inside = usize::from(offset) + bytes.len() <= 4096;
                    prop_assert_eq!(bench.function.config_write(offset, &bytes).is_ok(), inside);
                }
                Step::ConfigRead(offset, len) => {
                    let inside = usize::from(offset) + len <= 4096;
                    prop_assert_eq!(bench.function.config_read(offset, &mut vec![0; len]).is_ok(), inside);
                }
                Step::Read(at, width) => {
                    let read = bench.function.bar_read(at, width);
                    prop_assert!(read.is_err() || read.unwrap() <= width.all_ones());
                }
                Step::Write(at, width, value) => {
                    let known = description().contains(at.bar, at.offset, width.bytes()) && width.aligned(at.offset);
                    let known = known && (at.bar != 3 || width != Width::B8);
                    prop_assert_eq!(bench.function.bar_write(at, width, value).is_ok(), known);
                }
                Step::Mask(vector, masked) => bench.mask(vector, masked),
                Step::Say(say) => {
                    bench.script.say([say]);
                    bench.poll();
                }
                Step::Take => handed_out.extend(bench.function.next_mediation()),
                Step::Answer(index) if index < handed_out.len() => {
                    let answer = if index % 2 == 0 { MediationAnswer::Stored } else { MediationAnswer::Fault };
                    bench.function.answer(handed_out.remove(index).ticket, answer);
                }
                Step::Answer(_) => bench.function.answer(Ticket(99), MediationAnswer::Fetched(&[1])),
                Step::Unmap(start, len) => bench.function.unmap(Iova(start), len).unwrap(),
                Step::Client(mode) => bench.function.set_client_interrupts(mode),
            }
            messages += check(&mut bench, &mut level, steady);
            prop_assert!(messages <= raised, "a message that nobody raised");
        }
        // The attachment heard each change of bus mastering once.
        let calls = bench.script.calls();
        let masters: Vec<bool> = calls.iter().filter_map(|call| match call {
            Call::BusMaster(enabled) => Some(*enabled),
            _ => None,
        }).collect();
        prop_assert!(masters.iter().zip(masters.iter().skip(1)).all(|(before, after)| before != after));
    }
}
