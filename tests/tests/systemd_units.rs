//! The units in farbus/systemd: systemd itself finds nothing wrong with them, and its own judgement of their sandbox is good.
//!
//! `systemd-analyze verify` says nothing of `farbus-lend@.service`, and `systemd-analyze security --offline=true` an exposure of at most 2.0 of 10. Where there is no
//! systemd-analyze both say *not run*; that the arguments of the units are ones that the program takes is looked at everywhere.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::path::PathBuf;
use std::process::Command;

use farbus_tests::program::{farbus, repository};

/// Of 10; systemd calls up to 2 and more "OK", and what it calls "SAFE" leaves no network.
const MOST_EXPOSED: f64 = 2.0;

fn units() -> Vec<PathBuf> {
    let mut units: Vec<_> =
        std::fs::read_dir(repository().join("farbus/systemd")).unwrap().map(|entry| entry.unwrap().path()).collect();
    units.retain(|path| path.extension().is_some_and(|kind| kind == "service" || kind == "socket"));
    units.sort();
    assert_eq!(units.len(), 5, "{units:?}");
    units
}

/// The units with the program that is there, in a folder of their own.
fn installed() -> (tempfile::TempDir, Vec<PathBuf>) {
    let folder = tempfile::tempdir().unwrap();
    let install = |unit: &PathBuf| {
        let text = std::fs::read_to_string(unit).unwrap().replace("/usr/bin/farbus", &farbus().display().to_string());
        let path = folder.path().join(unit.file_name().unwrap());
        std::fs::write(&path, text).unwrap();
        path
    };
    let units = units().iter().map(install).collect();
    (folder, units)
}

fn analyze(args: &[&str], units: &[PathBuf]) -> Option<(bool, String)> {
    let output = match Command::new("systemd-analyze").args(args).args(units).output() {
        Ok(output) => output,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            println!("not run: there is no systemd-analyze");
            return None;
        }
        Err(error) => panic!("systemd-analyze: {error}"),
    };
    let said = [output.stdout, output.stderr].concat();
    Some((output.status.success(), String::from_utf8_lossy(&said).into_owned()))
}

#[test]
fn systemd_finds_nothing_wrong_with_the_units() {
    let (folder, units) = installed();
    let Some((good, said)) = analyze(&["verify", "--man=no"], &units) else { return };
    assert!(good && said.trim().is_empty(), "{said}");
    // It would find what is wrong.
    let broken = folder.path().join("broken.service");
    std::fs::write(&broken, "[Service]\nExecStart=/nowhere/farbus\nProtectSistem=strict\n").unwrap();
    let (_, said) = analyze(&["verify", "--man=no"], &[broken]).unwrap();
    assert!(said.contains("ProtectSistem"), "{said}");
}

#[test]
fn the_sandbox_of_each_service_leaves_little() {
    let (_folder, units) = installed();
    for unit in units.iter().filter(|unit| unit.extension().is_some_and(|kind| kind == "service")) {
        let Some((_, said)) = analyze(&["security", "--offline=true", "--no-pager"], std::slice::from_ref(unit)) else { return };
        let level = said
            .lines()
            .find_map(|line| line.split_once("exposure level for ")?.1.split_once(": ")?.1.split(' ').next()?.parse::<f64>().ok());
        let level = level.unwrap_or_else(|| panic!("{said}"));
        println!("{}: exposure {level}", unit.file_name().unwrap().display());
        assert!(level <= MOST_EXPOSED, "{said}");
    }
}

#[test]
fn what_the_units_start_is_what_the_program_takes() {
    for unit in units() {
        let text = std::fs::read_to_string(&unit).unwrap();
        let Some(start) = text.lines().find_map(|line| line.strip_prefix("ExecStart=/usr/bin/farbus ")) else { continue };
        let (command, config) = start.split_once(" --config ").unwrap();
        assert!(config.starts_with("/etc/farbus/"), "{start}");
        // The example in the unit's own head, as a file.
        let example = text.lines().find_map(|line| line.strip_prefix("# For example: ")).unwrap();
        let keys: Vec<_> = example.split(" (").next().unwrap().split(", ").collect();
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("farbus.toml");
        std::fs::write(&file, keys.join("\n")).unwrap();
        let mut asked = Command::new(farbus());
        let output = asked.args(command.split(' ')).arg("--config").arg(&file).arg("--print-config").output().unwrap();
        assert!(output.status.success(), "{}: {}", unit.display(), String::from_utf8_lossy(&output.stderr));
    }
}
