//! A bank at the other end of a link: one that serves, and a store that asks it, over any fabric of `transport`.
//!
//! `server.serve(fabric, &client, …)` on one host, `Bank::open(Box::new(RemoteStore::connect(fabric, …)?), None)` on the other: `withdraw` there writes what
//! `deposit` here took, each page verified at the client; and the other way round, each page verified at the server.
//!
//! # The protocol, version 1
//!
//! Messages of at most 56 bytes ([`wire`]) say what is wanted and where bytes are; the bytes themselves are *read* out of the other side's memory, by
//! one-sided reads, into memory that nobody else sees. Each side grants one region, for reading only:
//!
//! | region | whose | lanes | a lane |
//! |---|---|---|---|
//! | area | the client's | 8 | 1 MiB: the body of a request |
//! | slab | the server's, one for each client | 8 | 2 MiB: a part of an answer |
//!
//! Numbers are little-endian. What is 44 bytes or shorter travels in the message and in no lane.
//!
//! ```text
//! client  1, 0, version (2), key and length of the area (8, 8)          hello, first
//! server  1, 0, version (2), key and length of the slab (8, 8)          welcome, also to another version
//! client  2, op, lane, lanes lent (a bit each), 0 (4), length (4), body request
//! server  2, status, lane, lane of the part, last, 0 (3), length (4), part   answer, or a part of one
//! client  3                                                             it is there: every 20 s
//! client  4                                                             it is there, and needs what it holds: every 10 s while it holds something
//! server  3                                                             it works: every 5 s where an answer takes long
//! ```
//!
//! A client owns all lanes. A request takes one, by whose number its answers are known, and lends the server lanes of the slab; a lane is lent again only
//! when what lay in it was read. So nothing is allocated for a request, a client that asks for too much finds its own lanes taken, and a request in a lane
//! whose request is not yet done ends the link. The server obeys a client's requests in their order.
//!
//! | op | body | answer |
//! |---|---|---|
//! | 1 list | kind, name | objects of the kind behind the name, and whether there are more |
//! | 2 config | name | what the bank says of itself, or which pages it lost |
//! | 3 head | root, offset (4) | depth (1), length (4), bytes of the machine's head |
//! | 4 leaf | root, section (2), leaf (4) | the names of its pages, written in full |
//! | 5 fetch | root, section, leaf, bitmap of 4096 pages | parts: a table, and groups as they are stored |
//! | 6 have | up to 4096 names | a bitmap: which need not be sent |
//! | 7 hold | milliseconds (4) | a handle; no sweep until it ends |
//! | 8 pin | root | a handle; the machine is not removed until it ends |
//! | 9 let go | handle (4) | |
//! | 10 stage | stream (4), offset (8), bytes | |
//! | 11 pack | stream, length (8), name (16) | the stream is verified, and a pack |
//! | 12 commit | stream, length, root, number (8; 0, or one more than that of the machine's last deposit, which is to be the last still), machine | the deposit's number |
//! | 13 discard | stream | |
//!
//! Status 0 is done; the others are the reasons of a [`StoreError`](crate::store::StoreError), with a text. A part of an answer to *fetch* begins with the
//! number (2) of wanted pages that no pack has and those pages (2 each), the number of groups (2), and for each its length (4), how many wanted pages it
//! has (2), and for each of these its number in the leaf (2) and in the group (1); then the groups. What did not fit in the lent lanes is asked for again.
//!
//! # Who believes whom
//!
//! The client verifies all that it is sent, as it would what lies in a store: the head by the root, leaves by the head, pages by their names. What it must
//! take the server's word for is which root a name like `vm7@3` is, and whether a page need not be sent: a server that lies about that loses a deposit, which
//! it could as well delete.
//!
//! The server believes nothing. A client reads the machines that its [`Rights`] name and asks for pages by their place in one of them, so there is no name by
//! which it could ask for others'; and to who may not read every machine a group is sent without the pages beside the wanted ones. *Have* would be a way to ask whether somebody has a page of known contents; so it is answered for pages that the client
//! could read anyhow, because they are in a machine that it may read or because it brought them, and for all others as if they were not there: they
//! are sent, and stored a second time. A client that may read every machine is told about every page. A manifest may name only what *have* would
//! affirm, and rest only on a machine that the client may read: otherwise depositing the names of somebody's pages would be a way to read them.
//!
//! A tenant's key is the bank's: client and server both have it, the client to verify what it gets and to name what it deposits, the server to verify that a
//! page is stored under its own name. It is never sent. Whoever lacks it can name no page of such a bank; who has it is still held to its rights.
//!
//! # When somebody dies
//!
//! A client's holds, pins and unfinished streams end with its link. Packs that it had sent stay for the next attempt, which finds them by *have*, until a sweep. A
//! client that says nothing for 90 s is gone; one that neither uses nor renews what it holds for 5 minutes holds nothing any more.
//!
//! A client whose server dies makes a new link where it was told how ([`RemoteStore::reconnecting`]), with longer and longer pauses, for a minute at most. Reading is
//! asked again. What it holds it takes anew on the new link before anything else is asked there; what was known of pages under a hold that had a gap is settled at the
//! commit, when the server looks for every page that the manifest names. An object that was on its way is nowhere: its deposit is
//! [`StoreError::Gone`](crate::store::StoreError::Gone), and says that it has to be run again. Where the answer to a commit got lost, the client looks for the root that only this deposit has.
//!
//! # What one may have
//!
//! Of a client, over all its links, at most so many bytes lie unchecked, and so many holds and pins are taken, as [`ServeOptions`] says; beyond that it hears status 8.
//! Reading the index, and merging it, happens beside the one that is used, on a thread of its own: others go on, and who waits for it is told that it is worked on.
//! What is remembered of the machines of a client that may not read all is bounded: it is told less of what need not be sent, and at its commit the server looks
//! through its packs and its machines once more instead.

mod client;
mod courier;
mod draft;
mod port;
pub mod server;
mod service;
pub mod wire;

pub use client::{Link, Reconnect, RemoteStore};
pub use server::{BankServer, Client, Pattern, Rights, ServeOptions, Served, Stop};
pub use service::{Fetched, Service, WireCounts};

/// What both sides of a link to a bank say of themselves in their hellos, so that nobody takes a device for one.
pub const GREETING: &[u8] = b"farbus bank";
