//! Images that somebody changes while they are lent: the guest hears of it by a status, and the controller lives on.
//!
//! A file on tmpfs is cut to half its length; a read behind that ends as an unrecovered read error (status code type 2, code 0x81).

mod nvme_support;

use std::path::Path;
use std::time::{Duration, Instant};

use farbus_remote_dma::Backend;
use farbus_remote_dma::model::{Nvme, NvmeOptions};
use nvme_support::bus::TestBus;
use nvme_support::driver::{Driver, Sqe};

const LEN: u64 = 8 << 20;

fn read(driver: &mut Driver, page: u64, block: u64) -> u16 {
    driver.put(1, &Sqe { prp1: page, ..Sqe::io(2, block, 8) });
    driver.ring(1);
    let start = Instant::now();
    loop {
        driver.nvme.poll(&mut driver.bus);
        if let Some(entry) = driver.take(1) {
            driver.ring_completion(1);
            return entry.status;
        }
        assert!(start.elapsed() < Duration::from_secs(10), "a read never ends");
    }
}

#[test]
fn a_file_that_becomes_shorter_while_it_is_lent_fails_reads_and_takes_nobody_with_it() {
    // In memory, where a mapping would end the process, and on whatever is under the package.
    for folder in [Path::new("/dev/shm"), Path::new(env!("CARGO_MANIFEST_DIR"))] {
        let Ok(file) = tempfile::NamedTempFile::new_in(folder) else { continue };
        std::fs::write(file.path(), vec![5; LEN as usize]).unwrap();
        let nvme = Nvme::open(file.path(), NvmeOptions::default()).unwrap();
        let mut driver = Driver::ready(nvme, TestBus::new(32 << 20), 1, 64);
        let page = driver.pages(1);
        let last = LEN / 512 - 8;
        assert_eq!(read(&mut driver, page, last), 0);
        file.as_file().set_len(LEN / 2).unwrap();
        assert_eq!(read(&mut driver, page, last), 0x281, "{}", folder.display());
        assert_eq!(read(&mut driver, page, LEN / 1024 - 8), 0, "what is left can be read");
        file.as_file().set_len(LEN).unwrap();
        assert_eq!(read(&mut driver, page, last), 0, "and what is there again");
        let mut byte = [9];
        driver.bus.guest.read(page, &mut byte).unwrap();
        assert_eq!(byte, [0]);
    }
}
