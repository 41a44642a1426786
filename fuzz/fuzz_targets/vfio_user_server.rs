//! Fuzzes `vfio_user_server`: what it does with the bytes, with an example, is in tests/src/fuzz_bodies/vfio_user_server.rs.
//!
//! `fuzz/run vfio_user_server 60` runs it for a minute; a crash is left in fuzz/artifacts/vfio_user_server.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| farbus_tests::fuzz_bodies::vfio_user_server(bytes));
