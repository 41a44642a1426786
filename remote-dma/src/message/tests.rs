//! Every message survives its way, and nothing that is no message does.
//!
//! `Store { ticket: 20, slot: 4, … }` encodes to 19 bytes, comes back as it was, and is refused with one byte less or one more.

use super::*;
use proptest::prelude::*;

#[test]
fn the_store_of_the_header_is_these_bytes() {
    let store = ToLender::BarWrite { at: BarAddress { bar: 0, offset: 0x1018 }, width: Width::B4, value: 17 };
    let mut expected = vec![1, 0, 4, 0x18, 0x10, 0, 0, 0, 0, 0, 0];
    expected.extend([17, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(store.encode().as_slice(), expected);
}

fn grant() -> impl Strategy<Value = Grant> {
    (any::<u64>(), any::<u64>(), 0..4u8).prop_map(|(key, len, bits)| Grant { key, len, access: Access::from_bits(bits).unwrap() })
}

fn place() -> impl Strategy<Value = (BarAddress, Width)> {
    (any::<u8>(), any::<u64>(), 0..4u32)
        .prop_map(|(bar, offset, w)| (BarAddress { bar, offset }, Width::from_bytes(1 << w).unwrap()))
}

fn to_lender() -> impl Strategy<Value = ToLender> {
    prop_oneof![
        (place(), any::<u64>()).prop_map(|((at, width), value)| ToLender::BarWrite { at, width, value }),
        (place(), any::<u32>()).prop_map(|((at, width), sequence)| ToLender::BarRead { at, width, sequence }),
        (any::<u32>(), grant(), grant(), any::<bool>()).prop_map(|(sequence, memory, dirty, proven)| ToLender::Offer {
            sequence,
            memory,
            dirty,
            proven
        }),
        (any::<u32>(), any::<u64>(), any::<u64>(), any::<Option<u64>>(), any::<u64>(), 0..4u8).prop_map(
            |(sequence, iova, len, memory, offset, bits)| ToLender::Map {
                sequence,
                iova: Iova(iova),
                len,
                memory,
                offset,
                access: Access::from_bits(bits).unwrap()
            }
        ),
        (any::<u32>(), any::<u64>(), any::<u64>()).prop_map(|(sequence, iova, len)| ToLender::Unmap {
            sequence,
            iova: Iova(iova),
            len
        }),
        (any::<u32>(), any::<u64>()).prop_map(|(sequence, key)| ToLender::Withdraw { sequence, key }),
        any::<u64>().prop_map(|key| ToLender::Prove { key }),
        Just(ToLender::InterruptMode(InterruptMode::Pin)),
        Just(ToLender::InterruptMode(InterruptMode::Msix)),
        (0..6u32).prop_map(|n| ToLender::InterruptMode(InterruptMode::Msi(1 << n))),
        any::<bool>().prop_map(ToLender::BusMaster),
        any::<u32>().prop_map(|sequence| ToLender::Reset { sequence, kind: ResetKind::Function }),
        any::<u32>().prop_map(|sequence| ToLender::Reset { sequence, kind: ResetKind::Conventional }),
        any::<u32>().prop_map(|sequence| ToLender::Fence { sequence }),
        (any::<u32>(), any::<bool>()).prop_map(|(ticket, ok)| ToLender::Fetched { ticket: Ticket(ticket), ok }),
        (any::<u32>(), any::<bool>()).prop_map(|(ticket, ok)| ToLender::Stored { ticket: Ticket(ticket), ok }),
        grant().prop_map(ToLender::Staging),
        any::<u32>().prop_map(|ticket| ToLender::Taken { ticket: Ticket(ticket) }),
        (any::<u32>(), any::<[u8; 16]>()).prop_map(|(sequence, token)| ToLender::Pause { sequence, token: RestToken(token) }),
        Just(ToLender::Resume),
        (any::<u32>(), any::<u32>()).prop_map(|(sequence, lease_ms)| ToLender::Keep { sequence, lease_ms }),
    ]
}

fn to_borrower() -> impl Strategy<Value = ToBorrower> {
    prop_oneof![
        (any::<u32>(), any::<u64>()).prop_map(|(sequence, value)| ToBorrower::BarValue { sequence, value }),
        (any::<u32>(), 0..OUTCOMES.len()).prop_map(|(sequence, code)| ToBorrower::Ack { sequence, outcome: OUTCOMES[code] }),
        any::<u16>().prop_map(|vector| ToBorrower::Interrupt { vector }),
        any::<bool>().prop_map(|asserted| ToBorrower::Pin { asserted }),
        (any::<u64>(), 0..=MAX_POLLED_WRITE as u8, any::<[u8; MAX_POLLED_WRITE]>()).prop_map(|(iova, len, mut bytes)| {
            bytes[usize::from(len)..].fill(0);
            ToBorrower::StorePolled { iova: Iova(iova), len, bytes }
        }),
        (any::<u64>(), any::<u64>()).prop_map(|(iova, len)| ToBorrower::Dirty { iova: Iova(iova), len }),
        (any::<u32>(), any::<u64>(), any::<u32>()).prop_map(|(ticket, iova, len)| ToBorrower::Fetch {
            ticket: Ticket(ticket),
            iova: Iova(iova),
            len
        }),
        (any::<u32>(), any::<u8>(), any::<u64>(), any::<u32>(), any::<bool>()).prop_map(|(ticket, slot, iova, len, polled)| {
            ToBorrower::Store { ticket: Ticket(ticket), slot, iova: Iova(iova), len, polled }
        }),
        grant().prop_map(ToBorrower::Staging),
        (any::<u32>(), any::<Option<(u64, u64, u64)>>()).prop_map(|(sequence, mark)| {
            let mark = mark.map(|(life, begun, acknowledged)| Mark { life, begun, acknowledged });
            ToBorrower::Rested { sequence, mark }
        }),
    ]
}

proptest! {
    #[test]
    fn every_message_comes_back_as_sent_and_no_cut_one_does(a in to_lender(), b in to_borrower()) {
        let bytes = a.encode();
        prop_assert_eq!(ToLender::parse(bytes.as_slice()), Ok((a, &[][..])));
        prop_assert_eq!(ToLender::parse(&bytes.as_slice()[..bytes.as_slice().len() - 1]), Err(MessageError::Length));
        let bytes = b.encode();
        prop_assert_eq!(ToBorrower::parse(bytes.as_slice()), Ok((b, &[][..])));
        // What follows is the next message, untouched.
        let two = [bytes.as_slice(), &[0, 7]].concat();
        prop_assert_eq!(ToBorrower::parse(&two), Ok((b, &[0, 7][..])));
        prop_assert_eq!(ToBorrower::parse(&bytes.as_slice()[..bytes.as_slice().len() - 1]), Err(MessageError::Length));
    }

    #[test]
    fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
        // Whatever parses encodes to the same bytes: nothing is read loosely.
        if let Ok((message, rest)) = ToLender::parse(&bytes)
            && !matches!(message, ToLender::Map { memory: None, .. })
        {
            let encoded = message.encode();
            prop_assert_eq!(encoded.as_slice(), &bytes[..bytes.len() - rest.len()]);
        }
        if let Ok((message, rest)) = ToBorrower::parse(&bytes) {
            let encoded = message.encode();
            prop_assert_eq!(encoded.as_slice(), &bytes[..bytes.len() - rest.len()]);
        }
    }
}
