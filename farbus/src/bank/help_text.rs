//! What `farbus bank --help` says: its commands by what they are for, and examples.
//!
//! Under "In and out" stand `deposit` and `withdraw`, each with the sentence that its own help begins with.

use clap::{Command, Subcommand};

use super::args::BankCommand;

/// The commands, by what they are for.
const GROUPS: [(&str, &[&str]); 5] = [
    ("In and out", &["init", "deposit", "withdraw"]),
    ("Look", &["list", "show", "diff", "stats", "verify"]),
    ("Make room", &["remove", "gc"]),
    ("To other banks", &["copy", "export", "import"]),
    ("Serve", &["serve", "serve-faults"]),
];

/// Behind the commands.
pub const BANK: &str = "Save a machine twice, look, and take it out again:
  farbus bank init /srv/bank
  farbus bank deposit /srv/bank vm7 --memory vm7.ram --disk vm7.img --device-state vm7.dev
  farbus bank deposit /srv/bank vm7 --memory vm7.ram --disk vm7.img --device-state vm7.dev
  farbus bank list /srv/bank
  farbus bank withdraw /srv/bank vm7@1 --to vm7-yesterday

Keep a week, and what it needs:
  farbus bank remove /srv/bank --keep-within 7d --keep-last 1
  farbus bank gc /srv/bank

Take the last deposit to another host:
  farbus bank export /srv/bank vm7 - | ssh other farbus bank import /srv/bank -";

/// What the words before the commands mean, and the commands.
pub fn grouped() -> String {
    let commands = BankCommand::augment_subcommands(Command::new("bank"));
    let mut text = "{about-with-newline}\n{usage-heading} {usage}\n".to_owned();
    for (group, names) in GROUPS {
        text += &format!("\n{group}:\n");
        for command in names.iter().filter_map(|name| commands.find_subcommand(name)) {
            let about = command.get_about().map(ToString::to_string).unwrap_or_default();
            text += &format!("  {:<14}{about}\n", command.get_name());
        }
    }
    text + "
BANK is a directory of this host (/srv/bank), a bucket of an S3-compatible service (s3://BUCKET/PREFIX), a directory that is used as
  if it were one (file:///DIRECTORY), or where farbus bank serve serves one (shm:PATH, rdma:HOST:PORT). Where a bucket's service is and
  who asks say AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the others of their kind; http:// without
  encryption is used only with AWS_ALLOW_HTTP=true.
MACHINE is a name, vm7 (its last deposit), one of its deposits, vm7@3 (the third), or at least 6 digits of a root.

Options:
{options}

Exit status: 0 done, 1 failed or (list, stats, verify) something is damaged, 2 the arguments make no sense. farbus --help says all of
them, and how times and sizes are written.{after-help}"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_is_in_one_group() {
        let commands = BankCommand::augment_subcommands(Command::new("bank"));
        let grouped: Vec<_> = GROUPS.iter().flat_map(|(_, names)| names.iter().copied()).collect();
        let mut all: Vec<_> = commands.get_subcommands().map(Command::get_name).collect();
        assert_eq!(grouped.len(), all.len(), "{grouped:?}");
        all.retain(|name| !grouped.contains(name));
        assert_eq!(all, Vec::<&str>::new(), "in no group");
    }
}
