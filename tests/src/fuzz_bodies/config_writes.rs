//! Configuration space under any sequence of reads, writes and resets: no panic, and what is read-only stays.
//!
//! Three bytes `10 00 04` and `ff ff ff ff` write all ones to BAR0; its size then reads 16 KiB, and its address is a multiple of that.

use farbus_pci_shim::config::Space;
use farbus_pci_shim::{AddressSpace, config::Written};
use farbus_remote_dma::{BarDescription, BarKind, DeviceDescription, MsixLocation, ResetKind};

use super::input::Input;

/// A driver's writes.
pub fn config_writes(bytes: &[u8]) {
    let mut input = Input(bytes);
    let description = description(input.u8().unwrap_or_default());
    let mut space = Space::new(&description).expect("the description is possible");
    let identity = read::<4>(&space, 0);
    while let Some(operation) = input.u8() {
        match operation % 8 {
            0 => space.reset(if operation & 8 == 0 { ResetKind::Function } else { ResetKind::Conventional }),
            1 => space.show_interrupt(operation & 8 == 0),
            2 => space.show_msi_pending(u32::from(operation)),
            3 => space.note_unsupported_request(operation & 8 == 0),
            _ => {
                let (Some(offset), Some(piece)) = (input.u16(), input.piece()) else { break };
                let inside = usize::from(offset) + piece.len() <= 4096;
                match space.write(offset, piece) {
                    Ok(Written::FunctionLevelReset) => space.reset(ResetKind::Function),
                    Ok(Written::Stored) => assert!(inside, "a write past the end was taken"),
                    Err(_) => assert!(!inside || piece.is_empty(), "a write of {} bytes at {offset:#x} was refused", piece.len()),
                }
            }
        }
        check(&space, &description, identity);
    }
}

fn check(space: &Space, description: &DeviceDescription, identity: [u8; 4]) {
    assert_eq!(read::<4>(space, 0), identity, "the device became another");
    let [_, class @ ..] = read::<4>(space, 8);
    assert_eq!(class, [2, 8, 1], "the class changed");
    assert!(read::<2>(space, 0x100) == [0; 2], "an extended capability appeared");
    for (index, bar) in description.bars.iter().enumerate() {
        let bar_index = index as u8;
        match (bar, space.bar_base(bar_index)) {
            (Some(bar), Some(base)) => {
                assert_eq!(base % bar.size, 0, "bar {index} lies at {base:#x}, its size is {:#x}", bar.size);
                let kind = if bar.kind == BarKind::Io { AddressSpace::Io } else { AddressSpace::Memory };
                if let Some(at) = space.decode(kind, base) {
                    assert!(space.decodes(at.bar), "bar {} decodes while it is off", at.bar);
                }
            }
            (None, None) => assert!(!space.decodes(bar_index)),
            (bar, base) => panic!("bar {index} is {bar:?} and lies at {base:?}"),
        }
    }
    let msi = space.msi();
    assert!(msi.vectors <= description.msi_vectors);
    assert!(description.msix.is_some() || !space.msix().enabled);
}

fn read<const N: usize>(space: &Space, offset: u16) -> [u8; N] {
    let mut bytes = [0; N];
    space.read(offset, &mut bytes).expect("it lies inside");
    bytes
}

/// One of eight functions: with or without I/O BAR, MSI and MSI-X.
fn description(choice: u8) -> DeviceDescription {
    let bar = |kind, size| Some(BarDescription { kind, size, prefetchable: kind == BarKind::Memory64 });
    let io = if choice & 1 != 0 { bar(BarKind::Io, 32) } else { None };
    let msix = MsixLocation { vectors: 65, table_bar: 0, table_offset: 0x2000, pba_bar: 0, pba_offset: 0x3000 };
    DeviceDescription {
        name: "fuzzed".into(),
        vendor_id: 0x1b36,
        device_id: 0x0010,
        subsystem_vendor_id: 0,
        subsystem_id: 0,
        revision: 1,
        class_code: 0x01_0802,
        bars: [bar(BarKind::Memory64, 16 << 10), None, bar(BarKind::Memory32, 4096), io, bar(BarKind::Memory64, 1 << 33), None],
        pin: choice & 8 != 0,
        msi_vectors: if choice & 2 != 0 { 8 } else { 0 },
        msix: (choice & 4 != 0).then_some(msix),
        dma_bits: 64,
        constants: vec![],
        serial: String::new(),
    }
}
