//! Fuzzes `bank_store`: what it does with the bytes, with an example, is in tests/src/fuzz_bodies/bank_store.rs.
//!
//! `fuzz/run bank_store 60` runs it for a minute; a crash is left in fuzz/artifacts/bank_store.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| farbus_tests::fuzz_bodies::bank_store(bytes));
