//! Fuzzes `verbs_wire`: what it does with the bytes, with an example, is in tests/src/fuzz_bodies/verbs_wire.rs.
//!
//! `fuzz/run verbs_wire 60` runs it for a minute; a crash is left in fuzz/artifacts/verbs_wire.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| farbus_tests::fuzz_bodies::verbs_wire(bytes));
