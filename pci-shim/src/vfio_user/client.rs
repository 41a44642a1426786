//! A vfio-user client: for tests and benchmarks, and for driving a device that another program serves.
//!
//! `client.region_read(0, 0x1c, &mut bytes)` sends 32 bytes and waits for 36; a `DMA_READ` that arrives meanwhile waits in a queue
//! until `client.answer_dma(&mut memory)` answers it from the given memory.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use zerocopy::{FromBytes, Immutable, IntoBytes};

pub use super::client_error::ClientError;
pub use super::client_memory::ClientMemory;
use super::client_memory::answer_from;
use super::socket::{Incoming, Input, Received};
use super::wire::{
    Command, DeviceInfo, DmaMap, DmaUnmap, FLAG_ERROR, FLAG_NO_REPLY, Header, IrqInfo, IrqSet, MAX_MESSAGE_FDS, RegionAccess,
    RegionInfo,
};

/// A connection to a server.
pub struct Client {
    socket: UnixStream,
    input: Input,
    next_id: u16,
    deadline: Duration,
    /// `DMA_READ` and `DMA_WRITE` that wait for [`Client::answer_dma`].
    requests: VecDeque<(Header, Vec<u8>)>,
    /// Body of the last reply, and the descriptors beside it.
    reply: Vec<u8>,
    reply_fds: Vec<OwnedFd>,
    outgoing: Vec<u8>,
}

impl Client {
    /// Connects; no message is sent. Each request may take `deadline`.
    ///
    /// # Errors
    /// Where nobody listens.
    pub fn connect(path: impl AsRef<Path>, deadline: Duration) -> io::Result<Self> {
        Ok(Self::over(UnixStream::connect(path)?, deadline))
    }

    /// Over a connection that exists; no message is sent.
    pub fn over(socket: UnixStream, deadline: Duration) -> Self {
        Self {
            socket,
            input: Input::new(),
            next_id: 0,
            deadline,
            requests: VecDeque::new(),
            reply: Vec::new(),
            reply_fds: Vec::new(),
            outgoing: Vec::new(),
        }
    }

    /// The connection, with what was received and not yet looked at. What the server asked and nobody answered is lost.
    pub fn into_parts(self) -> (UnixStream, Input) {
        (self.socket, self.input)
    }

    /// How long each further request may take.
    pub fn set_deadline(&mut self, deadline: Duration) {
        self.deadline = deadline;
    }

    /// Connects and agrees on a version.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn open(path: impl AsRef<Path>, deadline: Duration) -> Result<Self, ClientError> {
        let mut client = Self::connect(path, deadline)?;
        client.version(
            0,
            1,
            b"{\"capabilities\":{\"max_msg_fds\":16,\"max_data_xfer_size\":1048576,\"write_multiple\":true}}\0",
        )?;
        Ok(client)
    }

    /// Proposes a version; gives the server's minor version and its data.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn version(&mut self, major: u16, minor: u16, data: &[u8]) -> Result<(u16, Vec<u8>), ClientError> {
        let body = [[major, minor].as_bytes(), data].concat();
        let reply = self.request(Command::Version, &body, &[])?;
        let ([answered, minor], data) =
            <[u16; 2]>::read_from_prefix(reply).map_err(|_| ClientError::Reply { command: Command::Version.number() })?;
        if answered != major {
            return Err(ClientError::Reply { command: Command::Version.number() });
        }
        Ok((minor, data.to_vec()))
    }

    /// What the device is.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn device_info(&mut self) -> Result<DeviceInfo, ClientError> {
        let ask = DeviceInfo { argsz: 16, flags: 0, num_regions: 0, num_irqs: 0 };
        self.ask(Command::DeviceInfo, &ask)
    }

    /// What a region is.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn region_info(&mut self, index: u32) -> Result<RegionInfo, ClientError> {
        let ask = RegionInfo { argsz: 32, flags: 0, index, cap_offset: 0, size: 0, offset: 0 };
        self.ask(Command::RegionInfo, &ask)
    }

    /// What an interrupt index is.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn irq_info(&mut self, index: u32) -> Result<IrqInfo, ClientError> {
        let ask = IrqInfo { argsz: 16, flags: 0, index, count: 0 };
        self.ask(Command::IrqInfo, &ask)
    }

    /// Reads `into.len()` bytes of a region.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn region_read(&mut self, region: u32, offset: u64, into: &mut [u8]) -> Result<(), ClientError> {
        let access = access(region, offset, into.len());
        let reply = self.request(Command::RegionRead, access.as_bytes(), &[])?;
        let data = reply.get(size_of::<RegionAccess>()..).filter(|data| data.len() == into.len());
        into.copy_from_slice(data.ok_or(ClientError::Reply { command: Command::RegionRead.number() })?);
        Ok(())
    }

    /// Writes to a region and waits for the server's acknowledgement.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn region_write(&mut self, region: u32, offset: u64, bytes: &[u8]) -> Result<(), ClientError> {
        let body = [access(region, offset, bytes.len()).as_bytes(), bytes].concat();
        self.request(Command::RegionWrite, &body, &[]).map(|_| ())
    }

    /// Writes to a region without an acknowledgement.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn region_write_posted(&mut self, region: u32, offset: u64, bytes: &[u8]) -> Result<(), ClientError> {
        let body = [access(region, offset, bytes.len()).as_bytes(), bytes].concat();
        let mut header = Header::command(self.fresh_id(), Command::RegionWrite, body.len());
        header.flags |= FLAG_NO_REPLY;
        self.send(&header, &body, &[])
    }

    /// Lets the server use `size` bytes at `address`: those at `offset` of `fd`, or by message.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn dma_map(
        &mut self,
        address: u64,
        size: u64,
        flags: u32,
        backing: Option<(BorrowedFd<'_>, u64)>,
    ) -> Result<(), ClientError> {
        let map = DmaMap { argsz: 32, flags, offset: backing.map_or(0, |(_, offset)| offset), address, size };
        let fds: Vec<_> = backing.into_iter().map(|(fd, _)| fd).collect();
        self.request(Command::DmaMap, map.as_bytes(), &fds).map(|_| ())
    }

    /// Takes memory away from the server.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn dma_unmap(&mut self, address: u64, size: u64, flags: u32) -> Result<(), ClientError> {
        let unmap = DmaUnmap { argsz: 24, flags, address, size };
        self.request(Command::DmaUnmap, unmap.as_bytes(), &[]).map(|_| ())
    }

    /// Sets interrupts: `flags` are the `SET_DATA_` and `SET_ACTION_` bits, `data` the booleans, `fds` the eventfds.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn set_irqs(
        &mut self,
        index: u32,
        flags: u32,
        start: u32,
        count: u32,
        data: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), ClientError> {
        let set = IrqSet { argsz: (size_of::<IrqSet>() + data.len()) as u32, flags, index, start, count };
        self.request(Command::SetIrqs, &[set.as_bytes(), data].concat(), fds).map(|_| ())
    }

    /// Resets the device.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn reset(&mut self) -> Result<(), ClientError> {
        self.request(Command::DeviceReset, &[], &[]).map(|_| ())
    }

    /// Sends any command and waits for its reply, whose body it gives.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn request(&mut self, command: Command, body: &[u8], fds: &[BorrowedFd<'_>]) -> Result<&[u8], ClientError> {
        let header = Header::command(self.fresh_id(), command, body.len());
        self.send(&header, body, fds)?;
        let answered = self.reply_to(&header)?;
        self.checked(command, &answered)
    }

    /// As [`Client::request`], making the accesses that the server asks for until the reply is there.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn request_serving(&mut self, command: Command, body: &[u8], memory: &mut dyn ClientMemory) -> Result<&[u8], ClientError> {
        let header = Header::command(self.fresh_id(), command, body.len());
        self.send(&header, body, &[])?;
        while let Some((asked, body)) = self.requests.pop_front() {
            self.answer(&asked, &body, memory)?;
        }
        let answered = self.await_reply(&header, Some(memory))?;
        self.checked(command, &answered)
    }

    fn checked(&self, command: Command, answered: &Header) -> Result<&[u8], ClientError> {
        if answered.flags & FLAG_ERROR != 0 {
            return Err(ClientError::Refused { command: command.number(), errno: answered.errno() });
        }
        Ok(&self.reply)
    }

    /// Sends a message as it is.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn send(&mut self, header: &Header, body: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), ClientError> {
        self.outgoing.clear();
        self.outgoing.extend_from_slice(header.as_bytes());
        self.outgoing.extend_from_slice(body);
        if fds.len() > MAX_MESSAGE_FDS {
            return Err(ClientError::TooManyFds { count: fds.len() });
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_MESSAGE_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(ClientError::TooManyFds { count: fds.len() });
        }
        let mut rest = self.outgoing.as_slice();
        let mut sent = if fds.is_empty() {
            rustix::net::send(&self.socket, rest, SendFlags::NOSIGNAL).map_err(io::Error::from)?
        } else {
            rustix::net::sendmsg(&self.socket, &[IoSlice::new(rest)], &mut control, SendFlags::NOSIGNAL).map_err(io::Error::from)?
        };
        loop {
            rest = rest.get(sent..).unwrap_or_default();
            if rest.is_empty() {
                return Ok(());
            }
            sent = rustix::net::send(&self.socket, rest, SendFlags::NOSIGNAL).map_err(io::Error::from)?;
        }
    }

    /// Waits for the reply to a message that was sent; its body is kept for [`Client::last_reply`].
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn reply_to(&mut self, sent: &Header) -> Result<Header, ClientError> {
        self.await_reply(sent, None)
    }

    fn await_reply(&mut self, sent: &Header, mut memory: Option<&mut dyn ClientMemory>) -> Result<Header, ClientError> {
        let start = Instant::now();
        loop {
            while let Some(incoming) = self.input.next_message() {
                let Incoming::Message { header, body, fds, .. } = incoming else {
                    return Err(ClientError::Reply { command: sent.command });
                };
                if !header.is_reply() {
                    let body = body.to_vec();
                    match &mut memory {
                        Some(memory) => self.answer(&header, &body, *memory)?,
                        None => self.requests.push_back((header, body)),
                    }
                } else if header.message_id == sent.message_id && header.command == sent.command {
                    self.reply.clear();
                    self.reply.extend_from_slice(body);
                    self.reply_fds = fds;
                    return Ok(header);
                } else {
                    return Err(ClientError::Reply { command: sent.command });
                }
            }
            self.receive(start)?;
        }
    }

    /// Body of the last reply.
    pub fn last_reply(&self) -> &[u8] {
        &self.reply
    }

    /// The descriptors that came beside the last reply.
    pub fn take_reply_fds(&mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.reply_fds)
    }

    /// Answers what the server asks of our memory until nothing has come for `quiet`; gives how many messages were answered.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn answer_dma(&mut self, memory: &mut dyn ClientMemory, quiet: Duration) -> Result<usize, ClientError> {
        let mut answered = 0;
        while let Some((header, body)) = self.next_request(quiet)? {
            self.answer(&header, &body, memory)?;
            answered += 1;
        }
        Ok(answered)
    }

    /// The next `DMA_READ` or `DMA_WRITE` of the server; `None` where none comes within `wait`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn next_request(&mut self, wait: Duration) -> Result<Option<(Header, Vec<u8>)>, ClientError> {
        let start = Instant::now();
        loop {
            while let Some(Incoming::Message { header, body, .. }) = self.input.next_message() {
                if !header.is_reply() {
                    self.requests.push_back((header, body.to_vec()));
                }
            }
            if let Some(request) = self.requests.pop_front() {
                return Ok(Some(request));
            }
            let left = wait.saturating_sub(start.elapsed());
            if left.is_zero() || !self.readable(left)? {
                return Ok(None);
            }
            self.receive(Instant::now())?;
        }
    }

    /// Answers one `DMA_READ` or `DMA_WRITE` from memory.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn answer(&mut self, header: &Header, body: &[u8], memory: &mut dyn ClientMemory) -> Result<(), ClientError> {
        let reply = answer_from(header, body, memory);
        match reply {
            Ok(body) => self.send(&header.reply(body.len()), &body, &[]),
            Err(errno) => self.send(&header.refusal(errno), &[], &[]),
        }
    }

    /// The socket, to wait on.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn ask<T: FromBytes + IntoBytes + Immutable>(&mut self, command: Command, ask: &T) -> Result<T, ClientError> {
        let reply = self.request(command, ask.as_bytes(), &[])?;
        T::read_from_bytes(reply).map_err(|_| ClientError::Reply { command: command.number() })
    }

    fn fresh_id(&mut self) -> u16 {
        self.next_id = self.next_id.wrapping_add(1);
        self.next_id
    }

    fn receive(&mut self, start: Instant) -> Result<(), ClientError> {
        loop {
            match self.input.receive(self.socket.as_fd(), false) {
                Ok(Received::Bytes) => return Ok(()),
                Ok(Received::Closed) => return Err(ClientError::Closed),
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Err(ClientError::Closed),
                Err(error) => return Err(error.into()),
                Ok(Received::Nothing) => {
                    let left = self.deadline.saturating_sub(start.elapsed());
                    if left.is_zero() || !self.readable(left)? {
                        let deadline_ms = u64::try_from(self.deadline.as_millis()).unwrap_or(u64::MAX);
                        return Err(ClientError::Deadline { deadline_ms });
                    }
                }
            }
        }
    }

    fn readable(&self, wait: Duration) -> Result<bool, ClientError> {
        let mut fds = [PollFd::new(&self.socket, PollFlags::IN)];
        let timeout =
            Timespec { tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX), tv_nsec: i64::from(wait.subsec_nanos()) };
        match rustix::event::poll(&mut fds, Some(&timeout)) {
            Ok(ready) => Ok(ready > 0),
            Err(Errno::INTR) => Ok(true),
            Err(errno) => Err(io::Error::from(errno).into()),
        }
    }
}

fn access(region: u32, offset: u64, len: usize) -> RegionAccess {
    RegionAccess { offset, region, count: u32::try_from(len).unwrap_or(u32::MAX) }
}
