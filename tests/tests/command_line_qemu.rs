//! `farbus bank deposit --qemu` and `withdraw --qemu` as their users run them, with a file as QEMU writes it, made here; that a real QEMU takes it is tests/tests/bank_qemu.rs.
//!
//! A file of one block of 2 MiB goes in, out again byte for byte, and in once more with only its first page read; a disk image in its place is refused.

use farbus_tests::bank_lab::BankLab;

const PAGE: usize = 4096;
/// Where the pages are.
const PLACE: usize = 1 << 20;

/// A machine with 2 MiB of memory, of which every third page is zero, and some device state; `fill` is in its first page.
fn saved(capability: &str, fill: u8) -> Vec<u8> {
    let mut memory = vec![0; 512 * PAGE];
    for (at, page) in memory.chunks_exact_mut(PAGE).enumerate().filter(|(at, _)| at % 3 != 2) {
        page.iter_mut().enumerate().for_each(|(byte, to)| *to = (at * 31 + byte / 16 + 1) as u8 | 1);
    }
    memory[..PAGE].fill(fill);
    let mut file = b"QEVM\0\0\0\x03\x07\0\0\0\x02pc\x05\x1aconfiguration/capabilities\0\0\0\x01\0\0\0\x01".to_vec();
    file.push(capability.len() as u8);
    file.extend_from_slice(capability.as_bytes());
    file.extend_from_slice(b"\x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x04");
    file.extend_from_slice(&(memory.len() as u64 | 4).to_be_bytes());
    file.extend_from_slice(b"\x06pc.ram");
    file.extend_from_slice(&(memory.len() as u64).to_be_bytes());
    file.extend_from_slice(&1_u32.to_be_bytes());
    let bitmap = file.len() + 24;
    [PAGE, bitmap, PLACE].iter().for_each(|number| file.extend_from_slice(&(*number as u64).to_be_bytes()));
    file.extend((0..64).map(|byte| (0..8).filter(|bit| (byte * 8 + bit) % 3 != 2).fold(0, |bits, bit| bits | 1_u8 << bit)));
    file.resize(PLACE, 0);
    file.extend_from_slice(&memory);
    file.extend_from_slice(&0x10_u64.to_be_bytes());
    file.extend_from_slice(b"and the state of devices");
    file
}

fn lab() -> BankLab {
    let lab = BankLab::new();
    lab.write("vm7.mig", saved("mapped-ram", 9));
    lab.write("vm7.disk", vec![5; 10_000]);
    lab
}

#[test]
fn a_file_that_qemu_saved_goes_in_and_out_with_its_disk() {
    let lab = lab();
    let (bank, mig, disk, out) = (lab.path("bank"), lab.path("vm7.mig"), lab.path("vm7.disk"), lab.path("out.mig"));
    lab.ok(&["deposit", &bank, "vm7", "--qemu", &mig, "--disk", &disk]);
    let shown = lab.ok(&["show", &bank, "vm7"]);
    let names: Vec<_> = shown["sections"].as_array().unwrap().iter().map(|section| section["name"].clone()).collect();
    assert_eq!(names, ["pc.ram", "qemu", "disk0"]);
    let folder = lab.path("others");
    let report = lab.ok(&["withdraw", &bank, "vm7", "--qemu", &out, "--to", &folder]);
    assert_eq!(report["qemu"]["bytes"], std::fs::metadata(&mig).unwrap().len());
    assert!(std::fs::read(&out).unwrap() == std::fs::read(&mig).unwrap());
    // What is in the file is not written beside it.
    let others: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(others, ["disk0"]);
    lab.refused(&["withdraw", &bank, "vm7", "--qemu", &out], &["is there", "--replace"]);
    let end = BankLab::run(&["withdraw", &bank, "vm7", "--qemu", &out, "--replace"]);
    assert!(end.code() == Some(0) && end.stdout.contains("of 2 sections"), "{}", end.stdout);
}

#[test]
fn of_a_block_only_what_changed_is_read_where_that_is_told() {
    let lab = lab();
    let (bank, mig, bitmap) = (lab.path("bank"), lab.path("vm7.mig"), lab.path("bitmap"));
    lab.ok(&["deposit", &bank, "vm7", "--qemu", &mig]);
    std::fs::write(&mig, saved("mapped-ram", 11)).unwrap();
    std::fs::write(&bitmap, [&[1_u8, 0, 0, 0, 0, 0, 0, 0][..], &[0; 56]].concat()).unwrap();
    let report = lab.ok(&["deposit", &bank, "vm7", "--qemu", &mig, "--parent", "vm7", "--dirty", &format!("pc.ram={bitmap}")]);
    assert_eq!((&report["counts"]["new"], &report["parent"]), (&1.into(), &"vm7@1".into()));
    lab.ok(&["withdraw", &bank, "vm7@2", "--qemu", &lab.path("out")]);
    assert!(std::fs::read(lab.path("out")).unwrap() == saved("mapped-ram", 11));
    lab.misused(&["deposit", &bank, "vm7", "--qemu", &mig, "--dirty", &format!("memory={bitmap}")], &["no section is called that"]);
}

#[test]
fn what_is_no_such_file_or_machine_is_refused_with_what_to_do() {
    let lab = lab();
    let (bank, disk, out) = (lab.path("bank"), lab.path("vm7.disk"), lab.path("out"));
    lab.refused(&["deposit", &bank, "vm7", "--qemu", &disk], &["no file that QEMU saved", "migrate file:FILE"]);
    std::fs::write(lab.path("stream"), saved("multifd", 1)).unwrap();
    lab.refused(&["deposit", &bank, "vm7", "--qemu", &lab.path("stream")], &["mapped-ram", "migrate_set_capability"]);
    std::fs::write(lab.path("cut"), &saved("mapped-ram", 1)[..PLACE + 7 * PAGE]).unwrap();
    lab.refused(&["deposit", &bank, "vm7", "--qemu", &lab.path("cut")], &["it ends at byte"]);
    lab.refused(&["deposit", &bank, "vm7", "--qemu", &lab.path("none")], &["none", "can read"]);
    lab.ok(&["deposit", &bank, "vm7", "--disk", &disk]);
    lab.refused(&["withdraw", &bank, "vm7", "--qemu", &out], &["not deposited from a mapped-ram file", "--to DIR"]);
    lab.refused(
        &["withdraw", &bank, "vm7", "--qemu", &out, "--to", &lab.path("folder")],
        &["not deposited from a mapped-ram file"],
    );
    assert!(!std::fs::exists(&out).unwrap() && !std::fs::exists(format!("{out}.farbus-part")).unwrap());
}
