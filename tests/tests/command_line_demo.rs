//! `farbus demo` on what users give it: images that are none, a picture in a bad place, a signal in the middle.
//!
//! `farbus demo --image disk.img --svg disk.img` refuses to overwrite the image with its picture; a demo that is killed leaves no gigabyte of
//! images in memory.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

use std::path::PathBuf;
use std::time::Instant;

use farbus_tests::Running;
use farbus_tests::place::Place;
use farbus_tests::process::{AMPLE, run};
use rustix::process::Signal;
use serde_json::Value;

#[test]
fn an_image_that_the_demo_cannot_use_is_refused_by_what_it_is_and_no_picture_is_begun() {
    let place = Place::new();
    place.image("odd.img", 1000);
    place.image("small.img", 1 << 20);
    std::fs::create_dir(place.path("folder")).unwrap();
    let fifo = place.path("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0).unwrap();
    let cases: [(String, &[&str]); 6] = [
        (place.name("missing.img"), &["cannot read", "missing.img"]),
        (place.name("odd.img"), &["1000 bytes", "multiple of 4096"]),
        (place.name("small.img"), &["1048576 bytes", "at least 2 MiB"]),
        (place.name("folder"), &["is a directory", "hint: give --image a file"]),
        (place.name("fifo"), &["is no file"]),
        ("/dev/zero".to_owned(), &["is no file"]),
    ];
    for (image, words) in cases {
        run(&["demo", "--image", &image, "--svg", &place.name("demo.svg")]).assert_refusal(1, words);
        assert!(!place.path("demo.svg").exists(), "{image}");
    }
}

#[test]
fn a_picture_is_refused_where_it_cannot_be_and_nothing_there_is_touched() {
    let place = Place::new();
    let image = place.name("disk.img");
    let demo = |svg: &str| run(&["demo", "--image", &image, "--svg", svg]);
    let before = std::fs::read(&image).unwrap();
    demo(&image).assert_refusal(1, &["that is the image", "--svg"]);
    std::fs::hard_link(&image, place.path("link.img")).unwrap();
    demo(&place.name("link.img")).assert_refusal(1, &["that is the image", "--svg"]);
    assert_eq!(std::fs::read(&image).unwrap(), before);
    demo(&place.name("")).assert_refusal(1, &["cannot leave the picture", "--svg"]);
    demo(&place.name("no/folder.svg")).assert_refusal(1, &["cannot leave the picture", "No such file"]);
    std::fs::write(place.path("precious"), "data").unwrap();
    demo(&place.name("precious")).assert_refusal(1, &["no picture in SVG", "--svg"]);
    assert_eq!(std::fs::read_to_string(place.path("precious")).unwrap(), "data");
    let fifo = place.path("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, rustix::fs::Mode::from(0o600), 0).unwrap();
    demo(&place.name("fifo")).assert_refusal(1, &["it is no file", "--svg"]);
    std::fs::write(place.path("old.svg"), "<svg>an old picture</svg>").unwrap();
    run(&["demo", "--image", &place.name("missing.img"), "--svg", &place.name("old.svg")]).assert_refusal(1, &["missing.img"]);
    assert_eq!(std::fs::read_to_string(place.path("old.svg")).unwrap(), "<svg>an old picture</svg>");
}

#[test]
fn a_short_demo_verifies_and_its_picture_and_object_name_the_machine() {
    let place = Place::new();
    let end = run(&["demo", "--json", "--seconds", "0.01", "--image", &place.name("disk.img"), "--svg", &place.name("demo.svg")]);
    assert_eq!(end.code(), Some(0), "{end:?}");
    let report: Value = serde_json::from_str(&end.stdout).unwrap();
    assert_eq!(report["verified"], true);
    // Both sides, before and after.
    assert_eq!(report["bytes_verified"], 4 * (8 << 20));
    assert!(report["machine"]["load_average"].is_number(), "{report}");
    let svg = std::fs::read_to_string(place.path("demo.svg")).unwrap();
    for key in ["date", "kernel"] {
        let said = report["machine"][key].as_str().unwrap();
        assert!(!said.is_empty() && svg.contains(said), "{key}: {said}");
    }
}

#[test]
fn an_image_that_somebody_writes_to_meanwhile_is_blamed_and_not_the_device() {
    let place = Place::new();
    let image = place.name("disk.img");
    let args = ["demo", "--seconds", "1", "--image", &image, "--svg", &place.name("demo.svg")];
    let demo = Running::farbus(&args);
    comparing(&demo);
    std::fs::write(&image, vec![0xa5; 8 << 20]).unwrap();
    demo.wait(AMPLE).assert_refusal(1, &["was changed while the demo compared", "hint: give --image a file that nobody writes to"]);
}

#[test]
fn a_demo_that_is_ended_leaves_no_images_behind() {
    let place = Place::new();
    let svg = place.name("demo.svg");
    // While files are packed their names are there.
    for (signal, code) in [(Signal::INT, 130), (Signal::TERM, 143)] {
        let demo = Running::farbus(&["demo", "--svg", &svg]);
        let folder = images_of(&demo, "original.img").parent().unwrap().to_owned();
        assert!(folder.exists());
        demo.signal(signal);
        let end = demo.wait(AMPLE);
        end.assert_refusal(code, &["ended by SIG"]);
        assert!(!folder.exists(), "{}", folder.display());
    }
    // Later they are gone already.
    let image = place.name("disk.img");
    let demo = Running::farbus(&["demo", "--seconds", "60", "--image", &image, "--svg", &svg]);
    let (_, folder) = comparing(&demo);
    demo.kill();
    assert_eq!(demo.wait(AMPLE).signal(), Some(9));
    assert!(!folder.exists(), "{}", folder.display());
}

#[test]
fn a_lender_process_that_is_killed_is_noticed_at_once_and_named() {
    let place = Place::new();
    let args = ["demo", "--json", "--seconds", "60", "--image", &place.name("disk.img"), "--svg", &place.name("demo.svg")];
    let demo = Running::farbus(&args);
    let (lender, _) = comparing(&demo);
    let killed = Instant::now();
    rustix::process::kill_process(lender, Signal::KILL).unwrap();
    let end = demo.wait(AMPLE);
    end.assert_refusal(1, &["the lender process died (signal: 9 (SIGKILL))", "hint: look for what ended it"]);
    // A command of the driver may take 10 s.
    assert!(killed.elapsed().as_secs() < 5, "{:?}", killed.elapsed());
    let object: Value = serde_json::from_str(&end.stdout).unwrap();
    assert!(object["causes"].as_array().is_some_and(|causes| !causes.is_empty()), "{object}");
}

/// Waits until the demo compares: its lender has everything, so its scratch folder is gone. Returns the lender, and where the folder was.
#[track_caller]
fn comparing(demo: &Running) -> (rustix::process::Pid, PathBuf) {
    let started = Instant::now();
    loop {
        if let Some((lender, folder)) = lender_of(demo.id()).filter(|(_, folder)| !folder.exists()) {
            return (lender, folder);
        }
        assert!(started.elapsed() < AMPLE, "the demo does not begin to compare");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}

/// The only child of the demo, and the folder of the link that it is told to listen at.
fn lender_of(demo: u32) -> Option<(rustix::process::Pid, PathBuf)> {
    let parent = demo.to_string();
    let processes = std::fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut children = processes.filter_map(|id| id.parse::<i32>().ok()).filter(|id| {
        // The second field is a name in parentheses, the fourth the parent (proc(5)).
        let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
        stat.rsplit_once(')').is_some_and(|(_, rest)| rest.split_whitespace().nth(1) == Some(&parent))
    });
    let child = children.next()?;
    let words = std::fs::read_to_string(format!("/proc/{child}/cmdline")).ok()?;
    let link = words.split('\0').find_map(|word| word.strip_prefix("shm:"))?;
    Some((rustix::process::Pid::from_raw(child)?, PathBuf::from(link).parent()?.to_owned()))
}

/// Waits until the demo has a file of its scratch folder open whose name ends in `with`.
#[track_caller]
fn images_of(demo: &Running, with: &str) -> PathBuf {
    let descriptors = format!("/proc/{}/fd", demo.id());
    let started = Instant::now();
    loop {
        let open = std::fs::read_dir(&descriptors).unwrap().filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok());
        let mut images = open.filter(|path| {
            let path = path.to_string_lossy();
            path.contains("/farbus-demo-") && path.ends_with(with)
        });
        if let Some(image) = images.next() {
            return image;
        }
        assert!(started.elapsed() < AMPLE, "the demo has no {with} open");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}
