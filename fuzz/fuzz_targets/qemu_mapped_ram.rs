//! Fuzzes `qemu_mapped_ram`: what it does with the bytes, with an example, is in tests/src/fuzz_bodies/qemu_mapped_ram.rs.
//!
//! `fuzz/run qemu_mapped_ram 60` runs it for a minute; a crash is left in fuzz/artifacts/qemu_mapped_ram.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| farbus_tests::fuzz_bodies::qemu_mapped_ram(bytes));
