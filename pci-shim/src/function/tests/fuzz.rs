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
    Poll,
}

fn width() -> impl Strategy<Value = Width> {
    prop_oneof![Just(Width::B1), Just(Width::B2), Just(Width::B4), Just(Width::B8)]
}

fn at() -> impl Strategy<Value = BarAddress> {
    let offset = prop_oneof![
        0..0x40u64,
        0x1000..0x1100u64,
        TABLE..TABLE + 0x420,
        PENDING..PENDING + 0x20,
        any::<u64>()
    ];
    (0..8u8, offset).prop_map(|(bar, offset)| BarAddress { bar, offset })
}

fn step() -> impl Strategy<Value = Step> {
    let offset = prop_oneof![0..0xc0u16, any::<u16>()];
    let interesting = prop_oneof![
        (0..8u16).prop_map(|command| Step::ConfigWrite(COMMAND, command.to_le_bytes().into())),
        (0..4u8).prop_map(|bits| Step::ConfigWrite(MSIX_CONTROL + 1, vec![bits << 6])),
        (0..128u8).prop_map(|bits| Step::ConfigWrite(MSI_CONTROL, vec![bits])),
        (0..4u8).prop_map(|state| Step::ConfigWrite(0x44, vec![state])),
        Just(Step::ConfigWrite(0x89, vec![0x80])),
    ];
    let mode = prop_oneof![
        Just(InterruptMode::Pin),
        any::<u8>().prop_map(InterruptMode::Msi),
        Just(InterruptMode::Msix)
    ];
    let page = || (0..0x4000u64).prop_map(Iova);
    let say = prop_oneof![
        (0..70u16).prop_map(Say::Vector),
        any::<bool>().prop_map(Say::Pin),
        (0..50u32, page(), 0..20u32).prop_map(|(ticket, iova, len)| Say::Fetch(Ticket(ticket), iova, len)),
        (0..50u32, page(), 0..20usize).prop_map(|(ticket, iova, len)| Say::Store(Ticket(ticket), iova, vec![1; len])),
    ];
    prop_oneof![
        (offset, prop::collection::vec(any::<u8>(), 0..12)).prop_map(|(offset, bytes)| Step::ConfigWrite(offset, bytes)),
        interesting,
        (any::<u16>(), 0..300usize).prop_map(|(offset, len)| Step::ConfigRead(offset, len)),
        (at(), width()).prop_map(|(at, width)| Step::Read(at, width)),
        (at(), width(), any::<u64>()).prop_map(|(at, width, value)| Step::Write(at, width, value)),
        (0..65u64, any::<bool>()).prop_map(|(vector, masked)| Step::Mask(vector, masked)),
        say.prop_map(Step::Say),
        Just(Step::Take),
        (0..8usize).prop_map(Step::Answer),
        (0..0x4000u64, 0..0x3000u64).prop_map(|(start, len)| Step::Unmap(start, len)),
        mode.prop_map(Step::Client),
        Just(Step::Poll),
    ]
}

/// What must hold after every step, whatever it was.
fn check(bench: &mut Bench, level: &mut bool) {
    let told = bench.told();
    for told in &told {
        if let Told::Pin(asserted) = told {
            assert_ne!(asserted, level, "a level that did not change was told");
            *level = *asserted;
        }
    }
    if bench.function.config().interrupt_disabled() {
        assert!(!*level, "a disabled pin is up");
    }
    let mut status = [0; 2];
    bench.function.config_read(0x06, &mut status).unwrap();
    assert!(!*level || status[0] & 8 != 0, "a pin is up without its status bit");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn nothing_that_guest_device_or_owner_do_breaks_the_function(
        client in any::<bool>(),
        steps in prop::collection::vec(step(), 0..120),
    ) {
        let owner = if client { InterruptOwner::Client } else { InterruptOwner::Function };
        let mut bench = Bench::new(owner);
        let (mut level, mut handed_out) = (false, Vec::new());
        for step in steps {
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
                Step::Say(say) => bench.script.say([say]),
                Step::Take => handed_out.extend(bench.function.next_mediation()),
                Step::Answer(index) if index < handed_out.len() => {
                    let answer = if index % 2 == 0 { MediationAnswer::Stored } else { MediationAnswer::Fault };
                    bench.function.answer(handed_out.remove(index).ticket, answer);
                }
                Step::Answer(_) => bench.function.answer(Ticket(99), MediationAnswer::Fetched(&[1])),
                Step::Unmap(start, len) => bench.function.unmap(Iova(start), len).unwrap(),
                Step::Client(mode) => bench.function.set_client_interrupts(mode),
                Step::Poll => bench.poll(),
            }
            check(&mut bench, &mut level);
        }
        // The attachment heard each change once: bus mastering alternates, and so do modes.
        let calls = bench.script.calls();
        let masters: Vec<bool> = calls.iter().filter_map(|call| match call {
            Call::BusMaster(enabled) => Some(*enabled),
            _ => None,
        }).collect();
        prop_assert!(masters.iter().zip(masters.iter().skip(1)).all(|(before, after)| before != after));
    }
}
