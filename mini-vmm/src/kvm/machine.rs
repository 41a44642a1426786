//! A running machine: the vCPU on a thread, the function on another, and both given back when the machine is stopped.
//!
//! `machine.run_while(|| sleep(100 ms))` runs the guest for so long; then the function can be quiesced, the vCPU saved, both deposited, and the machine runs on.

use std::os::unix::net::UnixStream;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use farbus_machine_bank::lazy::Area;
use farbus_pci_shim::{Embedded, FunctionThread, FunctionThreadOptions, Restored};
use farbus_remote_dma::Attachment;

use super::{Function, Vm, firmware};
use crate::deposit::{Depositor, Frozen, Withdrawn};
use crate::moving::{Arrived, Left, begin, send_ahead, send_last};

/// One vCPU and one function.
pub struct Machine {
    /// The vCPU and its counts.
    pub vm: Vm,
    /// `None` only where a thread of it panicked.
    function: Option<Function>,
    /// When the vCPU stopped last.
    stopped: Option<SystemTime>,
}

impl Machine {
    /// A new machine with this device: its guest is at its first instruction.
    ///
    /// # Errors
    /// KVM's, or the device's.
    pub fn begin(area: &Area, device: Box<dyn Attachment>) -> Result<Self> {
        let mut vm = Vm::new(area)?;
        vm.boot()?;
        let mut function = Embedded::new(device, vm.sink(), vm.memory())?;
        firmware(&mut function)?;
        Ok(Self { vm, function: Some(function), stopped: None })
    }

    /// A machine out of a bank, with its device, wherever that is now. It goes on by [`Machine::run_while`].
    ///
    /// # Errors
    /// KVM's, or the function does not fit the device.
    pub fn again(withdrawn: &Withdrawn, device: Box<dyn Attachment>) -> Result<(Self, Restored)> {
        Self::restore(&withdrawn.area, &withdrawn.cpu, &withdrawn.function, device)
    }

    fn restore(area: &Area, cpu: &[u8], state: &[u8], device: Box<dyn Attachment>) -> Result<(Self, Restored)> {
        let mut vm = Vm::new(area)?;
        vm.load(cpu)?;
        let (mut function, restored) = Embedded::restore(device, vm.sink(), vm.memory(), state)?;
        function.resume();
        Ok((Self { vm, function: Some(function), stopped: None }, restored))
    }

    /// Runs the guest while `during` runs, and stops it.
    ///
    /// # Errors
    /// The guest found something wrong.
    pub fn run_while<T>(&mut self, during: impl FnOnce() -> T) -> Result<T> {
        let function = self.function.take().context("the function is gone")?;
        let (thread, mut ports) = FunctionThread::start(function, 1, FunctionThreadOptions::default())?;
        let port = ports.first_mut().context("a function's thread without a port")?;
        let (stop, vm) = (self.vm.stop(), &mut self.vm);
        let (value, (ran, stopped)) = std::thread::scope(|scope| {
            let running = scope.spawn(|| vm.run(port));
            let value = during();
            let stopped = SystemTime::now();
            stop.stop();
            (value, (running.join(), stopped))
        });
        self.stopped = Some(stopped);
        self.function = thread.stop();
        match ran {
            Ok(ran) => ran.map(|()| value),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    /// Runs the guest for so long.
    ///
    /// # Errors
    /// The guest found something wrong.
    pub fn run_for(&mut self, time: Duration) -> Result<()> {
        self.run_while(|| std::thread::sleep(time))
    }

    /// Sends the machine away over `stream`: its memory in `rounds` while it runs, and what is left when it stands still. The device is kept for `lease`.
    ///
    /// # Errors
    /// As [`send_last`].
    pub fn move_away(&mut self, area: &Area, stream: &mut UnixStream, rounds: u32, lease: Duration) -> Result<Left> {
        let mut depositor = Depositor::new(area)?;
        begin(stream, area)?;
        let mut ahead = 0;
        for _ in 0..rounds {
            let pages = depositor.look_ahead(self.function.as_mut().context("the function is gone")?)?;
            ahead += pages.pages();
            self.run_while(|| send_ahead(stream, &pages))??;
        }
        let stopped = self.stopped.unwrap_or_else(SystemTime::now);
        let Self { vm, function, .. } = self;
        let function = function.as_mut().context("the function is gone")?;
        let left = send_last(stream, &mut depositor, function, lease, stopped, || vm.save())?;
        Ok(Left { ahead, ..left })
    }

    /// A machine that came, on the device that is kept for it, or that was reset. Goes on by [`Machine::run_while`].
    ///
    /// # Errors
    /// As [`Machine::again`].
    pub fn arrive(arrived: &Arrived, device: Box<dyn Attachment>) -> Result<(Self, Restored)> {
        Self::restore(&arrived.area, &arrived.cpu, &arrived.function, device)
    }

    /// The machine at this moment, to be deposited while it runs on.
    ///
    /// # Errors
    /// As [`Depositor::freeze`].
    pub fn freeze(&mut self, depositor: &mut Depositor<'_>) -> Result<Frozen> {
        let Self { vm, function, .. } = self;
        depositor.freeze(function.as_mut().context("the function is gone")?, || vm.save())
    }

    /// The machine at this moment, to be deposited and to go on elsewhere.
    ///
    /// # Errors
    /// As [`Depositor::freeze_and_leave`].
    pub fn freeze_and_leave(&mut self, depositor: &mut Depositor<'_>, lease: Duration) -> Result<Frozen> {
        let Self { vm, function, .. } = self;
        depositor.freeze_and_leave(function.as_mut().context("the function is gone")?, lease, || vm.save())
    }
}
