//! Fuzzes `function_state`: what it does with the bytes, with an example, is in tests/src/fuzz_bodies/function_state.rs.
//!
//! `fuzz/run function_state 60` runs it for a minute; a crash is left in fuzz/artifacts/function_state.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| farbus_tests::fuzz_bodies::function_state(bytes));
