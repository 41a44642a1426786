//! What a fault costs that the local cache answers, beside a handler that does nothing but copy 64 KiB, in the same run on the same bytes.
//!
//! One page of each of 256 groups is read from memory where nothing is: 45 us each by the bare handler, 48 us by ours, 15 us where the pages are mapped
//! from the shared cache. Every hash was made when the cache was filled. And how many faults of a second withdrawal a recorded working set removes.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use farbus_machine_bank::lazy::{Area, Backing, Cache, Event, FaultServer, Features, LazyMachine, LazyOptions, Uffd, Watch};
use farbus_machine_bank::store::{Directory, MemoryStore};
use farbus_machine_bank::{Bank, Changes, DepositOptions, PAGE, SectionKind};
use farbus_transport::Memory;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use super::bank_vm::Guest;
use crate::measure::{Latencies, Series as Figures};
use crate::report::{Row, Target};

const GROUP: u64 = 64 << 10;
const GROUPS: u64 = 256;
const LEN: u64 = GROUPS * GROUP;
const BARE: &str = "a bare UFFDIO_COPY handler";
/// The longest wait for anything that is fetched ahead.
const SOON: Duration = Duration::from_secs(60);

/// The rows, from so many rounds.
pub fn rows(rounds: usize) -> Vec<Row> {
    let (copy, map) = ("fault service, 64 KiB in the local cache", "fault service, 64 KiB mapped from the shared cache");
    let (copy_target, map_target) = (Target::AtMost(1.5), Target::AtMost(0.5));
    let mut rows = match services(rounds) {
        Ok(Services { bare, copy: copied, map: mapped }) => {
            let row = |case, figures: Vec<f64>, target| {
                let ratios = Figures::new(figures.iter().zip(&bare).map(|(ours, theirs)| ours / theirs).collect());
                Row::judged(case, "us", (&Figures::new(figures), BARE, &Figures::new(bare.clone())), &ratios, target)
            };
            vec![row(copy, copied, copy_target), row(map, mapped, map_target)]
        }
        Err(error) => {
            let why = format!("{error:#}");
            vec![Row::missing(copy, "us", BARE, copy_target, why.clone()), Row::missing(map, "us", BARE, map_target, why)]
        }
    };
    let (left, target) = ("second lazy withdrawal, faults that a working set leaves", Target::ValueAtMost(5.0));
    rows.push(match faults_left() {
        Ok(part) => Row::exact(left, "%", part, "without it", target),
        Err(error) => Row::missing(left, "%", "without it", target, format!("{error:#}")),
    });
    rows
}

/// Pages that a first instruction needs: its own, those of the page tables that lead there, stack and descriptor tables.
const FIRST: u64 = 8;

/// A machine that comes lazily out of the bank at `store`, with a cache that is empty.
fn withdraw(store: &Path, machine: &str) -> Result<(LazyMachine, FaultServer)> {
    let bank = Arc::new(Bank::open(Box::new(Directory::open(store)?), None)?);
    let server = FaultServer::start(Cache::new(1 << 30))?;
    let lazy = server.withdraw(&bank, &bank.find(machine)?, Backing::Anonymous, LazyOptions::default())?;
    Ok((lazy, server))
}

/// Seconds from nothing until 8 pages of the machine, each of another group and none of them zero, are read.
///
/// # Errors
/// There is no userfaultfd, or a page is not what it was.
pub fn pages(store: &Path, machine: &str, image: &Path) -> Result<f64> {
    let wanted = first_pages(image)?;
    let start = Instant::now();
    let (lazy, _server) = withdraw(store, machine)?;
    let memory = lazy.memory().context("the memory is elsewhere")?;
    let mut pages = [[0; PAGE]; FIRST as usize];
    for (page, (at, _)) in pages.iter_mut().zip(&wanted) {
        memory.read(*at, page)?;
    }
    let seconds = start.elapsed().as_secs_f64();
    ensure!(pages.iter().zip(&wanted).all(|(page, (_, right))| page == right), "a page is not what it was");
    Ok(seconds)
}

/// Seconds from nothing until a machine runs on that memory, and its guest has used as many pages.
///
/// # Errors
/// There is no userfaultfd or no KVM, or the guest found something else.
pub fn guest(store: &Path, machine: &str, guest: Guest) -> Result<f64> {
    let start = Instant::now();
    let (lazy, _server) = withdraw(store, machine)?;
    guest.run(lazy.memory().context("the memory is elsewhere")?)?;
    let seconds = start.elapsed().as_secs_f64();
    let report = lazy.report();
    ensure!(report.faults >= FIRST && report.poisoned == 0, "the memory did not come by faults: {report:?}");
    Ok(seconds)
}

/// Eight pages that are not zero, each of another group and spread as widely as the image allows, with what they hold.
///
/// # Errors
/// So many groups are not there.
pub(super) fn first_pages(image: &Path) -> Result<Vec<(u64, [u8; PAGE])>> {
    let file = File::open(image)?;
    let groups = file.metadata()?.len() / GROUP;
    let (mut bytes, mut filled) = (vec![0; GROUP as usize], Vec::new());
    for group in 0..groups {
        file.read_exact_at(&mut bytes, group * GROUP)?;
        let pages = bytes.as_chunks::<PAGE>().0;
        if let Some(page) = pages.iter().position(|page| *page != [0; PAGE]) {
            filled.push((group, group * GROUP + (page * PAGE) as u64, pages[page]));
        }
    }
    ensure!(
        filled.len() as u64 >= FIRST,
        "the image has {} groups of 64 KiB that are not zero, and {FIRST} are needed",
        filled.len()
    );
    let mut found = Vec::new();
    for n in 0..FIRST {
        let wish = n * (groups - 1) / (FIRST - 1);
        let nearest = filled.iter().enumerate().min_by_key(|(_, (group, ..))| group.abs_diff(wish)).map(|(at, _)| at);
        let (_, at, page) = filled.remove(nearest.context("a group too few")?);
        found.push((at, page));
    }
    Ok(found)
}

/// Medians of each round, in microseconds.
struct Services {
    bare: Vec<f64>,
    copy: Vec<f64>,
    map: Vec<f64>,
}

fn services(rounds: usize) -> Result<Services> {
    let (bank, bytes) = machine()?;
    let server = FaultServer::start(Cache::new(2 * LEN))?;
    let entry = bank.find("vm")?;
    let begin = |backing, rest| server.withdraw(&bank, &entry, backing, LazyOptions { rest, ..LazyOptions::default() });
    // Fills the cache, and with that makes every hash.
    let warm = begin(Backing::Anonymous, true)?;
    ensure!(warm.wait_whole(SOON), "the cache was not filled");
    let mut services = Services { bare: vec![], copy: vec![], map: vec![] };
    for _ in 0..rounds {
        services.bare.push(bare(&bytes)?);
        services.copy.push(ours(&begin(Backing::Anonymous, false)?, &bytes)?);
        services.map.push(ours(&begin(Backing::View, false)?, &bytes)?);
    }
    Ok(services)
}

/// 16 MiB of which no page is another, in a bank.
fn machine() -> Result<(Arc<Bank>, Vec<u8>)> {
    let words = (0..LEN / 8).flat_map(|word| (word / 4).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
    let bytes: Vec<u8> = words.collect();
    let bank = Bank::init(Box::new(MemoryStore::new()), None)?;
    let mut deposit = bank.deposit("vm", &DepositOptions::default())?;
    deposit.section(SectionKind::Memory, "memory", &&bytes[..], Changes::HashAll, &|_| {})?;
    deposit.commit()?;
    Ok((Arc::new(bank), bytes))
}

fn ours(machine: &LazyMachine, bytes: &[u8]) -> Result<f64> {
    let median = touch(machine.memory().context("the memory is elsewhere")?, bytes)?;
    let report = machine.report();
    ensure!(report.hits == GROUPS && report.faults == GROUPS, "not all faults were answered from the cache: {report:?}");
    Ok(median)
}

/// Reads one page of each group, and holds it against what it should be; the median in microseconds.
fn touch(memory: &Memory, bytes: &[u8]) -> Result<f64> {
    let (mut latencies, mut page) = (Latencies::new(), [0; PAGE]);
    for n in 0..GROUPS {
        // In no order, as guests do.
        let at = n * 101 % GROUPS * GROUP + n % 16 * PAGE as u64;
        let start = Instant::now();
        memory.read(at, &mut page)?;
        latencies.record_ns(start.elapsed().as_nanos() as u64);
        ensure!(bytes[at as usize..][..PAGE] == page, "the bytes at {at} are wrong");
    }
    Ok(latencies.p50_ns() as f64 / 1000.0)
}

/// What a handler takes that knows where the bytes are and asks nothing.
fn bare(bytes: &[u8]) -> Result<f64> {
    let uffd = Uffd::new(Features(0))?;
    let area = Area::anonymous(LEN)?;
    area.watch(&uffd, Watch::MISSING)?;
    let end = eventfd(0, EventfdFlags::CLOEXEC)?;
    std::thread::scope(|scope| {
        let handler = scope.spawn(|| -> Result<()> {
            loop {
                let (faults, over) = (uffd.as_fd(), end.as_fd());
                let mut fds = [PollFd::new(&faults, PollFlags::IN), PollFd::new(&over, PollFlags::IN)];
                poll(&mut fds, None)?;
                if !fds[1].revents().is_empty() {
                    return Ok(());
                }
                while let Some(event) = uffd.event()? {
                    let Event::Fault { address } = event else { bail!("an unexpected event: {event:?}") };
                    let offset = (address - area.address()) / GROUP * GROUP;
                    uffd.copy(area.address() + offset, &bytes[offset as usize..][..GROUP as usize])?;
                }
            }
        });
        let median = touch(area.memory(), bytes);
        rustix::io::write(&end, &1_u64.to_ne_bytes())?;
        handler.join().map_err(|_| anyhow::anyhow!("the bare handler panicked"))??;
        median
    })
}

/// Of the faults of a first withdrawal, how many percent are left in a second one that has its working set and then does the same: whether all of it is recorded,
/// kept and fetched. A guest that does something else has other faults.
fn faults_left() -> Result<f64> {
    let (bank, bytes) = machine()?;
    let run = |prefetch| -> Result<LazyMachine> {
        let server = FaultServer::start(Cache::new(2 * LEN))?;
        let options = LazyOptions { prefetch, ..LazyOptions::default() };
        let machine = server.withdraw(&bank, &bank.find("vm")?, Backing::Anonymous, options)?;
        ensure!(machine.wait_ahead(SOON), "the working set did not come");
        touch(machine.memory().context("the memory is elsewhere")?, &bytes)?;
        Ok(machine)
    };
    let first = run(false)?;
    first.working_set().keep(&bank, &bank.find("vm")?, "memory")?;
    Ok(100.0 * run(true)?.report().faults as f64 / first.report().faults as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eight_pages_are_found_wherever_they_are_and_seven_are_too_few() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("image");
        let image = |groups: &[u64]| {
            let file = File::create(&path).unwrap();
            file.set_len(64 * GROUP).unwrap();
            groups.iter().for_each(|group| file.write_all_at(&[*group as u8 + 1; 10], group * GROUP + 9000).unwrap());
            first_pages(&path)
        };
        let groups = |pages: Vec<(u64, [u8; PAGE])>| -> Vec<u64> {
            assert!(
                pages.iter().all(|(at, page)| u64::from(page[9000 - 2 * PAGE]) == at / GROUP + 1 && at % GROUP == 2 * PAGE as u64)
            );
            let mut groups: Vec<_> = pages.iter().map(|(at, _)| at / GROUP).collect();
            groups.sort_unstable();
            groups
        };
        // All of them in the first eighth.
        assert_eq!(groups(image(&[0, 1, 2, 3, 4, 5, 6, 7]).unwrap()), [0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(groups(image(&(0..64).collect::<Vec<_>>()).unwrap()), [0, 9, 18, 27, 36, 45, 54, 63]);
        assert!(image(&[1, 2, 3, 4, 5, 6, 7]).unwrap_err().to_string().contains("has 7 groups"));
    }

    #[test]
    fn both_handlers_answer_with_the_right_bytes_and_a_working_set_leaves_few_faults() {
        if let Err(error) = Uffd::supported() {
            eprintln!("fault service: not run: {error}");
            return;
        }
        let services = services(5).unwrap();
        assert!([&services.bare, &services.copy, &services.map].iter().all(|figures| figures.len() == 5));
        assert!(faults_left().unwrap() <= 5.0);
        let rows = rows(5);
        rows.iter().for_each(|row| eprintln!("{}: {:?}, {:?}", row.case, row.value, row.ratio));
        assert!(rows.iter().all(|row| row.note.is_none() || row.value.is_some()), "{rows:?}");
    }
}
