//! Fuzzes `bank_layers`: what it does with the bytes, with an example, is in tests/src/fuzz_bodies/bank_layers.rs.
//!
//! `fuzz/run bank_layers 60` runs it for a minute; a crash is left in fuzz/artifacts/bank_layers.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| farbus_tests::fuzz_bodies::bank_layers(bytes));
