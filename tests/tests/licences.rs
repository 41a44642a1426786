//! Every dependency's licence and origin, judged by the lists of deny.toml without cargo-deny, whose build takes longer than all of our tests.
//!
//! A crate under "MPL-2.0" fails with its name and that expression; one under "(MIT OR Apache-2.0) AND Unicode-3.0" passes only where
//! deny.toml names it with Unicode-3.0 as an exception.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

struct Lists {
    allow: BTreeSet<String>,
    exceptions: Vec<(String, BTreeSet<String>)>,
    registries: BTreeSet<String>,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

fn strings(value: &toml::Value) -> BTreeSet<String> {
    value.as_array().unwrap().iter().map(|text| text.as_str().unwrap().to_owned()).collect()
}

fn lists() -> Lists {
    let deny: toml::Table = std::fs::read_to_string(root().join("deny.toml")).unwrap().parse().unwrap();
    let exceptions = deny["licenses"]["exceptions"].as_array().unwrap().iter();
    Lists {
        allow: strings(&deny["licenses"]["allow"]),
        exceptions: exceptions.map(|one| (one["crate"].as_str().unwrap().to_owned(), strings(&one["allow"]))).collect(),
        registries: strings(&deny["sources"]["allow-registry"]),
    }
}

/// Why a package may not be here; `None` where it may.
fn objection(name: &str, licence: Option<&str>, source: Option<&str>, lists: &Lists) -> Option<String> {
    // Without a source it is our own.
    if let Some(source) = source
        && !lists.registries.contains(source.trim_start_matches("registry+"))
    {
        return Some(format!("{name} comes from {source}: use a published crate, or name its registry in deny.toml"));
    }
    let Some(licence) = licence else {
        return Some(format!("{name} names no licence: use another crate"));
    };
    let Ok(expression) = spdx::Expression::parse_mode(licence, spdx::ParseMode::LAX) else {
        return Some(format!("{name} has the licence {licence:?}, which is no SPDX expression: use another crate"));
    };
    let excepted = lists.exceptions.iter().filter(|(excepted, _)| excepted == name).flat_map(|(_, more)| more);
    let allowed: BTreeSet<&String> = lists.allow.iter().chain(excepted).collect();
    // A licence with an addition, such as LLVM's exception, is another one.
    let fine =
        expression.evaluate(|wanted| wanted.addition.is_none() && allowed.iter().any(|one| wanted.license.to_string() == **one));
    (!fine).then(|| format!("{name} is under {licence:?}: use another crate, or make the case for an exception in deny.toml"))
}

fn packages() -> Vec<Value> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--locked", "--all-features"])
        .args(["--filter-platform", "x86_64-unknown-linux-gnu"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    metadata["packages"].as_array().unwrap().clone()
}

#[test]
fn nothing_under_a_foreign_licence_or_of_unknown_origin_is_linked_in() {
    let lists = lists();
    let packages = packages();
    assert!(packages.len() > 50, "cargo names only {} packages", packages.len());
    let objections: Vec<String> = packages
        .iter()
        .filter_map(|package| objection(package["name"].as_str()?, package["license"].as_str(), package["source"].as_str(), &lists))
        .collect();
    assert!(objections.is_empty(), "{}", objections.join("\n"));
    // An exception that nobody needs any more would let something else in.
    for (name, _) in &lists.exceptions {
        let used = packages.iter().any(|package| package["name"] == name.as_str());
        assert!(used, "{name} is gone: take its exception out of deny.toml");
    }
}

#[test]
fn a_foreign_licence_a_missing_one_and_a_git_source_are_seen() {
    let lists = lists();
    let registry = Some("registry+https://github.com/rust-lang/crates.io-index");
    for licence in ["MIT", "Unlicense OR MIT", "MIT/Apache-2.0", "Apache-2.0 WITH LLVM-exception OR MIT", "MIT AND BSD-3-Clause"] {
        assert_eq!(objection("some", Some(licence), registry, &lists), None);
    }
    for licence in ["MPL-2.0", "GPL-2.0-only", "MIT AND GPL-3.0-or-later", "(MIT OR Apache-2.0) AND Unicode-3.0", "free", ""] {
        assert!(objection("some", Some(licence), registry, &lists).is_some(), "{licence}");
    }
    assert!(objection("some", None, registry, &lists).is_some());
    assert!(objection("some", Some("MIT"), Some("git+https://example.org/some"), &lists).is_some());
}
