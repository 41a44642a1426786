//! Fuzzes `session_messages`: what it does with the bytes, with an example, is in tests/src/fuzz_bodies/session_messages.rs.
//!
//! `fuzz/run session_messages 60` runs it for a minute; a crash is left in fuzz/artifacts/session_messages.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| farbus_tests::fuzz_bodies::session_messages(bytes));
