//! A board in the text format that Prometheus reads (version 0.0.4 of its exposition formats).
//!
//! A lender's direct DMA becomes `farbus_lend_session_direct_bytes_total{device="nvme",borrower="uid:1000"} 524288`, behind a HELP and a TYPE line.

use std::fmt::Write;
use std::time::Duration;

use farbus_remote_dma::borrower::READ_WAITS;
use farbus_transport::Tally;

use super::board::{AWAY, Board, Inner, STATES, unix};

/// What the answer says it is.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";
/// Counters of a tally that are no counters here, but a histogram: the sum in nanoseconds, and what is in each bucket.
const WAITS: &str = "read_wait_";

/// The text.
pub fn text(board: &Board) -> String {
    let inner = board.lock();
    let mut out = String::new();
    let command = board.command.replace('-', "_");
    head(&mut out, "farbus_start_time_seconds", "gauge", "When the service began, in seconds since 1970.");
    sample(&mut out, "farbus_start_time_seconds", &[("command", board.command)], unix(board.started));
    head(&mut out, "farbus_state", "gauge", "1 for what the service is doing, 0 for all else.");
    for (state, _) in STATES {
        sample(&mut out, "farbus_state", &[("command", board.command), ("state", state)], u64::from(state == inner.state));
    }
    for (event, count) in &inner.events {
        let name = format!("farbus_{command}_{event}_total");
        head(&mut out, &name, "counter", "How often that happened.");
        sample(&mut out, &name, &[], *count);
    }
    let role = match board.command {
        "lend" => "borrower",
        "borrow" => "lender",
        _ => "client",
    };
    let device = inner.about.get("device").map_or("", String::as_str);
    let labels = |peer: &str| -> Vec<(&'static str, String)> {
        let device = (!device.is_empty()).then(|| ("device", device.to_owned()));
        device.into_iter().chain([(role, peer.to_owned())]).collect()
    };
    if !inner.peers.is_empty() {
        let name = format!("farbus_{command}_links");
        head(&mut out, &name, "gauge", "Links with this peer now.");
        inner.peers.iter().for_each(|(peer, known)| sample(&mut out, &name, &borrowed(&labels(peer)), known.here));
        let name = format!("farbus_{command}_visits_total");
        head(&mut out, &name, "counter", "Links with this peer so far.");
        inner.peers.iter().for_each(|(peer, known)| sample(&mut out, &name, &borrowed(&labels(peer)), known.visits));
    }
    counters(&mut out, &command, &inner, &labels);
    if board.command == "borrow" {
        let name = "farbus_borrow_lender_away_seconds";
        head(&mut out, name, "histogram", "How long a lender that came back was away.");
        histogram(&mut out, name, &[], &AWAY, &inner.away, inner.away_sum);
    }
    out
}

/// A family for each counter, with a sample for each peer that has it.
fn counters(out: &mut String, command: &str, inner: &Inner, labels: &dyn Fn(&str) -> Vec<(&'static str, String)>) {
    let mut kinds: Vec<(&str, &Tally)> = Vec::new();
    for (of, tally) in inner.peers.values().flat_map(|peer| &peer.tallies) {
        if !kinds.iter().any(|(known, _)| known == of) {
            kinds.push((of, tally));
        }
    }
    for (of, first) in kinds {
        let each = || {
            let with = |(peer, known): (_, &'_ super::board::Peer)| {
                known.tallies.iter().find(|(kind, _)| *kind == of).map(|(_, tally)| (peer, tally.values()))
            };
            inner.peers.iter().filter_map(with)
        };
        let (mut waits, values): (Vec<_>, Vec<_>) =
            first.names().iter().enumerate().partition(|(_, (name, _))| name.starts_with(WAITS));
        for (index, (name, help)) in values {
            let name = format!("farbus_{command}_{of}_{name}_total");
            head(out, &name, "counter", help);
            for (peer, values) in each() {
                sample(out, &name, &borrowed(&labels(peer)), values.get(index).copied().unwrap_or_default());
            }
        }
        if waits.is_empty() {
            continue;
        }
        let (sum, _) = waits.remove(0);
        let name = format!("farbus_{command}_{of}_register_read_seconds");
        head(out, &name, "histogram", "How long answered register reads waited, rounded down to a look at the clock in 64 polls.");
        for (peer, values) in each() {
            let buckets: Vec<_> = waits.iter().filter_map(|(index, _)| values.get(*index).copied()).collect();
            let sum = Duration::from_nanos(values.get(sum).copied().unwrap_or_default());
            histogram(out, &name, &borrowed(&labels(peer)), &READ_WAITS, &buckets, sum);
        }
    }
}

fn borrowed<'a>(labels: &'a [(&'static str, String)]) -> Vec<(&'a str, &'a str)> {
    labels.iter().map(|(name, value)| (*name, value.as_str())).collect()
}

fn head(out: &mut String, name: &str, kind: &str, help: &str) {
    let help = help.replace('\\', "\\\\").replace('\n', "\\n");
    // A String takes all that is written to it.
    let _written = write!(out, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
}

fn sample(out: &mut String, name: &str, labels: &[(&str, &str)], value: u64) {
    let _written = writeln!(out, "{name}{} {value}", braces(labels));
}

/// `buckets` has what is in each; the format wants what is in each and all before it.
fn histogram(out: &mut String, name: &str, labels: &[(&str, &str)], bounds: &[Duration], buckets: &[u64], sum: Duration) {
    let mut all = 0;
    for (index, count) in buckets.iter().enumerate() {
        all += count;
        let bound = bounds.get(index).map_or("+Inf".to_owned(), |bound| bound.as_secs_f64().to_string());
        let labels: Vec<_> = labels.iter().copied().chain([("le", bound.as_str())]).collect();
        sample(out, &format!("{name}_bucket"), &labels, all);
    }
    let _written = writeln!(out, "{name}_sum{} {}", braces(labels), sum.as_secs_f64());
    sample(out, &format!("{name}_count"), labels, all);
}

fn braces(labels: &[(&str, &str)]) -> String {
    if labels.is_empty() {
        return String::new();
    }
    let escaped = |value: &str| value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    let labels: Vec<_> = labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escaped(value))).collect();
    format!("{{{}}}", labels.join(","))
}

#[cfg(test)]
mod tests {
    use farbus_remote_dma::{borrower, lender};

    use super::*;

    #[test]
    fn counters_have_the_device_and_the_borrower_as_labels_which_are_escaped() {
        let board = Board::new("lend");
        board.describe("device", "a \"disk\"\\\n");
        board.begin("uid:0");
        board.count("refused");
        board.tally("uid:0", "session", lender::Counters::NAMES).add(3, 4096);
        board.tally("vm7", "session", lender::Counters::NAMES).add(3, 1);
        let text = text(&board);
        for line in [
            "# TYPE farbus_lend_session_direct_bytes_total counter",
            r#"farbus_lend_session_direct_bytes_total{device="a \"disk\"\\\n",borrower="uid:0"} 4096"#,
            r#"farbus_lend_session_direct_bytes_total{device="a \"disk\"\\\n",borrower="vm7"} 1"#,
            r#"farbus_lend_links{device="a \"disk\"\\\n",borrower="uid:0"} 1"#,
            "farbus_lend_refused_total 1",
            r#"farbus_state{command="lend",state="starting"} 1"#,
        ] {
            assert!(text.lines().any(|said| said == line), "{line} is not in\n{text}");
        }
        // A family is said once, and all its samples behind it.
        assert_eq!(text.matches("# TYPE farbus_lend_session_direct_bytes_total").count(), 1);
    }

    #[test]
    fn register_reads_are_a_histogram_whose_buckets_hold_all_before_them() {
        let board = Board::new("borrow");
        let tally = board.tally("shm:/x", "session", borrower::Counters::NAMES);
        // 3 of up to 10 us, 1 of up to 1 ms, 2 of more than 1 s, 2.5 s together.
        [(6, 2_500_000_000), (7, 3), (9, 1), (13, 2)].iter().for_each(|(index, count)| tally.add(*index, *count));
        board.away(Duration::from_millis(38));
        let text = text(&board);
        let name = "farbus_borrow_session_register_read_seconds";
        for line in [
            format!(r#"{name}_bucket{{lender="shm:/x",le="0.00001"}} 3"#),
            format!(r#"{name}_bucket{{lender="shm:/x",le="0.001"}} 4"#),
            format!(r#"{name}_bucket{{lender="shm:/x",le="+Inf"}} 6"#),
            format!(r#"{name}_count{{lender="shm:/x"}} 6"#),
            format!(r#"{name}_sum{{lender="shm:/x"}} 2.5"#),
            r#"farbus_borrow_lender_away_seconds_bucket{le="0.04"} 1"#.to_owned(),
        ] {
            assert!(text.lines().any(|said| said == line), "{line} is not in\n{text}");
        }
        assert!(!text.contains("read_wait"), "{text}");
    }
}
