//! `farbus status`: what the services of this user do, asked at their sockets.
//!
//! "lend 4711: lent, nvme:disk.img at shm:/run/nvme0" and below it "uid:1000: here for 5m, 1 visit, bar_writes 1200 …"; a socket whose service is dead is said to be
//! stale.

use std::io::{ErrorKind, Read};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use clap::Args;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde_json::{Value, json};

use crate::count::count;
use crate::output::print_line;
use crate::service::folders;

/// How long a service may take to answer.
const LIMIT: Duration = Duration::from_secs(2);
/// Bytes of an answer.
const MAX_ANSWER: u64 = 4 << 20;

/// `farbus status`
#[derive(Debug, Args)]
#[command(
    after_help = "Services are lend, borrow, bank serve and bank serve-faults. Each has a socket, mode 600, in $RUNTIME_DIRECTORY (from systemd), $XDG_RUNTIME_DIR/farbus
or, for root, /run/farbus; this looks there and at no other user's. A socket whose service was killed is said to be stale: it may be removed."
)]
pub struct StatusArgs {
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Why there is no answer.
#[derive(Debug)]
enum Silent {
    /// Nobody listens.
    Stale,
    /// Somebody does, and says nothing that makes sense.
    Failed(String),
}

/// Asks all.
pub fn run(args: &StatusArgs) -> anyhow::Result<()> {
    let mut sockets: Vec<PathBuf> = folders().iter().flat_map(|folder| sockets_in(folder)).collect();
    sockets.sort();
    let (mut services, mut stale, mut failed) = (Vec::new(), Vec::new(), Vec::new());
    for path in sockets {
        match ask(&path) {
            Ok(answer) => services.push(answer),
            Err(Silent::Stale) => stale.push(path),
            Err(Silent::Failed(why)) => failed.push((path, why)),
        }
    }
    if args.json {
        let failed: Vec<_> = failed.iter().map(|(path, why)| json!({ "socket": path, "error": why })).collect();
        print_line(&json!({ "services": services, "stale": stale, "failed": failed }).to_string());
        return Ok(());
    }
    if services.is_empty() {
        print_line("no service of this user is running");
    }
    services.iter().flat_map(lines).for_each(|line| print_line(&line));
    stale.iter().for_each(|path| print_line(&format!("{}: stale, its service is not running", path.display())));
    failed.iter().for_each(|(path, why)| print_line(&format!("{}: no answer: {why}", path.display())));
    Ok(())
}

fn sockets_in(folder: &Path) -> Vec<PathBuf> {
    let services = ["lend-", "borrow-", "bank-serve-"];
    let of_service = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let number = name.strip_suffix(".sock").and_then(|name| name.rsplit('-').next());
        services.iter().any(|service| name.starts_with(service)) && number.is_some_and(|number| number.parse::<u32>().is_ok())
    };
    let entries = std::fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok);
    entries.map(|entry| entry.path()).filter(of_service).collect()
}

fn ask(path: &Path) -> Result<Value, Silent> {
    let failed = |error: std::io::Error| Silent::Failed(error.to_string());
    let mut stream = connect(path).map_err(|error| match error.kind() {
        ErrorKind::ConnectionRefused | ErrorKind::NotFound => Silent::Stale,
        ErrorKind::WouldBlock => Silent::Failed("it does not accept".to_owned()),
        _ => failed(error),
    })?;
    stream.set_nonblocking(false).map_err(failed)?;
    let (end, mut said) = (Instant::now() + LIMIT, Vec::new());
    let mut piece = vec![0; 64 << 10];
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Silent::Failed(format!("not all was said within {LIMIT:?}")));
        }
        stream.set_read_timeout(Some(left)).map_err(failed)?;
        match stream.read(&mut piece) {
            Ok(0) => break,
            Ok(count) => said.extend_from_slice(piece.get(..count).unwrap_or_default()),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                return Err(Silent::Failed(format!("not all was said within {LIMIT:?}")));
            }
            Err(error) => return Err(failed(error)),
        }
        if said.len() as u64 > MAX_ANSWER {
            return Err(Silent::Failed("it says more than a service has to say".to_owned()));
        }
    }
    let mut answer: Value = serde_json::from_slice(&said).map_err(|error| Silent::Failed(format!("no status: {error}")))?;
    match answer.as_object_mut() {
        Some(answer) => answer.insert("control".to_owned(), path.display().to_string().into()),
        None => return Err(Silent::Failed("no status".to_owned())),
    };
    Ok(answer)
}

/// Without waiting: where too many wait already, nobody is there for us.
fn connect(path: &Path) -> std::io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket.into())
}

/// For people.
fn lines(service: &Value) -> Vec<String> {
    let text = |key: &str| service.get(key).and_then(Value::as_str);
    let what: Vec<_> = ["device", "bank", "machine"].iter().filter_map(|key| text(key)).collect();
    let places: Vec<_> = ["address", "socket"].iter().filter_map(|key| text(key)).map(|place| format!(" at {place}")).collect();
    let since =
        service.get("started_unix_s").and_then(Value::as_u64).map_or(String::new(), |since| format!(", for {}", age(since)));
    let head = format!(
        "{} {}: {}, {}{}{since}",
        text("command").unwrap_or("?"),
        service.get("pid").and_then(Value::as_u64).unwrap_or_default(),
        text("state").unwrap_or("?"),
        what.join(" "),
        places.concat(),
    );
    let peers = service.get("peers").and_then(Value::as_array).into_iter().flatten();
    let mut lines = vec![head];
    lines.extend(peers.map(|peer| {
        let name = peer.get("name").and_then(Value::as_str).filter(|name| !name.is_empty()).unwrap_or("somebody");
        let here = match peer.get("since_unix_s").and_then(Value::as_u64) {
            Some(since) => format!("here for {}", age(since)),
            None => "not here".to_owned(),
        };
        let visits = count(peer.get("visits").and_then(Value::as_u64).unwrap_or_default(), "visit");
        let counters = peer.get("counters").and_then(Value::as_object).into_iter().flat_map(|kinds| kinds.values());
        let counters: Vec<_> = counters
            .filter_map(Value::as_object)
            .flatten()
            .filter(|(_, value)| value.as_u64() != Some(0))
            .map(|(name, value)| format!("{name} {value}"))
            .collect();
        format!("  {name}: {here}, {visits}{}{}", if counters.is_empty() { "" } else { ", " }, counters.join(", "))
    }));
    let events = service.get("events").and_then(Value::as_object).into_iter().flatten();
    let events: Vec<_> = events.map(|(name, count)| format!("{name} {count}")).collect();
    if !events.is_empty() {
        lines.push(format!("  {}", events.join(", ")));
    }
    lines
}

/// How long ago a second since 1970 was.
fn age(since: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
    match now.saturating_sub(since) {
        seconds @ 0..120 => format!("{seconds} s"),
        seconds @ 120..7200 => format!("{} min", seconds / 60),
        seconds @ 7200..172_800 => format!("{} h", seconds / 3600),
        seconds => format!("{} days", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn only_a_service_that_answers_is_one() {
        let folder = tempfile::tempdir().unwrap();
        let place = |name: &str| folder.path().join(name);
        let listener = UnixListener::bind(place("lend-1.sock")).unwrap();
        drop(UnixListener::bind(place("lend-2.sock")).unwrap());
        let _mute = UnixListener::bind(place("borrow-3.sock")).unwrap();
        std::fs::write(place("lend-x.sock"), "").unwrap();
        std::fs::write(place("other"), "").unwrap();
        assert_eq!(sockets_in(folder.path()).len(), 3);
        let say = |text: &'static str| {
            let listener = listener.try_clone().unwrap();
            std::thread::spawn(move || listener.accept().unwrap().0.write_all(text.as_bytes()).unwrap())
        };
        let said = say(
            r#"{"command":"lend","pid":1,"state":"lent","device":"edu","peers":[{"name":"uid:0","visits":1,"since_unix_s":0,"counters":{"session":{"faults":0,"bar_reads":7}}}]}"#,
        );
        let answer = ask(&place("lend-1.sock")).unwrap();
        said.join().unwrap();
        let lines = lines(&answer);
        assert!(lines[0].starts_with("lend 1: lent, edu"), "{lines:?}");
        assert!(lines[1].contains("uid:0: here for") && lines[1].ends_with("1 visit, bar_reads 7"), "{lines:?}");
        for wrong in ["", "[]", "{", "7"] {
            let said = say(wrong);
            assert!(matches!(ask(&place("lend-1.sock")), Err(Silent::Failed(_))), "{wrong}");
            said.join().unwrap();
        }
        assert!(matches!(ask(&place("lend-2.sock")), Err(Silent::Stale)));
        let start = Instant::now();
        assert!(matches!(ask(&place("borrow-3.sock")), Err(Silent::Failed(_))));
        assert!(start.elapsed() < LIMIT * 2);
    }
}
