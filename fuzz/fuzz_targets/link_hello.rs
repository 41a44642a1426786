//! Fuzzes `link_hello`: what it does with the bytes, with an example, is in tests/src/fuzz_bodies/link_hello.rs.
//!
//! `fuzz/run link_hello 60` runs it for a minute; a crash is left in fuzz/artifacts/link_hello.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| farbus_tests::fuzz_bodies::link_hello(bytes));
