//! Every input of the fuzzing corpora goes through its target's body again, without the fuzzer, so that what was found once stays found.
//!
//! fuzz/corpus/nvme_registers holds inputs that reach different places of the controller; each is run in a plain build with its assertions on.
//! Crashes that were mended have a file there too, named after what went wrong.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::path::{Path, PathBuf};

use farbus_tests::fuzz_bodies::{TARGETS, Target};

fn corpus(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("fuzz/corpus").join(name)
}

fn replay(name: &str) {
    let (_, body): Target = TARGETS.into_iter().find(|(known, _)| *known == name).unwrap();
    let mut files: Vec<PathBuf> = std::fs::read_dir(corpus(name)).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(files.len() >= 10, "only {} inputs in {}", files.len(), corpus(name).display());
    body(&[]);
    for file in files {
        // The name of the input comes before the panic that it causes.
        eprintln!("{}", file.display());
        body(&std::fs::read(&file).unwrap());
    }
}

#[test]
fn bank_archive() {
    replay("bank_archive");
}

#[test]
fn bank_formats() {
    replay("bank_formats");
}

#[test]
fn bank_layers() {
    replay("bank_layers");
}

#[test]
fn bank_link() {
    replay("bank_link");
}

#[test]
fn bank_store() {
    replay("bank_store");
}

#[test]
fn cloud_hypervisor_save() {
    replay("cloud_hypervisor_save");
}

#[test]
fn config_writes() {
    replay("config_writes");
}

#[test]
fn control_frames() {
    replay("control_frames");
}

#[test]
fn firecracker_regions() {
    replay("firecracker_regions");
}

#[test]
fn function_state() {
    replay("function_state");
}

#[test]
fn link_hello() {
    replay("link_hello");
}

#[test]
fn nvme_registers() {
    replay("nvme_registers");
}

#[test]
fn pci_config() {
    replay("pci_config");
}

#[test]
fn prp_lists() {
    replay("prp_lists");
}

#[test]
fn qemu_mapped_ram() {
    replay("qemu_mapped_ram");
}

#[test]
fn session_messages() {
    replay("session_messages");
}

#[test]
fn verbs_wire() {
    replay("verbs_wire");
}

#[test]
fn vfio_user_messages() {
    replay("vfio_user_messages");
}

#[test]
fn vfio_user_server() {
    replay("vfio_user_server");
}

#[test]
fn every_target_has_a_corpus_and_every_corpus_a_target() {
    let folders = |path: &Path| {
        let mut names: Vec<String> = std::fs::read_dir(path)
            .unwrap()
            .map(|entry| entry.unwrap().path().file_stem().unwrap().to_str().unwrap().into())
            .collect();
        names.sort();
        names
    };
    let known: Vec<&str> = TARGETS.iter().map(|(name, _)| *name).collect();
    assert_eq!(folders(corpus("").as_path()), known);
    assert_eq!(folders(&corpus("..").parent().unwrap().parent().unwrap().join("fuzz_targets")), known);
}
