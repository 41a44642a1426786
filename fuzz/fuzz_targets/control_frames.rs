//! Fuzzes `control_frames`: what it does with the bytes, with an example, is in tests/src/fuzz_bodies/control_frames.rs.
//!
//! `fuzz/run control_frames 60` runs it for a minute; a crash is left in fuzz/artifacts/control_frames.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| farbus_tests::fuzz_bodies::control_frames(bytes));
