//! Writes that nobody waits for: in order, never lost, not for long, and fewer than were made.
//!
//! Heads 1, 2 and 3 of one completion queue and then a tail are two writes for the device: head 3, tail.

use std::time::Duration;

use farbus_remote_dma::{Iova, Window, WindowMemory};
use farbus_transport::Access;
use proptest::prelude::*;

use super::*;
use crate::function::lazy::PATIENCE;

const CC: u64 = 0x14;
const TAIL: u64 = 0x1008;
const HEAD: u64 = 0x100c;
const OTHER_HEAD: u64 = 0x1014;

fn written(offset: u64, value: u64) -> Call {
    Call::Write(BarAddress { bar: 0, offset }, Width::B4, value)
}

fn window() -> Window {
    Window { iova: Iova(0x1000), len: 4096, access: Access::READ_WRITE, memory: WindowMemory::Mediated }
}

/// A driver's function with its controller enabled.
fn enabled() -> Bench {
    let mut bench = Bench::running();
    bench.write(CC, Width::B4, 0x46_0001);
    bench.script.calls();
    bench
}

#[test]
fn a_completion_queues_head_goes_with_the_next_write_and_before_it() {
    let mut bench = enabled();
    for head in 1..=3 {
        bench.write(HEAD, Width::B4, head);
    }
    assert_eq!(bench.script.calls(), []);
    bench.write(TAIL, Width::B4, 17);
    assert_eq!(bench.script.calls(), [written(HEAD, 3), written(TAIL, 17)]);
    bench.write(HEAD, Width::B4, 4);
    bench.write(OTHER_HEAD, Width::B4, 1);
    assert_eq!(bench.script.calls(), [written(HEAD, 4)], "one waits at most");
    bench.write(HEAD, Width::B4, 5);
    bench.write(TAIL, Width::B4, 18);
    assert_eq!(bench.script.calls(), [written(OTHER_HEAD, 1), written(HEAD, 5), written(TAIL, 18)]);
}

#[test]
fn whatever_could_tell_the_order_finds_the_head_written() {
    type Act = fn(&mut Bench);
    let acts: [(&str, Act); 7] = [
        ("a register read", |bench| assert_eq!(bench.read(0x1c, Width::B4), 0)),
        ("sleep", |bench| assert!(bench.function.arm())),
        ("a map", |bench| bench.function.map(window()).unwrap()),
        ("an unmap", |bench| bench.function.unmap(Iova(0), 4096).unwrap()),
        ("bus mastering", |bench| bench.config(COMMAND, 0x0003)),
        ("another interrupt mode", |bench| bench.config(MSIX_CONTROL, 0x0000)),
        ("the attachment", |bench| assert!(bench.function.attachment_mut().gone().is_none())),
    ];
    for (name, act) in acts {
        let mut bench = enabled();
        bench.write(HEAD, Width::B4, 1);
        act(&mut bench);
        assert_eq!(bench.script.calls().first(), Some(&written(HEAD, 1)), "{name}");
    }
}

#[test]
fn a_head_that_has_no_company_goes_alone_after_a_while() {
    let mut bench = enabled();
    let late = Nanos(7) + PATIENCE;
    bench.write(HEAD, Width::B4, 1);
    bench.function.poll(Nanos(7));
    // Its time is not that of the last write of the register: those may never end.
    bench.write(HEAD, Width::B4, 2);
    bench.function.poll(late - Duration::from_nanos(1));
    assert_eq!(bench.script.calls(), []);
    bench.function.poll(late);
    assert_eq!(bench.script.calls(), [written(HEAD, 2)]);
    bench.function.poll(late + PATIENCE);
    assert_eq!(bench.script.calls(), []);
}

#[test]
fn a_head_that_is_written_while_somebody_sleeps_goes_at_once() {
    let mut bench = enabled();
    assert!(bench.function.arm());
    bench.write(HEAD, Width::B4, 1);
    assert_eq!(bench.script.calls(), [written(HEAD, 1)]);
    bench.poll();
    bench.write(HEAD, Width::B4, 2);
    assert_eq!(bench.script.calls(), []);
}

#[test]
fn a_reset_controller_hears_nothing_of_its_earlier_life() {
    let mut bench = enabled();
    bench.write(HEAD, Width::B4, 1);
    bench.function.reset(ResetKind::Function).unwrap();
    assert!(!bench.script.calls().contains(&written(HEAD, 1)));
}

#[test]
fn where_a_head_lowers_the_pin_it_goes_at_once() {
    let mut bench = enabled();
    bench.config(MSIX_CONTROL, 0x0000);
    bench.script.calls();
    bench.write(HEAD, Width::B4, 1);
    assert_eq!(bench.script.calls(), [written(HEAD, 1)]);
}

proptest! {
    /// Without the heads whose place a later one took, the device sees what the driver wrote, in its order, whenever it is polled.
    #[test]
    fn the_device_sees_every_write_in_order_but_for_heads_that_were_overtaken(
        acts in prop::collection::vec((0..4usize, 0..8u64), 1..60),
    ) {
        let mut bench = enabled();
        let (mut made, mut now) = (Vec::new(), Nanos(0));
        for (act, value) in acts {
            match [TAIL, HEAD, OTHER_HEAD].get(act) {
                Some(&offset) => {
                    bench.write(offset, Width::B4, value);
                    made.push(written(offset, value));
                }
                None => {
                    now = now + Duration::from_micros(value * 10);
                    bench.function.poll(now);
                }
            }
        }
        bench.function.arm();
        let seen = bench.script.calls();
        prop_assert_eq!(last_of_each_run(&seen), last_of_each_run(&made));
        let mut left = made.iter();
        prop_assert!(seen.iter().all(|write| left.any(|made| made == write)), "{:?} became {:?}", made, seen);
    }
}

/// The writes without the heads that are followed by one of the same queue.
fn last_of_each_run(calls: &[Call]) -> Vec<&Call> {
    let mut kept: Vec<&Call> = Vec::new();
    for call in calls {
        if let (Some(Call::Write(before, ..)), Call::Write(at, ..)) = (kept.last(), call)
            && before == at
            && at.offset != TAIL
        {
            kept.pop();
        }
        kept.push(call);
    }
    kept
}
