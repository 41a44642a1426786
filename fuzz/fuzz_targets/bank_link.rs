//! Fuzzes `bank_link`: what it does with the bytes, with an example, is in tests/src/fuzz_bodies/bank_link.rs.
//!
//! `fuzz/run bank_link 60` runs it for a minute; a crash is left in fuzz/artifacts/bank_link.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| farbus_tests::fuzz_bodies::bank_link(bytes));
