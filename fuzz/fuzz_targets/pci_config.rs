//! Fuzzes `pci_config`: what it does with the bytes, with an example, is in tests/src/fuzz_bodies/pci_config.rs.
//!
//! `fuzz/run pci_config 60` runs it for a minute; a crash is left in fuzz/artifacts/pci_config.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| farbus_tests::fuzz_bodies::pci_config(bytes));
