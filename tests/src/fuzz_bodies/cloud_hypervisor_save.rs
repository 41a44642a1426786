//! What a Cloud Hypervisor, or anybody at its socket, says when it hands a machine over: without the descriptors of its memory it is refused, whatever it says.
//!
//! Bytes `01 00 …` are `Start`, which is taken, and then the end of the connection, which is not. Anything as a configuration has slots that make sense, or none.

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use farbus_machine_bank::cloud_hypervisor::{SaveError, save, slots};
use farbus_machine_bank::store::MemoryStore;
use farbus_machine_bank::{Bank, DepositOptions, PAGE};

/// A configuration, and a conversation.
pub fn cloud_hypervisor_save(bytes: &[u8]) {
    if let Ok(slots) = slots(bytes) {
        assert!(!slots.is_empty());
        for (at, slot) in slots.iter().enumerate() {
            assert!(slot.size > 0 && (slot.size | slot.gpa | slot.file_offset).is_multiple_of(PAGE as u64));
            let end = slot.gpa.checked_add(slot.size).expect("it ends in the guest");
            assert!(
                slots[..at].iter().all(|other| other.slot != slot.slot && (other.gpa >= end || other.gpa + other.size <= slot.gpa))
            );
        }
    }
    let bank = Bank::init(Box::new(MemoryStore::new()), None).expect("memory can be written");
    let (ours, mut theirs) = UnixStream::pair().expect("the host has sockets");
    // A pair's buffer holds more than an input has, and as many answers.
    theirs.write_all(&bytes[..bytes.len().min(64 << 10)]).expect("the other end is there");
    theirs.shutdown(Shutdown::Write).expect("it was open");
    let ended = save(&bank, "vm", &DepositOptions::default(), &[], ours, &|_, _| {});
    assert!(matches!(ended, Err(SaveError::Refused(_))), "{ended:?}");
    assert!(bank.listing().expect("memory can be listed").0.is_empty());
}
