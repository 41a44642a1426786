//! Who answers an access, and which are refused. Example: CAP comes from the description, without a word to the device.

use super::*;
use crate::profile::RegisterName;
use crate::scripted::CAP;

#[test]
fn an_access_that_hardware_cannot_make_is_refused_before_it_reaches_the_device() {
    let mut bench = Bench::running();
    let refused = [
        (BarAddress { bar: 1, offset: 0 }, Width::B4),
        (BarAddress { bar: 6, offset: 0 }, Width::B4),
        (BarAddress { bar: 255, offset: 0 }, Width::B1),
        (BarAddress { bar: 0, offset: 0x4000 }, Width::B1),
        (BarAddress { bar: 0, offset: 0x3ffe }, Width::B4),
        (
            BarAddress {
                bar: 0,
                offset: u64::MAX,
            },
            Width::B8,
        ),
        (BarAddress { bar: 0, offset: 0x1002 }, Width::B4),
        (BarAddress { bar: 0, offset: 0x1004 }, Width::B8),
        (BarAddress { bar: 3, offset: 0 }, Width::B8),
    ];
    for (at, width) in refused {
        let read = bench.function.bar_read(at, width);
        assert_eq!(read.map(|_| ()), bench.function.bar_write(at, width, 0));
        assert!(bench.function.bar_read(at, width).is_err(), "{at}");
    }
    assert!(bench.function.config_read(4095, &mut [0; 2]).is_err());
    assert!(bench.function.config_write(4095, &[0; 2]).is_err());
    assert_eq!(bench.script.calls(), []);
    assert_eq!(bench.function.counters().refused, 3 * 9 + 2);
}

#[test]
fn the_table_and_constants_never_cost_a_round_trip() {
    let mut bench = Bench::running();
    let before = bench.function.counters();
    assert_eq!(bench.read(0, Width::B8), CAP);
    assert_eq!(bench.read(4, Width::B4), CAP >> 32);
    assert_eq!(bench.read(1, Width::B1), CAP >> 8 & 0xff);
    assert_eq!(bench.read(TABLE + 3 * 16 + 8, Width::B4), 0x4003);
    assert_eq!(bench.read(PENDING + 8, Width::B8), 0);
    bench.write(PENDING, Width::B8, u64::MAX);
    assert_eq!(bench.read(PENDING, Width::B8), 0, "pending bits are read-only");
    assert_eq!(bench.script.calls(), []);
    let after = bench.function.counters();
    assert_eq!(after.bar_reads_local - before.bar_reads_local, 6);
    assert_eq!(
        (after.bar_reads_remote, after.bar_writes_local - before.bar_writes_local),
        (0, 1)
    );
}

#[test]
fn a_version_is_asked_for_once_and_again_after_a_reset_that_may_have_changed_it() {
    let mut bench = Bench::running();
    let version = BarAddress { bar: 0, offset: 8 };
    for value in [0x1_0400, 0x2_0000] {
        bench.script.set_register(version, value);
        assert_eq!((bench.read(8, Width::B4), bench.read(8, Width::B4)), (value, value));
        assert_eq!(bench.script.calls(), [Call::Read(version, Width::B4)]);
        bench.config(0x88, 0x8000);
        bench.config(COMMAND, 0x0002);
        bench.script.calls();
    }
}

#[test]
fn what_lies_beside_the_table_is_the_devices() {
    let mut bench = Bench::running();
    for offset in [TABLE - 4, TABLE + 65 * 16, PENDING - 4, PENDING + 16, 0x1c] {
        let at = BarAddress { bar: 0, offset };
        bench.script.set_register(at, 0x1_2345_6789);
        assert_eq!(bench.read(offset, Width::B4), 0x2345_6789);
        bench.write(offset, Width::B4, 0xf_0000_0001);
        let expected = [Call::Read(at, Width::B4), Call::Write(at, Width::B4, 1)];
        assert_eq!(bench.script.calls(), expected, "{offset:#x}");
    }
    // The same offsets in another BAR are not the table.
    let at = BarAddress { bar: 4, offset: TABLE };
    bench.function.bar_write(at, Width::B2, 7).unwrap();
    assert_eq!(bench.script.calls(), [Call::Write(at, Width::B2, 7)]);
}

#[test]
fn a_bar_that_is_off_answers_all_ones_and_notes_the_unsupported_request() {
    let mut bench = Bench::new(InterruptOwner::Function);
    for offset in [0, 0x1c, TABLE] {
        assert_eq!(bench.read(offset, Width::B4), 0xffff_ffff);
    }
    assert_eq!(bench.config_read(0x8a), 0b1001);
    bench.write(0x14, Width::B4, 1);
    assert_eq!(bench.config_read(0x8a), 0b1011);
    bench.config(0x8a, 0xf);
    assert_eq!((bench.config_read(0x8a), bench.script.calls()), (0, vec![]));
    bench.config(COMMAND, 0x0002);
    assert_eq!(bench.read(0, Width::B8), CAP);
    let port = BarAddress { bar: 3, offset: 0 };
    assert_eq!(
        bench.function.bar_read(port, Width::B2),
        Ok(0xffff),
        "i/o is enabled by another bit"
    );
}

#[test]
fn a_client_decodes_itself_so_its_accesses_are_carried_out() {
    let mut bench = Bench::new(InterruptOwner::Client);
    let at = BarAddress { bar: 0, offset: 0x14 };
    bench.write(0x14, Width::B4, 1);
    assert_eq!(bench.script.calls(), [Call::Write(at, Width::B4, 1)]);
}

#[test]
fn writes_reach_the_device_in_the_order_of_the_guests_stores() {
    let mut bench = Bench::running();
    let at = |offset| BarAddress { bar: 0, offset };
    for tail in 0..100 {
        bench.write(0x1018, Width::B4, tail);
        bench.write(0x101c, Width::B4, tail);
    }
    let expected: Vec<Call> = (0..100)
        .flat_map(|tail| [0x1018, 0x101c].map(|offset| Call::Write(at(offset), Width::B4, tail)))
        .collect();
    assert_eq!(bench.script.calls(), expected);
    let named = bench.function.register(at(0x1018));
    assert_eq!(named, Some(RegisterName::SubmissionTail { queue: 3 }));
}
