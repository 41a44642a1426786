//! `farbus completions` and `farbus man`: what a shell and a manual know of the arguments, made from the arguments themselves.
//!
//! `farbus man man1` writes man1/farbus.1, man1/farbus-lend.1, man1/farbus-bank-deposit.1 and so on, with the text of `--help`.

use std::fs;
use std::path::Path;

use clap::{Command, CommandFactory};

use crate::cli::{Cli, CompletionsArgs, ManArgs};
use crate::failure::Advise;
use crate::output::print_line;

/// Prints completions.
pub fn completions(args: &CompletionsArgs) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "farbus", &mut script);
    print_line(String::from_utf8_lossy(&script).trim_end());
    Ok(())
}

/// Writes a page for each command.
pub fn pages(args: &ManArgs) -> anyhow::Result<()> {
    let folder = &args.folder;
    let advice = "name a folder that is there and that this user can write, or one that can be made";
    fs::create_dir_all(folder).advise(format!("cannot make {}", folder.display()), advice)?;
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    let mut written = Vec::new();
    write(&command, folder, &mut written).advise(format!("cannot write into {}", folder.display()), advice)?;
    print_line(&if args.json {
        serde_json::json!({ "folder": folder, "pages": written }).to_string()
    } else {
        format!("{} pages are in {}: man {}/farbus.1", written.len(), folder.display(), folder.display())
    });
    Ok(())
}

fn write(command: &Command, folder: &Path, written: &mut Vec<String>) -> std::io::Result<()> {
    // clap calls the commands of commands "farbus-bank-deposit" for this.
    let name = command.get_display_name().unwrap_or_else(|| command.get_name()).to_owned();
    let page = format!("{name}.1");
    let mut roff = Vec::new();
    clap_mangen::Man::new(command.clone()).render(&mut roff)?;
    fs::write(folder.join(&page), roff)?;
    written.push(page);
    command.get_subcommands().filter(|command| !command.is_hide_set()).try_for_each(|command| write(command, folder, written))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_a_page_for_every_command() {
        let folder = tempfile::tempdir().unwrap();
        let man1 = folder.path().join("share/man1");
        pages(&ManArgs { folder: man1.clone(), json: false }).unwrap();
        let read = |page: &str| fs::read_to_string(man1.join(page)).unwrap_or_else(|error| panic!("{page}: {error}"));
        assert!(read("farbus.1").contains("farbus\\-lend(1)"), "{}", read("farbus.1"));
        assert!(read("farbus-lend.1").contains("\\-\\-listen"));
        assert!(read("farbus-bank-deposit.1").contains("\\-\\-dirty") && read("farbus-bench-compare.1").contains("BEFORE"));
        let blocked = ManArgs { folder: man1.join("farbus.1"), json: false };
        assert!(pages(&blocked).is_err(), "a file is no folder");
    }

    #[test]
    fn completions_know_the_commands() {
        for shell in [clap_complete::Shell::Bash, clap_complete::Shell::Zsh, clap_complete::Shell::Fish] {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "farbus", &mut script);
            let script = String::from_utf8(script).unwrap();
            assert!(script.contains("serve-faults") && script.contains("lend"), "{shell}");
        }
    }
}
