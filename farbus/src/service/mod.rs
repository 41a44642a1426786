//! What every command that runs until it is told to end has beside its work: a board of what it does, a socket for `farbus status`, metrics, and words for systemd.
//!
//! `Service::start("lend", …)` begins one thread that sleeps until somebody asks: `farbus status` at /run/farbus/lend-4711.sock, a scraper at
//! 127.0.0.1:9464. The thread that carries a session adds to counters now and then (`farbus_transport::tally`) and knows nothing of who reads them.

mod board;
pub mod config;
mod control;
mod http;
mod metrics;
pub mod notify;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use clap::Args;
use serde_json::json;

pub use self::board::Board;
use self::control::ControlSocket;
pub use self::control::folders;
use crate::failure::{Advise, misuse};
use crate::output::Events;

/// Above these arguments in the help.
const HEADING: &str = "As a service";

/// What all services take.
#[derive(Clone, Debug, Default, Args)]
pub struct ServiceArgs {
    /// Answer GET /metrics (Prometheus text) and GET /health there: a port of this host's loopback (0: any that is free), or an address and a port
    #[arg(long, help_heading = HEADING, value_name = "[ADDRESS:]PORT", value_parser = parse_metrics)]
    pub metrics: Option<SocketAddr>,
    /// With --metrics: at an address that others reach, too. Whoever reaches it learns devices, borrowers and how busy they are
    #[arg(long, help_heading = HEADING, requires = "metrics")]
    pub metrics_anyone: bool,
    /// Take what the command line and the environment (FARBUS_LEND_…, FARBUS_BORROW_…, FARBUS_BANK_SERVE_…) do not say from this file: TOML, with a table
    /// for each command (lend, borrow, bank.serve, bank.serve-faults) and the long names of its options
    #[arg(long, help_heading = HEADING, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Print what is in force, and where it comes from, as such a file, and end
    #[arg(long, help_heading = HEADING)]
    pub print_config: bool,
}

/// `9464`, `127.0.0.1:9464`, `[::1]:9464`.
fn parse_metrics(text: &str) -> Result<SocketAddr, String> {
    if let Ok(port) = text.parse::<u16>() {
        return Ok((std::net::Ipv4Addr::LOCALHOST, port).into());
    }
    text.parse().map_err(|_| format!("{text:?} is no address with a port: use 9464, 127.0.0.1:9464 or [::1]:9464"))
}

/// A service while it runs.
pub struct Service {
    /// What it does.
    pub board: Arc<Board>,
    /// Where `farbus status` finds it, until this is dropped; `None` where this user has no folder for such sockets.
    _control: Option<ControlSocket>,
}

impl Service {
    /// Begins to answer who asks for what the command does.
    ///
    /// # Errors
    /// The metrics cannot be offered where they were asked for. That `farbus status` does not find this service is only logged.
    pub fn start(command: &'static str, args: &ServiceArgs, events: Events) -> anyhow::Result<Self> {
        let board = Arc::new(Board::new(command));
        let metrics = args.metrics.map(|address| listen(address, args.metrics_anyone)).transpose()?;
        if let Some(listener) = &metrics {
            let address = listener.local_addr().context("where are the metrics?")?;
            board.describe("metrics", &address.to_string());
            events.say("metrics", json!({ "address": address.to_string() }), &format!("metrics are at http://{address}/metrics"));
        }
        let control = ControlSocket::bind(command)
            .inspect_err(|error| tracing::info!(%error, "`farbus status` does not find this service"))
            .ok();
        let listener = control.as_ref().map(ControlSocket::listener).transpose().context("cannot listen for `farbus status`")?;
        let answered = Arc::clone(&board);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot answer who asks")?;
        let answer = move || {
            runtime.block_on(async {
                let status = async {
                    match listener.map(tokio::net::UnixListener::from_std) {
                        Some(Ok(listener)) => control::serve(&listener, &answered).await,
                        Some(Err(error)) => tracing::warn!(%error, "`farbus status` is not answered"),
                        None => {}
                    }
                };
                let scraped = async {
                    match metrics.map(tokio::net::TcpListener::from_std) {
                        Some(Ok(listener)) => http::serve(&listener, &answered).await,
                        Some(Err(error)) => tracing::warn!(%error, "metrics are not answered"),
                        None => {}
                    }
                };
                tokio::join!(status, scraped);
            });
        };
        std::thread::Builder::new().name("farbus-status".into()).spawn(answer).context("cannot answer who asks")?;
        Ok(Self { board, _control: control })
    }

    /// One that nobody can ask, for tests.
    #[cfg(test)]
    pub fn unheard(command: &'static str) -> Self {
        Self { board: Arc::new(Board::new(command)), _control: None }
    }
}

/// Refuses what others reach, unless that is wanted.
fn listen(address: SocketAddr, anyone: bool) -> anyhow::Result<std::net::TcpListener> {
    if !address.ip().is_loopback() && !anyone {
        return Err(misuse(
            format!("metrics at {address} would be for everybody who reaches it"),
            "name a loopback address, as in --metrics 127.0.0.1:9464, or say --metrics-anyone",
        ));
    }
    let listener = std::net::TcpListener::bind(address).and_then(|listener| {
        listener.set_nonblocking(true)?;
        Ok(listener)
    });
    listener.advise(format!("cannot offer metrics at {address}"), "choose another --metrics address, or end what uses this one")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_alone_is_one_of_the_loopback_and_other_addresses_have_to_be_asked_for_twice() {
        assert_eq!(parse_metrics("9464"), Ok("127.0.0.1:9464".parse().unwrap()));
        assert_eq!(parse_metrics("[::1]:0"), Ok("[::1]:0".parse().unwrap()));
        for wrong in ["", "x", "127.0.0.1", "70000", "localhost:1", ":9464"] {
            assert!(parse_metrics(wrong).is_err(), "{wrong}");
        }
        let open = "0.0.0.0:0".parse().unwrap();
        assert!(crate::failure::is_misuse(&listen(open, false).unwrap_err()));
        let taken = listen(open, true).unwrap().local_addr().unwrap();
        assert!(listen("127.0.0.1:0".parse().unwrap(), false).is_ok() && taken.port() > 0);
    }
}
