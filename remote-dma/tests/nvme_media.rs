//! Images that somebody changes while they are lent: the guest hears of it by a status, and the controller lives on.
//!
//! A file on tmpfs is cut to half its length; the next access ends as an unrecovered read error (status code type 2, code 0x81) or a write fault, and so
//! does every later one.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

mod nvme_support;

use std::path::Path;
use std::time::{Duration, Instant};

use farbus_remote_dma::Backend;
use farbus_remote_dma::model::{Nvme, NvmeOptions};
use nvme_support::bus::TestBus;
use nvme_support::driver::{Driver, Sqe};
use tempfile::NamedTempFile;

const LEN: u64 = 8 << 20;

const FLUSH: u8 = 0;
const WRITE: u8 = 1;
const READ: u8 = 2;

/// The status of a command of 8 blocks.
fn status(driver: &mut Driver, opcode: u8, page: u64, block: u64) -> u16 {
    driver.put(1, &Sqe { prp1: page, ..Sqe::io(opcode, block, 8) });
    driver.ring(1);
    let start = Instant::now();
    loop {
        driver.nvme.poll(&mut driver.bus);
        if let Some(entry) = driver.take(1) {
            driver.ring_completion(1);
            return entry.status;
        }
        assert!(start.elapsed() < Duration::from_secs(10), "a command never ends");
    }
}

/// In memory, where a mapping would end the process, and on whatever is under the package.
fn images() -> impl Iterator<Item = (NamedTempFile, Driver, u64)> {
    let folders = [Path::new("/dev/shm"), Path::new(env!("CARGO_MANIFEST_DIR"))];
    folders.into_iter().filter_map(|folder| {
        let Ok(file) = NamedTempFile::new_in(folder) else {
            eprintln!("not run: no file can be made in {}", folder.display());
            return None;
        };
        std::fs::write(file.path(), vec![5; LEN as usize]).unwrap();
        let nvme = Nvme::open(file.path(), NvmeOptions::default()).unwrap();
        let mut driver = Driver::ready(nvme, TestBus::new(32 << 20), 1, 64);
        let page = driver.pages(1);
        Some((file, driver, page))
    })
}

#[test]
fn a_file_that_becomes_shorter_while_it_is_lent_fails_every_access_and_takes_nobody_with_it() {
    for (file, mut driver, page) in images() {
        let last = LEN / 512 - 8;
        assert_eq!(status(&mut driver, READ, page, last), 0);
        file.as_file().set_len(LEN / 2).unwrap();
        assert_eq!(status(&mut driver, READ, page, last), 0x281);
        // Longer again, and not the same: what was lost must not be read as zeros.
        file.as_file().set_len(LEN).unwrap();
        assert_eq!(status(&mut driver, READ, page, last), 0x281);
        assert_ne!(status(&mut driver, WRITE, page, 0), 0);
        assert_ne!(status(&mut driver, FLUSH, page, 0), 0);
    }
}

#[test]
fn a_write_does_not_let_a_shortened_file_grow_again() {
    for (file, mut driver, page) in images() {
        file.as_file().set_len(0).unwrap();
        assert_ne!(status(&mut driver, WRITE, page, LEN / 1024), 0);
        assert_eq!(file.as_file().metadata().unwrap().len(), 0);
        assert_eq!(status(&mut driver, READ, page, 0), 0x281);
    }
}

#[test]
fn what_was_written_to_a_file_that_is_shortened_afterwards_is_not_called_durable() {
    for (file, mut driver, page) in images() {
        assert_eq!(status(&mut driver, WRITE, page, 0), 0);
        file.as_file().set_len(LEN / 2).unwrap();
        assert_ne!(status(&mut driver, FLUSH, page, 0), 0);
    }
}
