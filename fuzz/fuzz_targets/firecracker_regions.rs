//! Fuzzes `firecracker_regions`: what it does with the bytes, with an example, is in tests/src/fuzz_bodies/firecracker_regions.rs.
//!
//! `fuzz/run firecracker_regions 60` runs it for a minute; a crash is left in fuzz/artifacts/firecracker_regions.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| farbus_tests::fuzz_bodies::firecracker_regions(bytes));
