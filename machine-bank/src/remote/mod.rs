//! placeholder
mod client;
mod courier;
mod draft;
mod port;
pub mod server;
mod service;
pub mod wire;

pub use client::RemoteStore;
pub use server::{BankServer, Client, Pattern, Rights, ServeOptions, Served, Stop};
pub use service::{Fetched, Service, WireCounts};
