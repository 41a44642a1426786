//! The host with the device: it lends it to one borrower after the other, keeps it for one that left on purpose, and has it back when one died.
//!
//! A borrower is killed: its link ends, the device is fenced and reset, and `serve` gives it back; its journal knows what it wrote since the last deposit, and the
//! machine can be restarted here with the device attached to it natively.

use std::path::Path;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use farbus_remote_dma::lender::{LenderSession, PollOptions};
use farbus_remote_dma::native::Native;
use farbus_remote_dma::wait::{Waker, sleep_until_readable};
use farbus_remote_dma::{Attachment, Backend, Claim, Kept, RestToken};
use farbus_transport::CloseReason;
use farbus_transport::link::hello::{Hello, Role, SPOKEN};
use farbus_transport::link::verdict::Refusal;
use farbus_transport::shm::{Greeted, Listener, ShmFabric, ShmOptions};

/// A device that nobody uses.
pub enum Device {
    /// As after power-on.
    Reset(Box<dyn Backend>),
    /// At rest, as a function left it.
    Kept(Kept),
}

impl Device {
    /// The device itself, to look at.
    pub fn get(&self) -> &dyn Backend {
        match self {
            Self::Reset(device) => &**device,
            Self::Kept(kept) => kept.device(),
        }
    }

    /// The device in this process, without a link: for the function of `token`, where it is kept for that one, else as after power-on.
    ///
    /// # Errors
    /// It cannot be attached.
    pub fn attach_here(self, token: &RestToken) -> Result<Box<dyn Attachment>> {
        let reset = match self {
            Self::Reset(device) => device,
            Self::Kept(kept) => match kept.claim(token) {
                Ok(device) => {
                    let native = Native::continued(device).map_err(|(error, _)| error)?;
                    return Ok(Box::new(native));
                }
                Err(kept) => kept.give_up(),
            },
        };
        Ok(Box::new(Native::threaded(reset, PollOptions::default())?))
    }
}

/// How a borrower left.
pub struct Left {
    /// Its device.
    pub device: Device,
    /// How.
    pub reason: CloseReason,
}

/// A place at which the device is lent.
pub struct Home {
    listener: Listener,
}

impl Home {
    /// At a unix socket.
    ///
    /// # Errors
    /// The socket cannot be made there.
    pub fn open(path: &Path) -> Result<Self> {
        Ok(Self { listener: Listener::bind(path)? })
    }

    /// Lends the device to the next borrower, until it leaves or dies, or until `stop`. A kept device goes only to who has its token, and when its lease is
    /// over it is reset.
    ///
    /// # Errors
    /// The host's fault; the device is lost with it.
    pub fn serve(&self, device: Device, stop: &Waker) -> Result<Left> {
        let mut device = device;
        loop {
            let (greeted, found) = match self.next_borrower(device, stop)? {
                Ok(found) => found,
                Err(device) => return Ok(Left { device, reason: CloseReason::Local }),
            };
            device = found;
            let claimed = Claim::parse(&greeted.agreed().peer.description).rest;
            let session = match (device, claimed) {
                (Device::Reset(backend), Some(_)) => {
                    // Who believes the device to be at rest must not get one that was reset.
                    refuse(greeted, Refusal::NotKept);
                    device = Device::Reset(backend);
                    continue;
                }
                (Device::Reset(backend), None) => {
                    let fabric = greeted.link(ShmOptions::default())?.fabric;
                    LenderSession::new(fabric, backend).map_err(|(error, _)| error)?
                }
                (Device::Kept(kept), Some(token)) => match kept.claim(&token) {
                    Ok(continued) => {
                        let fabric = greeted.link(ShmOptions::default())?.fabric;
                        LenderSession::continued(fabric, continued).map_err(|(error, _)| error)?
                    }
                    Err(kept) => {
                        refuse(greeted, Refusal::Kept);
                        device = Device::Kept(kept);
                        continue;
                    }
                },
                (Device::Kept(kept), None) => {
                    refuse(greeted, Refusal::Kept);
                    device = Device::Kept(kept);
                    continue;
                }
            };
            return serve_session(session, stop);
        }
    }

    /// As [`Home::serve`], on a thread of its own.
    ///
    /// # Errors
    /// No thread.
    pub fn serve_aside(self, device: Device, stop: Waker) -> Result<JoinHandle<Result<(Self, Left)>>> {
        let serve = move || self.serve(device, &stop).map(|left| (self, left));
        Ok(std::thread::Builder::new().name("farbus-home".into()).spawn(serve)?)
    }

    /// The next who says a good hello; a device whose lease ends meanwhile is reset. `Err` where it was stopped.
    fn next_borrower(&self, mut device: Device, stop: &Waker) -> Result<Result<(Greeted, Device), Device>> {
        let socket = self.listener.nonblocking_socket()?;
        loop {
            if stop.is_set() {
                return Ok(Err(device));
            }
            let lease = match device {
                Device::Reset(_) => None,
                Device::Kept(kept) => match kept.left() {
                    Some(left) => {
                        device = Device::Kept(kept);
                        Some(left)
                    }
                    None => {
                        device = Device::Reset(kept.give_up());
                        None
                    }
                },
            };
            let stream = match socket.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    use std::os::fd::AsFd;
                    sleep_until_readable(&[Some(socket.as_fd()), Some(stop.fd())], lease);
                    continue;
                }
                Err(error) => return Err(error).context("cannot accept a borrower"),
            };
            stream.set_nonblocking(false)?;
            let description = device.get().description().encode()?;
            let hello = Hello { versions: SPOKEN, role: Role::Lender, features: 0, epoch: 0, description };
            match Greeted::greet(stream, &hello, self.listener.path()) {
                Ok(greeted) => return Ok(Ok((greeted, device))),
                Err(error) => tracing::info!(%error, "somebody came who is no borrower"),
            }
        }
    }
}

fn refuse(greeted: Greeted, refusal: Refusal) {
    if let Err(error) = greeted.refuse(refusal) {
        tracing::info!(%error, "a borrower left before it was refused");
    }
}

fn serve_session(mut session: LenderSession<ShmFabric>, stop: &Waker) -> Result<Left> {
    let reason = session.run(PollOptions::default(), stop);
    let device = match session.into_kept() {
        Ok(kept) => Device::Kept(kept),
        Err(session) => {
            let mut ended = session.end();
            loop {
                match ended {
                    Ok(device) => break Device::Reset(device),
                    Err(wedged) if stop.is_set() => return Err(anyhow!("the device does not end {} accesses", wedged.in_flight())),
                    Err(wedged) => ended = wedged.wait(Duration::from_secs(10)),
                }
            }
        }
    };
    Ok(Left { device, reason })
}
