//! The arguments of `farbus bank serve`, and who may what.
//!
//! `--read 'web-*=vm7'` parses into a [`Rule`]: the client vm7 may read machines whose names begin with `web-`.

use std::str::FromStr;

use clap::Args;
use farbus_control::identity::Name;
use farbus_machine_bank::remote::Pattern;

use super::args::Place;
use crate::link_address::LinkAddress;
use crate::security::{AllowArgs, PeerArgs, SecurityArgs};
use crate::service::ServiceArgs;

/// How the two sides of a link to a bank know each other.
#[derive(Clone, Debug, Args)]
pub struct BankLinkArgs {
    /// What this side shows.
    #[command(flatten)]
    pub security: SecurityArgs,
    /// Which server is wanted.
    #[command(flatten)]
    pub peer: PeerArgs,
}

impl BankLinkArgs {
    /// Whether anything was said.
    pub fn is_given(&self) -> bool {
        self.security.is_given() || self.peer.peer.is_some()
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

Both sides need the tenant key of a bank that has one. SIGINT and SIGTERM end it: what clients had under way fails and can be run again."
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
    /// Who may connect.
    #[command(flatten)]
    pub allow: AllowArgs,
    /// What it is as a service.
    #[command(flatten)]
    pub service: ServiceArgs,
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
