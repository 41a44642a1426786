//! On a host without libibverbs the crate loads, and whoever asks for RDMA is told what to install.
//!
//! The test moves into an empty root first, where no library at all can be found, so that it holds on hosts that have the library too. That takes root, or a
//! user namespace: `unshare --map-root-user cargo test --test verbs_bare_host -- --ignored`; `ci/run binary` does it.

use farbus_transport::verbs::{DeviceChoice, NoRdma, VerbsError, VerbsFabric, devices};

#[test]
#[ignore = "needs root, or a user namespace, to leave the host's libraries behind; ci/run binary runs it"]
fn without_the_library_the_answer_is_what_to_install() {
    let empty = tempfile::tempdir().unwrap();
    rustix::process::chdir(empty.path()).unwrap();
    // A folder that is nowhere any more stays empty for good, and nothing of it is left behind.
    drop(empty);
    rustix::process::chroot(".").unwrap();
    assert_eq!(std::fs::read_dir("/").unwrap().count(), 0, "the root is not empty");

    let answer = devices();
    let Err(VerbsError::NoRdma(NoRdma::Library(reason))) = &answer else { panic!("{answer:?}") };
    assert!(reason.contains("libibverbs.so.1"), "{reason}");
    let text = answer.unwrap_err().to_string();
    assert!(text.contains("no RDMA library") && text.ends_with("apt-get install libibverbs1 ibverbs-providers"), "{text}");
    // Asked again, and for a link: the same answer.
    assert_eq!(devices().unwrap_err().to_string(), text);
    let linked = VerbsFabric::pair(&DeviceChoice::default());
    assert_eq!(linked.unwrap_err().to_string(), text);
}
