//! How long a region read takes over the socket, beside a bare ping-pong of the same sizes on a unix socket between the same two cores.
//!
//! `cargo test --release -p farbus-pci-shim --test vfio_user_latency -- --ignored --nocapture` prints `region read 9.1 us, bare 9.0 us, ratio
//! 1.01`. It measures, so it runs only when asked for.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod vfio_user_support;

use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use farbus_pci_shim::vfio_user::wire::{Command, Header, RegionAccess};
use farbus_pci_shim::vfio_user::{ClientInterrupts, Options, Served, Server};
use farbus_pci_shim::{AccessError, MediationRequest};
use farbus_remote_dma::{
    Activity, AttachmentError, BarAddress, DeviceDescription, InterruptMode, Iova, MapError, MediationAnswer, ResetKind, Ticket,
    Width, Window,
};
use farbus_transport::{CloseReason, Memory, Nanos};
use rustix::event::{EventfdFlags, eventfd};
use zerocopy::IntoBytes;

const READS: usize = 5_000;
const ROUNDS: usize = 7;

/// The cheapest device that can be waited for.
struct Register {
    description: DeviceDescription,
    interrupts: ClientInterrupts,
    wake: OwnedFd,
}

impl Served for Register {
    fn resets(&self) -> u64 {
        0
    }
    fn description(&self) -> &DeviceDescription {
        &self.description
    }
    fn config_read(&mut self, _: u16, _: &mut [u8]) -> Result<(), AccessError> {
        Ok(())
    }
    fn config_write(&mut self, _: u16, _: &[u8]) -> Result<(), AccessError> {
        Ok(())
    }
    fn bar_read(&mut self, _: BarAddress, _: Width) -> Result<u64, AccessError> {
        Ok(1)
    }
    fn bar_write(&mut self, _: BarAddress, _: Width, _: u64) -> Result<(), AccessError> {
        Ok(())
    }

    fn flush(&mut self) {}
    fn map(&mut self, _: Window) -> Result<(), MapError> {
        Ok(())
    }
    fn unmap(&mut self, _: Iova, _: u64) -> Result<(), MapError> {
        Ok(())
    }
    fn prove(&mut self, _: &Arc<Memory>) {}
    fn next_mediation(&mut self) -> Option<MediationRequest> {
        None
    }
    fn answer(&mut self, _: Ticket, _: MediationAnswer<'_>) {}
    fn set_client_interrupts(&mut self, _: InterruptMode) {}
    fn reset(&mut self, _: ResetKind) -> Result<(), AttachmentError> {
        Ok(())
    }
    fn poll(&mut self, _: Nanos) -> Activity {
        Activity::Idle(None)
    }
    fn arm(&mut self) -> bool {
        true
    }
    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.wake.as_fd())
    }
    fn gone(&self) -> Option<CloseReason> {
        None
    }
    fn interrupts(&mut self) -> &mut ClientInterrupts {
        &mut self.interrupts
    }
}

fn pin(core: usize) {
    let mut set = rustix::thread::CpuSet::new();
    set.set(core);
    // On one core the figures mean less, and are still comparable.
    let _ = rustix::thread::sched_setaffinity(None, &set);
}

/// Median round trip in nanoseconds of `request`, answered by `reply` bytes.
fn measure(socket: &mut UnixStream, request: &[u8], reply: usize) -> u64 {
    let mut answer = vec![0; reply];
    let mut times: Vec<u64> = (0..READS)
        .map(|_| {
            let start = Instant::now();
            socket.write_all(request).unwrap();
            socket.read_exact(&mut answer).unwrap();
            start.elapsed().as_nanos() as u64
        })
        .collect();
    times.sort_unstable();
    times[times.len() / 2]
}

fn bare(path: &std::path::Path) -> std::thread::JoinHandle<()> {
    let listener = UnixListener::bind(path).unwrap();
    std::thread::spawn(move || {
        pin(1);
        let (mut socket, _) = listener.accept().unwrap();
        let (mut request, reply) = ([0; 32], [0; 36]);
        while socket.read_exact(&mut request).is_ok() {
            if socket.write_all(&reply).is_err() {
                return;
            }
        }
    })
}

#[test]
#[ignore = "measures; run it in release on a quiet machine"]
fn region_read_beside_a_bare_ping_pong() {
    let directory = tempfile::tempdir().unwrap();
    let access = RegionAccess { offset: 0x1c, region: 0, count: 4 };
    let request = [Header::command(9, Command::RegionRead, 16).as_bytes(), access.as_bytes()].concat();
    for spin in [Duration::ZERO, Options::default().spin] {
        let mut server = Server::bind(directory.path().join("served")).unwrap();
        let stop = server.stop_handle();
        let options = Options { spin, ..Options::default() };
        let description = vfio_user_support::description();
        let mut device = Register {
            interrupts: ClientInterrupts::new(&description),
            description,
            wake: eventfd(0, EventfdFlags::NONBLOCK).unwrap(),
        };
        let path = server.path().to_owned();
        let served = std::thread::spawn(move || {
            pin(1);
            server.serve(&mut device, &options).unwrap()
        });
        let bare_path = directory.path().join("bare");
        let echo = bare(&bare_path);
        pin(0);
        let mut to_bare = UnixStream::connect(&bare_path).unwrap();
        let mut to_server = UnixStream::connect(&path).unwrap();
        to_server.write_all(Header::command(1, Command::Version, 4).as_bytes()).unwrap();
        to_server.write_all(&[0; 4]).unwrap();
        assert!(to_server.read(&mut [0; 256]).unwrap() > 20);
        let mut rounds: Vec<(u64, u64)> =
            (0..ROUNDS).map(|_| (measure(&mut to_server, &request, 36), measure(&mut to_bare, &request, 36))).collect();
        rounds.sort_by(|a, b| (a.0 * b.1).cmp(&(b.0 * a.1)));
        let (read, bare) = rounds[ROUNDS / 2];
        let ratio = read as f64 / bare as f64;
        println!("spin {spin:?}: region read {:.1} us, bare {:.1} us, ratio {ratio:.2}", read as f64 / 1e3, bare as f64 / 1e3);
        drop((to_bare, to_server));
        stop.stop();
        served.join().unwrap();
        echo.join().unwrap();
        std::fs::remove_file(bare_path).unwrap();
    }
}
