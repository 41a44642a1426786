//! What a lent device costs that nobody uses: the CPU and the wake-ups of both processes.
//!
//! A guest boots, reads 500 blocks and then does nothing for ten seconds: `farbus lend` and the borrower's process use 0.0 % of a core and wake up 0.1 times a
//! second, all threads together (proc_pid_schedstat, proc_pid_status(5)).

use std::io::{Read, Write};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use farbus_remote_dma::wait::sleep_until_readable;
use farbus_remote_dma::{Activity, Claim};
use farbus_transport::Nanos;

use super::machine::{LenderProcess, Machine, Places, Process, borrow_soon, empty_image, guest_memory, part};

/// How long it is looked at.
const LOOK: Duration = Duration::from_secs(10);
/// Until both have polled in vain, and sleep.
const SETTLE: Duration = Duration::from_millis(500);

/// What it costs, the worse of the two processes.
pub(super) struct Idle {
    pub(super) seconds: f64,
    /// Of one core.
    pub(super) cpu_percent: f64,
    pub(super) wakes_a_second: f64,
}

/// Looks for ten seconds, or for less where `effort` is below 1.
pub(super) fn idle(places: &Places, effort: f64) -> Result<Idle> {
    let (image, socket) = (places.scratch.join("idle.image"), places.scratch.join("idle"));
    empty_image(&image)?;
    let lender = LenderProcess::start(places, &image, &socket)?;
    lender.listening()?;
    let socket = socket.to_str().context("a scratch folder with odd letters in its name")?;
    let mut borrower = Process::start(part(places, &["idle", socket]).stdin(Stdio::null()).stdout(Stdio::piped()))?;
    let said = borrower.child().stdout.as_mut().context("the borrower has no voice")?;
    said.read_exact(&mut [0]).context("the borrower does not come to rest")?;
    std::thread::sleep(SETTLE);
    let processes = [lender.id(), borrower.id()];
    let (before, began) = (processes.map(cost), Instant::now());
    std::thread::sleep(LOOK.mul_f64(effort.clamp(0.1, 1.0)));
    let (after, seconds) = (processes.map(cost), began.elapsed().as_secs_f64());
    let mut worst = Idle { seconds, cpu_percent: 0.0, wakes_a_second: 0.0 };
    for (before, after) in before.into_iter().zip(after) {
        let (before, after) = (before?, after?);
        worst.cpu_percent = worst.cpu_percent.max((after.0.saturating_sub(before.0)) as f64 / seconds / 1e7);
        worst.wakes_a_second = worst.wakes_a_second.max(after.1.saturating_sub(before.1) as f64 / seconds);
    }
    Ok(worst)
}

/// Nanoseconds of CPU, and voluntary context switches, of all threads of a process.
fn cost(process: u32) -> Result<(u64, u64)> {
    let (mut cpu, mut wakes) = (0, 0);
    for task in std::fs::read_dir(format!("/proc/{process}/task")).context("a process of the suite is gone")? {
        let task = task?.path();
        let on_cpu = std::fs::read_to_string(task.join("schedstat")).context("the kernel does not say what a thread used")?;
        cpu += on_cpu.split_whitespace().next().and_then(|ns| ns.parse::<u64>().ok()).context("no figure in schedstat")?;
        let status = std::fs::read_to_string(task.join("status"))?;
        let switches = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        wakes += switches.and_then(|number| number.trim().parse::<u64>().ok()).context("no figure in status")?;
    }
    Ok((cpu, wakes))
}

/// The borrower's process: a VMM whose guest has nothing to do.
pub(super) fn do_nothing(socket: &Path) -> Result<()> {
    let mut machine = Machine::boot(&guest_memory()?, borrow_soon(socket, &Claim::default())?.0, 5)?;
    machine.run(500)?;
    machine.drain()?;
    let mut out = std::io::stdout();
    out.write_all(&[1])?;
    out.flush()?;
    loop {
        let Activity::Idle(limit) = machine.device.poll(Nanos::now()) else { continue };
        if machine.device.arm() {
            sleep_until_readable(&[machine.device.wake_fd()], limit);
        }
    }
}
