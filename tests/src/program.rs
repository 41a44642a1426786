//! Where the `farbus` program is: built once, in release, in the target folder that this test itself lies in.
//!
//! Cargo names binaries only to tests of their own package, so `farbus()` asks cargo; that takes a second where it is fresh. FARBUS_BIN names
//! another program to test instead, `FARBUS_BIN=/usr/bin/farbus` say.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The program under test.
///
/// # Panics
/// Where it cannot be built.
pub fn farbus() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| match std::env::var_os("FARBUS_BIN") {
        Some(named) => PathBuf::from(named),
        None => build(),
    })
}

/// The folder of the whole repository.
///
/// # Panics
/// Where this package lies nowhere.
pub fn repository() -> &'static Path {
    match Path::new(env!("CARGO_MANIFEST_DIR")).parent() {
        Some(root) => root,
        None => panic!("{} has no parent", env!("CARGO_MANIFEST_DIR")),
    }
}

fn build() -> PathBuf {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let target = target_folder();
    let built = Command::new(cargo)
        .args(["build", "--release", "--package", "farbus", "--bin", "farbus", "--target-dir"])
        .arg(&target)
        .current_dir(repository())
        .output();
    match built {
        Ok(output) if output.status.success() => target.join("release/farbus"),
        Ok(output) => panic!("farbus does not build:\n{}", String::from_utf8_lossy(&output.stderr)),
        Err(error) => panic!("cargo does not start: {error}"),
    }
}

/// The test itself is `TARGET/PROFILE/deps/NAME`.
fn target_folder() -> PathBuf {
    let test = std::env::current_exe().unwrap_or_else(|error| panic!("where is this test? {error}"));
    let deps = test.ancestors().find(|folder| folder.file_name().is_some_and(|name| name == "deps"));
    match deps.and_then(|deps| deps.ancestors().nth(2)) {
        Some(target) => target.to_owned(),
        None => repository().join("target"),
    }
}
