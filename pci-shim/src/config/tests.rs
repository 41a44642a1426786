//! What a driver reads must be what hardware would answer. Example: all ones written to BAR0 of 16 KiB must read 0xffff_c004.

use farbus_remote_dma::{BarKind, DeviceDescription, MsixLocation};
use proptest::prelude::*;

use super::*;
use crate::scripted::description;

fn space() -> Space {
    Space::new(&description()).unwrap()
}

fn read32(space: &Space, offset: u16) -> u32 {
    let mut bytes = [0; 4];
    space.read(offset, &mut bytes).unwrap();
    u32::from_le_bytes(bytes)
}

fn write32(space: &mut Space, offset: u16, value: u32) -> Written {
    space.write(offset, &value.to_le_bytes()).unwrap()
}

#[test]
fn a_driver_that_sizes_a_bar_is_never_told_a_wrong_size() {
    let mut space = space();
    for offset in (0x10..0x28).step_by(4) {
        let _ = write32(&mut space, offset, u32::MAX);
    }
    let sizes = [0xffff_c004, 0xffff_ffff, 0xffff_f008, 0xffff_ffe1, 0x0000_000c, 0xffff_fffe];
    assert_eq!(std::array::from_fn(|bar| read32(&space, 0x10 + bar as u16 * 4)), sizes);
    let _ = write32(&mut space, 0x30, u32::MAX);
    assert_eq!(read32(&space, 0x30), 0, "there is no expansion rom");
}

#[test]
fn a_bar_is_decoded_where_the_guest_put_it_and_only_while_it_is_on() {
    let mut space = space();
    let _ = write32(&mut space, 0x10, 0xfe00_0000);
    let _ = write32(&mut space, 0x14, 0x1);
    let _ = write32(&mut space, 0x1c, 0xc020);
    let _ = write32(&mut space, 0x24, 0x10);
    let memory = |space: &Space, address| space.decode(AddressSpace::Memory, address);
    assert_eq!(memory(&space, 0x1_fe00_1018), None);
    let _ = space.write(0x04, &[0x02]).unwrap();
    assert_eq!(memory(&space, 0x1_fe00_1018), Some(BarAddress { bar: 0, offset: 0x1018 }));
    assert_eq!(memory(&space, 0x1_fe00_4000), None);
    assert_eq!(space.decode(AddressSpace::Io, 0xc021), None, "i/o decoding is still off");
    let _ = space.write(0x04, &[0x01]).unwrap();
    let port = BarAddress { bar: 3, offset: 1 };
    assert_eq!(space.decode(AddressSpace::Io, 0xc021), Some(port));
    assert_eq!(memory(&space, 0x1_fe00_1018), None);
    let _ = space.write(0x04, &[0x03]).unwrap();
    let _ = space.write(0x44, &[0x03]).unwrap();
    assert_eq!(space.power_state(), PowerState::D3Hot);
    assert_eq!(memory(&space, 0x1_fe00_1018), None, "nothing is decoded in D3hot");
    assert_eq!(
        space.bar_base(0),
        Some(0x1_fe00_0000),
        "No_Soft_Reset keeps registers over D3hot"
    );
}

#[test]
fn a_power_state_that_does_not_exist_is_not_entered() {
    let mut space = space();
    for state in [1, 2] {
        let _ = space.write(0x44, &[state]).unwrap();
        assert_eq!(read32(&space, 0x44), 0x8);
    }
    let _ = space.write(0x44, &[3]).unwrap();
    let _ = space.write(0x44, &[1]).unwrap();
    assert_eq!(read32(&space, 0x44), 0xb);
}

#[test]
fn a_function_level_reset_keeps_the_links_settings_and_nothing_else() {
    let mut changed = space();
    for offset in (0..0x100).step_by(4).filter(|offset| *offset != 0x88) {
        let _ = write32(&mut changed, offset, u32::MAX);
    }
    let _ = write32(&mut changed, 0x88, 0x7fff);
    changed.note_unsupported_request(true);
    let mut conventional = changed.clone();
    changed.reset(ResetKind::Function);
    let fresh = space();
    for offset in (0..0x1000).step_by(4) {
        let kept = match offset {
            0x88 => 0x28f0, // max payload size 7 beside the initial values
            0x90 => read32(&fresh, offset) | 0x00cb,
            0xb0 => 0xf,
            _ => read32(&fresh, offset),
        };
        assert_eq!(read32(&changed, offset), kept, "{offset:#x}");
    }
    conventional.reset(ResetKind::Conventional);
    for offset in (0..0x1000).step_by(4) {
        assert_eq!(read32(&conventional, offset), read32(&fresh, offset), "{offset:#x}");
    }
}

#[test]
fn initiating_a_reset_is_seen_in_every_width_and_always_reads_zero() {
    for (offset, bytes) in [
        (0x89, &[0x80][..]),
        (0x88, &[0, 0x80]),
        (0x88, &[0, 0x80, 0, 0]),
        (0x80, &[0xff; 16]),
    ] {
        let mut space = space();
        assert_eq!(space.write(offset, bytes), Ok(Written::FunctionLevelReset));
        assert_eq!(read32(&space, 0x88) & 0x8000, 0);
    }
    let mut space = space();
    assert_eq!(space.write(0x88, &[0xff, 0x7f]), Ok(Written::Stored));
    assert_eq!(space.write(0x8a, &[0xff, 0xff]), Ok(Written::Stored));
    assert_eq!(space.write(0x89, &[]), Ok(Written::Stored));
}

#[test]
fn an_error_bit_is_cleared_by_the_guest_and_by_nobody_else() {
    let mut space = space();
    space.note_unsupported_request(true);
    assert_eq!(read32(&space, 0x88) >> 16, 0b1010);
    let _ = space.write(0x88, &[0, 0]).unwrap();
    let _ = space.write(0x8a, &[0b0100, 0]).unwrap();
    assert_eq!(
        read32(&space, 0x88) >> 16,
        0b1010,
        "writing zero or another bit clears nothing"
    );
    let _ = space.write(0x8a, &[0b0010]).unwrap();
    assert_eq!(read32(&space, 0x88) >> 16, 0b1000);
}

#[test]
fn status_bit_3_shows_an_interrupt_that_the_guest_disabled() {
    let mut space = space();
    let _ = space.write(0x04, &[0x00, 0x04]).unwrap();
    space.show_interrupt(true);
    assert_eq!(read32(&space, 0x04), 0x0018_0400);
    let _ = space.write(0x06, &[0xff, 0xff]).unwrap();
    assert_eq!(read32(&space, 0x04) >> 16, 0x0018, "the guest cannot clear it");
    space.show_interrupt(false);
    assert_eq!(read32(&space, 0x04) >> 16, 0x0010);
}

#[test]
fn more_msi_vectors_than_the_device_has_are_not_believed() {
    let mut space = space();
    for (log2, vectors) in [(0, 1), (1, 2), (3, 8), (5, 8), (6, 8), (7, 8)] {
        let _ = space.write(0x52, &[1 | log2 << 4]).unwrap();
        assert_eq!((space.msi().enabled, space.msi().vectors), (true, vectors));
    }
}

#[test]
fn a_description_that_no_function_can_have_is_refused() {
    let mut in_io = description();
    in_io.msix = Some(MsixLocation {
        vectors: 1,
        table_bar: 3,
        table_offset: 0,
        pba_bar: 0,
        pba_offset: 0,
    });
    assert!(Space::new(&in_io).is_err());
    let mut odd = description();
    odd.bars[2].as_mut().unwrap().size = 0x1001;
    assert!(Space::new(&odd).is_err());
}

/// Each register of [`description`] again, by hand from the specifications: offset, value at power-on, writable bits, bits cleared by one.
const MODEL: &[(usize, u32, u32, u32)] = &[
    (0x00, 0x1f1f_1d1d, 0, 0),
    (0x04, 0x0010_0000, 0x0000_0547, 0xf900_0000),
    (0x08, 0x0108_0202, 0, 0),
    (0x0c, 0, 0x0000_00ff, 0),
    (0x10, 0x4, 0xffff_c000, 0),
    (0x14, 0, 0xffff_ffff, 0),
    (0x18, 0x8, 0xffff_f000, 0),
    (0x1c, 0x1, 0xffff_ffe0, 0),
    (0x20, 0xc, 0, 0),
    (0x24, 0, 0xffff_fffe, 0),
    (0x2c, 0x1100_1af4, 0, 0),
    (0x34, 0x40, 0, 0),
    (0x3c, 0x0000_0100, 0x0000_00ff, 0),
    (0x40, 0x0003_5001, 0, 0),
    (0x44, 0x0000_0008, 0x0000_0003, 0),
    (0x50, 0x0186_7005, 0x0071_0000, 0),
    (0x54, 0, 0xffff_fffc, 0),
    (0x58, 0, 0xffff_ffff, 0),
    (0x5c, 0, 0x0000_ffff, 0),
    (0x60, 0, 0x0000_00ff, 0),
    (0x70, 0x0040_8011, 0xc000_0000, 0),
    (0x74, 0x2000, 0, 0),
    (0x78, 0x3000, 0, 0),
    (0x80, 0x0002_0010, 0, 0),
    (0x84, 0x1000_8fc1, 0, 0),
    (0x88, 0x0000_2810, 0x0000_78ff, 0x000f_0000),
    (0x8c, 0x0040_0043, 0, 0),
    (0x90, 0x1043_0000, 0x0000_00cb, 0),
    (0xa4, 0x10, 0, 0),
    (0xa8, 0, 0x10, 0),
    (0xac, 0x0e, 0, 0),
    (0xb0, 0x3, 0xf, 0),
];

struct Model {
    value: Vec<u8>,
    writable: Vec<u8>,
    clear: Vec<u8>,
}

impl Model {
    fn new() -> Self {
        let fill = |pick: fn(&(usize, u32, u32, u32)) -> u32| {
            let mut bytes = vec![0; 4096];
            for register in MODEL {
                bytes[register.0..register.0 + 4].copy_from_slice(&pick(register).to_le_bytes());
            }
            bytes
        };
        Self {
            value: fill(|r| r.1),
            writable: fill(|r| r.2),
            clear: fill(|r| r.3),
        }
    }

    /// Whether it was taken at all, and whether it initiates a reset.
    fn write(&mut self, offset: usize, bytes: &[u8]) -> Option<bool> {
        if offset + bytes.len() > 4096 {
            return None;
        }
        let (power, mut reset) = (self.value[0x44], false);
        for (at, byte) in (offset..).zip(bytes) {
            for bit in 0..8 {
                let one = byte >> bit & 1 == 1;
                if self.writable[at] >> bit & 1 == 1 {
                    self.value[at] = self.value[at] & !(1 << bit) | u8::from(one) << bit;
                } else if self.clear[at] >> bit & 1 == 1 && one {
                    self.value[at] &= !(1 << bit);
                }
            }
            reset |= at == 0x89 && byte & 0x80 != 0;
        }
        if matches!(self.value[0x44] & 3, 1 | 2) {
            self.value[0x44] = power;
        }
        Some(reset)
    }
}

fn descriptions() -> impl Strategy<Value = DeviceDescription> {
    let bar = prop_oneof![
        Just(None),
        (4..31u32, any::<bool>()).prop_map(|(log2, prefetchable)| Some((BarKind::Memory32, log2, prefetchable))),
        (2..8u32).prop_map(|log2| Some((BarKind::Io, log2, false))),
        (4..36u32, any::<bool>()).prop_map(|(log2, prefetchable)| Some((BarKind::Memory64, log2, prefetchable))),
    ];
    (prop::collection::vec(bar, 6), 0..7u32, any::<bool>()).prop_map(|(bars, msi, msix)| {
        let mut made = description();
        made.bars = [None; 6];
        let mut index = 0;
        for bar in bars {
            let Some((kind, log2, prefetchable)) = bar else { continue };
            let wide = usize::from(kind == BarKind::Memory64);
            if index + wide < 6 {
                let size = 1 << log2;
                made.bars[index] = Some(BarDescription {
                    kind,
                    size,
                    prefetchable,
                });
            }
            index += 1 + wide;
            if index >= 6 {
                break;
            }
        }
        made.constants.clear();
        made.msi_vectors = if msi == 0 { 0 } else { 1 << (msi - 1) };
        if !msix || made.bars[0].is_none_or(|bar| bar.size < 0x4000 || bar.kind == BarKind::Io) {
            made.msix = None;
        }
        made
    })
}

proptest! {
    /// Any range written to any place leaves the space as a bit-by-bit model says, and never panics.
    #[test]
    fn every_write_agrees_with_a_model_of_bytes_and_masks(
        writes in prop::collection::vec((0..4200u16, prop::collection::vec(any::<u8>(), 0..40)), 0..60),
        low in prop::collection::vec((0..0xc0u16, prop::collection::vec(any::<u8>(), 1..5)), 0..60),
    ) {
        let (mut space, mut model) = (space(), Model::new());
        for (offset, bytes) in writes.into_iter().chain(low) {
            let expected = model.write(usize::from(offset), &bytes).map(|reset| match reset {
                true => Written::FunctionLevelReset,
                false => Written::Stored,
            });
            prop_assert_eq!(space.write(offset, &bytes).ok(), expected);
        }
        let mut all = vec![0; 4096];
        space.read(0, &mut all).unwrap();
        prop_assert_eq!(all, model.value);
        prop_assert!(space.read(1, &mut [0; 4096]).is_err());
        prop_assert!(space.read(u16::MAX, &mut [0; 1]).is_err());
    }

    /// A driver that walks the capabilities of any device ends, and finds each once.
    #[test]
    fn the_chain_of_capabilities_ends_for_every_device(description in descriptions()) {
        let space = Space::new(&description).unwrap();
        let mut found = Vec::new();
        let mut at = (read32(&space, 0x34) & 0xff) as u16;
        while at != 0 {
            prop_assert!((0x40..0x100).contains(&at) && at.is_multiple_of(4) && found.len() < 4);
            let header = read32(&space, at);
            found.push(header as u8);
            at = (header >> 8 & 0xff) as u16;
        }
        let mut expected = vec![0x01];
        expected.extend((description.msi_vectors > 0).then_some(0x05));
        expected.extend(description.msix.is_some().then_some(0x11));
        expected.push(0x10);
        prop_assert_eq!(found, expected);
        prop_assert_eq!(read32(&space, 0x100), 0, "the extended space is empty");
    }

    /// All ones, then the size from the lowest writable bit, as every driver does it.
    #[test]
    fn the_size_that_a_driver_computes_is_the_size_of_the_bar(description in descriptions()) {
        let mut space = Space::new(&description).unwrap();
        for (index, bar) in (0u16..).zip(&description.bars) {
            let Some(bar) = bar else { continue };
            let at = 0x10 + index * 4;
            let _ = write32(&mut space, at, u32::MAX);
            let low = read32(&space, at);
            let mut mask = u64::from(low & if bar.kind == BarKind::Io { !3 } else { !15 });
            if bar.kind == BarKind::Memory64 {
                let _ = write32(&mut space, at + 4, u32::MAX);
                mask |= u64::from(read32(&space, at + 4)) << 32;
            }
            prop_assert_eq!(1 << mask.trailing_zeros(), bar.size);
            prop_assert_eq!(low & 1 == 1, bar.kind == BarKind::Io);
            prop_assert_eq!(low & 0b111 == 0b100, bar.kind == BarKind::Memory64);
        }
    }
}
