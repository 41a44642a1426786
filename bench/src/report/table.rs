//! Reports as text: columns that line up, latencies in the unit that reads best.
//!
//! `randread-4k-qd1   412.3k   2.1 us   3.0 us   388.0k   2.5 us   3.9 us   0.94   1.19   4 %` is one case, native and remote.

use super::{Change, DemoReport, NOISE_BOUND, Row, SideReport, SuiteReport, Target, Verdict, is_noise};

/// A demo, one line a case. A ratio that is only noise is not printed.
pub fn demo_table(report: &DemoReport) -> String {
    let mut rows = vec![
        ["", "native", "", "", "remote", "", "", "remote/native", "", "rounds"].map(str::to_owned).to_vec(),
        ["case", "IOPS", "p50", "p99", "IOPS", "p50", "p99", "IOPS", "p50", "differ by"].map(str::to_owned).to_vec(),
    ];
    let mut noisy = false;
    for case in &report.cases {
        let side = |side: &SideReport| [count(side.iops), duration(side.p50_ns as f64), duration(side.p99_ns as f64)];
        let ratio = |ratio: f64, spread: f64| if is_noise(spread) { "?".to_owned() } else { format!("{ratio:.2}") };
        // What cannot be said of a spread is the worst.
        let worst = [case.iops_ratio_spread, case.p50_ratio_spread].into_iter().max_by(f64::total_cmp).unwrap_or(f64::NAN);
        noisy |= is_noise(worst);
        let mut row = vec![case.name.clone()];
        row.extend(side(&case.native));
        row.extend(side(&case.remote));
        row.push(ratio(case.iops_ratio, case.iops_ratio_spread));
        row.push(ratio(case.p50_ratio, case.p50_ratio_spread));
        row.push(format!("{:.0} %", 100.0 * worst));
        rows.push(row);
    }
    let verdict = if report.verified { "equal to the file" } else { "NOT VERIFIED" };
    let mib = report.bytes_verified as f64 / f64::from(1 << 20);
    let mut text = format!("{}\nfabric {}: {mib:.0} MiB read back, every byte {verdict}\n", align(&rows), report.fabric);
    if noisy {
        let bound = 100.0 * NOISE_BOUND;
        text += &format!(
            "?: too noisy to say, the rounds differ by more than {bound:.0} %: a quieter machine or more --seconds would tell\n"
        );
    }
    if report.machine.is_busy() {
        let load = report.machine.load_average.unwrap_or(f64::NAN);
        text += &format!("the machine was busy: a load average of {load:.1} on {} cores when it began\n", report.machine.cores);
    }
    text
}

/// A suite, one line a row.
pub fn suite_table(report: &SuiteReport) -> String {
    let header = ["case", "value", "reference", "", "ratio", "target", "meets"];
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    rows.extend(report.rows.iter().map(cells));
    format!("suite {}\n{}", report.suite, align(&rows))
}

/// Two runs of a suite, one line a row.
pub fn changes_table(suite: &str, changes: &[Change]) -> String {
    let header = ["case", "reference", "", "before", "after", ""];
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    let figure = |value: Option<f64>, of: &str| match value {
        None => "-".to_owned(),
        Some(value) if of == "ratio" => format!("{value:.2}"),
        Some(value) => in_unit(value, of),
    };
    rows.extend(changes.iter().map(|change| {
        let verdict = match change.verdict {
            Verdict::Better => "better",
            Verdict::Worse => "WORSE",
            Verdict::Noise => "noise",
            Verdict::Missing => "not in both",
        };
        let [before, after] = [change.before, change.after].map(|value| figure(value, &change.of));
        vec![change.case.clone(), change.reference.clone(), change.of.clone(), before, after, verdict.to_owned()]
    }));
    format!("suite {suite}\n{}", align(&rows))
}

/// One row, for whoever wants to see it before the suite has ended: its cells with two spaces between.
pub fn suite_row(row: &Row) -> String {
    let cells = cells(row);
    cells.iter().filter(|cell| *cell != "-").map(String::as_str).collect::<Vec<_>>().join("  ")
}

fn cells(row: &Row) -> Vec<String> {
    let figure = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| in_unit(value, &row.unit));
    let meets = match row.meets {
        Some(_) if row.target == Target::None.to_string() => "-".to_owned(),
        Some(true) => "yes".to_owned(),
        Some(false) => "NO".to_owned(),
        None if row.value.is_some() => row.note.clone().unwrap_or_else(|| "?".to_owned()),
        None => format!("not measured: {}", row.note.as_deref().unwrap_or("no reason given")),
    };
    vec![
        row.case.clone(),
        figure(row.value),
        row.reference.clone(),
        figure(row.reference_value),
        row.ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}")),
        row.target.clone(),
        meets,
    ]
}

/// Nanoseconds as people read them: "860 ns", "2.1 us", "13 ms".
pub fn duration(ns: f64) -> String {
    let (figure, unit) = match ns {
        ns if ns < 1e3 => return format!("{ns:.0} ns"),
        ns if ns < 1e6 => (ns / 1e3, "us"),
        ns if ns < 1e9 => (ns / 1e6, "ms"),
        ns => (ns / 1e9, "s"),
    };
    if figure < 10.0 { format!("{figure:.1} {unit}") } else { format!("{figure:.0} {unit}") }
}

fn in_unit(value: f64, unit: &str) -> String {
    match unit {
        "ns" => duration(value),
        "bytes/s" if value < 1e9 => format!("{:.1} MB/s", value / 1e6),
        "bytes/s" => format!("{:.2} GB/s", value / 1e9),
        "iops" => count(value),
        // Enough digits to read, and none that make nothing of something.
        unit if value.fract() != 0.0 && value.abs() >= 0.01 => format!("{value:.2} {unit}"),
        unit => format!("{value} {unit}"),
    }
}

fn count(figure: f64) -> String {
    match figure {
        figure if figure < 1e4 => format!("{figure:.0}"),
        figure if figure < 1e6 => format!("{:.1}k", figure / 1e3),
        figure => format!("{:.2}M", figure / 1e6),
    }
}

/// Columns as wide as their widest cell: the first to the left, the others to the right.
fn align(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<_> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, width))| match column {
            0 => format!("{cell:<width$}"),
            _ => format!("{cell:>width$}"),
        });
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{CaseReport, Machine, Row};

    #[test]
    fn columns_line_up_and_a_missing_row_gives_its_reason() {
        let side = |iops, p50_ns| SideReport { iops, p50_ns, p99_ns: p50_ns * 2 };
        let case = |name: &str| CaseReport {
            name: name.to_owned(),
            native: side(1_234_567.0, 860),
            remote: side(9_999.0, 21_000),
            iops_ratio: 0.955,
            p50_ratio: 1.2,
            iops_ratio_spread: 0.02,
            p50_ratio_spread: 0.04,
        };
        let report = DemoReport {
            fabric: "shm".to_owned(),
            verified: true,
            bytes_verified: 256 << 20,
            cases: vec![case("randread-4k-qd1"), case("read-128k")],
            machine: Machine::here(),
        };
        let text = demo_table(&report);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[2].chars().count(), lines[3].chars().count());
        assert!(lines[2].contains("1.23M") && lines[2].contains("860 ns") && lines[2].contains("21 us"), "{text}");
        assert!(text.contains("256 MiB read back, every byte equal to the file"));
        let rows = vec![Row::missing("a", "ns", "b", Target::AtMost(1.3), "one core only".to_owned())];
        let text = suite_table(&SuiteReport { suite: "shm".to_owned(), rows });
        assert!(text.contains("not measured: one core only"), "{text}");
        let row = Row::measured("mmio-read-4 p50", "ns", 250.0, ("one round trip", 125.0), 2.0, Target::AtMost(2.0));
        assert_eq!(suite_row(&row), "mmio-read-4 p50  250 ns  one round trip  125 ns  2.00  <= 2  yes");
    }

    #[test]
    fn a_ratio_that_is_noise_is_not_printed_and_a_busy_machine_is_named() {
        let side = SideReport { iops: 1000.0, p50_ns: 900, p99_ns: 2000 };
        let case = |iops_ratio_spread, p50_ratio_spread| CaseReport {
            name: "read-128k".to_owned(),
            native: side,
            remote: side,
            iops_ratio: 0.87,
            p50_ratio: 1.93,
            iops_ratio_spread,
            p50_ratio_spread,
        };
        let machine = |load| Machine { cores: 2, load_average: Some(load), ..Machine::here() };
        let report = |case, load| DemoReport {
            fabric: "shm".to_owned(),
            verified: true,
            bytes_verified: 1 << 20,
            cases: vec![case],
            machine: machine(load),
        };
        let quiet = demo_table(&report(case(0.03, 0.15), 1.9));
        assert!(quiet.contains("0.87") && quiet.contains("1.93") && quiet.contains(" 15 %"), "{quiet}");
        assert!(!quiet.contains("too noisy") && !quiet.contains("busy"), "{quiet}");
        let noisy = demo_table(&report(case(0.03, 0.62), 5.26));
        assert!(noisy.contains("0.87") && !noisy.contains("1.93") && noisy.contains(" 62 %"), "{noisy}");
        assert!(noisy.contains("?: too noisy to say") && noisy.contains("a load average of 5.3 on 2 cores"), "{noisy}");
        let unknown = demo_table(&report(case(f64::NAN, 0.1), 0.0));
        assert!(!unknown.contains("0.87") && unknown.contains("too noisy to say"), "{unknown}");
    }

    #[test]
    fn durations_read_well() {
        let texts = [3.2, 999.0, 1500.0, 45_600.0, 7_000_000.0, 2.5e9].map(duration);
        assert_eq!(texts, ["3 ns", "999 ns", "1.5 us", "46 us", "7.0 ms", "2.5 s"]);
    }
}
