//! The control frames and slots of the RDMA fabric: whatever a peer sends is refused, or sent again as the same bytes.
//!
//! `00 03` is the frame "ready"; `01 0d 01 05 00 00 07 00 00 00 68 65 6c 6c 6f` is a slot of 13 bytes, the message "hello" of a sender that has taken
//! seven.

use farbus_transport::verbs::{frame_again, slot_again};

/// Either a frame, or the length of a slot and its bytes; what is missing at its end is zero.
pub fn verbs_wire(bytes: &[u8]) {
    match bytes {
        [kind, frame @ ..] if kind & 1 == 0 => {
            if let Some(again) = frame_again(frame) {
                assert_eq!(again, frame, "a frame is sent in two ways");
            }
        }
        [_, len, slot @ ..] => {
            let mut whole = [0; 64];
            whole.iter_mut().zip(slot).for_each(|(to, from)| *to = *from);
            if let Some((again, count)) = slot_again(&whole, u32::from(*len)) {
                assert_eq!(count, usize::from(*len), "a slot is sent with another length");
                assert_eq!(again.get(..count), whole.get(..count), "a slot is sent in two ways");
            }
        }
        _ => {}
    }
}
