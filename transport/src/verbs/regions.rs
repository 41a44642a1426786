//! Memory of both sides: what the device may use here, what the peer was granted, and what the peer granted us.
//!
//! Each grant is a memory window, or, where the device does not hold its peers to a window's bounds (rxe), a memory region of its own with just the
//! access given. The grant that the caller hands to its peer carries a number; address and key come on the control connection, and only from there
//! are they believed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::chain::{Bytes, What};
use super::context::ProtectionDomain;
use super::error::VerbsError;
use super::establish::by_chance;
use super::objects::MemoryRegion;
use super::sys::{IBV_ACCESS_LOCAL_WRITE, IBV_ACCESS_MW_BIND, IBV_ACCESS_REMOTE_READ, IBV_ACCESS_REMOTE_WRITE};
use super::windows::MemoryWindow;
use super::wire::{Announcement, Frame, Slot};
use super::{Phase, VerbsFabric, outbox};
use crate::fabric::{CloseReason, Grant, GrantError, Regions, RegisterError, RevokeError};
use crate::link::control::{Control, ControlError, receive_by};
use crate::memory::{Mapped, Memory, MemoryError};
use crate::span::{Access, LocalRegion, LocalSpan, RegionName, RemoteRegion, RemoteSpan};
use crate::table::{MAX_REGIONS, Table};

/// How long a grant may take to come on the control connection after it was heard of on the queue pair.
const GRANT_LIMIT: Duration = Duration::from_secs(2);

/// Memory of this side.
pub(super) struct Local {
    pub(super) memory: Arc<Memory>,
    /// `None` where it is only to be granted, and where it has no bytes.
    pub(super) region: Option<MemoryRegion>,
    access: Access,
}

/// Memory of the peer's.
pub(super) struct Remote {
    pub(super) address: u64,
    pub(super) key: u32,
    number: u64,
}

/// A grant of ours that lives.
struct Granted {
    number: u64,
    of: RegionName,
    opening: Opening,
}

impl Granted {
    fn window_key(&self) -> Option<u32> {
        if let Opening::Window(window) = &self.opening { Some(window.key()) } else { None }
    }
}

/// Through what the peer reaches granted memory, as long as it lives.
enum Opening {
    /// Nothing is to be reached: the memory has no bytes.
    None,
    /// A region of its own, held for that.
    Region(MemoryRegion),
    Window(MemoryWindow),
}

/// All memory that one end knows of.
pub(super) struct Books {
    domain: Arc<ProtectionDomain>,
    /// Grants are windows.
    windows: bool,
    pub(super) locals: Table<Local>,
    pub(super) remotes: Table<Remote>,
    granted: Vec<Granted>,
    /// A window whose bind is under way.
    being_bound: Option<MemoryWindow>,
    last_grant: u64,
    /// Grants of the peer's by number, imported or not.
    announced: BTreeMap<u64, Announcement>,
    /// Grants of the peer's that it took back before we read of them on the control connection.
    revoked_unread: BTreeSet<u64>,
}

impl Books {
    pub(super) fn new(domain: Arc<ProtectionDomain>, windows: bool) -> Self {
        Self {
            domain,
            windows,
            locals: Table::default(),
            remotes: Table::default(),
            granted: Vec::new(),
            being_bound: None,
            // Somewhere among 2^63, so that a made-up number is no grant.
            last_grant: by_chance() >> 1,
            announced: BTreeMap::new(),
            revoked_unread: BTreeSet::new(),
        }
    }

    /// Takes the frames that have come.
    ///
    /// # Errors
    /// Why the link ends.
    pub(super) fn take_frames(&mut self, control: &mut dyn Control) -> Result<(), CloseReason> {
        loop {
            match control.receive() {
                Ok(None) => return Ok(()),
                Ok(Some(frame)) => self.take_frame(&frame)?,
                Err(error) => return Err(reason(&error)),
            }
        }
    }

    /// Ends all windows, before the queue pair that they are bound to.
    pub(super) fn free_windows(&mut self) {
        self.being_bound = None;
        for granted in &mut self.granted {
            if let Opening::Window(_) = granted.opening {
                granted.opening = Opening::None;
            }
        }
    }

    fn take_frame(&mut self, frame: &[u8]) -> Result<(), CloseReason> {
        let Frame::Grant(grant) = Frame::parse(frame).map_err(CloseReason::Protocol)? else {
            return Err(CloseReason::Protocol("a control frame that was not asked for"));
        };
        if self.revoked_unread.remove(&grant.number) {
            return Ok(());
        }
        if self.announced.len() >= MAX_REGIONS as usize {
            return Err(CloseReason::Protocol("more grants than a side may hold"));
        }
        match self.announced.insert(grant.number, grant) {
            None => Ok(()),
            Some(_) => Err(CloseReason::Protocol("two grants of one number")),
        }
    }

    /// The peer is about to take a grant back; operations on it would end the link, so they are refused here.
    ///
    /// # Errors
    /// Why the link ends.
    pub(super) fn revoked_by_peer(&mut self, number: u64) -> Result<(), CloseReason> {
        if self.announced.remove(&number).is_some() {
            self.remotes.remove_where(|remote| remote.number == number);
            return Ok(());
        }
        self.revoked_unread.insert(number);
        if self.revoked_unread.len() > MAX_REGIONS as usize {
            return Err(CloseReason::Protocol("more grants taken back than were given"));
        }
        Ok(())
    }
}

fn reason(error: &ControlError) -> CloseReason {
    match error {
        ControlError::TooLong { .. } | ControlError::Flood => CloseReason::Protocol("control frames out of bounds"),
        ControlError::Foreign(_) => CloseReason::Protocol("control bytes that are not the peer's"),
        ControlError::Gone | ControlError::Stuck | ControlError::Host(_) => CloseReason::PeerGone,
    }
}

fn region_of(domain: &Arc<ProtectionDomain>, memory: &Arc<Memory>, flags: u32) -> Result<Option<MemoryRegion>, MemoryError> {
    if memory.is_empty() { Ok(None) } else { MemoryRegion::new(domain, memory, flags).map(Some) }
}

impl VerbsFabric {
    fn add_local(&mut self, memory: Arc<Memory>, access: Access, used_here: bool) -> Result<LocalRegion, RegisterError> {
        if access.write && !memory.writable() {
            return Err(MemoryError::ReadOnly.into());
        }
        let write = if access.write { IBV_ACCESS_LOCAL_WRITE } else { 0 };
        // A window is a part of a region; a grant that is a region of its own needs no other.
        let (flags, used_here) = if self.books.windows { (write | IBV_ACCESS_MW_BIND, true) } else { (write, used_here) };
        let region = if used_here { region_of(&self.books.domain, &memory, flags)? } else { None };
        let len = memory.len();
        let name =
            self.books.locals.insert(Local { memory, region, access }).ok_or(RegisterError::TooMany { limit: MAX_REGIONS })?;
        Ok(LocalRegion { name, len, access })
    }
}

impl VerbsFabric {
    /// A window over a whole region, bound by a work request of its own and waited for.
    fn open_window(&mut self, region: &LocalRegion, access: u32) -> Result<Opening, GrantError> {
        let refused = |error: VerbsError| MemoryError::Host { what: "open a memory window", source: std::io::Error::other(error) };
        let mut window = MemoryWindow::new(&self.books.domain).map_err(refused)?;
        let Some(Local { region: Some(whole), .. }) = self.books.locals.find(region.name) else {
            return Err(GrantError::NotRegistered);
        };
        let bind = window.bind(whole, 0, region.len, access & !IBV_ACCESS_LOCAL_WRITE);
        self.hand_over();
        if !self.drain(|fabric| fabric.outbox.has_room(1)) || !self.outbox.push(true, bind, Bytes::Copied(&[])) {
            return Err(GrantError::Closed);
        }
        // In the books while it is bound, so that an end of the link meanwhile finds it.
        self.books.being_bound = Some(window);
        self.hand_over();
        if let Some(window) = &mut self.books.being_bound {
            window.bound();
        }
        let bound = self.outbox.last_posted();
        if !self.drain(|fabric| fabric.outbox.is_done(bound)) {
            self.end(CloseReason::Device("it does not bind a memory window"));
        }
        self.books.being_bound.take().filter(|_| self.pair.is_some()).map(Opening::Window).ok_or(GrantError::Closed)
    }

    /// A write of no bytes, which takes nothing of the peer's but an acknowledgement: when it is done, so is everything before it, and while it can be
    /// done the peer's device is there. No key is looked at for it (InfiniBand Architecture Specification 1.4, volume 1, C9-88).
    pub(super) fn push_nothing(&mut self) -> bool {
        self.make_room();
        let nothing = What::Write { address: 0, key: 0 };
        let pushed = self.outbox.has_reserve() && self.outbox.push(true, nothing, Bytes::Copied(&[]));
        self.hand_over();
        pushed
    }

    /// Waits until everything that was posted is done, or the link has ended; false at the limit.
    fn all_is_done(&mut self) -> bool {
        if !self.drain(|fabric| fabric.outbox.has_reserve()) || (self.pair.is_some() && !self.push_nothing()) {
            return false;
        }
        let last = self.outbox.last_posted();
        self.drain(|fabric| fabric.outbox.is_done(last))
    }
}

impl Regions for VerbsFabric {
    fn register(&mut self, memory: Arc<Memory>, access: Access) -> Result<LocalRegion, RegisterError> {
        self.add_local(memory, access, true)
    }

    fn register_for_peer(&mut self, memory: Arc<Memory>, access: Access) -> Result<LocalRegion, RegisterError> {
        self.add_local(memory, access, false)
    }

    fn deregister(&mut self, region: LocalRegion) -> Result<(), RevokeError> {
        let ends = |granted: &Granted| granted.of == region.name;
        // They stay in the books until all is done, so that an end of the link meanwhile finds their windows.
        let ended: Vec<(u64, Option<u32>)> = self
            .books
            .granted
            .iter()
            .filter(|granted| ends(granted))
            .map(|granted| (granted.number, granted.window_key()))
            .collect();
        for (number, window) in ended {
            // Where there is no room to say it, a peer that uses the grant once more loses the link.
            self.say(Slot::Revoke(number), false);
            if let Some(key) = window
                && self.outbox.has_reserve()
            {
                self.make_room();
                self.outbox.push(false, What::Invalidate { key }, Bytes::Copied(&[]));
            }
        }
        self.hand_over();
        // The device may still be reading or filling the memory for operations of ours.
        if self.outbox.outstanding() > 0 && !self.all_is_done() {
            self.end(CloseReason::Protocol("an operation on memory that is given back does not end"));
        }
        // With the regions the peer's access ends: whatever arrives from now on is refused by the device.
        let kept = self.context.kept_memory();
        self.books.granted.retain(|granted| !ends(granted));
        self.books.locals.remove(region.name);
        if self.context.kept_memory() != kept {
            // Without a queue pair nobody reaches it.
            self.end(CloseReason::Device("it does not give memory back"));
        }
        Ok(())
    }

    fn local_memory(&self, region: &LocalRegion) -> Option<Arc<Memory>> {
        self.books.locals.find(region.name).map(|local| Arc::clone(&local.memory))
    }

    fn map_local(&self, span: LocalSpan) -> Option<Mapped> {
        let local = self.books.locals.find(span.name)?;
        Mapped::new(Arc::clone(&local.memory), span.offset, u64::from(span.len)).ok()
    }

    fn export(&mut self, region: &LocalRegion, access: Access) -> Result<Grant, GrantError> {
        let local = self.books.locals.find(region.name).ok_or(GrantError::NotRegistered)?;
        if !local.access.allows(access) {
            return Err(GrantError::Widened { asked: access, allowed: local.access });
        }
        if self.pair.is_none() {
            return Err(GrantError::Closed);
        }
        if self.books.granted.len() >= MAX_REGIONS as usize {
            return Err(GrantError::TooMany { limit: MAX_REGIONS });
        }
        let read = if access.read { IBV_ACCESS_REMOTE_READ } else { 0 };
        // The device writes for the peer, so it must be allowed to write at all.
        let write = if access.write { IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_LOCAL_WRITE } else { 0 };
        let opening = match &local.region {
            Some(_) if self.books.windows => self.open_window(region, read | write)?,
            _ => region_of(&self.books.domain, &local.memory, read | write)?.map_or(Opening::None, Opening::Region),
        };
        let (address, key) = match &opening {
            Opening::None => (0, 0),
            Opening::Region(own) => (own.address(), own.rkey()),
            Opening::Window(window) => {
                let whole = self.books.locals.find(region.name).and_then(|local| local.region.as_ref());
                (whole.map_or(0, MemoryRegion::address), window.key())
            }
        };
        self.books.last_grant += 1;
        let announcement = Announcement { number: self.books.last_grant, address, len: region.len, key, access };
        if let Err(error) = self.control.send(&Frame::Grant(announcement).encode()) {
            tracing::debug!(%error, "a grant cannot be told");
            // A window goes before its queue pair. Nothing can follow half a frame, so this was the last grant.
            drop(opening);
            self.end(reason(&error));
            return Err(GrantError::Closed);
        }
        self.books.granted.push(Granted { number: announcement.number, of: region.name, opening });
        Ok(Grant { key: announcement.number, len: region.len, access })
    }

    fn import(&mut self, grant: &Grant) -> Result<RemoteRegion, GrantError> {
        let deadline = Instant::now() + GRANT_LIMIT;
        let announced = loop {
            if self.phase != Phase::Open {
                return Err(GrantError::Closed);
            }
            if let Some(announced) = self.books.announced.get(&grant.key) {
                break *announced;
            }
            let taken = match receive_by(&mut *self.control, deadline) {
                Ok(Some(frame)) => self.books.take_frame(&frame),
                Ok(None) => return Err(GrantError::Missing { key: grant.key }),
                Err(error) => Err(reason(&error)),
            };
            if let Err(reason) = taken {
                self.end(reason);
                return Err(GrantError::Closed);
            }
        };
        // What the owner said counts; a grant that says more was altered on its way.
        if grant.len > announced.len {
            return Err(GrantError::TooLong { granted: grant.len, actual: announced.len });
        }
        if !announced.access.allows(grant.access) {
            return Err(GrantError::Widened { asked: grant.access, allowed: announced.access });
        }
        let remote = Remote { address: announced.address, key: announced.key, number: announced.number };
        let name = self.books.remotes.insert(remote).ok_or(GrantError::TooMany { limit: MAX_REGIONS })?;
        Ok(RemoteRegion { name, len: grant.len, access: grant.access })
    }

    fn release(&mut self, region: RemoteRegion) {
        self.books.remotes.remove(region.name);
    }

    fn map_remote(&self, _span: RemoteSpan) -> Option<Mapped> {
        None
    }
}

const _: () = assert!(MAX_REGIONS > outbox::DEPTH);
