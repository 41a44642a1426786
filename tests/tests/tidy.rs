//! The house rules as tests: what a reviewer would have to say again and again is said here, with what to do instead.
//!
//! A `Mutex` in transport/src/ring.rs fails with that file and line and "hand the value over a ring or keep it on one thread"; a new unsafe
//! block in a file that has none fails until that file is in the list below, which a reviewer then sees.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Which of our packages each may use, in any kind of dependency.
const LAYERS: &[(&str, &[&str])] = &[
    ("transport", &[]),
    ("control", &["transport"]),
    ("remote-dma", &["transport"]),
    ("pci-shim", &["transport", "remote-dma"]),
    ("machine-bank", &["transport"]),
    ("bench", &["transport", "control", "remote-dma", "pci-shim", "machine-bank"]),
    ("farbus", &["transport", "control", "remote-dma", "pci-shim", "machine-bank", "bench"]),
    ("mini-vmm", &["transport", "remote-dma", "pci-shim", "machine-bank"]),
    ("tests", &["transport", "control", "remote-dma", "pci-shim", "machine-bank", "bench", "mini-vmm"]),
    // Outside the workspace.
    ("fuzz", &["tests"]),
    ("tests/oracle", &["transport"]),
];

/// Files and folders of the data path: no lock, because a thread that waits there waits with the guest's CPU.
const DATA_PATH: &[&str] = &[
    "transport/src/fabric.rs",
    "transport/src/local.rs",
    "transport/src/memory.rs",
    "transport/src/ring.rs",
    "transport/src/shm/",
    "transport/src/span.rs",
    "transport/src/table.rs",
    "transport/src/verbs/",
    "remote-dma/src/borrower/",
    "remote-dma/src/dirty_log.rs",
    "remote-dma/src/endpoint.rs",
    "remote-dma/src/iova_map.rs",
    "remote-dma/src/lender/",
    "remote-dma/src/message.rs",
    "remote-dma/src/model/nvme/",
];

/// Files with `unsafe` and how often at most: blocks, functions, implementations, foreign blocks. The number may only fall.
const UNSAFE: &[(&str, usize)] = &[
    ("bench/src/measure/allocations.rs", 9),
    ("bench/src/measure/syscalls.rs", 6),
    // KVM is given the address of memory that a machine starts on.
    ("bench/src/suite/bank_vm.rs", 1),
    ("machine-bank/src/lazy/area.rs", 6),
    ("machine-bank/src/lazy/device.rs", 4),
    ("machine-bank/src/lazy/uffd.rs", 4),
    ("machine-bank/src/track/writes.rs", 4),
    // KVM is given the address of the machine's memory, and the guest program's bytes lie between two labels of its assembly.
    ("mini-vmm/src/kvm/guest.rs", 2),
    ("mini-vmm/src/kvm/mod.rs", 1),
    ("remote-dma/src/model/nvme/media/worker.rs", 2),
    ("remote-dma/src/vfio/interrupts.rs", 1),
    ("remote-dma/src/vfio/registers.rs", 6),
    ("remote-dma/src/vfio/sys.rs", 5),
    ("remote-dma/src/vfio/windows.rs", 1),
    ("remote-dma/tests/nvme_data_path.rs", 5),
    ("tests/oracle/tests/peer/mod.rs", 2),
    ("tests/tests/idle.rs", 1),
    ("transport/src/barrier.rs", 1),
    ("transport/src/memory.rs", 12),
    ("transport/src/shm/lines.rs", 5),
    ("transport/src/verbs/chain.rs", 2),
    ("transport/src/verbs/context.rs", 23),
    ("transport/src/verbs/device.rs", 1),
    ("transport/src/verbs/library.rs", 7),
    ("transport/src/verbs/objects.rs", 31),
    ("transport/src/verbs/windows.rs", 3),
    ("transport/tests/loom_support/mod.rs", 2),
];
const UNSAFE_IN_ALL: usize = 147;

/// Lines from which a file should have been split.
const LONG: usize = 450;
/// Files that are longer, with the length they may not grow beyond.
const LONG_FILES: &[(&str, usize)] =
    &[("pci-shim/tests/vfio_user.rs", 628), ("remote-dma/tests/nvme.rs", 498), ("remote-dma/tests/nvme_storm.rs", 517)];

/// Written by a program, from declarations alone; tests/oracle holds it against its source.
const GENERATED: &str = "transport/src/verbs/sys.rs";

/// What may not stand in code, and what to do instead.
const UNFINISHED: &[(&str, &str)] = &[
    ("todo!", "write it, or refuse the case with an error that says so"),
    ("unimplemented!", "write it, or refuse the case with an error that says so"),
    ("dbg!", "use tracing, or take it out"),
    ("FIXME", "mend it, or open an issue"),
    ("TODO", "do it, or open an issue"),
];

/// Files with ignored tests, and the test program that a step of ci/run, or the list of ci/lab/tests, runs them by.
const IGNORED: &[(&str, &str)] = &[
    ("bench/tests/verbs.rs", "verbs"),
    ("bench/tests/verbs_counts.rs", "verbs_counts"),
    ("pci-shim/tests/vfio_user_latency.rs", "vfio_user_latency"),
    ("pci-shim/tests/vfio_user_qemu.rs", "vfio_user_qemu"),
    ("remote-dma/tests/common/links.rs", "session"),
    ("remote-dma/tests/nvme_data_path.rs", "nvme_data_path"),
    ("remote-dma/tests/session_two_hosts.rs", "session_two_hosts"),
    ("tests/oracle/tests/interop.rs", "interop"),
    ("tests/tests/command_line_bank_rdma.rs", "command_line_bank_rdma"),
    ("tests/tests/bank_qemu.rs", "bank_qemu"),
    ("tests/tests/command_line_rdma.rs", "command_line_rdma"),
    ("tests/tests/command_line_two_hosts.rs", "command_line_two_hosts"),
    ("tests/tests/vfio_edu.rs", "vfio_edu"),
    ("tests/tests/vfio_nvme.rs", "vfio_nvme"),
    ("transport/src/verbs/tests.rs", "farbus_transport"),
    ("transport/tests/broken_rules.rs", "broken_rules"),
    ("transport/tests/conformance_verbs.rs", "conformance_verbs"),
    ("transport/tests/verbs_absent.rs", "verbs_absent"),
    ("transport/tests/verbs_bare_host.rs", "verbs_bare_host"),
    ("transport/tests/verbs_edges.rs", "verbs_edges"),
    ("transport/tests/verbs_hostile.rs", "verbs_hostile"),
    ("transport/tests/verbs_life.rs", "verbs_life"),
    ("transport/tests/verbs_two_hosts.rs", "verbs_two_hosts"),
];

/// Paths of somebody's machine. A path counts where it begins a word.
const FOREIGN: &[&str] = &["/root/", "/home/", "/Users/"];

const THIS_FILE: &str = "tests/tests/tidy.rs";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// All text files of the repository by path, without what tools write.
fn files() -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut folders = vec![root().to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path: PathBuf = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            if path.is_dir() {
                if !matches!(name, "target" | ".git" | "corpus" | "artifacts" | "coverage") {
                    folders.push(path);
                }
            } else if !matches!(name, ".git" | "Cargo.lock")
                && let Ok(text) = std::fs::read_to_string(&path)
            {
                found.insert(path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned(), text);
            }
        }
    }
    assert!(found.len() > 100, "only {} files in {}", found.len(), root().display());
    found
}

fn rust_files() -> BTreeMap<String, String> {
    files().into_iter().filter(|(path, _)| path.ends_with(".rs")).collect()
}

/// Lines of code with their numbers, without comments.
fn code(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines().enumerate().map(|(at, line)| (at + 1, line)).filter(|(_, line)| !line.trim_start().starts_with("//"))
}

#[track_caller]
fn none(complaints: &[String]) {
    assert!(complaints.is_empty(), "{} complaints:\n{}", complaints.len(), complaints.join("\n"));
}

#[test]
fn dependencies_point_one_way() {
    let mut complaints = vec![];
    let mut seen = BTreeSet::new();
    for (path, text) in files() {
        let Some(folder) = path.strip_suffix("/Cargo.toml") else { continue };
        seen.insert(folder.to_owned());
        let Some((_, allowed)) = LAYERS.iter().find(|(known, _)| *known == folder) else {
            complaints.push(format!("{path}: say in LAYERS what {folder} may use, and in ARCHITECTURE.md what it is"));
            continue;
        };
        for used in own_dependencies(&text.parse().unwrap()) {
            if used != folder && !allowed.contains(&used.as_str()) {
                complaints
                    .push(format!("{path}: {folder} may not use {used}: move what it needs down to a package that both may use"));
            }
        }
    }
    none(&complaints);
    assert!(["transport", "farbus", "tests", "fuzz"].iter().all(|folder| seen.contains(*folder)), "{seen:?}");
}

/// Our own packages in any dependency table, by folder.
fn own_dependencies(manifest: &toml::Table) -> BTreeSet<String> {
    let targets = manifest.get("target").and_then(toml::Value::as_table).into_iter().flat_map(|targets| targets.values());
    [manifest]
        .into_iter()
        .chain(targets.filter_map(toml::Value::as_table))
        .flat_map(|tables| {
            ["dependencies", "dev-dependencies", "build-dependencies"].into_iter().filter_map(|kind| tables.get(kind))
        })
        .filter_map(toml::Value::as_table)
        .flat_map(toml::Table::keys)
        .filter_map(|name| if name == "farbus" { Some("farbus") } else { name.strip_prefix("farbus-") })
        .map(str::to_owned)
        .collect()
}

#[test]
fn every_file_opens_with_what_it_holds() {
    let mut complaints = vec![];
    for (path, text) in files() {
        let header: Vec<&str> = if path.ends_with(".rs") {
            text.lines().take_while(|line| line.starts_with("//!")).collect()
        } else if path.starts_with("ci/") || path.starts_with(".ci/") || path == "fuzz/run" || path.ends_with(".sh") {
            text.lines().skip_while(|line| line.starts_with("#!")).take_while(|line| line.starts_with('#')).collect()
        } else if path.ends_with(".toml") && !path.ends_with("/Cargo.toml") {
            text.lines().take_while(|line| line.starts_with('#')).collect()
        } else {
            continue;
        };
        let long = header.iter().map(|line| line.len()).sum::<usize>() >= 60;
        if !long {
            complaints.push(format!("{path}: open it with what it holds and one real example, in about three sentences"));
        }
    }
    none(&complaints);
}

#[test]
fn nothing_is_left_unfinished() {
    let mut complaints = vec![];
    for (path, text) in files() {
        for (number, line) in text.lines().enumerate() {
            for (word, instead) in UNFINISHED {
                if path != THIS_FILE && line.contains(word) {
                    complaints.push(format!("{path}:{}: {word}: {instead}", number + 1));
                }
            }
        }
    }
    none(&complaints);
}

#[test]
fn an_ignored_test_is_run_by_a_step_of_its_own() {
    let files = files();
    let (steps, lab) = (&files["ci/run"], &files["ci/lab/tests"]);
    let mut complaints = vec![];
    for (path, text) in &files {
        // The last is how the conformance suite is told.
        let forms = ["#[ignore]", "#[ignore = \"", " ignore = \""];
        let ignores = path.ends_with(".rs") && path != THIS_FILE && forms.iter().any(|form| text.contains(form));
        let listed = IGNORED.iter().find(|(known, _)| known == path);
        let named = |program: &str| {
            let by_a_step = [format!("binary({program})"), format!("--test {program} |")].iter().any(|step| steps.contains(step));
            by_a_step || [format!("    {path}\n"), format!("/tests/{program}.rs\n")].iter().any(|line| lab.contains(line))
        };
        match (ignores, listed) {
            (true, Some((_, program))) if named(program) => {}
            (true, _) => complaints.push(format!(
                "{path}: an ignored test: make it fit the normal run, or have a step of ci/run run binary(…) of its name, or ci/lab/tests list it, and list it in IGNORED"
            )),
            (false, Some(_)) => complaints.push(format!("{path} ignores nothing any more: take it out of IGNORED")),
            (false, None) => {}
        }
    }
    none(&complaints);
}

#[test]
fn no_lock_is_on_the_data_path() {
    let files = rust_files();
    let mut complaints = vec![];
    for part in DATA_PATH {
        let mut there = false;
        for (path, text) in files.iter().filter(|(path, _)| path.starts_with(part)) {
            there = true;
            // The tests at the end of a file may lock.
            let text = text.split("\n#[cfg(test)]").next().unwrap().split("\n#[cfg(all(test").next().unwrap();
            for (number, line) in code(text) {
                if ["Mutex", "RwLock", "Condvar", "mpsc"].iter().any(|lock| line.contains(lock)) {
                    complaints.push(format!("{path}:{number}: a lock: hand the value over a ring or keep it on one thread"));
                }
            }
        }
        if !there {
            complaints.push(format!("{part} is gone: name in DATA_PATH what took its place"));
        }
    }
    none(&complaints);
}

#[test]
fn unsafe_code_stays_where_it_is_and_becomes_less() {
    let allowed: BTreeMap<&str, usize> = UNSAFE.iter().copied().collect();
    let mut complaints = vec![];
    let mut in_all = 0;
    for (path, text) in rust_files() {
        let forms = ["unsafe {", "unsafe fn", "unsafe impl", "unsafe extern", "unsafe trait"];
        let count = code(&text).flat_map(|(_, line)| forms.map(|form| line.matches(form).count())).sum::<usize>();
        let count = if path == THIS_FILE || path == GENERATED { 0 } else { count };
        in_all += count;
        match (allowed.get(path.as_str()), count) {
            (None, 0) => {}
            (None, _) => complaints.push(format!(
                "{path}: unsafe in a new file: use what transport/src/memory.rs offers, or make the case in UNSAFE of {THIS_FILE}"
            )),
            (Some(_), 0) => complaints.push(format!("{path} has no unsafe any more: take it out of UNSAFE")),
            (Some(most), count) if count > *most => {
                complaints.push(format!("{path}: {count} times unsafe, at most {most}: use the safe calls that are there already"));
            }
            (Some(_), _) => {}
        }
    }
    for (path, _) in UNSAFE {
        if !root().join(path).exists() {
            complaints.push(format!("{path} is gone: take it out of UNSAFE"));
        }
    }
    none(&complaints);
    assert!(in_all <= UNSAFE_IN_ALL, "{in_all} times unsafe in all, at most {UNSAFE_IN_ALL}");
    assert_eq!(UNSAFE.iter().map(|(_, most)| most).sum::<usize>(), UNSAFE_IN_ALL, "UNSAFE_IN_ALL is the sum of the list");
}

#[test]
fn long_files_do_not_grow() {
    let listed: BTreeMap<&str, usize> = LONG_FILES.iter().copied().collect();
    let mut complaints = vec![];
    for (path, text) in rust_files() {
        let lines = text.lines().count();
        let most = listed.get(path.as_str()).copied().unwrap_or(LONG);
        if lines > most && path != GENERATED {
            complaints.push(format!("{path}: {lines} lines, at most {most}: split it where its header says \"and\""));
        }
        if lines <= LONG && listed.contains_key(path.as_str()) {
            complaints.push(format!("{path} has {lines} lines now: take it out of LONG_FILES"));
        }
    }
    for (path, _) in LONG_FILES {
        if !root().join(path).exists() {
            complaints.push(format!("{path} is gone: take it out of LONG_FILES"));
        }
    }
    none(&complaints);
}

#[test]
fn the_file_map_of_architecture_md_is_complete_and_true() {
    let files = files();
    let map = files.get("ARCHITECTURE.md").expect("ARCHITECTURE.md has the map of the files");
    let named: BTreeSet<&str> =
        map.lines().filter_map(|line| line.strip_prefix("| `")?.split_once('`')).map(|(path, _)| path).collect();
    let mut complaints: Vec<String> = named
        .iter()
        .filter(|path| path.contains('/') && !files.contains_key(**path))
        .map(|path| format!("ARCHITECTURE.md names {path}, which is gone: run ci/file-map"))
        .collect();
    let mapped = |path: &str| path.ends_with(".rs") || path.starts_with("ci/") || path.starts_with(".ci/") || path == "fuzz/run";
    for path in files.keys().filter(|path| mapped(path) && !named.contains(path.as_str())) {
        complaints.push(format!("{path} is not in ARCHITECTURE.md: run ci/file-map"));
    }
    none(&complaints);
}

#[test]
fn the_project_speaks_of_itself_only() {
    let mut complaints = vec![];
    for (path, text) in files() {
        for (number, line) in text.lines().enumerate() {
            let lower = line.to_lowercase();
            for word in FOREIGN {
                let begins = |at: usize| {
                    let before = lower.get(..at).and_then(|before| before.chars().next_back());
                    !before.is_some_and(|c| c.is_alphanumeric() || "_}$-./*".contains(c))
                };
                if path != THIS_FILE && lower.match_indices(word).any(|(at, _)| begins(at)) {
                    complaints.push(format!("{path}:{}: {word:?} belongs to one machine or workplace: say it without", number + 1));
                }
            }
        }
    }
    none(&complaints);
}

#[test]
fn the_rules_see_what_breaks_them() {
    let manifest: toml::Table =
        "[dev-dependencies]\nfarbus-bench.workspace = true\n[target.'cfg(unix)'.dependencies]\nfarbus-tests = '1'".parse().unwrap();
    assert_eq!(own_dependencies(&manifest), BTreeSet::from(["bench".to_owned(), "tests".to_owned()]));
    assert_eq!(code("a\n  // b\nc").collect::<Vec<_>>(), [(1, "a"), (3, "c")]);
}
