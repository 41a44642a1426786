//! Fuzzes `config_writes`: what it does with the bytes, with an example, is in tests/src/fuzz_bodies/config_writes.rs.
//!
//! `fuzz/run config_writes 60` runs it for a minute; a crash is left in fuzz/artifacts/config_writes.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| farbus_tests::fuzz_bodies::config_writes(bytes));
