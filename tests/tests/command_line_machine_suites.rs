//! `farbus bench migrate` and `farbus bench faults` from end to end, with a few moves and kills only: what is judged by the clock may be missed on a busy machine,
//! what is judged by blocks may not.
//!
//! `farbus bench faults --effort 0.03 --json` kills three lenders, links and borrowers each at random; the rows of blocks say 0 and "meets".

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::time::Duration;

use farbus_tests::Running;
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(180);

fn rows(suite: &str, effort: &str) -> Vec<Value> {
    let mut bench = Running::farbus(&["bench", suite, "--json", "--effort", effort]);
    let report: Value = bench.line("a report", LIMIT, |line| serde_json::from_str(line).ok());
    assert_eq!(bench.wait(LIMIT).code(), Some(0));
    assert_eq!(report["suite"], suite);
    report["rows"].as_array().unwrap().clone()
}

fn row<'a>(rows: &'a [Value], case: &str) -> &'a Value {
    rows.iter().find(|row| row["case"].as_str().unwrap().contains(case)).unwrap_or_else(|| panic!("no row {case}: {rows:#?}"))
}

/// Its figure is there, whether or not it is good.
fn assert_measured(row: &Value) {
    assert!(row["value"].as_f64().is_some_and(|value| value > 0.0), "{row:#}");
}

#[test]
fn a_machine_moves_and_its_downtime_is_the_sum_of_its_parts() {
    let rows = rows("migrate", "0.05");
    for harm in ["lost, duplicated or torn blocks", "lost interrupts"] {
        assert_eq!(row(&rows, harm)["meets"], true, "{:#}", row(&rows, harm));
    }
    assert_measured(row(&rows, "downtime p99"));
    let parts: f64 =
        rows.iter().filter(|row| row["case"].as_str().unwrap().starts_with("- ")).map(|row| row["value"].as_f64().unwrap()).sum();
    let mean = row(&rows, "downtime mean")["value"].as_f64().unwrap();
    assert!((parts - mean).abs() < 0.02 + mean / 100.0, "{parts} and {mean}");
}

#[test]
fn lenders_links_and_borrowers_die_and_no_block_is_lost() {
    let rows = rows("faults", "0.03");
    for harm in ["lender killed: lost", "link cut: lost", "lender, link and borrower killed: lost"] {
        assert_eq!(row(&rows, harm)["meets"], true, "{:#}", row(&rows, harm));
    }
    for measured in ["pause beyond its start p99", "restored to first answer p99", "64 functions"] {
        assert_measured(row(&rows, measured));
    }
    let rdma = row(&rows, "over RDMA");
    assert!(rdma["meets"].is_null() && rdma["note"].as_str().unwrap().starts_with("not run"), "{rdma:#}");
    assert!(row(&rows, "idle CPU")["value"].as_f64().is_some());
}
