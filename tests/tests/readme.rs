//! What README and the test command's help say is held to what is there.
//!
//! A line of README's "Embed it" that is not in tests/examples/embed.rs, which is compiled and runs, fails with that line.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

use std::process::Command;

use farbus_tests::program::repository;

fn read(path: &str) -> String {
    std::fs::read_to_string(repository().join(path)).unwrap()
}

#[test]
fn what_readme_shows_of_the_library_is_in_the_program_that_it_names() {
    let (readme, example) = (read("README.md"), read("tests/examples/embed.rs"));
    assert!(readme.contains("(tests/examples/embed.rs)"));
    let mut shown = 0;
    for block in readme.split("```rust\n").skip(1) {
        for line in block.split("```").next().unwrap().lines().filter(|line| !line.is_empty()) {
            assert!(example.lines().any(|there| there.trim() == line.trim()), "not in the example: {line}");
            shown += 1;
        }
    }
    assert!(shown >= 5, "README shows {shown} lines");
}

#[test]
fn the_test_commands_help_has_every_step() {
    let help = Command::new(repository().join("ci/run")).arg("--help").output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    let script = read("ci/run");
    let steps = script.lines().find_map(|line| line.strip_prefix("all=(")?.strip_suffix(')')).unwrap();
    for step in steps.split(' ').chain(["fuzz", "measurements"]) {
        assert!(help.lines().any(|line| line.trim_start().starts_with(&format!("{step} "))), "{step} is missing:\n{help}");
    }
}
