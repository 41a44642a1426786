//! Fuzzes `cloud_hypervisor_save`: what it does with the bytes, with an example, is in tests/src/fuzz_bodies/cloud_hypervisor_save.rs.
//!
//! `fuzz/run cloud_hypervisor_save 60` runs it for a minute; a crash is left in fuzz/artifacts/cloud_hypervisor_save.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| farbus_tests::fuzz_bodies::cloud_hypervisor_save(bytes));
