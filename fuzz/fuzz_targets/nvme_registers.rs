//! Fuzzes `nvme_registers`: what it does with the bytes, with an example, is in tests/src/fuzz_bodies/nvme_registers.rs.
//!
//! `fuzz/run nvme_registers 60` runs it for a minute; a crash is left in fuzz/artifacts/nvme_registers.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| farbus_tests::fuzz_bodies::nvme_registers(bytes));
