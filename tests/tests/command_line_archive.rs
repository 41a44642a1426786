//! `farbus bank export` and `import` as their users run them: through files, through pipes, and with files that are not whole.
//!
//! `farbus bank export bank vm7 - | farbus bank import other -` makes the machine in the other bank; an archive that lost its last byte is refused with what to do.

use std::path::Path;
use std::process::{Command, Stdio};

use farbus_tests::bank_lab::BankLab;
use farbus_tests::farbus;
use serde_json::Value;

/// A bank with two deposits of `vm7`, and an empty one.
fn lab() -> BankLab {
    let lab = BankLab::new();
    lab.ok(&["init", &lab.path("other")]);
    let mut memory: Vec<u8> = (0..500_000_u32).flat_map(|n| (n / 700).wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    for change in 0..2 {
        memory[8192..12_288].fill(change);
        let ram = lab.write("ram", &memory);
        lab.ok(&["deposit", &lab.bank(), "vm7", "--memory", &ram]);
    }
    lab
}

#[test]
fn a_machine_goes_through_files_to_another_bank_the_second_by_what_changed() {
    let lab = lab();
    let (bank, other, first, second) = (lab.path("bank"), lab.path("other"), lab.path("first"), lab.path("second"));
    let whole = lab.ok(&["export", &bank, "vm7@1", &first]);
    let changes = lab.ok(&["export", &bank, "vm7", &second, "--since", "vm7@1"]);
    assert_eq!((&changes["pages"], &changes["since"]), (&1.into(), &"vm7@1".into()));
    assert_eq!(whole["bytes"], std::fs::metadata(&first).unwrap().len());
    lab.refused(&["import", &other, &second], &["rests on the machine", "without --since"]);
    assert_eq!(lab.ok(&["import", &other, &first])["root"], whole["root"]);
    assert_eq!(lab.ok(&["import", &other, &second])["machine"], "vm7@2");
    assert_eq!(lab.ok(&["import", &other, &second])["was_there"], true);
    lab.ok(&["withdraw", &other, "vm7", "--to", &lab.path("out")]);
    assert!(std::fs::read(lab.path("out/memory")).unwrap() == std::fs::read(lab.path("ram")).unwrap());
    let words = BankLab::run(&["export", &bank, "vm7", &first, "--replace"]);
    assert!(words.code() == Some(0) && words.stdout.contains("vm7@2: ") && words.stdout.contains("root "), "{}", words.stdout);
}

#[test]
fn a_machine_goes_through_a_pipe() {
    let lab = lab();
    let mut export = Command::new(farbus());
    export.args(["bank", "export", &lab.path("bank"), "vm7", "-", "--json"]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut export = export.spawn().unwrap();
    let mut import = Command::new(farbus());
    import.args(["bank", "import", &lab.path("other"), "-", "--json"]).stdin(export.stdout.take().unwrap());
    let imported = import.output().unwrap();
    let exported = export.wait_with_output().unwrap();
    assert!(exported.status.success() && imported.status.success(), "{exported:?} {imported:?}");
    let (said, made): (Value, Value) =
        (serde_json::from_slice(&exported.stderr).unwrap(), serde_json::from_slice(&imported.stdout).unwrap());
    assert_eq!((&said["root"], &said["pages"]), (&made["root"], &made["pages"]));
}

#[test]
fn an_archive_that_is_not_whole_is_refused_and_nothing_is_left() {
    let lab = lab();
    let (bank, other, file) = (lab.path("bank"), lab.path("other"), lab.path("archive"));
    lab.ok(&["export", &bank, "vm7", &file]);
    let archive = std::fs::read(&file).unwrap();
    for (name, bytes) in
        [("cut", &archive[..archive.len() - 1]), ("half", &archive[..archive.len() / 2]), ("empty", &[]), ("text", b"vm7")]
    {
        std::fs::write(lab.path(name), bytes).unwrap();
        lab.refused(&["import", &other, &lab.path(name)], &["ends too early", "export the machine again"]);
    }
    let mut changed = archive.clone();
    changed[archive.len() / 2] ^= 16;
    std::fs::write(lab.path("changed"), changed).unwrap();
    lab.refused(&["import", &other, &lab.path("changed")], &["export the machine again"]);
    std::fs::write(lab.path("longer"), [&archive[..], b"x"].concat()).unwrap();
    lab.refused(&["import", &other, &lab.path("longer")], &["follow its end"]);
    assert!(lab.names(&other).is_empty());
    lab.ok(&["gc", &other]);
    assert_eq!(std::fs::read_dir(lab.path("other/packs")).unwrap().count(), 0);
}

#[test]
fn an_export_says_what_is_wrong_and_leaves_no_part() {
    let lab = lab();
    let (bank, file) = (lab.path("bank"), lab.path("archive"));
    lab.refused(&["export", &bank, "vm8", &file], &["vm8", "farbus bank list"]);
    lab.refused(&["export", &bank, "vm7", &lab.path("ram")], &["is there", "--replace"]);
    lab.refused(&["export", &bank, "vm7", &lab.path("no/such/folder")], &["cannot write", "choose a place"]);
    lab.refused(&["import", &bank, &lab.path("none")], &["none", "can read"]);
    for pack in std::fs::read_dir(lab.path("bank/packs")).unwrap() {
        let pack = pack.unwrap().path();
        let mut bytes = std::fs::read(&pack).unwrap();
        bytes[30] ^= 4;
        std::fs::write(pack, bytes).unwrap();
    }
    lab.refused(&["export", &bank, "vm7", &file], &["damaged", "farbus bank verify"]);
    assert!(!Path::new(&file).exists() && !Path::new(&format!("{file}.farbus-part")).exists());
}

#[test]
fn a_tenants_archive_is_imported_with_its_key_only() {
    let lab = lab();
    let (key, tenant, again, file) = (lab.path("key"), lab.path("tenant"), lab.path("again"), lab.path("archive"));
    std::fs::write(&key, [3; 32]).unwrap();
    for bank in [&tenant, &again] {
        lab.ok(&["init", bank, "--tenant-key", &key]);
    }
    lab.ok(&["deposit", &tenant, "vm", "--memory", &lab.path("ram"), "--tenant-key", &key]);
    lab.ok(&["export", &tenant, "vm", &file, "--tenant-key", &key]);
    lab.refused(&["import", &lab.path("other"), &file], &["another tenant key", "same tenant"]);
    lab.ok(&["import", &again, &file, "--tenant-key", &key]);
}
