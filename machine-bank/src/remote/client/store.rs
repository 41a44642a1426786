//! The Store and the Service of a bank at the other end of a link: each call is a question or a few, and what comes back is held to its form.
//!
//! `store.list(Kind::Manifest)` asks for names behind "", and behind the last of them until there are no more; `fetch` asks for a leaf's pages until all
//! are there.

use std::sync::PoisonError;
use std::time::Duration;

use super::super::draft::RemoteDraft;
use super::super::service::{Fetched, Service, WireCounts};
use super::super::wire::{BITMAP, LANES, MOST_NAMES, Op, PART, parse_objects, parse_part};
use super::{Remote, RemoteStore, named};
use crate::bank::CONFIG;
use crate::codec::Input;
use crate::manifest::head::MOST_HEAD;
use crate::page::{PAGE, PageId, Root};
use crate::store::{Draft, Guard, Hold, Kind, Object, Pin, Store, StoreError};

/// Objects of one listing that are taken at most.
const MOST_OBJECTS: usize = 1 << 22;
/// Lanes of one fetch at most, so that another thread's can be under way too.
const FETCH_LANES: usize = LANES / 2;

/// A hold that the server takes by itself when it is needed.
#[derive(Debug)]
struct Unneeded;

impl Guard for Unneeded {}

impl RemoteStore {
    fn config(&self, name: &str) -> Result<Vec<u8>, StoreError> {
        let config = self.0.call(&Op::Config(name.to_owned()))?;
        if name == CONFIG {
            self.0.described.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(|| config.clone());
        }
        Ok(config)
    }

    fn not_here<T>(&self, what: &str) -> Result<T, StoreError> {
        Err(StoreError::Refused(format!("{what} over a link; it is done on the host that has the bank")))
    }
}

/// All objects of a kind that this client may know of.
pub(in crate::remote) fn list(remote: &Remote, kind: Kind) -> Result<Vec<Object>, StoreError> {
    let mut all: Vec<Object> = Vec::new();
    loop {
        let after = all.last().map(|object| object.name.clone()).unwrap_or_default();
        let part = remote.call(&Op::List(kind, after.clone()))?;
        let (objects, more) = parse_objects(&part).map_err(|error| remote.wrong(error))?;
        let sorted = objects.first().is_none_or(|first| first.name > after) && objects.is_sorted_by(|a, b| a.name < b.name);
        if !sorted || (more && objects.is_empty()) || all.len() + objects.len() > MOST_OBJECTS {
            return Err(remote.wrong("a listing without order or end"));
        }
        all.extend(objects);
        if !more {
            return Ok(all);
        }
    }
}

impl Store for RemoteStore {
    fn address(&self) -> String {
        self.0.address()
    }

    fn service(&self) -> Option<&dyn Service> {
        Some(self)
    }

    fn list(&self, kind: Kind) -> Result<Vec<Object>, StoreError> {
        list(&self.0, kind)
    }

    fn read(&self, kind: Kind, name: &str, offset: u64, buf: &mut [u8]) -> Result<(), StoreError> {
        if kind != Kind::Config {
            return self.not_here("packs, indexes and manifests are not read as they are");
        }
        let config = self.config(name)?;
        let from = usize::try_from(offset).ok().and_then(|from| config.get(from..)?.get(..buf.len()));
        let wanted = offset.saturating_add(buf.len() as u64);
        buf.copy_from_slice(from.ok_or_else(|| StoreError::Ends { kind, name: name.to_owned(), wanted })?);
        Ok(())
    }

    fn len(&self, kind: Kind, name: &str) -> Result<u64, StoreError> {
        if kind == Kind::Config {
            return Ok(self.config(name)?.len() as u64);
        }
        let object = self.list(kind)?.into_iter().find(|object| object.name == name);
        object.map(|object| object.len).ok_or_else(|| StoreError::Missing { kind, name: name.to_owned() })
    }

    fn create(&self, kind: Kind) -> Result<Box<dyn Draft>, StoreError> {
        match kind {
            Kind::Pack | Kind::Manifest => Ok(Box::new(RemoteDraft::new(self.0.clone(), kind))),
            Kind::Config => self.not_here("no bank is made"),
            Kind::Index => self.not_here("no index is written"),
        }
    }

    /// Before a manifest is seen the server makes durable what it rests on, and then the manifest itself.
    fn sync(&self, _: Kind) -> Result<(), StoreError> {
        Ok(())
    }

    fn remove(&self, _: Kind, _: &str) -> Result<(), StoreError> {
        self.not_here("nothing is removed")
    }

    fn hold(&self, hold: Hold, wait: Duration) -> Result<Box<dyn Guard>, StoreError> {
        match hold {
            Hold::Deposit => self.guard(&Op::Hold(u32::try_from(wait.as_millis()).unwrap_or(u32::MAX))),
            // The server gives numbers, one at a time.
            Hold::Commit => Ok(Box::new(Unneeded)),
            Hold::Sweep => self.not_here("nothing is swept"),
        }
    }

    fn pin(&self, root: Root) -> Result<Box<dyn Guard>, StoreError> {
        self.guard(&Op::Pin(root))
    }

    fn pins(&self) -> Result<Vec<Pin>, StoreError> {
        self.not_here("nobody is told who withdraws what")
    }

    fn tidy(&self) -> Result<u64, StoreError> {
        self.not_here("nothing is tidied")
    }
}

impl Service for RemoteStore {
    fn head(&self, root: &Root) -> Result<(u8, Vec<u8>), StoreError> {
        self.0.pins(root)?;
        let mut head = Vec::new();
        loop {
            let part = self.0.call(&Op::Head(*root, head.len() as u32))?;
            let mut input = Input::new(&part);
            let fields = (|| Ok::<_, crate::codec::Malformed>((input.u8()?, input.u32()? as usize, input.take(input.left())?)))();
            let (depth, total, piece) = fields.map_err(|error| self.0.wrong(error))?;
            head.extend_from_slice(piece);
            if total > MOST_HEAD || head.len() > total || piece.is_empty() {
                return Err(self.0.wrong("a head without end"));
            }
            if head.len() == total {
                return Ok((depth, head));
            }
        }
    }

    fn leaf(&self, root: &Root, section: usize, leaf: usize) -> Result<Vec<u8>, StoreError> {
        self.0.pins(root)?;
        self.0.call(&Op::Leaf(*root, section as u16, leaf as u32))
    }

    fn fetch(
        &self,
        root: &Root,
        section: usize,
        leaf: usize,
        pages: &[u16],
        buffer: &mut Vec<u8>,
        sink: &mut dyn FnMut(Fetched<'_>),
    ) -> Result<(), StoreError> {
        let mut wanted = Box::new([0_u8; BITMAP]);
        for page in pages {
            if let Some(byte) = wanted.get_mut(usize::from(*page) / 8) {
                *byte |= 1 << (page % 8);
            }
        }
        let mut left: usize = wanted.iter().map(|byte| byte.count_ones() as usize).sum();
        self.0.pins(root)?;
        while left > 0 {
            let before = left;
            let op = |wanted: &[u8; BITMAP]| Op::Fetch(*root, section as u16, leaf as u32, Box::new(*wanted));
            let lanes = (left * PAGE / PART + 1).min(FETCH_LANES);
            // What came over a link that ended is not asked for again.
            self.0.ask(|client| {
                let op = op(&wanted);
                let mut flight = client.send(op.code(), &op.body(), &[], lanes)?;
                loop {
                    let last = flight.part(buffer).map_err(|error| named(error, &op))?;
                    let (missing, groups) = parse_part(buffer).map_err(|error| client.wrong(error))?;
                    let pages = missing.iter().chain(groups.iter().flat_map(|group| group.pages.iter().map(|(page, _)| page)));
                    for page in pages {
                        let (byte, bit) = (&mut wanted[usize::from(*page) / 8], 1 << (page % 8));
                        if *byte & bit == 0 {
                            return Err(client.wrong("a page that was not asked for"));
                        }
                        *byte &= !bit;
                        left -= 1;
                    }
                    missing.iter().for_each(|page| sink(Fetched::Missing(*page)));
                    groups.iter().for_each(|group| sink(Fetched::Group(&buffer[group.bytes.clone()], &group.pages)));
                    if last || left == 0 {
                        return Ok(());
                    }
                }
            })?;
            if left == before {
                return Err(self.0.wrong("an answer without pages"));
            }
        }
        Ok(())
    }

    fn have(&self, ids: &[PageId]) -> Result<Vec<bool>, StoreError> {
        let mut have = Vec::with_capacity(ids.len());
        self.0.holds()?;
        for ids in ids.chunks(MOST_NAMES) {
            let bitmap = self.0.call(&Op::Have(ids.to_vec()))?;
            if bitmap.len() != ids.len().div_ceil(8) {
                return Err(self.0.wrong(format!("{} bytes about {} pages", bitmap.len(), ids.len())));
            }
            have.extend((0..ids.len()).map(|at| bitmap[at / 8] >> (at % 8) & 1 == 1));
        }
        Ok(have)
    }

    fn wire(&self) -> WireCounts {
        self.0.wire()
    }
}
