//! The format of a saved function: what was written once is read for ever, and what is altered, cut off, too new or no state at all is refused with a reason.
//!
//! `pci-shim/golden/function-1.state` was written by version 1; a change of the format that cannot read it is a mistake, and needs a version 2 beside it.

use farbus_remote_dma::device::MsixLocation;
use proptest::prelude::*;

use super::*;
use crate::profile::Profile;
use crate::profile::nvme::Nvme;
use crate::scripted::description;

const GOLDEN: &[u8] = include_bytes!("../../golden/function-1.state");

/// What the golden file says.
fn sample() -> FunctionState {
    let mut config = Box::new([0; CONFIG_BYTES]);
    for (at, byte) in config.iter_mut().enumerate().take(256) {
        *byte = at as u8;
    }
    let vector = |at: u32| VectorState {
        address: 0xfee0_0000 + u64::from(at) * 0x1000,
        data: 0x4000 + at,
        masked: at % 2 == 1,
        pending: at == 3,
    };
    let mut device = description();
    device.serial = "FB000000000000002A".into();
    device.msix = Some(MsixLocation { vectors: 5, table_bar: 0, table_offset: 0x2000, pba_bar: 0, pba_offset: 0x3000 });
    FunctionState {
        device: DeviceIdentity::of(&device),
        rest: Rest { token: RestToken(*b"a token of 16 by"), mark: Some(Mark { life: 7, begun: 1317, acknowledged: 1315 }) },
        saved_ms: 1_795_000_000_001,
        config,
        interrupts: InterruptState {
            owner: InterruptOwner::Function,
            client_mode: InterruptMode::Msi(4),
            pin: true,
            msi_pending: 0x8000_0001,
            msix: (0..5).map(vector).collect(),
        },
        windows: vec![
            WindowState { iova: 0, len: 0xc000_0000, access: Access::READ_WRITE, mapped: true },
            WindowState { iova: 0x1_0000_0000, len: 0x4000_0000, access: Access::READ, mapped: false },
        ],
        profile: ProfileState { kind: 1, bytes: nvme_bytes() },
    }
}

/// A controller with one queue pair, part of the way through it, by the table at the top of `profile/nvme/saved.rs`.
fn nvme_bytes() -> Vec<u8> {
    let mut out = Output::default();
    out.u16(1);
    let mut written = [0; 0x38];
    written[0x14..0x18].copy_from_slice(&0x0046_0001u32.to_le_bytes());
    written[0x24..0x28].copy_from_slice(&0x001f_001fu32.to_le_bytes());
    written[0x28..0x30].copy_from_slice(&0x1000u64.to_le_bytes());
    written[0x30..0x38].copy_from_slice(&0x2000u64.to_le_bytes());
    out.bytes(&written);
    out.u32(0b10);
    out.bytes(&[0xff, 7, 1, 30, 0x20, 0, 0, 0, 0, 4, 1, 0]);
    out.bytes(&[1; 12]);
    out.u8(1);
    out.text("");
    out.u16(2);
    for (id, base, entries, completions, head, tail) in [(0, 0x1000, 32, 0, 7, 7), (1, 0x4000, 64, 1, 21, 25)] {
        out.u16(id);
        out.u64(base);
        out.u32(entries);
        out.u16(completions);
        out.u32(head);
        out.u32(tail);
    }
    out.u16(2);
    for (id, base, entries, vector, head, tail, round, outstanding) in
        [(0, 0x2000, 32, 0, 5, 5, 0, 2), (1, 0x5000, 64, 0xffff, 9, 12, 1, u32::MAX)]
    {
        out.u16(id);
        out.u64(base);
        out.u32(entries);
        out.u16(vector);
        out.u32(head);
        out.u8(1);
        out.u32(tail);
        out.u8(1);
        out.u8(round);
        out.u32(outstanding);
    }
    out.u16(1);
    out.bytes(&[9; 64]);
    out.u16(2);
    out.bytes(&[0x0c; 128]);
    out.0
}

#[test]
fn a_state_of_version_1_is_read_for_ever() {
    let golden = FunctionState::parse(GOLDEN).unwrap();
    assert_eq!(golden, sample());
    assert_eq!(golden.encode(), GOLDEN, "the same function is now written otherwise: that is another version");
    let mut profile = Nvme::new(&description());
    profile.load(&golden.profile).unwrap();
}

#[test]
fn what_the_nvme_profile_was_loaded_with_is_what_it_saves() {
    struct Blind;
    impl crate::profile::Peek for Blind {
        fn peek(&self, _: farbus_remote_dma::Iova, _: &mut [u8]) -> bool {
            false
        }
    }
    let mut profile = Nvme::new(&description());
    profile.load(&sample().profile).unwrap();
    assert_eq!(profile.save(&Blind), sample().profile);
}

#[test]
fn a_newer_version_is_refused_and_says_so() {
    let mut newer = GOLDEN.to_vec();
    newer[8] = 2;
    assert_eq!(FunctionState::parse(&newer), Err(StateError::Version { found: 2 }));
}

#[test]
fn every_cut_and_every_flipped_bit_is_refused() {
    for len in 0..GOLDEN.len() {
        let refused = FunctionState::parse(&GOLDEN[..len]).unwrap_err();
        assert!(
            matches!(refused, StateError::Truncated | StateError::Malformed(_) | StateError::Altered),
            "{len} bytes: {refused}"
        );
    }
    let mut altered = GOLDEN.to_vec();
    for at in 0..altered.len() {
        for bit in 0..8 {
            altered[at] ^= 1 << bit;
            assert!(FunctionState::parse(&altered).is_err(), "bit {bit} of byte {at}");
            altered[at] ^= 1 << bit;
        }
    }
    let flipped = GOLDEN.len() - 40;
    altered[flipped] ^= 1;
    assert_eq!(FunctionState::parse(&altered), Err(StateError::Altered));
    assert!(matches!(FunctionState::parse(b"FBBANK1\nanything"), Err(StateError::Magic { .. })));
    assert_eq!(FunctionState::parse(&vec![0; MOST_BYTES + 1]), Err(StateError::TooLong(MOST_BYTES + 1)));
}

/// With its checksum made good, so that what lies behind it is looked at.
fn sealed(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some((body, hash)) = bytes.split_last_chunk_mut::<HASH_BYTES>() {
        hash.copy_from_slice(blake3::hash(body).as_bytes());
    }
    bytes
}

proptest! {
    #[test]
    fn whatever_is_sealed_parses_to_what_encodes_to_the_same_or_is_refused(
        at in 0..GOLDEN.len() - HASH_BYTES,
        with in prop::collection::vec(any::<u8>(), 1..12),
    ) {
        let mut bytes = GOLDEN.to_vec();
        for (place, byte) in bytes.iter_mut().skip(at).zip(with) {
            *place = byte;
        }
        let bytes = sealed(bytes);
        if let Ok(state) = FunctionState::parse(&bytes) {
            // Only what says nothing may differ: the fields of a BAR or of vectors that are not there.
            let again = state.encode();
            prop_assert_eq!(FunctionState::parse(&again), Ok(state.clone()));
            let mut profile = Nvme::new(&description());
            // Refused or taken; never a panic.
            let _taken = profile.load(&state.profile);
        }
    }
}
