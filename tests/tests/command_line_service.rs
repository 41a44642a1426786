//! The habits of a service: metrics that rise while a borrower works, `farbus status`, words and sockets of systemd, an end in which nothing is cut off.
//!
//! A lender with `--metrics 0` is scraped while a driver reads through it and clients talk nonsense to it: every scrape parses, no value falls, and no read fails. What
//! systemd does is done by the tests: they open sockets, pass them on, and listen at NOTIFY_SOCKET.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::collections::BTreeMap;
use std::io::Write;
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use farbus_bench::driver::{DmaMemory, Driver, DriverOptions, Io, QueueIndex};
use farbus_bench::function::FunctionRegisters;
use farbus_pci_shim::RecorderSink;
use farbus_remote_dma::borrower::{BorrowerOptions, BorrowerSession};
use farbus_remote_dma::{DeviceDescription, Iova};
use farbus_tests::Running;
use farbus_tests::place::{Place, assert_end_in_order, assert_nvme};
use farbus_tests::process::{AMPLE, End};
use farbus_tests::program::farbus;
use farbus_tests::scrape::{get, samples, value};
use farbus_transport::Memory;
use farbus_transport::link::hello::{Hello, Role, SPOKEN};
use farbus_transport::shm::{self, ShmOptions};
use serde_json::Value;

const BASE: Iova = Iova(0x1_0000_0000);
const QUEUE: QueueIndex = QueueIndex(1);

/// A command whose sockets for `farbus status` are in the place.
fn command(place: &Place, args: &[&str]) -> Command {
    let mut command = Command::new(farbus());
    command.args(args).env("XDG_RUNTIME_DIR", place.path("")).env_remove("RUNTIME_DIRECTORY").env_remove("RUST_LOG");
    command
}

fn start(place: &Place, args: &[&str]) -> Running {
    Running::start(&args.join(" "), &mut command(place, args))
}

fn lend(place: &Place, more: &[&str]) -> Running {
    let (device, link) = (place.device("disk.img"), place.link());
    start(place, &[&["lend", "--json", "--device", &device, "--listen", &link], more].concat())
}

/// A driver of this process that has borrowed the drive.
fn borrow(place: &Place) -> (Driver<FunctionRegisters<RecorderSink>>, Arc<Memory>) {
    let hello = Hello { versions: SPOKEN, role: Role::Borrower, features: 0, epoch: 0, description: Vec::new() };
    let connection = shm::connect(place.path("link"), &hello, ShmOptions::default()).unwrap();
    let device = DeviceDescription::decode(&connection.agreed.peer.description).unwrap();
    let session = BorrowerSession::new(connection.fabric, device, BorrowerOptions::default()).unwrap();
    let memory = Memory::memfd("driver", 4 << 20).unwrap();
    let registers = FunctionRegisters::open(Box::new(session), RecorderSink::default(), &memory, BASE).unwrap();
    let driver = Driver::start(registers, DmaMemory::new(Arc::clone(&memory), BASE), DriverOptions::default()).unwrap();
    (driver, memory)
}

#[test]
fn counters_rise_while_a_borrower_works_and_clients_that_talk_nonsense_hurt_nobody() {
    let place = Place::new();
    let mut lender = lend(&place, &["--metrics", "0"]);
    let address = lender.event("metrics", AMPLE)["address"].as_str().unwrap().to_owned();
    assert!(address.starts_with("127.0.0.1:"), "{address}");
    lender.event("listening", AMPLE);
    assert!(get(&address, b"GET /health HTTP/1.1\r\n\r\n").ends_with("idle\n"));
    let (mut driver, _memory) = borrow(&place);
    lender.event("lent", AMPLE);
    let buffer = driver.allocate(4096).unwrap();
    let over = AtomicBool::new(false);
    let (reads, mut seen) = std::thread::scope(|scope| {
        let over = &over;
        let reader = scope.spawn(move || {
            let mut reads = 0;
            while !over.load(Ordering::Relaxed) {
                driver.execute(QUEUE, &Io::Read { block: reads % 1024, into: &buffer }).unwrap();
                reads += 1;
            }
            (reads, driver)
        });
        let nonsense: Vec<_> = (0..60)
            .map(|number| {
                let mut stream = TcpStream::connect(&address).unwrap();
                let words: &[u8] = [&b""[..], b"GET /metrics HTTP/1.1\r\nX:", b"\0\xff\x16\x03", &[b'A'; 20_000]][number % 4];
                // Whoever talks long enough is cut off.
                let _cut = stream.write_all(words);
                stream
            })
            .collect();
        let mut seen: Vec<BTreeMap<String, f64>> = Vec::new();
        let start = Instant::now();
        while seen.len() < 8 {
            assert!(start.elapsed() < AMPLE);
            let now = samples(&address);
            if let Some(before) = seen.last() {
                let fell = |(name, value): &(&String, &f64)| name.contains("_total") && now[*name] < **value;
                assert_eq!(before.iter().find(fell), None, "{now:?}");
            }
            let rose = |before: &BTreeMap<String, f64>| value(&now, BYTES) > value(before, BYTES);
            if seen.last().is_none_or(rose) && value(&now, BYTES) > 0.0 {
                seen.push(now);
            }
        }
        over.store(true, Ordering::Relaxed);
        drop(nonsense);
        let (reads, driver) = reader.join().unwrap();
        drop(driver);
        (reads, seen)
    });
    assert!(get(&address, b"GET /health HTTP/1.1\r\n\r\n").contains("200 OK"));
    lender.event("returned", AMPLE);
    let end = samples(&address);
    assert!(value(&end, BYTES) >= (reads * 4096) as f64, "{reads} reads: {end:?}");
    // Of each a command of 64 bytes.
    assert!(value(&end, "farbus_lend_session_direct_bytes_total") >= (reads * 64) as f64, "{reads} reads: {end:?}");
    assert_eq!((value(&end, "farbus_lend_links"), value(&end, "farbus_lend_visits_total")), (0.0, 1.0));
    assert_eq!(value(&seen.remove(0), "farbus_lend_links"), 1.0);
    assert_eq!(value(&end, "farbus_lend_session_faults_total"), 0.0);
    assert_end_in_order(lender);
}

/// The image is a file: its data are read by the kernel.
const BYTES: &str = "farbus_lend_session_lent_bytes_total";

#[test]
fn a_borrower_tells_its_reads_and_that_its_lender_was_lost_and_came_back() {
    let place = Place::new();
    let mut lender = lend(&place, &[]);
    lender.event("listening", AMPLE);
    let (link, socket) = (place.link(), place.name("vmm"));
    let args = ["borrow", "--json", "--from", &link, "--vfio-user", &socket, "--metrics", "127.0.0.1:0", "--reconnect", "20s"];
    let mut borrower = self::start(&place, &args);
    let address = borrower.event("metrics", AMPLE)["address"].as_str().unwrap().to_owned();
    borrower.event("serving", AMPLE);
    let mut vmm = place.vmm("vmm");
    assert_nvme(&mut vmm);
    // CSTS, which only the device knows; what does not change is answered here.
    vmm.region_read(0, 0x1c, &mut [0; 4]).unwrap();
    // What was counted is told at the latest when there is nothing more to do.
    let start = Instant::now();
    let told = loop {
        let told = samples(&address);
        if value(&told, "farbus_borrow_session_bar_reads_total") >= 1.0 {
            break told;
        }
        assert!(start.elapsed() < AMPLE, "{told:?}");
    };
    assert_eq!(
        value(&told, "farbus_borrow_session_register_read_seconds_count"),
        value(&told, "farbus_borrow_session_bar_reads_total")
    );
    assert!(value(&told, "farbus_borrow_function_config_reads_total") >= 3.0, "{told:?}");
    lender.kill();
    assert_eq!(lender.wait(AMPLE).signal(), Some(9));
    borrower.event("lender-lost", AMPLE);
    assert!(get(&address, b"GET /health HTTP/1.1\r\n\r\n").contains("503 Service Unavailable"));
    let mut lender = lend(&place, &[]);
    lender.event("listening", AMPLE);
    borrower.event("lender-back", AMPLE);
    let told = samples(&address);
    assert_eq!((value(&told, "farbus_borrow_losses_total"), value(&told, "farbus_borrow_recoveries_total")), (1.0, 1.0));
    assert_eq!(value(&told, "farbus_borrow_lender_away_seconds_count"), 1.0);
    assert!(get(&address, b"GET /health HTTP/1.1\r\n\r\n").contains("200 OK"));
    drop(vmm);
    assert_end_in_order(borrower);
}

#[test]
fn metrics_for_everybody_have_to_be_asked_for_twice() {
    let place = Place::new();
    let end = lend(&place, &["--metrics", "0.0.0.0:0"]).wait(AMPLE);
    end.assert_refusal(2, &["everybody", "--metrics-anyone"]);
    let mut lender = lend(&place, &["--metrics", "0.0.0.0:0", "--metrics-anyone"]);
    lender.event("listening", AMPLE);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let link = format!("shm:{}", place.name("other"));
    let end = start(&place, &["lend", "--device", "edu", "--listen", &link, "--metrics", &port]).wait(AMPLE);
    end.assert_refusal(1, &["metrics", "choose another"]);
}

/// What `farbus status --json` says of the services in the place.
fn status(place: &Place) -> (Vec<Value>, Vec<String>) {
    let end = start(place, &["status", "--json"]).wait(AMPLE);
    assert_eq!(end.code(), Some(0), "{end:?}");
    let said: Value = serde_json::from_str(&end.stdout).unwrap();
    let folder = place.name("farbus");
    let services = said["services"].as_array().unwrap().iter().filter(|one| one["control"].as_str().unwrap().starts_with(&folder));
    let stale = said["stale"].as_array().unwrap().iter().map(|path| path.as_str().unwrap().to_owned());
    (services.cloned().collect(), stale.filter(|path| path.starts_with(&folder)).collect())
}

#[test]
fn status_says_what_each_service_does_and_which_socket_is_stale() {
    let place = Place::new();
    let mut lender = lend(&place, &[]);
    lender.event("listening", AMPLE);
    let idle = status(&place).0;
    assert_eq!((idle.len(), idle[0]["state"].as_str()), (1, Some("idle")));
    let (link, socket) = (place.link(), place.name("vmm"));
    let mut borrower = start(&place, &["borrow", "--json", "--from", &link, "--vfio-user", &socket, "--reconnect", "20s"]);
    borrower.event("serving", AMPLE);
    lender.event("lent", AMPLE);
    assert_nvme(&mut place.vmm("vmm"));
    let (services, stale) = status(&place);
    assert_eq!((services.len(), stale.len()), (2, 0), "{services:?}");
    let of = |command: &str| services.iter().find(|one| one["command"] == command).unwrap();
    assert_eq!((&of("lend")["state"], &of("borrow")["state"]), (&"lent".into(), &"serving".into()));
    assert_eq!((&of("lend")["address"], &of("borrow")["socket"]), (&link.as_str().into(), &socket.as_str().into()));
    assert_eq!(of("lend")["pid"], lender.id());
    let peer = &of("lend")["peers"][0];
    assert!(peer["name"].as_str().unwrap().starts_with("uid:") && peer["since_unix_s"].is_u64() && peer["links"] == 1, "{peer}");
    let mode = std::fs::metadata(of("lend")["control"].as_str().unwrap()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);

    let control = of("lend")["control"].as_str().unwrap().to_owned();
    lender.kill();
    assert_eq!(lender.wait(AMPLE).signal(), Some(9));
    borrower.event("lender-lost", AMPLE);
    let (services, stale) = status(&place);
    assert_eq!((services.len(), services[0]["state"].as_str(), stale), (1, Some("lost"), vec![control]));
    let text = start(&place, &["status"]).wait(AMPLE).stdout;
    assert!(text.contains("borrow ") && text.contains(": lost, ") && text.contains(": stale"), "{text}");
    assert_end_in_order(borrower);
    assert!(status(&place).0.is_empty());
}

#[test]
fn systemd_hears_when_a_lender_is_ready_what_it_does_that_it_lives_and_that_it_ends() {
    let place = Place::new();
    let socket = UnixDatagram::bind(place.path("notify")).unwrap();
    socket.set_read_timeout(Some(AMPLE)).unwrap();
    let hear = |wanted: &str| {
        let mut piece = [0; 4096];
        let start = Instant::now();
        loop {
            let count = socket.recv(&mut piece).unwrap_or_else(|error| panic!("no {wanted}: {error}"));
            let text = String::from_utf8_lossy(&piece[..count]).into_owned();
            if text.lines().any(|line| line.starts_with(wanted)) {
                return text;
            }
            assert!(start.elapsed() < AMPLE, "no {wanted}");
        }
    };
    let (device, link) = (place.device("disk.img"), place.link());
    let mut command = command(&place, &["lend", "--json", "--device", &device, "--listen", &link]);
    command.env("NOTIFY_SOCKET", place.path("notify")).env("WATCHDOG_USEC", "200000").env_remove("WATCHDOG_PID");
    let mut lender = Running::start("lend", &mut command);
    assert!(hear("READY=1").contains("STATUS=lending"));
    lender.event("listening", AMPLE);
    let start = Instant::now();
    (0..5).for_each(|_| drop(hear("WATCHDOG=1")));
    assert!(start.elapsed() > Duration::from_millis(300), "five in {:?}", start.elapsed());
    let driver = borrow(&place);
    hear("STATUS=lent");
    drop(driver);
    hear("STATUS=the device is lent to nobody");
    lender.terminate();
    assert!(hear("STOPPING=1").contains("SIGTERM"));
    assert_eq!(lender.wait(AMPLE).code(), Some(0));
}

/// Starts `args` as systemd does with a socket: as descriptor 3, which LISTEN_FDS counts and LISTEN_PID names the heir of.
fn activated(place: &Place, listener: &UnixListener, args: &[&str]) -> Running {
    let mut command = Command::new("sh");
    command.args(["-c", "exec 3<&0 </dev/null; LISTEN_PID=$$ LISTEN_FDS=1 exec \"$@\"", "sh"]).arg(farbus()).args(args);
    command.env("XDG_RUNTIME_DIR", place.path(""));
    let passed: OwnedFd = listener.try_clone().unwrap().into();
    Running::start_reading(&args.join(" "), &mut command, Stdio::from(passed))
}

#[test]
fn a_socket_that_systemd_opened_is_served_and_outlives_the_lender() {
    let place = Place::new();
    let listener = UnixListener::bind(place.path("link")).unwrap();
    let (device, link) = (place.device("disk.img"), place.link());
    let args = ["lend", "--json", "--device", &device, "--listen", &link];
    for _ in 0..2 {
        // Who comes before the lender is there waits in the socket.
        let early = std::thread::scope(|scope| {
            let borrower = scope.spawn(|| borrow(&place));
            let mut lender = activated(&place, &listener, &args);
            lender.event("lent", AMPLE);
            let (mut driver, _memory) = borrower.join().unwrap();
            let buffer = driver.allocate(4096).unwrap();
            driver.execute(QUEUE, &Io::Read { block: 0, into: &buffer }).unwrap();
            drop(driver);
            lender.event("returned", AMPLE);
            lender
        });
        assert_end_in_order(early);
        assert!(place.path("link").exists());
    }
    let elsewhere = format!("shm:{}", place.name("elsewhere"));
    let end = activated(&place, &listener, &["lend", "--device", "edu", "--listen", &elsewhere]).wait(AMPLE);
    end.assert_refusal(2, &["a socket was passed", "ListenStream="]);
}

#[test]
fn a_bank_is_served_at_a_socket_that_systemd_opened() {
    let place = Place::new();
    let (bank, link) = (place.name("bank"), place.link());
    assert_eq!(start(&place, &["bank", "init", &bank]).wait(AMPLE).code(), Some(0));
    let listener = UnixListener::bind(place.path("link")).unwrap();
    let mut server = activated(&place, &listener, &["bank", "serve", &bank, "--json", "--listen", &link, "--metrics", "0"]);
    let address = server.event("metrics", AMPLE)["address"].as_str().unwrap().to_owned();
    server.event("serving", AMPLE);
    let end = start(&place, &["bank", "list", &link, "--json"]).wait(AMPLE);
    assert_eq!(end.code(), Some(0), "{end:?}");
    server.event("left", AMPLE);
    let told = samples(&address);
    assert!(value(&told, "farbus_bank_serve_link_messages_received_total") >= 1.0, "{told:?}");
    assert_eq!(value(&told, "farbus_bank_serve_visits_total"), 1.0);
    assert_end_in_order(server);
    assert!(place.path("link").exists());
}

/// Four reads of a drive that needs `latency` for each are under way when the lender is told to end.
fn end_under_reads(latency: &str, more: &[&str], signals: usize) -> (usize, End, Duration) {
    let place = Place::new();
    std::fs::write(place.path("disk.img"), vec![7; 8 << 20]).unwrap();
    let (device, link) = (format!("{},latency={latency}", place.device("disk.img")), place.link());
    let mut lender = start(&place, &[&["lend", "--json", "--device", &device, "--listen", &link], more].concat());
    lender.event("listening", AMPLE);
    let (mut driver, memory) = borrow(&place);
    lender.event("lent", AMPLE);
    let buffers: Vec<_> = (0..4).map(|_| driver.allocate(4096).unwrap()).collect();
    for (token, buffer) in buffers.iter().enumerate() {
        driver.submit(QUEUE, &Io::Read { block: 0, into: buffer }, token as u64).unwrap();
    }
    driver.ring(QUEUE).unwrap();
    // A register read comes behind the doorbell.
    driver
        .registers_mut()
        .function_mut()
        .bar_read(farbus_remote_dma::BarAddress { bar: 0, offset: 8 }, farbus_remote_dma::Width::B4)
        .unwrap();
    let start = Instant::now();
    lender.terminate();
    (1..signals).for_each(|_| {
        std::thread::sleep(Duration::from_millis(200));
        lender.terminate();
    });
    let mut done = 0;
    while done < 4 && start.elapsed() < AMPLE && !driver.is_gone() {
        done += driver.reap(QUEUE, |completion| assert!(completion.status.ok())).unwrap_or_default();
        driver.registers_mut().function_mut().poll(farbus_transport::Nanos::now());
    }
    // What came before the end is there, although the link is not.
    done += driver.reap(QUEUE, |completion| assert!(completion.status.ok())).unwrap_or_default();
    let sevens = |buffer: &farbus_bench::driver::DmaBuffer| {
        let mut bytes = [0; 4096];
        buffer.read(0, &mut bytes).unwrap();
        bytes == [7; 4096]
    };
    assert!(buffers.iter().filter(|buffer| sevens(buffer)).count() >= done);
    drop(memory);
    let hello = Hello { versions: SPOKEN, role: Role::Borrower, features: 0, epoch: 0, description: Vec::new() };
    assert!(shm::connect(place.path("link"), &hello, ShmOptions::default()).is_err(), "somebody was let in after the end began");
    (done, lender.wait(AMPLE), start.elapsed())
}

#[test]
fn a_lender_that_is_told_to_end_lets_end_what_its_device_has_begun() {
    let (done, end, _) = end_under_reads("700ms", &[], 1);
    assert_eq!((done, end.code()), (4, Some(0)), "{end:?}");
    assert!(end.stdout.contains("\"event\":\"drained\"") && end.stdout.contains("\"done\":true"), "{end:?}");
    end.assert_no_panic();
}

#[test]
fn a_lender_waits_no_longer_than_it_was_told_and_not_at_all_after_a_second_signal() {
    for (latency, more, signals) in [("4s", &["--drain", "100ms"][..], 1), ("4s", &["--drain", "1m"], 2)] {
        let (done, end, took) = end_under_reads(latency, more, signals);
        assert_eq!((done, end.code()), (0, Some(0)), "{end:?}");
        assert!(end.stdout.contains("\"done\":false"), "{end:?}");
        assert!(took < Duration::from_secs(3), "{more:?}: it took {took:?}");
    }
}

#[test]
fn options_come_from_a_file_and_the_environment_and_what_nobody_knows_is_refused() {
    let place = Place::new();
    let (config, link, device) = (place.name("farbus.toml"), place.link(), place.device("disk.img"));
    std::fs::write(&config, format!("[lend]\ndevice = \"{device}\"\nlisten = \"shm:/nowhere/link\"\n")).unwrap();
    let mut asked = command(&place, &["lend", "--json", "--config", &config]);
    let mut lender = Running::start("lend", asked.env("FARBUS_LEND_LISTEN", &link));
    assert_eq!(lender.event("listening", AMPLE)["address"], link.as_str());
    assert_end_in_order(lender);

    let printed = Running::start(
        "lend",
        command(&place, &["lend", "--print-config", "--config", &config, "--spin", "1ms"]).env("FARBUS_LEND_LISTEN", &link),
    );
    let end = printed.wait(AMPLE);
    assert_eq!(end.code(), Some(0), "{end:?}");
    for line in [format!("listen = \"{link}\"  # FARBUS_LEND_LISTEN"), "spin = \"1ms\"  # the command line".to_owned()] {
        assert!(end.stdout.contains(&line), "{line} is not in {end:?}");
    }

    std::fs::write(&config, "[lend]\ndevise = \"edu\"\n").unwrap();
    let end = start(&place, &["lend", "--json", "--config", &config, "--listen", &link]).wait(AMPLE);
    end.assert_refusal(2, &["devise", "is it device?"]);
    let said: Value = serde_json::from_str(end.stdout.lines().next().unwrap()).unwrap();
    assert!(said["event"] == "error" && said["error"].as_str().unwrap().contains("devise"), "{said}");
}
