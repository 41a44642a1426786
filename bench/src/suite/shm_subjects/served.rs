//! The vfio-user row: a server with its default options, a client that is one blocking socket, and 4-byte reads of BAR 0.
//!
//! The device is inside the server's process, so that the round trip is the protocol's own: 32 bytes there, 36 bytes back.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use farbus_pci_shim::vfio_user::{ClientInterrupts, Options, Server, StopHandle};
use farbus_pci_shim::{Function, FunctionOptions, InterruptOwner};
use farbus_remote_dma::Backend;
use farbus_remote_dma::native::Native;

use crate::measure::{Latencies, Stopwatch, pin_to};
use crate::suite::engine::{Engine, register};
use crate::suite::shm::{REGION_READ_REPLY, REGION_READ_REQUEST};

/// A reply that takes longer is no figure but a failure.
const LOST: Duration = Duration::from_secs(5);
/// Commands and region of the vfio-user specification 0.9.2.
const VERSION: u16 = 1;
const REGION_READ: u16 = 9;
const BAR0_REGION: u32 = 0;
const REPLY_ERROR_AT: usize = 12;

/// Stops the server also where the client fails.
struct Stop(StopHandle);

impl Drop for Stop {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// Round trips of region reads: the client on core `here`, the server on core `there`.
pub(super) fn region_read(here: usize, there: usize, samples: u64) -> Result<Latencies> {
    let (engine, _) = Engine::new(4096)?;
    let interrupts = ClientInterrupts::new(engine.description());
    let options = FunctionOptions { interrupts: InterruptOwner::Client };
    let mut function = Function::new(Box::new(Native::inline(Box::new(engine))?), interrupts, options)?;
    let path = std::env::temp_dir().join(format!("farbus-bench-{}.sock", std::process::id()));
    let mut server = Server::bind(&path).context("cannot serve vfio-user")?;
    let stop = server.stop_handle();
    std::thread::scope(|scope| {
        let serving = scope.spawn(move || -> Result<()> {
            let _pinned = pin_to(there)?;
            server.serve(&mut function, &Options::default())?;
            Ok(())
        });
        let measured = {
            let _stop = Stop(stop);
            let _pinned = pin_to(here)?;
            client(UnixStream::connect(&path)?, samples)
        };
        let served = serving.join().map_err(|_| anyhow::anyhow!("the server's thread failed"))?;
        served.and(measured)
    })
}

fn client(mut socket: UnixStream, samples: u64) -> Result<Latencies> {
    socket.set_read_timeout(Some(LOST))?;
    // Version 0.1, no capabilities.
    socket.write_all(&message(VERSION, &[0, 0, 1, 0]))?;
    let mut head = [0; 16];
    socket.read_exact(&mut head)?;
    let size = u32::from_le_bytes([head[4], head[5], head[6], head[7]]) as usize;
    ensure!((16..65536).contains(&size), "the server's version is {size} bytes long");
    socket.read_exact(&mut vec![0; size - head.len()])?;

    let mut access = register::VALUE.to_le_bytes().to_vec();
    access.extend(BAR0_REGION.to_le_bytes());
    access.extend(4_u32.to_le_bytes());
    let request = message(REGION_READ, &access);
    ensure!(request.len() == REGION_READ_REQUEST, "a request of {} bytes", request.len());
    let watch = Stopwatch::calibrate();
    let mut latencies = Latencies::new();
    let mut reply = [0; REGION_READ_REPLY];
    let warm_up = samples / 10 + 1;
    for round in 0..warm_up + samples {
        let start = Instant::now();
        socket.write_all(&request)?;
        socket.read_exact(&mut reply)?;
        let ns = watch.since(start);
        ensure!(reply[REPLY_ERROR_AT..REPLY_ERROR_AT + 4] == [0; 4], "the server refused a region read");
        if round >= warm_up {
            latencies.record_ns(ns);
        }
    }
    Ok(latencies)
}

/// A command with its header.
fn message(command: u16, body: &[u8]) -> Vec<u8> {
    let size = 16 + body.len() as u32;
    let mut bytes = 7_u16.to_le_bytes().to_vec();
    bytes.extend(command.to_le_bytes());
    bytes.extend(size.to_le_bytes());
    bytes.extend([0; 8]);
    bytes.extend(body);
    bytes
}
