//! Fuzzes `prp_lists`: what it does with the bytes, with an example, is in tests/src/fuzz_bodies/prp_lists.rs.
//!
//! `fuzz/run prp_lists 60` runs it for a minute; a crash is left in fuzz/artifacts/prp_lists.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| farbus_tests::fuzz_bodies::prp_lists(bytes));
