//! The arguments of `farbus bank serve`, and who may what.
//!
//! `--read 'web-*=vm7'` parses into a [`Rule`]: the client vm7 may read machines whose names begin with `web-`.

use std::str::FromStr;
use std::time::Duration;

use clap::Args;
use farbus_control::identity::Name;
use farbus_machine_bank::remote::Pattern;

use super::args::Place;
use crate::link_address::LinkAddress;
use crate::security::{AllowArgs, PeerArgs, SecurityArgs};
use crate::service::ServiceArgs;
use crate::values::{parse_duration, parse_size, parse_wait};

/// How the two sides of a link to a bank know each other.
#[derive(Clone, Debug, Args)]
pub struct BankLinkArgs {
    /// What this side shows.
    #[command(flatten)]
    pub security: SecurityArgs,
    /// Which server is wanted.
    #[command(flatten)]
    pub peer: PeerArgs,
    /// How long to wait for a server that went away, as in 60s, which it is without this, or 0s: reading then goes on, and so does a deposit of which nothing was on its way
    #[arg(long, help_heading = "The bank", value_name = "TIME", value_parser = parse_duration)]
    pub reconnect: Option<Duration>,
}

impl BankLinkArgs {
    /// Whether anything was said.
    pub fn is_given(&self) -> bool {
        self.security.is_given() || self.peer.peer.is_some() || self.reconnect.is_some()
    }
}

/// `farbus bank serve`
#[derive(Debug, Args)]
#[command(
    after_help = "The address is then a bank for every command that does not remove anything (deposit, withdraw, serve-faults, list, show, diff, stats,
copy): farbus bank list shm:/run/bank. Pages go by one-sided reads and are verified by who gets them; what is deposited is verified here.

Who may what. A client is the name in its certificate, or uid:NUMBER over shared memory. Without --read and --write whoever is let in may read and
deposit every machine: over shared memory that is this user and root, over RDMA those of --allow. With either of them a client may do what they say
and nothing else, and has never heard of other machines; a user that is named by uid:NUMBER is let in over shared memory too.
  farbus bank serve /srv/bank --listen shm:/run/bank
  farbus bank serve /srv/bank --listen rdma:nas:7001,dev=mlx5_0 --tls nas --allow '*' --read 'golden-*' --read '*=backup' --write 'web-*=web'

Both sides need the tenant key of a bank that has one. SIGINT and SIGTERM end it: clients wait for the next one (--reconnect), go on with what they read, and say
so where a deposit has to be run again."
)]
pub struct ServeArgs {
    /// The bank.
    #[command(flatten)]
    pub place: Place,
    /// Where clients connect
    #[arg(long, value_name = "shm:PATH|rdma:HOST:PORT[,dev=NAME]")]
    pub listen: LinkAddress,
    /// Machines that may be listed and withdrawn, by all clients or by this one; '*' and '?' stand for any letters and for one (repeatable)
    #[arg(long, value_name = "PATTERN[=CLIENT]")]
    pub read: Vec<Rule>,
    /// Machines that may be deposited, likewise
    #[arg(long, value_name = "PATTERN[=CLIENT]")]
    pub write: Vec<Rule>,
    /// Clients at a time: each may take 40 MiB, and 256 MiB more while it deposits
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub clients: u16,
    /// What a client may have, over all its links
    #[command(flatten)]
    pub shares: ShareArgs,
    /// Who may connect.
    #[command(flatten)]
    pub allow: AllowArgs,
    /// What it is as a service.
    #[command(flatten)]
    pub service: ServiceArgs,
}

/// Where they are in the help.
const SHARES: &str = "What a client may have, over all its links";

/// What one client may have of a served bank.
#[derive(Clone, Debug, Args)]
pub struct ShareArgs {
    /// How much a client may have sent before it is checked, as in 256M
    #[arg(long, help_heading = SHARES, value_name = "SIZE", default_value = "256M", value_parser = parse_size)]
    pub client_staged: u64,
    /// Deposits that a client may have under way
    #[arg(long, help_heading = SHARES, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..))]
    pub client_deposits: u64,
    /// Machines that a client may be withdrawing
    #[arg(long, help_heading = SHARES, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u64).range(1..))]
    pub client_withdrawals: u64,
    /// Pages whose names are remembered for a client that may not read every machine, some 24 bytes each: what is beyond them it sends again
    #[arg(long, help_heading = SHARES, value_name = "N", default_value_t = 1 << 20, value_parser = clap::value_parser!(u64).range(0..1 << 32))]
    pub client_known: u64,
    /// After how long a deposit or a withdrawal ends whose client neither uses nor renews it; a living one renews it every 10 s
    #[arg(long, help_heading = SHARES, value_name = "TIME", default_value = "5m", value_parser = parse_wait)]
    pub hold_age: Duration,
}

/// Machines, and the client whom a rule is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// The machines.
    pub machines: Pattern,
    /// Nobody: it is for all.
    pub client: Option<String>,
}

impl FromStr for Rule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (machines, client) = text.split_once('=').map_or((text, None), |(machines, client)| (machines, Some(client)));
        let machines = machines.parse()?;
        match client {
            Some(client) if client.strip_prefix("uid:").is_some_and(|uid| uid.parse::<u32>().is_err()) => {
                Err(format!("{client:?} is no user: use uid:1000"))
            }
            Some(client) if !client.starts_with("uid:") && client.parse::<Name>().is_err() => {
                Err(format!("{client:?} is no client: use a name of a certificate, or uid:1000"))
            }
            client => Ok(Self { machines, client: client.map(str::to_owned) }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_is_for_machines_and_for_one_client_or_all() {
        let rule: Rule = "web-*=uid:1000".parse().unwrap();
        assert_eq!((rule.machines.to_string().as_str(), rule.client.as_deref()), ("web-*", Some("uid:1000")));
        assert!(["", "a/b", "vm7=", "vm7=uid:x", "vm7=a b"].iter().all(|wrong| wrong.parse::<Rule>().is_err()));
        assert_eq!("vm7".parse::<Rule>().map(|rule| rule.client), Ok(None));
    }
}
